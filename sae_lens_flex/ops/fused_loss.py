"""What the fused losses share: the PyTorch operator and its autograd.

A fused loss returns a scalar, so its forward pass can produce every gradient up to the factor that
arrives in backward. With r_j the residual of level j, c_j its weight and

    L = factor / (B D) * sum_b sum_j c_j |r_j|^2,      g_j = 2 factor / (B D) * c_j r_j,
    S_t = sum_{j >= t} g_j,

the gradients are

    dL/dweight[f] = sum over the pairs (b, t) that chose f of vals[b, t] S_t,
    dL/dvals[b, t] = weight[indices[b, t]] . S_t,      dL/dtarget[b] = -S_1.

where a bias, if there is one, is part of every reconstruction: dL/dbias = sum_b S_1[b].
"""

import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

from . import _triton
from ._triton import cdiv, tl, triton
from .checks import check_range
from .inverted_index import InvertedIndex

BACKENDS = ("auto", "triton", "torch")

CHECKS_INDICES = os.environ.get("SAE_LENS_FLEX_CHECK_INDICES") == "1"
"""Whether the Triton kernels, too, raise for a latent outside [0, F), at the cost of waiting for
the device at every call."""


class Wanted(NamedTuple):
    """Which of a fused loss's outputs to compute."""

    residual: bool = False
    grad_weight: bool = False
    grad_vals: bool = False
    grad_bias: bool = False
    grad_target: bool = False


class Outputs(NamedTuple):
    """What a fused loss computes; None for what is not wanted.

    Attributes:
        loss: scalar, float32 (float64 for float64 inputs).
        residual: reconstruction minus target at level K, [B, D], in the loss's dtype.
        grad_weight: [F, D], grad_vals: [B, K], grad_bias: [D], grad_target: [B, D]: the gradients
            of `loss`, each in the `gradient_dtype` of its input.
    """

    loss: torch.Tensor
    residual: torch.Tensor | None = None
    grad_weight: torch.Tensor | None = None
    grad_vals: torch.Tensor | None = None
    grad_bias: torch.Tensor | None = None
    grad_target: torch.Tensor | None = None


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which the gradient of an input is kept until the backward pass.

    float32 for float16, whose range is narrow: the factor of a gradient scaler comes only then. In
    the input's dtype it is by autograd.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def kept(gradient: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    """Return the gradient of an input in its `gradient_dtype`."""
    dtype = gradient_dtype(of.dtype)
    return gradient if gradient.dtype == dtype else gradient.to(dtype)  # sooner than `to` alone


Launcher = Callable[
    [
        torch.Tensor,  # indices
        torch.Tensor,  # weight
        torch.Tensor,  # vals
        torch.Tensor | None,  # bias
        torch.Tensor,  # target
        torch.Tensor | None,  # level_weights
        torch.Tensor,  # read: what is read of the weight, itself or a copy in a lower precision
        InvertedIndex | None,  # of the indices, where it is at hand
        float,  # factor
        Wanted,
    ],
    Outputs,
]

# "sae_lens_flex", or the name by which the package `kernels` imports a copy of `ops`: each copy has
# operators of its own, for it may be of another version.
NAMESPACE = __name__.removesuffix(".fused_loss").removesuffix(".ops").replace(".", "_")
# Kept when this module is reloaded: the operators would go with the library.
_library = globals().get("_library") or torch.library.Library(NAMESPACE, "FRAGMENT")
_operators = getattr(torch.ops, NAMESPACE)


@triton.jit
def _scale_part(gradient, scale, n_elements, BLOCK: tl.constexpr):
    stride = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, n_elements, stride):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < n_elements
        scaled = tl.load(gradient + offsets, mask=mask).to(tl.float32) * scale
        tl.store(gradient + offsets, scaled.to(gradient.dtype.element_ty), mask=mask)


@triton.jit
def _scale_kernel(factor, a, b, c, d, n_a, n_b, n_c, n_d, BLOCK: tl.constexpr):
    scale = tl.load(factor)
    if scale != 1.0:
        _scale_part(a, scale, n_a, BLOCK)
        _scale_part(b, scale, n_b, BLOCK)
        _scale_part(c, scale, n_c, BLOCK)
        _scale_part(d, scale, n_d, BLOCK)


