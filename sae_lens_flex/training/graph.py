"""The launches of `reconstruct` as one CUDA graph, for steps so small that they wait for the host.

A recording is replayed only under the conditions in which it was made: equal sizes, dtypes and
settings, and the same weights at the same addresses. It copies the inputs into its own memory
first, so these may change from step to step.
"""

import warnings
from collections.abc import Callable, Hashable
from functools import cache
from typing import NamedTuple

import torch

from ..ops.codes import Code
from .requests import Gradients, Inputs, Spec, WantedGradients, Weights
from .step import Reconstruction, reconstruct

ORDINARY_CALLS = (
    3  # before a recording: in them kernels are compiled and libraries get their memory
)

# Up to these sizes of the dictionary, F * D, and of its product with a batch, launching a step
# takes the host longer than computing it takes an H200; benchmarks/README.md has the times.
MOST_RECORDED_WEIGHTS = 2**25
MOST_RECORDED_PRODUCTS = 2**38


def is_worth_recording(weights: Weights, inputs: Inputs) -> bool:
    """Return whether a step is so small that it waits for the host."""
    n_weights, n_samples = weights.W_dec.numel(), len(inputs.target)
    return (
        weights.W_dec.is_cuda
        and n_weights <= MOST_RECORDED_WEIGHTS
        and n_weights * n_samples <= MOST_RECORDED_PRODUCTS
    )


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    result: Reconstruction


class Recorder:
    """
    Calls `reconstruct`. Once it has been called under the same conditions a few times, records what
    it launches, and from then on replays that in one launch.

    A recording keeps the memory that `reconstruct` allocates. A copy of a recorder, as the copy of
    an SAE has one, has recorded nothing.
    """

    def __init__(self) -> None:
        self._conditions: Hashable = None
        self._calls_to_come = ORDINARY_CALLS
        self._patience = ORDINARY_CALLS
        self._recording: _Recording | None = None

    def __reduce__(self) -> tuple[type["Recorder"], tuple[()]]:
        return Recorder, ()

    @property
    def has_recorded(self) -> bool:
        """Whether the next step under the same conditions is a replay."""
        return self._recording is not None

    def __call__(
        self, weights: Weights, inputs: Inputs, spec: Spec, wanted: WantedGradients
    ) -> Reconstruction:
        """Return what `reconstruct` returns for tensors on a CUDA device.

        The next call may overwrite `residual`, `rows`, `code.values` and `norms` of the result. The
        loss, the gradients, the latents and `hidden_pre` stay.
        """
        conditions = (
            *((w.data_ptr(), w.dtype, w.shape, w.stride()) for w in weights),
            *(None if each is None else (each.dtype, each.shape) for each in inputs),
            inputs.encoder_input is inputs.target,
            spec,
            wanted,
            torch.cuda.current_stream(weights.W_dec.device).cuda_stream,
        )
        if conditions != self._conditions:
            self._conditions, self._recording = conditions, None
            self._calls_to_come = self._patience
        if self._recording is None and self._calls_to_come == 0:
            self._patience *= 2  # Recordings are not worth it where the conditions keep changing.
            self._recording = _record(weights, inputs, spec, wanted)
        self._calls_to_come -= 1
        if self._recording is None:
            # Triton compiles for aligned tensors, as the recording's are. It must do so by then.
            return reconstruct(weights, _map_inputs(_aligned, inputs), spec, wanted)
        _map_inputs(torch.Tensor.copy_, self._recording.inputs, inputs)
        self._recording.graph.replay()
        result = self._recording.result
        return result._replace(
            mse_loss=result.mse_loss.clone(),
            gradients=Gradients(*(g if g is None else g.clone() for g in result.gradients)),
            code=Code(result.code.latents.clone(), result.code.values),
            hidden_pre=result.hidden_pre.clone(),
        )


def _map_inputs(function: Callable[..., torch.Tensor], *inputs: Inputs) -> Inputs:
    """Return the inputs that a function makes of each input, or each pair of them.

    It is called once for a tensor that comes several times.
    """
    made: dict[int, torch.Tensor] = {}
    fields = []
    for tensors in zip(*inputs, strict=True):
        first = tensors[0]
        if first is not None and id(first) not in made:
            made[id(first)] = function(*tensors)
        fields.append(None if first is None else made[id(first)])
    return Inputs(*fields)


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    # All recordings on a device share a stream, because PyTorch keeps a workspace of cuBLAS for
    # every stream that used it. PyTorch's own default for recordings is one stream for all devices.
    return torch.cuda.Stream(device)


def _record(
    weights: Weights, inputs: Inputs, spec: Spec, wanted: WantedGradients
) -> _Recording | None:
    device = weights.W_dec.device
    graph, static = torch.cuda.CUDAGraph(), _map_inputs(torch.empty_like, inputs)
    # cuBLAS would reuse the workspace of an earlier recording. When that recording is freed, a
    # replay of this one would write into freed memory. Cleared, it takes a workspace in the memory
    # of this recording.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with (
            torch.cuda.stream(torch.cuda.current_stream(device)),  # so that it is current again
            torch.cuda.graph(graph, stream=_stream(device), capture_error_mode="thread_local"),
        ):
            result = reconstruct(weights, static, spec, wanted)
        return _Recording(graph, static, result)
    except torch.OutOfMemoryError:
        warnings.warn(
            "too little memory to record training steps as CUDA graphs: they go on without, which "
            "takes the host longer",
            stacklevel=2,
        )
        return None
