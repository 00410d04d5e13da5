"""What a function of tensors launches, as one CUDA graph.

A step of a small SAE waits for the host, which launches it piece by piece. A recording takes one
launch. Two kinds of steps are recorded: a reconstruction with its gradients, here, and the
trainer's whole step, in `acceleration`. A recording is replayed only under the conditions in which
it was made: equal sizes, dtypes and settings, and all that it reads or changes at the same
addresses. The inputs are copied into its own memory first, so they may change from step to step.
"""

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple, TypeVar

import torch

from ..ops.codes import Code
from .requests import Gradients, Inputs, Spec, WantedGradients, Weights
from .shards import Whole
from .step import Reconstruct, Reconstruction, reconstruct

ORDINARY_CALLS = (
    3  # before a recording: in them kernels are compiled and libraries get their memory
)
MOST_FORMS = 2  # that a recorder holds; each keeps memory

# Up to these sizes of the dictionary, F * D, and of its product with a batch, the host takes longer
# to launch a step than an H200 to compute it; benchmarks/README.md has the times.
MOST_RECORDED_WEIGHTS = 2**25
MOST_RECORDED_PRODUCTS = 2**38
# Whole steps are recorded up to so many times these sizes, because no gradient has to be copied out
# of such a recording. benchmarks/README.md has what it saves at 2^27 weights.
WHOLE_FACTOR = 16

Result = TypeVar("Result")


def is_worth_recording(
    weights: Weights, inputs: Inputs, shards: Whole, *, is_whole: bool = False
) -> bool:
    """Return whether a step is so small that it waits for the host. All processes agree on it.

    Args:
        weights, inputs: of the step.
        shards: of which process they are. Each computes a part of the step, but launches all of it.
        is_whole: whether the step also changes the weights.
    """
    n_latents, d_in = len(weights.W_dec), inputs.target.shape[-1]
    n_weights, n_samples = n_latents * d_in, shards.n_samples(len(inputs.target))
    factor = shards.size * (WHOLE_FACTOR if is_whole else 1)
    return (
        weights.W_dec.is_cuda
        and n_weights <= factor * MOST_RECORDED_WEIGHTS
        and n_weights * n_samples <= factor * MOST_RECORDED_PRODUCTS
    )


def place(tensor: torch.Tensor) -> Hashable:
    """Return where a tensor lies, and how: the condition under which a recording may use it."""
    return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


