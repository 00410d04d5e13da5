"""The decoder losses by Triton kernels.

The loss over levels takes the one kernel of `kernels/hierarchical.py`, whose gradient of weight
comes by atomic additions.

In the loss of level K alone every level shares one S, 2 scale r_K. So its gradients

    dL/dweight[f] = sum over the pairs (b, t) that chose f of v_t S[b],
    dL/dvalues[b, t] = w_t . S[b]

can be summed latent by latent: one kernel gathers rows of weight and stores r, and another walks
the inverted index and gathers rows of r, once for both gradients. Launches of a small batch without
an index take longer than the device needs, so it takes the one kernel of the loss over levels.

Of nested dictionaries all pairs of a part of a sample's row share one S. So the parts are summed
latent by latent as samples are in the loss of level K alone.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch

from .checks import check_range
from .codes import Code
from .kernels import copies, hierarchical, nested, residual
from .kernels.finish import finish
from .kernels.launch import Launch, cdiv
from .kernels.sums import sum_by_latent
from .kernels.tiles import COPIES, SLOTS, Batch, Sizes, slice_width, table_size
from .policy import CHECKS_INDICES, in_dtype
from .requests import (
    DecoderLoss,
    LossAndGradients,
    UnfinishedLoss,
    Wanted,
    are_of_samples,
    weighted_sum,
)

# B K D from which an index is worth its launches. To the device alone it mostly is from 2^24 on: at
# B=4096, K=64, F=24576, D=768 an H200 takes 0.29 ms with it, and 0.36 with the one kernel (with
# bfloat16 and Zipf-distributed indices 0.24 and 0.40).
FEWEST_ELEMENTS = 2**27
# Atomic additions to dL/dbias wait for each other, so the programs of a large batch take this many
# rows in turn. Up to SMALL_BATCH samples share one row, and the kernel itself adds up the parts of
# the loss. That spares a launch, and a small batch waits for the host.
BIAS_ROWS = 64
SMALL_BATCH = 1024
# Where a backward pass finishes the gradients, the kernel adds up the parts of the loss, too. Each
# program then waits until its additions are done. That takes an H100 12 us of 210 at B=2048, D=768,
# and 21 of 330 at B=4096 (24,576 programs). A launch less there spares a slow host 39 us. Larger
# batches keep the device busy for longer than their launches take.
MOST_UNFINISHED = 2**15
# The sums of a gradient are float32. So one in 16 bits holds twice its memory until then. With more
# elements it is finished at once.
MOST_HELD = 2**25
PLANS = 1024  # kept: one a set of sizes, dtypes and wishes


def decoder_loss(request: DecoderLoss) -> LossAndGradients:
    """Compute what a request asks for. A latent outside [0, F) is ignored.

    Raises:
        IndexError: for such a latent, where SAE_LENS_FLEX_CHECK_INDICES is 1.
    """
    _check_indices(request)
    if request.widths is not None:
        return _by_width(request)
    if _takes_index(request):
        return _by_latent(request)
    return (_by_walk_slice_by_slice if request.deterministic else _by_walk)(request)


def unfinished_decoder_loss(request: DecoderLoss) -> UnfinishedLoss | None:
    """Compute the loss, and sums of which the gradients are made once their factor is known.

    One launch of the backward pass then makes the gradients and multiplies them by the factor. That
    is for batches that wait for the host. Return None for others: nothing is computed then.
    """
    if not _is_finished_later(request):
        return None
    _check_indices(request)
    walked = _walk(request, is_finished_later=True)
    return UnfinishedLoss(walked.loss, walked.finish)


def _is_finished_later(request: DecoderLoss) -> bool:
    if request.widths is not None or request.deterministic or _takes_index(request):
        return False
    n_samples, d_in = request.target.shape
    is_in_place = request.wanted.weight in (None, torch.float32)
    return cdiv(n_samples, 2) * cdiv(d_in, hierarchical.BLOCK_D) <= MOST_UNFINISHED and (
        is_in_place or request.weight.numel() <= MOST_HELD
    )


def _check_indices(request: DecoderLoss) -> None:
    if CHECKS_INDICES and request.code.latents.numel() > 0:
        check_range(request.code.latents, request.weight.shape[0])


def _takes_index(request: DecoderLoss) -> bool:
    return _is_last_level(request) and (
        request.code.latents.numel() * request.weight.shape[1] >= FEWEST_ELEMENTS
        or request.index is not None
        or request.deterministic
        or request.code.starts is not None  # the walk knows no last level of each sample
    )


def _batch(request: DecoderLoss) -> Batch:
    code = request.code
    return Batch(
        code.latents.contiguous(),
        _contiguous(code.values),
        request.weight.resolve_neg(),
        None if request.bias is None else _contiguous(request.bias),
        _contiguous(request.target),
        code.starts,
    )


def _contiguous(tensor: torch.Tensor) -> torch.Tensor:
    # A kernel reads what lies in memory, which has the other sign where the negative bit is set. A
    # conjugate's imaginary part has that bit. These two questions take half the time of the two
    # calls below on a tensor that they leave as it is.
    if tensor.is_contiguous() and not tensor.is_neg():
        return tensor
    return tensor.resolve_neg().contiguous()


def _level_weights(request: DecoderLoss) -> torch.Tensor | None:
    levels = request.levels
    return _contiguous(levels) if isinstance(levels, torch.Tensor) else None


def _is_last_level(request: DecoderLoss) -> bool:
    return isinstance(request.levels, str) and request.levels == "last"


def _scale(request: DecoderLoss) -> float:
    """Return what multiplies the kernels' loss, in which levels without level weights weigh 1."""
    is_mean = isinstance(request.levels, str) and request.levels == "every"
    return request.scale / request.code.latents.shape[1] if is_mean else request.scale


