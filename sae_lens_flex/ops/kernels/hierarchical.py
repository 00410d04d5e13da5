"""The HierarchicalTopK loss in one kernel, whose memory does not grow with K.

    L = scale * sum_b sum_j c_j |r_j|^2,     r_j = bias + sum_{i <= j} v_i w_i - target

with w_i = weight[latents[b, i]], v_i = values[b, i] and level weights c_j. A program takes two
samples and one slice of D. It walks up the levels to the residual r_K. Then it walks down again,
some levels at a time, with two running sums along the levels in registers:

    r_{j-1} = r_j - v_j w_j,     S_j = S_{j+1} + 2 scale c_j r_j.

They give the loss and every gradient (see `requests`). No level is ever stored.
With level weights of each sample its rows may have any length, and level 0, r_0 = bias - target,
may count.
"""

from typing import Literal, NamedTuple

import torch

from .launch import cdiv, launch, tl, triton
from .tiles import (
    Batch,
    add_to_bias,
    gather_levels,
    highest_level,
    is_wide,
    levels_from,
    levels_in_a_tile,
    offsets_of,
    pairs_of,
    store_losses,
    widened,
)


@triton.jit
def _with_weight(r, first, K, LEVELS: tl.constexpr, LAST_ALONE: tl.constexpr, EVEN: tl.constexpr):
    # r where a level counts, 0 elsewhere: an infinite r times a weight of 0 would be NaN.
    level = levels_from(first, LEVELS)
    if LAST_ALONE:
        return tl.where((level == K - 1)[:, None], r, 0.0)
    elif EVEN:
        return r
    else:
        return tl.where((level < K)[:, None], r, 0.0)


@triton.jit
def _weighted(r, level_weights, first, K, LEVELS: tl.constexpr):
    # c_j r_j. Without level_weights c_j is 1: `scale` holds the 1 / K of the mean.
    if level_weights is not None:
        level = levels_from(first, LEVELS)
        c = tl.load(level_weights + level, mask=level < K, other=0.0).to(tl.float32)
        return c[:, None] * r
    else:
        return r


@triton.jit
def _counted(
    r,
    level_weights,
    level_errors,
    first,
    sample,
    starts,
    B,
    K,
    BLOCK_D: tl.constexpr,
    LEVELS: tl.constexpr,
    EVEN: tl.constexpr,
    LAST_ALONE: tl.constexpr,
    OF_SAMPLES: tl.constexpr,
):
    # r_j where the level counts, 0 elsewhere; and c_j r_j. Adds |r_j|^2 to level_errors.
    if OF_SAMPLES:
        pairs, exists = pairs_of(first, sample, starts, B, K, LEVELS)
        at = pairs + sample + tl.arange(0, 2)[None, :] + 1
        of_level = tl.load(level_weights + at, mask=exists, other=0.0).to(tl.float32)
        c = widened(of_level, BLOCK_D)
        r = tl.where(c != 0.0, r, 0.0)
        if level_errors is not None:
            squares = tl.sum(tl.reshape(r * r, [LEVELS, 2, BLOCK_D]), 2)
            tl.atomic_add(level_errors + at, squares, mask=of_level != 0.0, sem="relaxed")
        return r, c * r
    else:
        r = _with_weight(r, first, K, LEVELS, LAST_ALONE, EVEN)
        return r, _weighted(r, level_weights, first, K, LEVELS)


@triton.jit
def _running_sum(x, start, LEVELS: tl.constexpr):
    # At each level: start plus the sum of x from the highest level down to it.
    is_highest = (tl.arange(0, LEVELS) == 0)[:, None]
    return tl.cumsum(tl.where(is_highest, x + start[None, :], x), 0)


@triton.jit
def _lowest(x, LEVELS: tl.constexpr):
    is_lowest = (tl.arange(0, LEVELS) == LEVELS - 1)[:, None]
    return tl.sum(tl.where(is_lowest, x, 0.0), 0)


@triton.jit
def _add_to_loss(loss, loss_sums, part, SUMS: tl.constexpr):
    # A single sum of thousands of parts would lose digits, so there are SUMS of them. The program
    # that finishes last adds these up. It reads them by atomic additions of zero, which see what
    # the other programs added.
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.atomic_add(loss_sums + program % SUMS, part, sem="relaxed")
    n_done = tl.atomic_add(loss_sums + SUMS, 1.0, sem="acq_rel")
    if n_done == tl.num_programs(0) * tl.num_programs(1) - 1:
        sums = tl.atomic_add(loss_sums + tl.arange(0, SUMS), tl.zeros([SUMS], tl.float32))
        tl.store(loss, tl.sum(sums))