def _scale_by_triton(gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
    # Reads the factor on the device, so nothing waits for it, and touches no gradient where it is
    # 1, as it almost always is. Four at a time, as many as a loss has.
    block = 8192
    for start in range(0, len(gradients), 4):
        some = gradients[start : start + 4]
        sizes = [gradient.numel() for gradient in some]
        n_absent = 4 - len(some)
        _triton.launch(
            _scale_kernel,
            (min(1024, cdiv(max(sizes), block)),),
            (factor, *some, *(factor,) * n_absent),
            (),
            (*sizes, *(0,) * n_absent),
            BLOCK=block,
            num_warps=8,
        )


def _scale(gradients: list[torch.Tensor], factor: torch.Tensor) -> None:
    if _triton.is_available(factor.device):
        _scale_by_triton(gradients, factor)
    elif factor.device.type != "cpu" or factor.item() != 1:
        for gradient in gradients:
            gradient.mul_(factor)


def scaled(
    gradients: Sequence[torch.Tensor], factor: torch.Tensor | None
) -> list[torch.Tensor | None]:
    """Multiply what an operator keeps of its gradients; None for those without an element.

    A factor of None is autograd's for a loss on which nothing depends.
    """
    if factor is None:
        return [None] * len(gradients)
    computed = [gradient if gradient.numel() else None for gradient in gradients]
    if type(factor) is not torch.Tensor:  # being traced: memory is the compiler's affair
        return [None if gradient is None else gradient * factor for gradient in computed]
    # In place, without a second gradient in memory. Autograd, which does not see what a kernel
    # writes, is told: another backward pass through the same graph then raises.
    if some := [gradient for gradient in computed if gradient is not None]:
        _scale(some, factor)
        torch.autograd.graph.increment_version(some)
    return computed


def check_is_first_derivative(name: str) -> None:
    """Raise where a backward pass is asked for a graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} has no second derivative: its backward pass was asked for a graph "
            "(create_graph=True). The definitions hierarchical_sae_loss and topk_sae_loss have one."
        )


class _Given(torch.autograd.Function):
    """A loss whose gradients come with it. No operator, whose dispatch takes as long as a loss."""

    @staticmethod
    def forward(ctx, name, compute, *inputs):
        loss, residual, *ctx.gradients = compute()
        if residual is not None:
            ctx.mark_non_differentiable(residual)
        ctx.set_materialize_grads(False)  # which would be zeros of the size of weight
        ctx.name = name
        return loss, residual

    @staticmethod
    def backward(ctx, *grad_outputs):
        check_is_first_derivative(ctx.name)
        if ctx.gradients is None:
            raise RuntimeError(
                f"{ctx.name} has been differentiated already, and its gradients were given away: "
                "compute the loss once more, or ask for all gradients at once"
            )
        if grad_outputs[0] is None:  # nothing depends on the loss
            return None, None, *(None for _ in ctx.gradients)
        gradients, ctx.gradients = ctx.gradients, None
        some = [gradient for gradient in gradients if gradient is not None]
        if some:
            _scale(some, grad_outputs[0])
        return None, None, *gradients


def with_gradients(
    name: str,
    compute: Callable[[], Iterable[torch.Tensor | None]],
    inputs: Sequence[torch.Tensor | None],
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a loss that hands its gradients to `inputs` in its backward pass, and a residual.

    That pass scales them in place: nothing else may hold them.

    Args:
        name: of the loss, in errors.
        compute: returns the loss, a scalar, the residual or None, and a gradient of each input or
            None. It is called without autograd.
        inputs: tensors, or None.
    """
    return _Given.apply(name, compute, *inputs)  # pyright: ignore[reportReturnType]


_computations: dict[str, Callable[..., Outputs]] = globals().get("_computations") or {}


def define_loss_operator(name: str, *, triton: Launcher, torch_: Launcher) -> None:
    """Define a fused loss, and the operator `torch.ops.<NAMESPACE>.<name>`.

    An operator, so that torch.compile keeps it whole. Of what is not wanted it returns a tensor
    without an element.

    Args:
        name: the operator's name.
        triton: computes it by Triton kernels.
        torch_: computes it by PyTorch alone.
    """

    def compute(
        indices: torch.Tensor,
        weight: torch.Tensor,
        vals: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        level_weights: torch.Tensor | None,
        low_weight: torch.Tensor | None,
        index: Sequence[torch.Tensor] | None,
        factor: float,
        use_triton: bool,
        wanted: Sequence[bool],
    ) -> Outputs:
        arguments = (
            *(indices, weight, vals, bias, target),
            *(level_weights, weight if low_weight is None else low_weight),
            *(None if index is None else InvertedIndex(*index), factor, Wanted(*wanted)),
        )
        if not use_triton:
            with no_autocast(weight.device):
                return torch_(*arguments)
        if CHECKS_INDICES:
            check_range(indices, weight.shape[0])
        return triton(*arguments)

    def operate(*arguments: Any) -> tuple[torch.Tensor, ...]:
        outputs = []
        for output in compute(*arguments):
            if output is None:
                output = arguments[0].new_empty(0, dtype=outputs[0].dtype)
            elif output.storage_offset():  # part of what other outputs are part of
                output = output.clone()
            outputs.append(output)
        return tuple(outputs)

    def shapes_only(
        indices: torch.Tensor,
        weight: torch.Tensor,
        vals: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        *others: Any,
    ) -> tuple[torch.Tensor, ...]:
        wanted = Wanted(*others[-1])
        dtype = accumulation_dtype(weight, vals, target)
        outputs = [target.new_empty(target.shape if wanted.residual else 0, dtype=dtype)]
        for tensor, is_wanted in zip((weight, vals, bias, target), wanted[1:], strict=True):
            if tensor is not None and is_wanted:
                outputs.append(target.new_empty(tensor.shape, dtype=gradient_dtype(tensor.dtype)))
            else:
                outputs.append(target.new_empty(0, dtype=dtype))
        return target.new_empty((), dtype=dtype), *outputs

    def keep_gradients(ctx, inputs, output) -> None:
        index = inputs[7]
        ctx.grad_index = None if index is None else [None] * len(index)
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[2:])

    def backward(ctx, *gradients):
        check_is_first_derivative(name)
        gradients = scaled(ctx.saved_tensors, gradients[0])
        return None, *gradients, None, None, ctx.grad_index, None, None, None

    _computations[name] = compute
    if hasattr(_operators, name):
        return  # the module is imported a second time
    _library.define(
        f"{name}(Tensor indices, Tensor weight, Tensor vals, Tensor? bias, Tensor target, "
        "Tensor? level_weights, Tensor? low_weight, Tensor[]? index, float factor, "
        "bool use_triton, bool[] wanted) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    _library.impl(name, operate, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", shapes_only)
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=keep_gradients)


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context without autocast: none where it is off, for entering one takes time."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def accumulation_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return float64 where an input is float64, else float32."""
    is_double = torch.float64 in [tensor.dtype for tensor in tensors]
    return torch.float64 if is_double else torch.float32