def _dtypes(*tensors: torch.Tensor | None) -> list[torch.dtype | None]:
    return [None if tensor is None else tensor.dtype for tensor in tensors]


class _WalkPlan(NamedTuple):
    """What a walk takes that depends on sizes and dtypes alone.

    Attributes:
        parts: of the one tensor that is zeroed, float32: sums of the gradients of weight and
            values, those of the loss, the table of copies, and sums of the gradient of bias. Each
            is at least as long as what it holds, and 0 for what is not wanted.
        choose: the launch that gives copies to latents, or None.
        walk: the launch of the walk.
        finish: the launch that makes results of the sums. None where the sums are the results.
        is_loss_left: whether `finish` adds up the loss.
    """

    parts: list[int]
    choose: Launch | None
    walk: Launch
    finish: Launch | None
    is_loss_left: bool


@lru_cache(PLANS)
def _plan_walk(
    sizes: Sizes,
    n_pairs: int,
    is_last_level: bool,
    of_samples: bool,
    wanted: Wanted,
    is_finished_later: bool,
    is_ragged: bool,
    *_: object,
) -> _WalkPlan:
    """Make a plan, another one for each device and for each set of dtypes, the last arguments."""
    n_samples, n_latents, d_in = sizes.n_samples, sizes.n_latents, sizes.d_in
    is_small = n_samples <= SMALL_BATCH
    has_copies = wanted.weight is not None and copies.is_worth_copies(n_samples, n_pairs)
    casts_weight = wanted.weight not in (None, torch.float32)
    n_rows = n_latents + (SLOTS * COPIES if has_copies else 0) + 1 if wanted.weight else 0
    bias_rows = 1 if is_small else BIAS_ROWS
    n_values = n_pairs if wanted.values else 0
    # The address of each part is a multiple of 16 bytes.
    parts = [
        _to_16_bytes(n_rows * d_in),
        _to_16_bytes(n_values),
        _to_16_bytes(hierarchical.LOSS_SUMS + 1),
        _to_16_bytes(table_size(n_latents)) if has_copies else 0,
        bias_rows * d_in if wanted.bias else 0,
    ]
    walk = hierarchical.walk(
        sizes,
        last_level_alone=is_last_level,
        walks_down=any(wanted[1:]),
        of_samples=of_samples,
        is_ragged=is_ragged,
        n_rows=n_rows,
        bias_rows=bias_rows,
    )
    is_cast = not {wanted.weight, wanted.values, wanted.bias} <= {None, torch.float32}
    is_left = is_finished_later or not is_small or has_copies or is_cast
    finish_walk = None
    if is_left:
        finish_walk = finish(
            sizes,
            n_sums=hierarchical.LOSS_SUMS,
            has_copies=has_copies,
            casts_weight=casts_weight,
            n_values=n_values,
            bias_rows=bias_rows if wanted.bias else 0,
            has_factor=is_finished_later,
            n_target=n_samples * d_in if is_finished_later and wanted.target else 0,
        )
    return _WalkPlan(
        parts,
        copies.choose(n_pairs, n_latents) if has_copies else None,
        walk,
        finish_walk,
        is_loss_left=is_left and not is_finished_later,
    )


def _to_16_bytes(n_floats: int) -> int:
    return cdiv(n_floats, 4) * 4


