"""The HierarchicalTopK loss in one kernel, memory flat in K.

    L = factor / (B D) * sum_b sum_j c_j |r_j|^2,   r_j = sum_{i <= j} v_i w_i - target

with w_i = weight[indices[b, i]], v_i = vals[b, i] and c_j = 1 / K, or `level_weights`. A program
takes a few samples and one slice of D. It walks up the levels with the residual r in registers,
adding up the loss, and then down again, peeling one latent off r at each level, with the suffix sum
S of the scaled residuals; S gives every gradient (see `fused_loss`). No level is ever stored.
"""

import torch

from . import torch_backend
from ._triton import tl, triton
from .fused_loss import (
    Outputs,
    Wanted,
    check_arguments,
    define_loss_operator,
    empty_outputs,
    fused_loss,
    subtract_bias,
)
from .inverted_index import invert, sum_by_latent


@triton.jit
def _hierarchical_kernel(
    indices,
    weight,
    vals,
    target,
    level_weights,
    loss_parts,  # [slices, B]
    residual,
    grad_weight,  # float32, zeroed
    grad_vals_parts,  # [slices, B, K]
    grad_target,
    suffix_sums,  # [B, K, BLOCK_D], of one slice
    first_slice,
    scale,  # factor / (B D)
    B,
    K,
    F,
    D,
    stride_wf,
    stride_wd,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_LEVEL_WEIGHTS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    GRAD_VALS: tl.constexpr,
    GRAD_TARGET: tl.constexpr,
    SUFFIX_SUMS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    slice_ = first_slice + tl.program_id(1)
    d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)
    in_batch = b < B
    in_slice = d < D
    bd = b[:, None] * D + d[None, :]
    bd_mask = in_batch[:, None] & in_slice[None, :]
    weight_slice = weight + d[None, :].to(tl.int64) * stride_wd

    x = tl.load(target + bd, mask=bd_mask, other=0.0).to(tl.float32)
    r = -x
    loss = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    for j in range(K):
        i = tl.load(indices + b * K + j, mask=in_batch, other=-1).to(tl.int64)
        v = tl.load(vals + b * K + j, mask=in_batch, other=0.0).to(tl.float32)
        kept = (i >= 0) & (i < F)
        w = tl.load(
            weight_slice + i[:, None] * stride_wf,
            mask=kept[:, None] & in_slice[None, :],
            other=0.0,
        ).to(tl.float32)
        r += v[:, None] * w
        if HAS_LEVEL_WEIGHTS:
            c = tl.load(level_weights + j).to(tl.float32)
        else:
            c = 1.0 / K
        loss += c * r * r
    tl.store(loss_parts + slice_.to(tl.int64) * B + b, scale * tl.sum(loss, axis=1), mask=in_batch)
    if RESIDUAL:
        tl.store(residual + bd, r, mask=bd_mask)

    if GRAD_WEIGHT or GRAD_VALS or GRAD_TARGET or SUFFIX_SUMS:
        s = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for step in range(K):
            j = K - 1 - step
            i = tl.load(indices + b * K + j, mask=in_batch, other=-1).to(tl.int64)
            v = tl.load(vals + b * K + j, mask=in_batch, other=0.0).to(tl.float32)
            kept = (i >= 0) & (i < F)
            row_mask = kept[:, None] & in_slice[None, :]
            w = tl.load(weight_slice + i[:, None] * stride_wf, mask=row_mask, other=0.0)
            w = w.to(tl.float32)
            if HAS_LEVEL_WEIGHTS:
                c = tl.load(level_weights + j).to(tl.float32)
            else:
                c = 1.0 / K
            s += (2.0 * scale * c) * r
            if GRAD_VALS:
                tl.store(
                    grad_vals_parts + (slice_.to(tl.int64) * B + b) * K + j,
                    tl.sum(w * s, axis=1),
                    mask=in_batch,
                )
            if GRAD_WEIGHT:
                tl.atomic_add(
                    grad_weight + i[:, None] * D + d[None, :],
                    v[:, None] * s,
                    mask=row_mask,
                    sem="relaxed",
                )
            if SUFFIX_SUMS:
                column = tl.arange(0, BLOCK_D)[None, :]
                tl.store(
                    suffix_sums + (b * K + j)[:, None] * BLOCK_D + column,
                    s,
                    mask=in_batch[:, None],
                )
            r -= v[:, None] * w
        if GRAD_TARGET:
            tl.store(grad_target + bd, -s, mask=bd_mask)


