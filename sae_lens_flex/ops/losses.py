"""The decoder losses: with all their gradients, for autograd, and as PyTorch operators.

Whether Triton or PyTorch computes a loss is decided in `decoder_loss`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from . import by_torch, by_triton
from .autograd import (
    attach,
    check_has_no_tangent,
    check_is_first_derivative,
    scale_in_place,
)
from .checks import check_arguments, check_starts
from .codes import Code
from .policy import (
    CHECKS_INDICES,
    accumulation_dtype,
    computes_by_triton,
    gradient_dtype,
    is_deterministic,
    is_traced,
)
from .products import gather
from .requests import DecoderLoss, Levels, LossAndGradients, Times, UnfinishedLoss, Wanted

# "sae_lens_flex", or the name by which the package `kernels` imports a copy of `ops`. Each copy has
# an operator of its own, because it may be of another version.
NAMESPACE = __name__.removesuffix(".losses").removesuffix(".ops").replace(".", "_")


def decoder_loss(request: DecoderLoss, *, use_triton: bool) -> LossAndGradients:
    """Compute a loss and the gradients that are wanted, without autograd.

    Raises:
        IndexError: for a latent outside [0, F), which the kernels ignore unless
            SAE_LENS_FLEX_CHECK_INDICES is 1.
    """
    return (by_triton if use_triton else by_torch).decoder_loss(request)


def unfinished_decoder_loss(request: DecoderLoss, *, use_triton: bool) -> UnfinishedLoss:
    """Compute what `decoder_loss` does, for gradients that are still to be multiplied."""
    unfinished = by_triton.unfinished_decoder_loss(request) if use_triton else None
    if unfinished is not None:
        return unfinished
    result = decoder_loss(request, use_triton=use_triton)
    gradients = result.gradients  # Not the result with the loss, whose node holds `times`.

    def times(factor: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale_in_place(gradients, factor)
        return gradients

    return UnfinishedLoss(result.loss, times)


def prefix_residuals(
    code: Code,
    weight: torch.Tensor,
    target: torch.Tensor,
    budgets: Sequence[int],
    *,
    use_triton: bool,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each budget j with sum_{i <= j} values[b, i] * weight[latents[b, i]] - target[b].

    Each residual starts from the one before, so every latent is added once.

    Args:
        code: latents and decode coefficients, [B, K] each, in the order of the levels.
        weight: [F, D].
        target: [B, D].
        budgets: ascending, within 1..K.
        use_triton: whether the kernels compute them.

    Yields:
        The budget and its residual, [B, D], float32 (float64 for float64 inputs).
    """
    start = 0
    for budget in budgets:
        levels = slice(start, budget)
        part = Code(code.latents[:, levels], code.values[:, levels])
        residual = gather(part, weight, use_triton=use_triton, target=target)
        yield budget, residual
        target, start = -residual, budget