class _Walked(NamedTuple):
    """What a walk has computed.

    Attributes:
        loss: a scalar, which is still to be added up where `is_loss_left`.
        residual: r_K, or None.
        finish: returns the gradients of weight, values, bias and target. It takes a factor of them,
            a scalar, float32, or None and where to add up the loss. It does not hold the loss,
            whose node holds it.
    """

    loss: torch.Tensor
    residual: torch.Tensor | None
    finish: Callable[..., tuple[torch.Tensor | None, ...]]
    is_loss_left: bool


def _walk(request: DecoderLoss, *, is_finished_later: bool = False) -> _Walked:
    """Walk, and return gradients that are still to be finished.

    Args:
        request: what is asked for.
        is_finished_later: whether `finish` is called with a factor. The walk then adds up the loss.
    """
    batch, wanted, level_weights = _batch(request), request.wanted, _level_weights(request)
    plan = _plan_walk(
        batch.sizes(),
        batch.latents.numel(),
        _is_last_level(request),
        are_of_samples(request.levels, request.code),
        wanted,
        is_finished_later,
        batch.starts is not None,
        request.target.device,
        *_dtypes(*batch, level_weights),
    )
    new, b_and_d = request.target.new_empty, request.target.shape
    zeros = request.target.new_zeros(sum(plan.parts), dtype=torch.float32)
    weight_sums, value_sums, loss_sums, table, bias_sums = [
        part if size else None
        for part, size in zip(zeros.split_with_sizes(plan.parts), plan.parts, strict=True)
    ]
    assert loss_sums is not None
    if plan.choose is not None and table is not None:
        table = table.view(torch.int32)
        plan.choose((batch.latents, table))
    loss = new((), dtype=torch.float32)
    grad_target = new(b_and_d, dtype=wanted.target) if wanted.target else None
    outputs = hierarchical.Outputs(
        loss_sums=loss_sums,
        loss=None if plan.is_loss_left else loss,
        residual=new(b_and_d, dtype=torch.float32) if wanted.residual else None,
        grad_weight=weight_sums,
        grad_values=value_sums,
        grad_bias=bias_sums,
        grad_target=grad_target,
    )
    plan.walk((*batch, level_weights, table, *outputs), (_scale(request),))
    # `finish` makes the gradient of weight. The small ones are made here, because a backward pass
    # on a GPU runs in a thread whose caches are cold.
    shape, shape_of_values = request.weight.shape, request.code.values.shape
    grad_values, grad_bias = None, bias_sums
    if plan.finish is None and value_sums is not None:
        grad_values = value_sums[: shape_of_values.numel()].view(shape_of_values)
    elif wanted.values:  # also where there is no pair
        grad_values = new(shape_of_values, dtype=wanted.values)
    if plan.finish is not None and wanted.bias:
        grad_bias = new(shape[1:], dtype=wanted.bias)

    def finish(
        factor: torch.Tensor | None = None, loss: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, ...]:
        grad_weight = cast = None
        if wanted.weight not in (None, torch.float32):
            grad_weight = cast = loss_sums.new_empty(shape, dtype=wanted.weight)
        elif weight_sums is not None:
            grad_weight = weight_sums.as_strided(shape, (shape[1], 1))
        if plan.finish is not None:
            scaled_target = None if factor is None else grad_target
            plan.finish(
                (
                    *(loss_sums, loss, factor, weight_sums, table, cast),
                    *(value_sums, grad_values, bias_sums, grad_bias, scaled_target),
                )
            )
        return grad_weight, grad_values, grad_bias, grad_target

    return _Walked(loss, outputs.residual, finish, plan.is_loss_left)


def _by_walk(request: DecoderLoss) -> LossAndGradients:
    loss, residual, finish, is_loss_left = _walk(request)
    gradients = finish(loss=loss if is_loss_left else None)
    return LossAndGradients(loss, residual, *gradients)


@lru_cache(PLANS)
def _plan_slices(
    sizes: Sizes,
    is_last_level: bool,
    of_samples: bool,
    wanted: Wanted,
    is_ragged: bool,
    *_: object,
) -> list[Launch]:
    """Return a walk for each slice, others for each device and for each set of dtypes."""
    n_programs = cdiv(sizes.n_samples, 2)
    return [
        hierarchical.walk(
            sizes,
            last_level_alone=is_last_level,
            walks_down=any(wanted[1:]),
            of_samples=of_samples,
            is_ragged=is_ragged,
            bias_rows=n_programs,  # No row and no sum is then added to twice.
            n_sums=n_programs,
            slices=range(slice_, slice_ + 1),
        )
        for slice_ in range(cdiv(sizes.d_in, hierarchical.BLOCK_D))
    ]


