"""How a kept launch runs its compiled kernel."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae_lens_flex.ops.kernels import launch
from sae_lens_flex.ops.kernels.scale import scale_in_place


class Compiled:
    """Stands for a kernel that Triton has compiled. It notes how it was launched."""

    function, packed_metadata = "function", "metadata"

    def __init__(self) -> None:
        self.launches: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.launches.append((grid, *arguments))

    def run(self, gridX, gridY, gridZ, stream, function, *args) -> None:  # noqa: N803
        self.launches.append(((gridX, gridY, gridZ), "direct", stream, function, *args))


class OtherwiseCalled(Compiled):
    def run(self, gridX, gridY, gridZ, stream, function, more, *args) -> None:  # noqa: N803
        raise AssertionError


class OnGPU1:
    """Stands for a tensor on the second GPU."""

    def get_device(self) -> int:
        return 1

    def data_ptr(self) -> int:
        return 64


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    runtime = SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    active = SimpleNamespace(get_current_stream=lambda device: 10 + device)
    stand_in = SimpleNamespace(
        knobs=SimpleNamespace(runtime=runtime),
        runtime=SimpleNamespace(driver=SimpleNamespace(active=active)),
    )
    monkeypatch.setattr(launch, "triton", stand_in)
    return runtime


@pytest.mark.parametrize("hook", [None, SimpleNamespace(calls=[])], ids=["None", "empty"])
def test_without_hooks_the_kernel_runs_at_once(hooks, hook) -> None:
    hooks.launch_enter_hook = hooks.launch_exit_hook = hook
    compiled = Compiled()
    launch.launcher(compiled, (3, 2, 1), device=1)(100, 0.5)
    assert compiled.launches == [
        ((3, 2, 1), "direct", 11, "function", "metadata", None, None, None, 100, 0.5)
    ]


@pytest.mark.parametrize("which", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("hook", [print, SimpleNamespace(calls=[print])], ids=["one", "chain"])
def test_hooks_that_come_later_are_told_of_each_launch(hooks, which, hook) -> None:
    compiled = Compiled()
    run = launch.launcher(compiled, (3, 2, 1), device=0)
    setattr(hooks, which, hook)
    run(100)
    assert compiled.launches == [((3, 2, 1), 100)]


def test_a_triton_that_is_called_otherwise_launches_itself(hooks) -> None:
    compiled = OtherwiseCalled()
    launch.launcher(compiled, (3, 2, 1), device=0)(100)
    assert compiled.launches == [((3, 2, 1), 100)]


def test_a_launch_is_kept_with_its_grid_and_device(hooks, monkeypatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    compiled = Compiled()
    kernel = {(3, 2): lambda *arguments, **constants: compiled}
    kept = launch.Launch(kernel, (3, 2), (7,), BLOCK=16, num_warps=1)
    kept([OnGPU1(), None], (1,))  # pyright: ignore[reportArgumentType]
    assert compiled.launches == []  # Triton has launched it as it compiled it.
    kept([OnGPU1(), None], (1,))  # pyright: ignore[reportArgumentType]
    direct = ((3, 2, 1), "direct", 11, "function", "metadata", None, None, None)
    assert compiled.launches == [(*direct, 64, None, 1.0, 7, 16)]


@pytest.mark.skipif(not launch.IS_INSTALLED, reason="there is no Triton for this system")
def test_the_installed_triton_takes_the_known_arguments() -> None:
    from triton.backends.nvidia.driver import CudaLauncher

    launcher = object.__new__(CudaLauncher)
    assert launch._takes_known_arguments(launcher.__call__)


@pytest.mark.gpu
def test_hooks_of_a_profiler_on_a_gpu(monkeypatch) -> None:
    from triton import knobs
    from triton.compiler import CompiledKernel

    described: list[str] = []
    describe = CompiledKernel.launch_metadata
    monkeypatch.setattr(
        CompiledKernel,
        "launch_metadata",
        lambda self, *arguments: described.append(self.name) or describe(self, *arguments),
    )
    gradient, factor = torch.ones(5, device="cuda"), torch.full((), 2.0, device="cuda")
    scale_in_place([gradient], factor)
    n_before = len(described)
    scale_in_place([gradient], factor)
    assert len(described) == n_before  # Nobody asks for a description.
    entered: list[Any] = []
    chain = knobs.runtime.launch_enter_hook
    chain.add(entered.append)
    try:
        scale_in_place([gradient], factor)
    finally:
        chain.remove(entered.append)
    assert len(entered) == 1
    assert gradient.tolist() == [8.0] * 5