def uses_triton(backend: str, device: torch.device) -> bool:
    """Resolve a backend's name for tensors on `device`.

    Raises:
        ValueError: for an unknown name.
        RuntimeError: for "triton" where its kernels cannot run; the message says why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    if backend == "auto":
        return _triton.is_available(device)
    if backend == "triton" and (reason := _triton.why_unavailable(device)) is not None:
        raise RuntimeError(
            f"the Triton kernels cannot run here: {reason}. backend='auto' in an SAE's config, and "
            "the functions without the prefix triton_, do without them"
        )
    return backend == "triton"


def computes_by_triton(backend: str, *tensors: torch.Tensor) -> bool:
    """Resolve a backend's name for these tensors; errors as in `uses_triton`."""
    if backend == "auto" and accumulation_dtype(*tensors) == torch.float64:
        return False  # the kernels accumulate in float32
    return uses_triton(backend, tensors[0].device)


_UNTRACED_TYPES = frozenset((torch.Tensor, torch.nn.Parameter, type(None)))


def is_traced(*tensors: torch.Tensor | None) -> bool:
    """Return whether the tensors stand for others, as in torch.compile: operators are for these."""
    return torch.compiler.is_compiling() or not _UNTRACED_TYPES.issuperset(map(type, tensors))


def fused_loss(
    name: str,
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    level_weights: torch.Tensor | None = None,
    low_weight: torch.Tensor | None = None,
    index: InvertedIndex | None = None,
    factor: float = 1.0,
    backend: str = "auto",
    needs_residual: bool = False,
) -> tuple[torch.Tensor, Any]:
    """Call a fused loss; gradients are computed for the inputs that ask for them.

    Args:
        name: an operator defined by `define_loss_operator`.
        indices, weight, vals, bias, target: as in `reference.hierarchical_sae_loss`; None for no
            bias.
        level_weights: [K] or None, as there.
        low_weight: a copy of `weight` in a lower precision, [F, D], which is read in its place:
            reading is most of what a loss does.
        index: the inverted index of `indices`, if it is at hand.
        factor: multiplies the loss. Given here rather than by the caller afterwards, it costs
            nothing in backward.
        backend: "auto", "triton" or "torch".
        needs_residual: whether to return the residual.

    Returns:
        The loss (scalar) and, detached, the residual of level K ([B, D]), or None where it is not
        needed.
    """
    use_triton = computes_by_triton(backend, weight, vals, target)
    tensors = (weight, vals, bias, target)
    wanted = [needs_residual]
    if torch.is_grad_enabled():
        wanted += [tensor is not None and tensor.requires_grad for tensor in tensors]
    else:
        wanted += [False] * 4
    others = level_weights, low_weight, index, factor, use_triton, wanted
    if is_traced(indices, *tensors):
        loss, residual, *_ = getattr(_operators, name)(indices, *tensors, *others)
        return loss, residual if needs_residual else None
    compute = _computations[name]
    return with_gradients(name, lambda: compute(indices, *tensors, *others), tensors)
