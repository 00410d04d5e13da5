"""The losses of nested dictionaries: of the latents below each of some widths.

    r_m[b] = bias - target[b] + sum of values[b, i] weight[latents[b, i]] over those below width m
    L = scale * sum_b sum_m c_m |r_m[b]|^2,     S_m[b] = sum_{m' >= m} 2 scale c_m' r_m'[b]

A sample's latents ascend, so each width but the first adds the next part of its row to the one
before. A pair of part m has the gradients values[b, t] S_m[b] of weight and w_t . S_m[b] of its
value, dL/dbias = sum_b S_1[b] and dL/dtarget = -S_1. A program takes two samples and one slice of
D. It gathers part after part, each row of weight once, and stores g_m = 2 scale c_m r_m. Then it
adds the g_m up from the last to the first.
"""

from typing import NamedTuple

import torch

from .launch import cdiv, launch, tl, triton
from .tiles import (
    Batch,
    add_to_bias,
    gather_pairs,
    levels_from,
    levels_in_a_tile,
    slice_width,
    widened,
)


@triton.jit(do_not_specialize=["M", "n_sums", "bias_rows", "B", "F"])
def _nested_kernel(
    latents,
    values,
    weight,
    bias,  # or None
    target,
    starts,  # [B M + 1]: where the parts of each sample's row begin
    width_weights,  # [M]
    errors,  # float32, zeroed: [n_sums, M], parts
    residual,  # or None
    suffix_sums,  # or None
    grad_bias,  # or None; float32, zeroed: [bias_rows, D], parts
    grad_target,  # or None
    scale,
    M,
    n_sums,
    bias_rows,
    B,
    F,
    D,
    stride_wf,
    stride_wd,
    BLOCK_D: tl.constexpr,
    LEVELS: tl.constexpr,
    WIDE: tl.constexpr,  # whether an offset takes 64 bits
):
    sample = tl.program_id(0).to(tl.int64) * 2
    slice_ = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, 2 * BLOCK_D)
    b = sample + column // BLOCK_D
    d = slice_ * BLOCK_D + column % BLOCK_D
    in_slice = d < D
    bd = b * D + d
    bd_mask = (b < B) & in_slice
    weight_slice = weight + d * stride_wd
    both = sample + tl.arange(0, 2)
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    errors += (program % n_sums).to(tl.int64) * M

    r = -tl.load(target + bd, mask=bd_mask, other=0.0).to(tl.float32)
    if bias is not None:
        r += tl.load(bias + d, mask=in_slice, other=0.0).to(tl.float32)
    g = tl.zeros([2 * BLOCK_D], tl.float32)
    s = g
    for m in range(0, M):
        part = starts + both * M + m
        start = tl.load(part, mask=both < B, other=0)
        length = tl.load(part + 1, mask=both < B, other=0) - start
        for first in range(0, tl.max(length).to(tl.int32), LEVELS):
            level = levels_from(first, LEVELS)[:, None]
            _, v, w = gather_pairs(
                start[None, :] + level,
                level < length[None, :],
                latents,
                values,
                weight_slice,
                in_slice,
                F,
                stride_wf,
                BLOCK_D,
                False,
                WIDE,
            )
            r += tl.sum(widened(v, BLOCK_D) * w, 0)
        r = tl.where(bd_mask, r, 0.0)  # beyond the batch the bias is no error
        tl.atomic_add(errors + m, tl.sum(r * r), sem="relaxed")
        c = tl.load(width_weights + m).to(tl.float32)
        g = tl.where(c != 0.0, 2.0 * scale * c * r, 0.0)  # an infinite r times 0 would be NaN
        s += g
        if suffix_sums is not None:
            tl.store(suffix_sums + (b * M + m) * D + d, g, mask=bd_mask)
    if residual is not None:
        tl.store(residual + bd, r, mask=bd_mask)
    if grad_target is not None:
        tl.store(grad_target + bd, -s, mask=bd_mask)
    if grad_bias is not None:
        add_to_bias(grad_bias, s, 1.0, slice_, bias_rows, D, BLOCK_D)
    if suffix_sums is not None:
        tl.debug_barrier()  # Another thread may have stored what a thread loads.
        for step in range(1, M):
            at = suffix_sums + (b * M + (M - 1 - step)) * D + d
            g += tl.load(at, mask=bd_mask, other=0.0)
            tl.store(at, g, mask=bd_mask)


NUM_WARPS = 1


class Outputs(NamedTuple):
    """The tensors that are written, or added to; None for one that is not wanted.

    Attributes:
        errors: [n_sums, M], float32, zeroed: parts of the sums of |r_m|^2 over the samples.
        residual: r of the last width, [B, D], float32.
        suffix_sums: S, [B M, D], float32.
        grad_bias: [bias_rows, D], float32, zeroed: parts of the gradient.
        grad_target: [B, D].
    """

    errors: torch.Tensor
    residual: torch.Tensor | None = None
    suffix_sums: torch.Tensor | None = None
    grad_bias: torch.Tensor | None = None
    grad_target: torch.Tensor | None = None


def nested(batch: Batch, width_weights: torch.Tensor, outputs: Outputs, *, scale: float) -> None:
    """Write what the losses of a batch's widths take.

    Args:
        batch: with a target, and in `starts`, [B M + 1], where the part of each width begins in
            each row. The latents of a row ascend.
        width_weights: c, [M], contiguous.
        outputs: what to write.
        scale: multiplies the loss.
    """
    sizes = batch.sizes()  # K is the mean length of a part
    assert batch.target is not None
    n_samples, block = len(batch.target), slice_width(batch.weight)
    launch(
        _nested_kernel,
        (cdiv(n_samples, 2), cdiv(sizes.d_in, block)),
        (*batch, width_weights, *outputs),
        (scale,),
        (
            len(width_weights),
            len(outputs.errors),
            1 if outputs.grad_bias is None else len(outputs.grad_bias),
            n_samples,
            *sizes[2:],
        ),
        BLOCK_D=block,
        LEVELS=levels_in_a_tile(sizes.k),
        WIDE=sizes.is_wide(),
        num_warps=NUM_WARPS,
    )