def differentiable_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    levels: Levels,
    scale: float | None = None,
    backend: str = "auto",
    name: str = "the decoder loss",
    repeats: bool = False,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return a decoder loss that autograd can differentiate once.

    Args:
        indices, weight, vals, bias, target: as in `reference.hierarchical_sae_loss`; None for no
            bias.
        levels: the level weights, not differentiated.
        scale: multiplies the sum over samples and D; None for the mean, 1 / (B D).
        backend: "auto", "triton" or "torch".
        name: of the function that the user called, for errors.
        repeats: whether a second backward pass computes the gradients again. Without, it raises,
            and autograd keeps no input for it.
        starts: for rows of different length (see `codes.Code`); the levels are then "last", or
            weights of each sample.

    Returns:
        A scalar, differentiable in weight, vals, bias and target.
    """
    use_triton = computes_by_triton(backend, weight, vals, target)
    scale = 1 / target.numel() if scale is None else scale
    inputs = (weight, vals, bias, target)
    if isinstance(levels, torch.Tensor):
        levels = levels.detach()
    is_enabled = torch.is_grad_enabled()
    flags = [is_enabled and t is not None and t.requires_grad for t in inputs]
    if is_traced(indices, *inputs):
        level_weights = None if isinstance(levels, str) else levels
        is_last = isinstance(levels, str) and levels == "last"
        arguments = (*inputs, level_weights, starts, is_last, scale, use_triton, flags)
        return getattr(torch.ops, NAMESPACE).decoder_loss(indices, *arguments)[0]
    check_has_no_tangent(name, *inputs)
    wanted = _wanted(inputs, flags)

    def request(
        weight: torch.Tensor,
        vals: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
    ) -> DecoderLoss:
        return DecoderLoss(
            code=Code(indices, vals, starts),
            weight=weight,
            bias=bias,
            target=target,
            levels=levels,
            scale=scale,
            wanted=wanted,
            deterministic=is_deterministic(),
        )

    if not any(flags):
        return decoder_loss(request(*inputs), use_triton=use_triton).loss
    held: list[Times] = []

    def compute_and_hold() -> tuple[torch.Tensor, ...]:
        unfinished = unfinished_decoder_loss(request(*inputs), use_triton=use_triton)
        held.append(unfinished.gradients)
        return (unfinished.loss,)

    def give(grad_outputs: Sequence[torch.Tensor | None], saved: Any) -> Sequence[Any]:
        (factor,) = grad_outputs
        if factor is None:  # Nothing depends on the loss.
            return (None,) * 4
        if held:
            gradients = held.pop()
        elif repeats:
            again = unfinished_decoder_loss(request(*saved()), use_triton=use_triton)
            gradients = again.gradients
        else:
            raise RuntimeError(
                f"{name} has been differentiated already, and its gradients were given away: "
                "compute the loss once more, or ask for all gradients at once"
            )
        return gradients(factor)

    return attach(name, compute_and_hold, inputs, give, saves=repeats)[0]


def _wanted(tensors: Sequence[torch.Tensor | None], flags: Sequence[bool]) -> Wanted:
    """Return what is wanted where the gradients with a flag are."""
    return Wanted(
        False,
        *[
            gradient_dtype(tensor.dtype) if is_wanted and tensor is not None else None
            for tensor, is_wanted in zip(tensors, flags, strict=True)
        ],
    )


def triton_hierarchical_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    *,
    level_weights: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the squared error of every level, averaged over B, K and D, by fused kernels.

    The same function as `hierarchical_sae_loss`, whose docstring has the formula and the arguments,
    without its [B, K, D] tensor. It accumulates in float32 whatever the inputs' dtypes. It gets the
    residual of a level by subtracting, from the residual of the last level, what the levels in
    between add. Where these add a thousand times as much as the level itself, three of its digits
    are lost. With `torch.use_deterministic_algorithms(True)` its results are the same from run to
    run.

    Args:
        indices: [B, K] (with `starts` [n]), int32 or int64. A latent outside [0, F) is ignored;
            with the environment variable SAE_LENS_FLEX_CHECK_INDICES=1, set before the import, it
            is an IndexError.
        weight: [F, D], vals: as indices, bias: [D], target: [B, D]: float32, bfloat16 or float16.
        level_weights: [K], or those of each sample from level 0 on, [B, K + 1] (with `starts`
            [n + B]); not differentiated. None weighs each level 1 / K.
        starts: [B + 1], int32 or int64, for rows of different length. Whether it ascends from 0 to
            at most n is only checked on a CPU and with SAE_LENS_FLEX_CHECK_INDICES=1: other numbers
            make the kernels read beyond the arguments.

    Returns:
        The loss, a float32 scalar, differentiable in weight, vals, bias and target by one backward
        pass, which gives away what the forward pass has computed of the gradients.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or device.
        RuntimeError: where Triton or its device is missing, for a second backward pass through the
            same graph, and for a second derivative.
        NotImplementedError: for forward-mode differentiation.
    """
    check_arguments(indices, weight, vals, bias, target, level_weights, starts)
    if starts is not None:
        indices, vals, starts = _checked(indices, vals, starts)
        if level_weights is None:
            level_weights = _equal_weights(starts, indices)
    return differentiable_loss(
        *(indices, weight, vals, bias, target),
        levels="every" if level_weights is None else level_weights,
        backend="triton",
        name="triton_hierarchical_sae_loss",
        starts=starts,
    )


