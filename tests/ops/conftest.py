from collections.abc import Iterator

import pytest
import torch

from sae_lens_flex.ops import by_triton

from .comparison import LOSSES, Implementation, implementation_named


@pytest.fixture(autouse=True)
def _plans_are_made_with_this_tests_settings() -> Iterator[None]:
    def forget() -> None:
        for plans in (by_triton._plan_walk, by_triton._plan_slices, by_triton._plan_finish):
            plans.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture(
    params=[
        pytest.param((name, device), id=f"{name}-{device}", marks=marks)
        for name in LOSSES
        for device, marks in (("cpu", ()), ("cuda", pytest.mark.gpu))
    ]
)
def implementation(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Implementation:
    name, device = request.param
    if name.startswith("triton") and device == "cpu" and torch.cuda.is_available():
        pytest.skip("the kernels are compiled where there is a CUDA device")
    return implementation_named(name, device, monkeypatch)
