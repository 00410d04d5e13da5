"""The HierarchicalTopK loss in one kernel, whose memory does not grow with K.

    L = scale * sum_b sum_j c_j |r_j|^2,     r_j = bias + sum_{i <= j} v_i w_i - target

with w_i = weight[latents[b, i]], v_i = values[b, i] and level weights c_j. A program takes two
samples and one slice of D. It walks up the levels to the residual r_K. Then it walks down again,
some levels at a time, with two running sums along the levels in registers:

    r_{j-1} = r_j - v_j w_j,     S_j = S_{j+1} + 2 scale c_j r_j.

They give the loss and every gradient (see `requests`). No level is ever stored. With level weights
of each sample the rows may have different lengths, and level 0, r_0 = bias - target, may count.
"""

from typing import NamedTuple

import torch

from .launch import Launch, cdiv, tl, triton
from .tiles import (
    COPIES,
    SLOTS,
    Sizes,
    add_to_bias,
    add_to_loss,
    gather_levels,
    has_hot_latents,
    highest_level,
    levels_from,
    levels_in_a_tile,
    offsets_of,
    pairs_of,
    row_of_copy,
    slots_of,
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
    # r_j where the level counts, 0 elsewhere; and c_j r_j.
    if OF_SAMPLES:
        pairs, exists = pairs_of(first, sample, starts, B, K, LEVELS)
        at = pairs + sample + tl.arange(0, 2)[None, :] + 1
        of_level = tl.load(level_weights + at, mask=exists, other=0.0).to(tl.float32)
        c = widened(of_level, BLOCK_D)
        r = tl.where(c != 0.0, r, 0.0)
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
def _add_up_loss(loss, loss_sums, SUMS: tl.constexpr):
    # The program that finishes last adds up the sums. It reads them by atomic additions of zero,
    # which see what the other programs added. Behind the sums is the number of those that are done.
    # Counting releases a program's own additions. Only the last program acquires those of others.
    # It does so by adding 0 to the count.
    n_done = tl.atomic_add(loss_sums + SUMS, 1.0, sem="release")
    if n_done == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.atomic_add(loss_sums + SUMS, 0.0, sem="acquire")
        sums = tl.atomic_add(loss_sums + tl.arange(0, SUMS), tl.zeros([SUMS], tl.float32))
        tl.store(loss, tl.sum(sums))


# These arguments are not specialized: no address depends on them, and Triton would compile the
# kernel again for each combination of their divisibilities by 16.
@triton.jit(do_not_specialize=["first_slice", "n_sums", "bias_rows", "spare_row", "B", "K", "F"])
def _hierarchical_kernel(  # an output that is None is not wanted
    latents,
    values,
    weight,
    bias,  # or None
    target,
    starts,  # [B + 1]: where each sample's pairs begin; None for K of each
    level_weights,  # or None; with OF_SAMPLES those of each sample, from level 0 on
    table,  # which latents have copies of their row of grad_weight (see `tiles`), or None
    loss_sums,  # float32, zeroed: [n_sums], parts; with `loss` one more, for counting
    loss,  # None where the sums are added up later
    residual,
    grad_weight,  # float32, zeroed; its row `spare_row` takes what belongs to no latent
    grad_values,  # float32, zeroed
    grad_bias,  # float32, zeroed: [bias_rows, D], parts
    grad_target,
    suffix_sums,  # [n_pairs, BLOCK_D], of one slice
    scale,  # factor / (B D), and / K without level_weights
    first_slice,
    n_sums,
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
    SLOTS: tl.constexpr,
    COPIES: tl.constexpr,
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
    if table is not None:
        has_copies = has_copies | has_hot_latents(table, F, SLOTS)
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
                if table is not None:
                    slot = slots_of(f, table, F, (f >= 0) & has_copies)
                    copy = ((sample + tl.arange(0, 2)) % COPIES).to(tl.int32)[None, :]
                    row = tl.where(slot > 0, row_of_copy(slot, copy, F, COPIES), f)
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

    error = tl.where(bd_mask, error, 0.0)  # beyond the batch the bias is no error
    add_to_loss(loss_sums, scale * tl.sum(error), n_sums)
    if loss is not None:
        _add_up_loss(loss, loss_sums, SUMS)
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
LOSS_SUMS = 256


class Outputs(NamedTuple):
    """The tensors that a walk adds to or writes; None for one that is not wanted.

    Attributes:
        loss_sums: parts of the loss, [n_sums], float32, zeroed; with `loss` [LOSS_SUMS + 1].
        loss: a scalar, float32: a walk of all slices can add up the sums itself.
        residual: r_K, [B, D], float32.
        grad_weight: [n_rows, D], float32, zeroed. Its last row takes what belongs to no latent.
        grad_values: [B, K], float32, zeroed.
        grad_bias: [bias_rows, D], float32, zeroed: parts of the gradient.
        grad_target: [B, D].
        suffix_sums: S of each pair, [n_pairs, BLOCK_D], float32: a walk over one slice only.
    """

    loss_sums: torch.Tensor
    loss: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    grad_weight: torch.Tensor | None = None
    grad_values: torch.Tensor | None = None
    grad_bias: torch.Tensor | None = None
    grad_target: torch.Tensor | None = None
    suffix_sums: torch.Tensor | None = None


def walk(
    sizes: Sizes,
    *,
    last_level_alone: bool,
    walks_down: bool,
    of_samples: bool = False,
    is_ragged: bool = False,
    n_rows: int = 0,
    bias_rows: int = 1,
    n_sums: int = LOSS_SUMS,
    slices: range | None = None,
) -> Launch:
    """Return the launch that walks up and down the levels of a batch.

    It takes the tensors of a `Batch`, which has a target; the level weights c_j, [K], contiguous,
    or None for 1 each (or for 1 at level K alone), or with `of_samples` those of each sample, from
    level 0 on; the table of copies or None; `Outputs`; and the scale of the loss.

    Args:
        sizes: of the batch.
        last_level_alone: whether only level K counts.
        walks_down: whether any gradient, or suffix_sums, is wanted.
        of_samples: whether level weights are those of each sample: [B, K + 1], or [n + B].
        is_ragged: whether rows have different lengths, which takes weights of each sample.
        n_rows: rows of grad_weight.
        bias_rows: rows of grad_bias.
        n_sums: sums of the loss.
        slices: the slices of D, of BLOCK_D columns each; None for all.
    """
    slices = range(cdiv(sizes.d_in, BLOCK_D)) if slices is None else slices
    tile = levels_in_a_tile(sizes.k)
    # The slices vary slowest, so the slice at work stays in the second-level cache.
    return Launch(
        _hierarchical_kernel,
        (cdiv(sizes.n_samples, 2), len(slices)),
        (slices.start, n_sums, bias_rows, n_rows - 1, *sizes),
        BLOCK_D=BLOCK_D,
        LEVELS=tile,
        EVEN=not is_ragged and sizes.are_even(tile, BLOCK_D),
        WIDE=sizes.is_wide(n_rows),
        LAST_ALONE=last_level_alone,
        WALKS_DOWN=walks_down,
        OF_SAMPLES=of_samples,
        SUMS=LOSS_SUMS,
        SLOTS=SLOTS,
        COPIES=COPIES,
        num_warps=NUM_WARPS,
    )
