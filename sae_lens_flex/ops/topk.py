"""The TopK loss, the squared error of the reconstruction from all K latents.

    L = factor / (B D) * sum_b |r|^2,   r = bias + sum_i v_i w_i - target

with w_i = weight[indices[b, i]] and v_i = vals[b, i]. Every level shares one S, 2 factor / (B D) r,
so unlike in `hierarchical` the gradients

    dL/dweight[f] = sum over the pairs (b, t) that chose f of v_t S[b],
    dL/dvals[b, t] = w_t . S[b]

can be taken latent by latent: one kernel gathers rows of weight and stores r, another walks the
inverted index and gathers rows of r, once for both gradients. A small batch without an index, for
which launches take longer than the device, is left to the one kernel of `hierarchical`.
"""

import torch

from . import _triton, hierarchical, torch_backend
from ._triton import cdiv, tl, triton
from .checks import check_arguments
from .fused_loss import Outputs, Wanted, define_loss_operator, fused_loss, gradient_dtype, kept
from .inverted_index import InvertedIndex, invert, sum_by_latent
from .levels import (
    add_to_bias,
    gather_levels,
    is_wide,
    levels_in_a_tile,
    store_losses,
    widened,
)


@triton.jit(do_not_specialize=["bias_rows", "B", "K", "F"])
def _residual_kernel(
    indices,
    weight,
    vals,
    bias,  # or None
    target,
    loss_parts,  # [slices, B]
    residual,  # or None
    grad_bias,  # or None; zeroed: [bias_rows, D], to be added up
    grad_target,  # or None
    scale,  # factor / (B D)
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

    r = -tl.load(target + bd, mask=bd_mask, other=0.0).to(tl.float32)
    if bias is not None:
        r += tl.load(bias + d, mask=in_slice, other=0.0).to(tl.float32)
    for first in range(0, K, LEVELS):
        _, v, w = gather_levels(
            first,
            indices,
            vals,
            weight_slice,
            sample,
            in_slice,
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
    r = tl.where(bd_mask, r, 0.0)  # where there is no target, a bias is no error
    store_losses(loss_parts, r * r, scale, slice_, sample, B, BLOCK_D)
    if residual is not None:
        tl.store(residual + bd, r, mask=bd_mask)
    if grad_target is not None:
        tl.store(grad_target + bd, (-2.0 * scale) * r, mask=bd_mask)
    if grad_bias is not None:
        add_to_bias(grad_bias, r, 2.0 * scale, slice_, bias_rows, D, BLOCK_D)


SLICE_BYTES = 256  # of a row of weight
NUM_WARPS = 1
# B K D from which an index is worth its launches. To the device it mostly is from 2^24 on: at
# B=4096, K=64, F=24576, D=768 an H200 takes 0.29 ms, by the one kernel 0.36 (bfloat16 and Zipf
# 0.24 and 0.40).
FEWEST_ELEMENTS = 2**27


def _launch(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    level_weights: torch.Tensor | None,
    read: torch.Tensor,
    index: InvertedIndex | None,
    factor: float,
    wanted: Wanted,
) -> Outputs:
    n_samples, k = indices.shape
    n_latents, d_in = weight.shape
    is_small = indices.numel() * d_in < FEWEST_ELEMENTS
    if is_small and index is None and not torch.are_deterministic_algorithms_enabled():
        return hierarchical.launch(
            *(indices, weight, vals, bias, target),
            *(None, read, None, factor, wanted),
            last_alone=True,
        )
    # The gradients are gathered from the residual or, one [B, D] tensor less where it is not asked
    # for, from a target's gradient of equal precision, -2 scale times the residual.
    gathers = wanted.grad_weight or wanted.grad_vals
    by_target = (
        wanted.grad_target and not wanted.residual and gradient_dtype(target.dtype) == torch.float32
    )
    indices, vals, target = indices.contiguous(), vals.contiguous(), target.contiguous()
    scale = factor / target.numel()
    block = SLICE_BYTES // read.element_size()
    levels = levels_in_a_tile(k)
    n_slices = cdiv(d_in, block)
    loss_parts = target.new_empty((n_slices, n_samples), dtype=torch.float32)
    n_programs = cdiv(n_samples, 2)
    bias_rows = n_programs  # nothing to be added twice
    if not torch.are_deterministic_algorithms_enabled():
        bias_rows = min(n_programs, hierarchical.BIAS_ROWS)
    residual = grad_bias = grad_target = None
    if wanted.grad_bias:
        grad_bias = target.new_zeros((bias_rows, d_in), dtype=torch.float32)
    if wanted.residual or (gathers and not by_target):
        residual = torch.empty_like(target, dtype=torch.float32)
    if wanted.grad_target:
        grad_target = torch.empty_like(target, dtype=gradient_dtype(target.dtype))
    _triton.launch(
        _residual_kernel,
        (n_programs, n_slices),
        (
            indices,
            read,
            vals,
            None if bias is None else bias.contiguous(),
            target,
            loss_parts,
            residual,
            grad_bias,
            grad_target,
        ),
        (scale,),
        (bias_rows, n_samples, k, n_latents, d_in, *read.stride()),
        BLOCK_D=block,
        LEVELS=levels,
        EVEN=n_samples % 2 == 0 and k % levels == 0 and d_in % block == 0,
        WIDE=is_wide(read),
        num_warps=NUM_WARPS,
    )
    grad_weight = grad_vals = None
    if residual is not None:
        rows, scale_of_rows = residual, 2 * scale
    else:
        rows, scale_of_rows = grad_target, -1.0
    if gathers and rows is not None:
        if wanted.grad_weight:
            grad_weight = weight.new_empty(weight.shape, dtype=gradient_dtype(weight.dtype))
        grad_vals = sum_by_latent(
            index or invert(indices, n_latents, use_triton=True),
            vals,
            rows,
            grad_weight,
            scale=scale_of_rows,
            weight=read if wanted.grad_vals else None,
        )
    if grad_vals is not None:
        grad_vals = kept(grad_vals, vals)
    if grad_bias is not None and bias is not None:
        grad_bias = kept(grad_bias.sum(0), bias)
    return Outputs(
        loss=loss_parts.sum(),
        residual=residual if wanted.residual else None,
        grad_weight=grad_weight,
        grad_vals=grad_vals,
        grad_bias=grad_bias,
        grad_target=grad_target,
    )


define_loss_operator("topk_loss", triton=_launch, torch_=torch_backend.topk)


def triton_topk_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
) -> torch.Tensor:
    """Return the squared error of the K-latent reconstruction, averaged over B and D.

    The same function as `topk_sae_loss`, by fused kernels; arguments, result and errors as in
    `triton_hierarchical_sae_loss`.
    """
    check_arguments(indices, weight, vals, bias, target)
    loss, _ = fused_loss("topk_loss", indices, weight, vals, bias, target, backend="triton")
    return loss