def _checked(
    indices: torch.Tensor, vals: torch.Tensor, starts: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return latents, values and starts as a `Code` has them: 0 of pairs that belong to no sample.

    Where that waits for nothing, check the starts.
    """
    if not is_traced(starts) and (CHECKS_INDICES or not starts.is_cuda):
        check_starts(starts, len(indices))
    starts = starts.long().contiguous()
    is_spare = torch.arange(len(indices), device=indices.device) >= starts[-1]
    return indices.masked_fill(is_spare, 0), vals.masked_fill(is_spare, 0), starts


def _equal_weights(starts: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return weights of each sample's levels, [n + B]: equal, in an empty row 1 for level 0."""
    code = Code(indices, indices, starts)
    lengths, pairs = starts.diff(), torch.arange(len(indices), device=starts.device)
    samples = code.samples()
    weights = torch.zeros(len(indices) + len(lengths), device=starts.device)
    weights[pairs + samples + 1] = 1 / lengths[samples].clamp_min(1)
    of_empty = (lengths == 0).to(weights.dtype)
    return weights.index_copy(
        0, starts[:-1] + torch.arange(len(lengths), device=starts.device), of_empty
    )


def triton_topk_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the squared error of the K-latent reconstruction, averaged over B and D.

    The same function as `topk_sae_loss`, by fused kernels; arguments, result and errors as in
    `triton_hierarchical_sae_loss`.
    """
    check_arguments(indices, weight, vals, bias, target, None, starts)
    if starts is not None:
        indices, vals, starts = _checked(indices, vals, starts)
    return differentiable_loss(
        *(indices, weight, vals, bias, target),
        levels="last",
        backend="triton",
        name="triton_topk_sae_loss",
        starts=starts,
    )


# --- the operator, which torch.compile keeps whole


def _operate(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    level_weights: torch.Tensor | None,
    starts: torch.Tensor | None,
    last_level: bool,
    scale: float,
    use_triton: bool,
    wanted: Sequence[bool],
) -> tuple[torch.Tensor, ...]:
    levels = level_weights
    if levels is None:
        levels = "last" if last_level else "every"
    request = DecoderLoss(
        code=Code(indices, vals, starts),
        weight=weight,
        bias=bias,
        target=target,
        levels=levels,
        scale=scale,
        wanted=_wanted((weight, vals, bias, target), wanted),
        deterministic=is_deterministic(),
    )
    result = decoder_loss(request, use_triton=use_triton)
    outputs = [result.loss]
    for gradient in result.gradients:
        if gradient is None:  # An operator returns tensors.
            gradient = target.new_empty(0, dtype=result.loss.dtype)
        elif gradient.storage_offset():  # Outputs of an operator share no memory.
            gradient = gradient.clone()
        outputs.append(gradient)
    return tuple(outputs)


def _shapes(indices, weight, vals, bias, target, *others) -> tuple[torch.Tensor, ...]:
    dtype = accumulation_dtype(weight, vals, target)
    outputs = [target.new_empty((), dtype=dtype)]
    for tensor, is_wanted in zip((weight, vals, bias, target), others[-1], strict=True):
        if tensor is not None and is_wanted:
            outputs.append(target.new_empty(tensor.shape, dtype=gradient_dtype(tensor.dtype)))
        else:
            outputs.append(target.new_empty(0, dtype=dtype))
    return tuple(outputs)


def _keep_gradients(ctx, inputs, output) -> None:
    gradients = output[1:]
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)


def _differentiate(ctx, *grad_outputs):
    check_is_first_derivative("a compiled decoder loss")
    factor = grad_outputs[0]
    gradients = [gradient if gradient.numel() else None for gradient in ctx.saved_tensors]
    if factor is None:
        gradients = [None] * len(gradients)
    elif type(factor) is not torch.Tensor:  # It is traced, and memory is the compiler's affair.
        gradients = [None if gradient is None else gradient * factor for gradient in gradients]
    else:
        scale_in_place(gradients, factor.resolve_neg())
        # Autograd does not see what a kernel writes. Told of it, it raises in a second backward
        # pass through the same graph.
        some = [gradient for gradient in gradients if gradient is not None]
        torch.autograd.graph.increment_version(some)
    return None, *gradients, None, None, None, None, None, None


if not hasattr(getattr(torch.ops, NAMESPACE), "decoder_loss"):
    _library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _library.define(
        "decoder_loss(Tensor indices, Tensor weight, Tensor vals, Tensor? bias, Tensor target, "
        "Tensor? level_weights, Tensor? starts, bool last_level, float scale, bool use_triton, "
        "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    _library.impl("decoder_loss", _operate, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::decoder_loss", _shapes)
    torch.library.register_autograd(
        f"{NAMESPACE}::decoder_loss", _differentiate, setup_context=_keep_gradients
    )