# These arguments are not specialized: no address depends on them, and Triton would compile the
# kernel again for each combination of their divisibilities by 16.
@triton.jit(do_not_specialize=["first_slice", "bias_rows", "spare_row", "B", "K", "F"])
def _hierarchical_kernel(  # an output that is None is not wanted
    latents,
    values,
    weight,
    bias,  # or None
    target,
    starts,  # [B + 1]: where each sample's pairs begin; None for K of each
    level_weights,  # or None; with OF_SAMPLES those of each sample, from level 0 on
    rows,  # [B, K]: the row of grad_weight to which each pair adds; None for its latent's row
    n_copied,  # the number of latents with copies; where it is 0, rows are not read
    loss,  # [slices, B], parts of the loss; with loss_sums a scalar, the loss
    loss_sums,  # [SUMS + 1], zeroed: the last one counts the programs that have finished
    residual,
    grad_weight,  # float32, zeroed; its row `spare_row` takes what belongs to no latent
    grad_values,  # float32, zeroed
    grad_bias,  # float32, zeroed: [bias_rows, D], parts
    grad_target,
    suffix_sums,  # [B, K, BLOCK_D], of one slice
    level_errors,  # float32, zeroed, like level_weights
    scale,  # factor / (B D), and / K without level_weights
    first_slice,
    bias_rows,
    spare_row,
    B,
    K,
    F,
    D,
    stride_wf,
    stride_wd,
    BLOCK_D: tl.constexpr,
    LEVELS: tl.constexpr,
    EVEN: tl.constexpr,  # whether the blocks divide B, K and D
    WIDE: tl.constexpr,  # whether an offset takes 64 bits
    LAST_ALONE: tl.constexpr,
    WALKS_DOWN: tl.constexpr,
    OF_SAMPLES: tl.constexpr,
    SUMS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * 2
    slice_ = (first_slice + tl.program_id(1)).to(tl.int64)
    column = tl.arange(0, 2 * BLOCK_D)
    b = sample + column // BLOCK_D
    # With at most 4 columns a thread, float32 and bfloat16 have the same layout in registers.
    d = tl.max_contiguous(slice_ * BLOCK_D + column % BLOCK_D, 4)
    in_slice = d < D
    bd = b * D + d
    bd_mask = (b < B) & in_slice
    weight_slice = weight + d * stride_wd

    r = -tl.load(target + bd, mask=bd_mask, other=0.0).to(tl.float32)
    if bias is not None:
        r += tl.load(bias + d, mask=in_slice, other=0.0).to(tl.float32)
    error = tl.zeros([2 * BLOCK_D], tl.float32)
    K = highest_level(sample, starts, B, K)
    last = (tl.cdiv(K, LEVELS) - 1) * LEVELS
    for first in range(0, last, LEVELS):
        _, v, w = gather_levels(
            first,
            latents,
            values,
            weight_slice,
            sample,
            in_slice,
            starts,
            B,
            K,
            F,
            stride_wf,
            BLOCK_D,
            LEVELS,
            EVEN,
            WIDE,
        )
        p = widened(v, BLOCK_D) * w
        r += tl.sum(p, 0)
        if not WALKS_DOWN:
            r_j = p + _running_sum(-p, r, LEVELS)
            r_j, c_r = _counted(
                r_j,
                level_weights,
                level_errors,
                first,
                sample,
                starts,
                B,
                K,
                BLOCK_D,
                LEVELS,
                EVEN,
                LAST_ALONE,
                OF_SAMPLES,
            )
            error += tl.sum(c_r * r_j, 0)
    f, v, w = gather_levels(
        last,
        latents,
        values,
        weight_slice,
        sample,
        in_slice,
        starts,
        B,
        K,
        F,
        stride_wf,
        BLOCK_D,
        LEVELS,
        EVEN,
        WIDE,
    )
    r += tl.sum(widened(v, BLOCK_D) * w, 0)
    if residual is not None:
        tl.store(residual + bd, r, mask=bd_mask)

    s = tl.zeros([2 * BLOCK_D], tl.float32)
    has_copies = tl.full([LEVELS, 2], False, tl.int1)
    if rows is not None:
        has_copies = tl.load(n_copied + tl.zeros([LEVELS, 2], tl.int32)) > 0
    lowest = 0 if WALKS_DOWN else last
    for step in range(0, last - lowest + LEVELS, LEVELS):
        first = last - step
        if step > 0:  # the rows of the last levels are loaded already
            f, v, w = gather_levels(
                first,
                latents,
                values,
                weight_slice,
                sample,
                in_slice,
                starts,
                B,
                K,
                F,
                stride_wf,
                BLOCK_D,
                LEVELS,
                EVEN,
                WIDE,
            )
        if LAST_ALONE:
            r_j = tl.broadcast_to(r[None, :], [LEVELS, 2 * BLOCK_D])
        else:
            p = widened(v, BLOCK_D) * w
            without = _running_sum(-p, r, LEVELS)  # r_{j-1}
            r_j = p + without
            r = _lowest(without, LEVELS)
        r_j, c_r = _counted(
            r_j,
            level_weights,
            level_errors,
            first,
            sample,
            starts,
            B,
            K,
            BLOCK_D,
            LEVELS,
            EVEN,
            LAST_ALONE,
            OF_SAMPLES,
        )
        error += tl.sum(c_r * r_j, 0)
        if WALKS_DOWN:
            S = _running_sum(c_r, s, LEVELS)  # still without the factor 2 scale
            s = _lowest(S, LEVELS)
            pairs, exists = pairs_of(first, sample, starts, B, K, LEVELS)
            if grad_values is not None:
                dots = 2.0 * scale * tl.sum(tl.reshape(w * S, [LEVELS, 2, BLOCK_D]), 2)
                tl.atomic_add(grad_values + pairs, dots, mask=exists, sem="relaxed")
            if grad_weight is not None:
                row = f
                if rows is not None:
                    row = tl.load(rows + pairs, mask=(f >= 0) & has_copies, other=f)
                row = tl.where(row >= 0, row, spare_row)
                at = grad_weight + d[None, :] + offsets_of(row, D, BLOCK_D, WIDE)[0]
                v_S = widened(2.0 * scale * v, BLOCK_D) * S
                if EVEN:
                    tl.atomic_add(at, v_S, sem="relaxed")
                else:
                    mask = tl.broadcast_to(in_slice[None, :], [LEVELS, 2 * BLOCK_D])
                    tl.atomic_add(at, v_S, mask=mask, sem="relaxed")
            if suffix_sums is not None:
                out = widened(pairs, BLOCK_D) * BLOCK_D + (column % BLOCK_D)[None, :]
                tl.store(suffix_sums + out, 2.0 * scale * S, mask=widened(exists, BLOCK_D))

    if OF_SAMPLES:  # level 0, loaded again because registers are scarce in the walk
        r_0 = -tl.load(target + bd, mask=bd_mask, other=0.0).to(tl.float32)
        if bias is not None:
            r_0 += tl.load(bias + d, mask=in_slice, other=0.0).to(tl.float32)
        start = b * K
        if starts is not None:
            start = tl.load(starts + b, mask=b < B, other=0)
        c = tl.load(level_weights + start + b, mask=b < B, other=0.0).to(tl.float32)
        r_0 = tl.where(c != 0.0, r_0, 0.0)
        error += c * r_0 * r_0
        s += c * r_0
        if level_errors is not None:
            of_sample = tl.sum(tl.reshape(tl.where(bd_mask, r_0 * r_0, 0.0), [2, BLOCK_D]), 1)
            b = sample + tl.arange(0, 2)
            start = b * K
            if starts is not None:
                start = tl.load(starts + b, mask=b < B, other=0)
            tl.atomic_add(level_errors + start + b, of_sample, mask=b < B, sem="relaxed")

    error = tl.where(bd_mask, error, 0.0)  # beyond the batch the bias is no error
    if loss_sums is None:
        store_losses(loss, error, scale, slice_, sample, B, BLOCK_D)
    else:
        _add_to_loss(loss, loss_sums, scale * tl.sum(error), SUMS)
    if WALKS_DOWN:
        s *= 2.0 * scale
        if grad_bias is not None:
            s_of_all = tl.where(bd_mask, s, 0.0)
            add_to_bias(grad_bias, s_of_all, 1.0, slice_, bias_rows, D, BLOCK_D)
        if grad_target is not None:
            tl.store(grad_target + bd, -s, mask=bd_mask)


# Loss and gradients took 2.30, 2.20 and 2.28 ms of an H200 with float32 and uniform, float32 and
# Zipf, bfloat16 and uniform indices at B=4096, K=128, F=65536, D=2304; with tiles of 8 levels they
# took 2.88, 2.82 and 2.82. A slice of weight that is 64 wide and the same slice of its gradient
# share the second-level cache: 2 * 65536 * 64 * 4 bytes = 34 MB. benchmarks/README.md has what else
# was tried.
BLOCK_D = 64
NUM_WARPS = 1
LOSS_SUMS = 32


class Outputs(NamedTuple):
    """The tensors that a walk writes, or adds to; None for one that is not wanted.

    Attributes:
        loss: a scalar with `loss_sums`; without, the parts of the loss, [slices, B].
        loss_sums: [LOSS_SUMS + 1], float32, zeroed.
        residual: r_K, [B, D], float32.
        grad_weight: [n_rows, D], float32, zeroed. Its last row takes what belongs to no latent.
        grad_values: [B, K], float32, zeroed.
        grad_bias: [bias_rows, D], float32, zeroed: parts of the gradient.
        grad_target: [B, D].
        suffix_sums: S of each pair, [n_pairs, BLOCK_D], float32: a walk over one slice only.
        level_errors: |r_j|^2 of the levels that count, laid out as level weights of each sample,
            float32, zeroed: with such weights only.
    """

    loss: torch.Tensor
    loss_sums: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    grad_weight: torch.Tensor | None = None
    grad_values: torch.Tensor | None = None
    grad_bias: torch.Tensor | None = None
    grad_target: torch.Tensor | None = None
    suffix_sums: torch.Tensor | None = None
    level_errors: torch.Tensor | None = None


def walk(
    batch: Batch,
    outputs: Outputs,
    levels: torch.Tensor | Literal["every", "last"],
    *,
    scale: float,
    of_samples: bool = False,
    rows: torch.Tensor | None = None,
    n_copied: torch.Tensor | None = None,
    slices: range | None = None,
) -> None:
    """Walk up and down the levels of a batch.

    Args:
        batch: what is read; it has a target.
        outputs: what is written.
        levels: the level weights c_j, [K], contiguous; "every" for 1 / K each; "last" for 1 at
            level K alone. With `of_samples` those of each sample, from level 0 on, contiguous:
            [B, K + 1], or for rows of different length [n + B].
        scale: multiplies the loss.
        of_samples: whether `levels` are those of each sample. Rows of different length need it.
        rows: the row of `grad_weight` to which each pair adds, [B, K], int32. None for the row of
            its latent.
        n_copied: the number of latents with copies, [1], int32; given with `rows`.
        slices: the slices of D, of BLOCK_D columns each; None for all.
    """
    n_samples, k, n_latents, d_in = batch.sizes()
    slices = range(cdiv(d_in, BLOCK_D)) if slices is None else slices
    tile = levels_in_a_tile(k)
    n_rows = 0 if outputs.grad_weight is None else outputs.grad_weight.shape[0]
    gradients = outputs.grad_weight, outputs.grad_values, outputs.grad_bias, outputs.grad_target
    # The slices vary slowest, so the slice at work stays in the second-level cache.
    launch(
        _hierarchical_kernel,
        (cdiv(n_samples, 2), len(slices)),
        (
            *batch,
            levels if isinstance(levels, torch.Tensor) else None,
            rows,
            n_copied,
            *outputs,
        ),
        (scale / k if isinstance(levels, str) and levels == "every" else scale,),
        (
            slices.start,
            1 if outputs.grad_bias is None else outputs.grad_bias.shape[0],
            n_rows - 1,
            *(n_samples, k, n_latents, d_in),
            *batch.weight.stride(),
        ),
        BLOCK_D=BLOCK_D,
        LEVELS=tile,
        EVEN=batch.is_even(tile, BLOCK_D),
        WIDE=is_wide(batch.weight, n_rows),
        LAST_ALONE=isinstance(levels, str) and levels == "last",
        WALKS_DOWN=outputs.suffix_sums is not None or any(g is not None for g in gradients),
        OF_SAMPLES=of_samples,
        SUMS=LOSS_SUMS,
        num_warps=NUM_WARPS,
    )
