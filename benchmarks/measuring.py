"""What the benchmarks share: how they take time and memory, and what they say of the machine."""

import datetime
import gc
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

SLOW_HOST_MS = 0.1  # of `host_ms`


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


class Marks:
    """Points in time of the device, or of a CPU, that are taken without waiting."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._marks: list[Any] = []

    def set(self) -> None:
        if self._device == "cuda":
            self._marks.append(torch.cuda.Event(enable_timing=True))
            self._marks[-1].record()
        else:
            self._marks.append(time.perf_counter())

    def distances_ms(self) -> list[float]:
        """Return the times between successive marks."""
        synchronize(self._device)
        if self._device == "cuda":
            return [a.elapsed_time(b) for a, b in pairwise(self._marks)]
        return [1e3 * (b - a) for a, b in pairwise(self._marks)]


def median_ms(function: Callable[[], Any], device: str, n_warm_up: int = 3, n: int = 15) -> float:
    """Return the median distance between the ends of calls made one after the other."""
    for _ in range(n_warm_up):
        function()
    synchronize(device)
    marks = Marks(device)
    marks.set()
    for _ in range(n):
        function()
        marks.set()
    return statistics.median(marks.distances_ms())


def device_ms(function: Callable[[], Any], n: int = 5) -> float | None:
    """Return how long the device works in a call: the sum of its kernels, copies and fills.

    None where the profiler sees no kernel.
    """
    profile = DeviceProfile()
    for _ in range(n):
        function()
    total = profile.stop_ms()
    return None if total is None else total / n


class DeviceProfile:
    """Adds up how long the device works, from when it is made until `stop_ms`."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
        self.profile.start()

    def stop_ms(self) -> float | None:
        """Return the sum of the kernels, copies and fills, or None where none was seen."""
        torch.cuda.synchronize()
        self.profile.stop()
        us = sum(event.self_device_time_total for event in self.profile.key_averages())
        return us / 1e3 or None


@contextmanager
def peak_memory(device: str) -> Iterator[Callable[[], dict[str, float | None]]]:
    """Yield a function that returns the peaks of the memory allocated and reserved, in GiB.

    What a CUDA graph keeps for its replays is reserved, and allocated while it is recorded.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peaks() -> dict[str, float | None]:
        if device != "cuda":
            return {"peak_gib": None}
        return {
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
            "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        }

    yield peaks


def machine(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} threads of a {platform.machine().replace('_', '-')} CPU"


def kind(device: str) -> str:
    """Return the device's name as results files have it, such as "h200" or "cpu"."""
    return machine(device).split()[1 if device == "cuda" else -1].lower()


def description(device: str, *packages: str) -> dict[str, Any]:
    """Return what a results file says of where and when its figures were measured.

    Args:
        device: "cuda" or "cpu".
        packages: whose versions it says, beside torch's and SAELens's.
    """
    names = ("torch", "sae-lens", *packages, *(("triton",) if device == "cuda" else ()))
    return {
        "machine": machine(device),
        "python": platform.python_version(),
        **{name: version(name) for name in names},
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
        "host_ms": host_ms(device),
    }


def commit() -> str | None:
    """Return the commit that is checked out, with a + where files differ; None without git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--exclude=*", "--dirty=+"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


class NothingComputed(torch.autograd.Function):
    """A loss and gradients without values: what PyTorch itself takes of a loss's time."""

    @staticmethod
    def forward(ctx, *inputs):
        ctx.gradients = [torch.empty_like(tensor) for tensor in inputs]
        return inputs[0].new_empty(())

    @staticmethod
    def backward(ctx, *grad_outputs):
        gradients, ctx.gradients = ctx.gradients, None
        return tuple(gradients)


def host_ms(device: str) -> float:
    """Return what a loss of `NothingComputed` and its backward pass take: the host's time alone.

    Above `SLOW_HOST_MS` the host is slow.
    """
    inputs = [torch.zeros(1, device=device, requires_grad=True) for _ in range(3)]

    def step() -> None:
        for each in inputs:
            each.grad = None
        NothingComputed.apply(*inputs).backward()

    return median_ms(step, "cpu", n_warm_up=50, n=500)


def describe_host(ms: float) -> str:
    kind = "a slow host" if ms > SLOW_HOST_MS else "a quick host"
    return f"{kind}: an autograd function that computes nothing takes {ms:.3f} ms"
