"""The residual of the last level: what a sample's rows of weight add up to, less a target.

    r[b] = bias + sum_i values[b, i] * weight[latents[b, i]] - target[b]

Without bias and target this is sparse decoding. The squared error and its gradients that need
nothing but r come in the same pass:

    L = scale * sum_b |r[b]|^2,     dL/dbias = 2 scale sum_b r[b],     dL/dtarget = -2 scale r.
"""

from typing import NamedTuple

import torch

from .launch import cdiv, launch, tl, triton
from .tiles import (
    Batch,
    add_to_bias,
    add_to_loss,
    gather_levels,
    highest_level,
    levels_in_a_tile,
    slice_width,
    widened,
)


@triton.jit(do_not_specialize=["n_sums", "bias_rows", "B", "K", "F"])
def _residual_kernel(
    latents,
    values,
    weight,
    bias,  # or None
    target,  # or None
    starts,  # or None
    loss_sums,  # or None; float32, zeroed: [n_sums], parts
    residual,  # or None
    grad_bias,  # or None; float32, zeroed: [bias_rows, D], parts
    grad_target,  # or None
    scale,
    n_sums,
    bias_rows,
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

    r = tl.zeros([2 * BLOCK_D], tl.float32)
    if target is not None:
        r = -tl.load(target + bd, mask=bd_mask, other=0.0).to(tl.float32)
    if bias is not None:
        r += tl.load(bias + d, mask=in_slice, other=0.0).to(tl.float32)
    for first in range(0, highest_level(sample, starts, B, K), LEVELS):
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
        r += tl.sum(widened(v, BLOCK_D) * w, 0)
    r = tl.where(bd_mask, r, 0.0)  # beyond the batch the bias is no error
    if loss_sums is not None:
        add_to_loss(loss_sums, scale * tl.sum(r * r), n_sums)
    if residual is not None:
        tl.store(residual + bd, r, mask=bd_mask)
    if grad_target is not None:
        tl.store(grad_target + bd, (-2.0 * scale) * r, mask=bd_mask)
    if grad_bias is not None:
        add_to_bias(grad_bias, r, 2.0 * scale, slice_, bias_rows, D, BLOCK_D)


NUM_WARPS = 1


class Outputs(NamedTuple):
    """The tensors that are written, or added to; None for one that is not wanted.

    Attributes:
        loss_sums: [n_sums], float32, zeroed: parts of the loss.
        residual: r, [B, D], float32.
        grad_bias: [bias_rows * D], float32, zeroed: parts of the gradient.
        grad_target: [B, D].
    """

    loss_sums: torch.Tensor | None = None
    residual: torch.Tensor | None = None
    grad_bias: torch.Tensor | None = None
    grad_target: torch.Tensor | None = None


def residual(batch: Batch, outputs: Outputs, *, scale: float = 1.0) -> None:
    """Write a batch's residual, and what comes with it."""
    sizes = batch.sizes()
    block = slice_width(batch.weight)
    levels = levels_in_a_tile(sizes.k)
    launch(
        _residual_kernel,
        (cdiv(sizes.n_samples, 2), cdiv(sizes.d_in, block)),
        (*batch, *outputs),
        (scale,),
        (
            1 if outputs.loss_sums is None else len(outputs.loss_sums),
            1 if outputs.grad_bias is None else outputs.grad_bias.numel() // sizes.d_in,
            *sizes,
        ),
        BLOCK_D=block,
        LEVELS=levels,
        EVEN=batch.starts is None and sizes.are_even(levels, block),
        WIDE=sizes.is_wide(),
        num_warps=NUM_WARPS,
    )
