"""A function's launches as one CUDA graph, for steps so small that they wait for the host."""

import warnings
from collections.abc import Callable, Hashable
from functools import cache
from typing import Any, NamedTuple

import torch

ORDINARY_CALLS = 3  # in which kernels are compiled and libraries take their workspaces


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    x: torch.Tensor
    result: Any


class StepGraph:
    """
    Calls a function of one tensor, and once it has been called under the same conditions a few
    times, records what it launches and replays that, in one launch.

    A recording keeps what the function allocates. A copy of it, as an SAE's copy has one, has
    recorded nothing.
    """

    def __init__(self) -> None:
        self._conditions: Hashable = None
        self._calls_to_come = ORDINARY_CALLS
        self._patience = ORDINARY_CALLS
        self._recording: _Recording | None = None

    def __reduce__(self) -> Any:
        return StepGraph, ()

    def __call__(
        self, function: Callable[[torch.Tensor], Any], x: torch.Tensor, *on: Hashable
    ) -> Any:
        """Return function(x), by a replay where it has been recorded.

        Args:
            function: launches kernels on the current stream, waits for none and returns tensors,
                in whatever containers.
            x: on a CUDA device, contiguous.
            on: all else that the result depends on, but for the contents of memory.

        Returns:
            What `function` returned; the next call may overwrite its tensors.
        """
        conditions = (x.shape, x.dtype, torch.cuda.current_stream(x.device).cuda_stream, *on)
        if conditions != self._conditions:
            self._conditions, self._recording = conditions, None
            self._calls_to_come = self._patience
        if self._recording is None and self._calls_to_come == 0:
            self._patience *= 2  # where conditions change all the time, it is not worth it
            self._recording = _record(function, x)
        self._calls_to_come -= 1
        if self._recording is None:
            # Aligned, as what is recorded: kernels are compiled for it, and must be by then.
            return function(x if x.data_ptr() % 16 == 0 else x.clone())
        self._recording.x.copy_(x)
        self._recording.graph.replay()
        return self._recording.result


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # For all recordings on a device, for PyTorch keeps a workspace of cuBLAS for every stream that
    # used it. Its own default is one for all devices.
    return torch.cuda.Stream(device)


def _record(function: Callable[[torch.Tensor], Any], x: torch.Tensor) -> _Recording | None:
    graph, static = torch.cuda.CUDAGraph(), torch.empty_like(x)
    # So that the recording gets a workspace in its own memory. That of an earlier recording may be
    # freed with it, and would be written to by the replays.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with (
            torch.cuda.stream(torch.cuda.current_stream(x.device)),  # to come back to it
            torch.cuda.graph(graph, stream=_stream(x.device), capture_error_mode="thread_local"),
        ):
            return _Recording(graph, static, function(static))
    except torch.OutOfMemoryError:
        warnings.warn(
            "too little memory to record training steps as CUDA graphs: they go on without, which "
            "takes the host longer",
            stacklevel=2,
        )
        return None