BLOCK_B = 1
BLOCK_D = 64
NUM_WARPS = 1


def _launch(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    target: torch.Tensor,
    level_weights: torch.Tensor | None,
    factor: float,
    wanted: Wanted,
) -> Outputs:
    n_samples, k = indices.shape
    n_latents, d_in = weight.shape
    outputs = empty_outputs(weight, vals, target, wanted)
    n_slices = triton.cdiv(d_in, BLOCK_D)
    loss_parts = target.new_empty((n_slices, n_samples), dtype=torch.float32)
    grad_weight = target.new_zeros(
        weight.shape if wanted.grad_weight else (0,), dtype=torch.float32
    )
    grad_vals_parts = target.new_empty(
        (n_slices, n_samples, k) if wanted.grad_vals else (0,), dtype=torch.float32
    )
    indices, vals, target = indices.contiguous(), vals.contiguous(), target.contiguous()

    def walk(first_slice: int, n_slices: int, grad_weight_by_atomics: bool, suffix_sums=None):
        # The slices vary slowest, so that the slice at work, of weight and of its gradient, stays
        # in the second-level cache: 2 * 65536 * 64 * 4 bytes = 34 MB.
        _hierarchical_kernel[(triton.cdiv(n_samples, BLOCK_B), n_slices)](
            indices,
            weight,
            vals,
            target,
            level_weights,
            loss_parts,
            outputs.residual,
            grad_weight,
            grad_vals_parts,
            outputs.grad_target,
            suffix_sums,
            first_slice,
            factor / target.numel(),
            n_samples,
            k,
            n_latents,
            d_in,
            weight.stride(0),
            weight.stride(1),
            BLOCK_B=BLOCK_B,
            BLOCK_D=BLOCK_D,
            HAS_LEVEL_WEIGHTS=level_weights is not None,
            RESIDUAL=wanted.residual,
            GRAD_WEIGHT=grad_weight_by_atomics,
            GRAD_VALS=wanted.grad_vals,
            GRAD_TARGET=wanted.grad_target,
            SUFFIX_SUMS=suffix_sums is not None,
            num_warps=NUM_WARPS,  # pyright: ignore[reportCallIssue]
        )

    if wanted.grad_weight and torch.are_deterministic_algorithms_enabled():
        # The order of atomic additions varies, so a slice's S are stored and then added up latent
        # by latent.
        index = invert(indices, n_latents)
        suffix_sums = target.new_empty((n_samples * k, BLOCK_D), dtype=torch.float32)
        for slice_ in range(n_slices):
            walk(slice_, 1, False, suffix_sums)
            columns = min(BLOCK_D, d_in - slice_ * BLOCK_D)
            sum_by_latent(index, vals, suffix_sums, grad_weight, slice_ * BLOCK_D, columns)
    else:
        walk(0, n_slices, wanted.grad_weight)
    return outputs._replace(
        loss=loss_parts.sum(),
        grad_weight=grad_weight.to(weight.dtype),
        grad_vals=grad_vals_parts.sum(0).to(vals.dtype) if wanted.grad_vals else outputs.grad_vals,
    )


define_loss_operator("hierarchical_loss", triton=_launch, torch_=torch_backend.hierarchical)


def triton_hierarchical_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    *,
    level_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the squared error of every level, averaged over B, K and D, by fused kernels.

    The same function as `hierarchical_sae_loss`, whose docstring has the formula and the arguments,
    without its [B, K, D] tensor. It accumulates in float32 whatever the inputs' dtypes. With
    `torch.use_deterministic_algorithms(True)` its results are the same from run to run.

    Args:
        indices: [B, K], int32 or int64. A latent outside [0, F) is ignored; with the environment
            variable SAE_LENS_FLEX_CHECK_INDICES=1 it is an IndexError.
        weight: [F, D], vals: [B, K], bias: [D], target: [B, D]: float32, bfloat16 or float16.
        level_weights: [K], not differentiated. None weighs each level 1 / K.

    Returns:
        The loss, a float32 scalar, differentiable once in weight, vals, bias and target.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or device.
        RuntimeError: where Triton or its device is missing, and for a second derivative.
    """
    check_arguments(indices, weight, vals, bias, target, level_weights)
    loss, _ = fused_loss(
        "hierarchical_loss",
        indices,
        weight,
        vals,
        subtract_bias(target, bias),
        level_weights=level_weights,
        backend="triton",
    )
    return loss