class _Recording(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Inputs
    result: Any


class Recorder:
    """
    Calls a function of tensors. Once it has been called under the same conditions a few times,
    records what it launches, and from then on replays that in one launch.

    A recording keeps the memory that the function allocates. Under the same conditions a function
    may have several forms, each with a recording of its own; the two used last are kept. A copy of
    a recorder, as the copy of an SAE has one, has recorded nothing.
    """

    def __init__(self) -> None:
        self._conditions: Hashable = None
        self._patience = ORDINARY_CALLS
        # Of each form the recording, or the number of calls to come before it; the last used last.
        self._forms: dict[Hashable, _Recording | int] = {}

    def __reduce__(self) -> tuple[type["Recorder"], tuple[()]]:
        return Recorder, ()

    def forget(self) -> None:
        """Free what has been recorded."""
        self.__init__()

    @property
    def recordings(self) -> list[_Recording]:
        """What has been recorded under the conditions of the last call."""
        return [each for each in self._forms.values() if not isinstance(each, int)]

    def __call__(
        self,
        function: Callable[[Inputs], Result],
        inputs: Inputs,
        conditions: Hashable,
        form: Hashable = None,
    ) -> tuple[Result, bool]:
        """Return what the function returns, and whether the next call may overwrite that.

        Args:
            function: it waits for nothing and asks nothing of the device. Whatever it reads beside
                its argument stays where it is under the same conditions.
            inputs: its argument, on a CUDA device. It gets other tensors of the same values.
            conditions: all else that what it launches depends on.
            form: which of several functions it is.
        """
        device = inputs.target.device
        conditions = (
            conditions,
            *(None if each is None else (each.dtype, each.shape) for each in inputs),
            inputs.encoder_input is inputs.target,
            torch.cuda.current_stream(device).cuda_stream,
        )
        if conditions != self._conditions:
            if self.recordings:  # which are not worth it where the conditions keep changing
                self._patience *= 2
            self._conditions, self._forms = conditions, {}
        recording = self._forms.pop(form, self._patience)
        while len(self._forms) >= MOST_FORMS:
            del self._forms[next(iter(self._forms))]
        if recording == 0:
            pool = next((each.graph.pool() for each in self.recordings), None)
            recording = _record(function, inputs, pool) or -1
        if isinstance(recording, int):
            self._forms[form] = recording - 1
            # Triton compiles for aligned tensors, as the recording's are. It must do so by then.
            return function(_map_inputs(_aligned, inputs)), False
        self._forms[form] = recording
        _map_inputs(torch.Tensor.copy_, recording.inputs, inputs)
        recording.graph.replay()
        return recording.result, True


def reconstruct_by(recorder: Recorder) -> Reconstruct:
    """Return `reconstruct` for tensors on a CUDA device, replayed once it has been recorded.

    The next call may overwrite `residual`, `rows`, `code.values` and `norms` of the result. The
    losses, the gradients, the latents with their `starts` and `hidden_pre` stay.
    """

    def by(weights: Weights, inputs: Inputs, spec: Spec, wanted: WantedGradients) -> Reconstruction:
        result, is_replay = recorder(
            lambda inputs: reconstruct(weights, inputs, spec, wanted),
            inputs,
            (reconstruct, *map(place, weights), spec, wanted),
        )
        if not is_replay:
            return result
        code = result.code
        return result._replace(
            mse_loss=result.mse_loss.clone(),
            gradients=Gradients(*map(_cloned, result.gradients)),
            code=Code(code.latents.clone(), code.values, _cloned(code.starts)),
            hidden_pre=result.hidden_pre.clone(),
            width_losses=_cloned(result.width_losses),
        )

    return by


def _cloned(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


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


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    # An SAE that nobody holds any more is garbage with cycles. To free its recordings while this
    # thread records is an error.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _record(function: Callable[[Inputs], Any], inputs: Inputs, pool: Any) -> _Recording | None:
    """Record a function; None where that fails, as where memory does not suffice.

    Args:
        function: of the inputs.
        inputs: like those of later calls.
        pool: the memory of another recording, which this one may use too, since one is replayed
            after the other; None for memory of its own.
    """
    device = inputs.target.device
    graph, static = torch.cuda.CUDAGraph(), _map_inputs(torch.empty_like, inputs)
    # cuBLAS would reuse the workspace of an earlier recording. When that recording is freed, a
    # replay of this one would write into freed memory. Cleared, it takes a workspace in the memory
    # of this recording.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with (
            _without_garbage_collection(),
            torch.cuda.stream(torch.cuda.current_stream(device)),  # so that it is current again
            torch.cuda.graph(
                graph, pool=pool, stream=_stream(device), capture_error_mode="thread_local"
            ),
        ):
            result = function(static)
        return _Recording(graph, static, result)
    except RuntimeError as error:  # The step itself has worked without being recorded.
        if device.type == "cuda":
            # Where CUDA breaks a recording off, PyTorch's generator is left as while recording: it
            # would refuse to draw. A copy of its state is not.
            generator = torch.cuda.default_generators[device.index]
            generator.graphsafe_set_state(generator.clone_state())
        is_full = isinstance(error, torch.OutOfMemoryError)
        reason = "too little memory" if is_full else str(error).splitlines()[0]
        warnings.warn(
            f"training steps are not recorded as CUDA graphs: {reason}. They go on without, which "
            "takes the host longer",
            stacklevel=2,
        )
        return None