def _by_walk_slice_by_slice(request: DecoderLoss) -> LossAndGradients:
    """Walk without an addition whose order varies.

    The slices all add to the gradient of the values, so they are launched one after another. The S
    of a slice are stored, and then added up latent by latent.
    """
    batch, wanted, level_weights = _batch(request), request.wanted, _level_weights(request)
    sizes, target = batch.sizes(), request.target
    n_samples, _, n_latents, d_in = sizes[:4]
    of_samples = are_of_samples(request.levels, request.code)
    n_programs = cdiv(n_samples, 2)

    def new(is_wanted: object, *shape: int, dtype: torch.dtype | None = torch.float32):
        return target.new_zeros(shape, dtype=dtype) if is_wanted else None

    index = values_in_order = suffix_sums = None
    grad_weight = new(wanted.weight, n_latents, d_in)
    if grad_weight is not None:
        index = request.index or request.code.by_latent(
            n_latents, use_triton=True, deterministic=True
        )
        values_in_order = batch.values.flatten()[index.pairs]
        suffix_sums = new(True, batch.latents.numel(), hierarchical.BLOCK_D)
    outputs = hierarchical.Outputs(
        loss_sums=target.new_zeros(n_programs, dtype=torch.float32),
        residual=new(wanted.residual, n_samples, d_in),
        grad_values=new(wanted.values, *batch.values.shape),
        grad_bias=new(wanted.bias, n_programs, d_in),
        grad_target=new(wanted.target, n_samples, d_in, dtype=wanted.target),
        suffix_sums=suffix_sums,
    )
    dtypes = _dtypes(*batch, level_weights)
    walks = _plan_slices(
        sizes,
        _is_last_level(request),
        of_samples,
        wanted,
        batch.starts is not None,
        target.device,
        *dtypes,
    )
    for slice_, walk in enumerate(walks):
        walk((*batch, level_weights, None, *outputs), (_scale(request),))
        if index is not None and values_in_order is not None and suffix_sums is not None:
            first = slice_ * hierarchical.BLOCK_D
            n_columns = min(hierarchical.BLOCK_D, d_in - first)
            sum_by_latent(
                index,
                values_in_order,
                suffix_sums[:, :n_columns].contiguous(),
                sums=grad_weight,
                in_order=True,
                rows_of_pairs=True,
                first_column=first,
                zero_absent=False,
            )
    values, bias = outputs.grad_values, outputs.grad_bias
    return LossAndGradients(
        loss=outputs.loss_sums.sum(),
        residual=outputs.residual,
        weight=None if grad_weight is None else in_dtype(grad_weight, wanted.weight),
        values=None if values is None else in_dtype(values, wanted.values),
        bias=None if bias is None else in_dtype(bias.sum(0), wanted.bias),
        target=outputs.grad_target,
    )


@lru_cache(PLANS)
def _plan_finish(sizes: Sizes, bias_rows: int, *_: object) -> Launch:
    """Return the launch that adds up loss and bias, another one for each device and dtype."""
    return finish(
        sizes,
        n_sums=hierarchical.LOSS_SUMS,
        has_copies=False,
        casts_weight=False,
        n_values=0,
        bias_rows=bias_rows,
    )


