"""The TopK loss, the squared error of the reconstruction from all K latents, in two kernels.

    L = factor / (B D) * sum_b |r|^2,   r = sum_i v_i w_i - target,   S = 2 factor / (B D) * r

with w_i = weight[indices[b, i]] and v_i = vals[b, i]. Every level shares one S, so unlike in
`hierarchical` the gradients

    dL/dweight[f] = sum over the pairs (b, t) that chose f of v_t S[b],
    dL/dvals[b, t] = w_t . S[b]

can be taken latent by latent: the first kernel gathers rows of weight and stores r, the second
walks the inverted index and gathers rows of r, once for both gradients.
"""

import torch

from . import torch_backend
from ._triton import tl, triton
from .checks import check_arguments
from .fused_loss import (
    Outputs,
    Wanted,
    define_loss_operator,
    empty_outputs,
    fused_loss,
    subtract_bias,
)
from .inverted_index import InvertedIndex, invert, sum_by_latent
from .levels import gather_levels


@triton.jit(do_not_specialize=["B", "K", "F"])
def _residual_kernel(
    indices,
    weight,
    vals,
    target,
    loss_parts,  # [slices, B]
    residual,
    grad_target,
    scale,  # factor / (B D)
    B,
    K,
    F,
    D,
    stride_wf,
    stride_wd,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEVELS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GRAD_TARGET: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    slice_ = tl.program_id(1).to(tl.int64)
    d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)
    in_batch = b < B
    in_slice = (d < D)[None, :]
    bd = b[:, None] * D + d[None, :]
    bd_mask = in_batch[:, None] & in_slice
    weight_slice = weight + d[None, :] * stride_wd

    r = -tl.load(target + bd, mask=bd_mask, other=0.0).to(tl.float32)
    for first in range(0, K, LEVELS):
        _, v, w = gather_levels(
            first,
            indices,
            vals,
            weight_slice,
            b,
            in_slice,
            B,
            K,
            F,
            stride_wf,
            LEVELS,
        )
        for t in tl.static_range(LEVELS):
            r += v[t][:, None] * w[t]
    tl.store(loss_parts + slice_ * B + b, scale * tl.sum(r * r, axis=1), mask=in_batch)
    if RESIDUAL:
        tl.store(residual + bd, r, mask=bd_mask)
    if GRAD_TARGET:
        tl.store(grad_target + bd, (-2.0 * scale) * r, mask=bd_mask)


BLOCK_B = 2
SLICE_BYTES = 256  # of a row of weight
LEVELS = 8
NUM_WARPS = 1


def _launch(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    target: torch.Tensor,
    level_weights: torch.Tensor | None,
    index: InvertedIndex | None,
    factor: float,
    wanted: Wanted,
) -> Outputs:
    n_samples, k = indices.shape
    n_latents, d_in = weight.shape
    # The gradients are gathered from the residual or, one [B, D] tensor less where it is not asked
    # for, from a target's gradient of equal precision, -2 scale times the residual.
    gathers = wanted.grad_weight or wanted.grad_vals
    by_target = wanted.grad_target and not wanted.residual and target.dtype == torch.float32
    stores_residual = wanted.residual or (gathers and not by_target)
    outputs = empty_outputs(
        weight, vals, target, wanted._replace(residual=stores_residual, grad_vals=False)
    )
    indices, vals = indices.contiguous(), vals.contiguous()
    scale = factor / target.numel()
    block = SLICE_BYTES // weight.element_size()
    n_slices = triton.cdiv(d_in, block)
    loss_parts = target.new_empty((n_slices, n_samples), dtype=torch.float32)
    _residual_kernel[(triton.cdiv(n_samples, BLOCK_B), n_slices)](
        indices,
        weight,
        vals,
        target.contiguous(),
        loss_parts,
        outputs.residual,
        outputs.grad_target,
        scale,
        n_samples,
        k,
        n_latents,
        d_in,
        weight.stride(0),
        weight.stride(1),
        BLOCK_B=BLOCK_B,
        BLOCK_D=block,
        LEVELS=LEVELS,
        RESIDUAL=stores_residual,
        GRAD_TARGET=wanted.grad_target,
        num_warps=NUM_WARPS,
    )
    grad_vals = outputs.grad_vals
    if gathers:
        dots = sum_by_latent(
            index or invert(indices, n_latents),
            vals,
            outputs.grad_target if by_target else outputs.residual,
            outputs.grad_weight if wanted.grad_weight else None,
            scale=-1.0 if by_target else 2 * scale,
            weight=weight if wanted.grad_vals else None,
        )
        if dots is not None:
            grad_vals = dots.to(vals.dtype)
    return outputs._replace(
        loss=loss_parts.sum(),
        residual=outputs.residual if wanted.residual else target.new_empty(0, dtype=torch.float32),
        grad_vals=grad_vals,
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
    `triton_hierarchical_sae_loss`. Its results are the same from run to run.
    """
    check_arguments(indices, weight, vals, bias, target)
    loss, _ = fused_loss(
        "topk_loss", indices, weight, vals, subtract_bias(target, bias), backend="triton"
    )
    return loss