def _by_latent(request: DecoderLoss) -> LossAndGradients:
    batch, wanted, scale = _batch(request), request.wanted, request.scale
    sizes = batch.sizes()
    n_samples, d_in = sizes.n_samples, sizes.d_in
    new = request.target.new_empty
    bias_rows, n_sums = BIAS_ROWS, hierarchical.LOSS_SUMS
    if request.deterministic:  # No row and no sum is then added to twice.
        bias_rows = cdiv(n_samples, 2)
        n_sums = bias_rows * cdiv(d_in, slice_width(batch.weight))
    bias_rows = bias_rows if wanted.bias else 0
    parts = [n_sums, -n_sums % 4, bias_rows * d_in]
    zeros = request.target.new_zeros(sum(parts), dtype=torch.float32)
    loss_sums, _, bias_sums = zeros.split_with_sizes(parts)
    # The second kernel gathers rows of the residual. Where the residual is not wanted, the gradient
    # of the target, -2 scale times the residual, saves a [B, D] tensor if it is as precise.
    gathers = wanted.weight is not None or wanted.values is not None
    by_target = wanted.target == torch.float32 and not wanted.residual
    r = grad_target = None
    if wanted.residual or (gathers and not by_target):
        r = new((n_samples, d_in), dtype=torch.float32)
    if wanted.target:
        grad_target = new((n_samples, d_in), dtype=wanted.target)
    bias_sums = bias_sums if wanted.bias else None
    residual.residual(batch, residual.Outputs(loss_sums, r, bias_sums, grad_target), scale=scale)
    grad_weight = grad_values = None
    if gathers:
        rows, scale_of_rows = (grad_target, -1.0) if r is None else (r, 2 * scale)
        assert rows is not None
        grad_weight, grad_values = _sum_by_latent(request, request.code, rows, scale_of_rows)
    grad_bias = None
    if request.deterministic:
        loss = loss_sums.sum()
        if bias_sums is not None:
            grad_bias = in_dtype(bias_sums.view(bias_rows, d_in).sum(0), wanted.bias)
    else:
        loss = new((), dtype=torch.float32)
        grad_bias = new((d_in,), dtype=wanted.bias) if wanted.bias else None
        _plan_finish(sizes, bias_rows, request.target.device, wanted.bias)(
            (loss_sums, loss, *(None,) * 6, bias_sums, grad_bias, None)
        )
    return LossAndGradients(
        loss=loss,
        residual=r if wanted.residual else None,
        weight=grad_weight,
        values=grad_values,
        bias=grad_bias,
        target=grad_target,
    )


def _sum_by_latent(
    request: DecoderLoss, code: Code, rows: torch.Tensor, scale: float
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the gradients of weight and values, where they are wanted.

    Args:
        request: what is asked for.
        code: its pairs, whose rows are those of `rows`.
        rows: what `scale` makes S of, [n_rows, D].
        scale: multiplies the rows.
    """
    wanted, weight = request.wanted, request.weight.resolve_neg()
    index = request.index
    if index is None:
        index = code.by_latent(len(weight), use_triton=True, deterministic=request.deterministic)
    elif code is not request.code:
        index = index.with_rows_of(code)
    grad_weight = None
    if wanted.weight is not None:
        grad_weight = rows.new_empty(weight.shape, dtype=wanted.weight)
    grad_values = sum_by_latent(
        index,
        _contiguous(code.values),
        rows,
        sums=grad_weight,
        weight=weight if wanted.values else None,
        scale=scale,
    )
    if grad_values is not None:
        if code.starts is not None:
            pairs = torch.arange(len(grad_values), device=grad_values.device)
            grad_values.masked_fill_(pairs >= code.starts[-1], 0)  # those of no sample
        grad_values = in_dtype(grad_values, wanted.values)
    return grad_weight, grad_values


def _by_width(request: DecoderLoss) -> LossAndGradients:
    wanted, target, widths = request.wanted, request.target, request.widths
    width_weights = _level_weights(request)
    assert widths is not None
    assert width_weights is not None
    n_widths, n_programs = len(widths), cdiv(len(target), 2)
    code = request.code.by_width(widths)
    batch = _batch(replace(request, code=code))

    def new(is_wanted: object, *shape: int, dtype: torch.dtype | None = torch.float32):
        return target.new_empty(shape, dtype=dtype) if is_wanted else None

    bias_rows, n_sums = BIAS_ROWS, hierarchical.LOSS_SUMS
    if request.deterministic:  # No row and no sum is then added to twice.
        bias_rows = n_programs
        n_sums = n_programs * cdiv(target.shape[1], slice_width(batch.weight))
    by_latent = wanted.weight is not None or wanted.values is not None
    outputs = nested.Outputs(
        errors=target.new_zeros((n_sums, n_widths), dtype=torch.float32),
        residual=new(wanted.residual, *target.shape),
        suffix_sums=new(by_latent, len(target) * n_widths, target.shape[1]),
        grad_bias=target.new_zeros((bias_rows, target.shape[1]), dtype=torch.float32)
        if wanted.bias
        else None,
        grad_target=new(wanted.target, *target.shape, dtype=wanted.target),
    )
    nested.nested(batch, width_weights, outputs, scale=request.scale)
    grad_weight = grad_values = None
    if outputs.suffix_sums is not None:
        grad_weight, grad_values = _sum_by_latent(request, code, outputs.suffix_sums, 1.0)
    errors, bias = outputs.errors.sum(0), outputs.grad_bias
    return LossAndGradients(
        loss=request.scale * weighted_sum(errors, width_weights),
        residual=outputs.residual,
        weight=grad_weight,
        values=grad_values,
        bias=None if bias is None else in_dtype(bias.sum(0), wanted.bias),
        target=outputs.grad_target,
        width_errors=errors,
    )
