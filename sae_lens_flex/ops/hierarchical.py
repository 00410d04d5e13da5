"""The HierarchicalTopK loss in one kernel, memory flat in K.

    L = factor / (B D) * sum_b sum_j c_j |r_j|^2,   r_j = sum_{i <= j} v_i w_i - target

with w_i = weight[indices[b, i]], v_i = vals[b, i] and c_j = 1 / K, or `level_weights`. A program
takes two samples and one slice of D. It walks up the levels with the residual r in registers,
adding up the loss, and then down again, peeling one latent off r at each level, with the suffix sum
S of the scaled residuals; S gives every gradient (see `fused_loss`). No level is ever stored.
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
from .spread import COPIES, SLOTS, fold_copies, spread


@triton.jit
def _level_weight(level_weights, j, K, HAS_LEVEL_WEIGHTS: tl.constexpr):
    if HAS_LEVEL_WEIGHTS:
        return tl.load(level_weights + j, mask=j < K, other=0.0).to(tl.float32)
    else:
        return tl.where(j < K, 1.0 / K, 0.0)


# Compiling takes some seconds: not again for every divisibility of what no address depends on.
@triton.jit(do_not_specialize=["first_slice", "B", "K", "F"])
def _hierarchical_kernel(
    indices,
    weight,
    vals,
    target,
    level_weights,
    rows,  # [B, K]: where in grad_weight each pair adds, for HAS_ROWS
    loss_parts,  # [slices, B]
    residual,
    grad_weight,  # float32, zeroed
    grad_vals,  # float32, zeroed
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
    LEVELS: tl.constexpr,
    HAS_LEVEL_WEIGHTS: tl.constexpr,
    HAS_ROWS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    GRAD_VALS: tl.constexpr,
    GRAD_TARGET: tl.constexpr,
    SUFFIX_SUMS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    slice_ = (first_slice + tl.program_id(1)).to(tl.int64)
    d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)
    in_slice = (d < D)[None, :]
    bd = b[:, None] * D + d[None, :]
    bd_mask = (b < B)[:, None] & in_slice
    weight_slice = weight + d[None, :] * stride_wd

    r = -tl.load(target + bd, mask=bd_mask, other=0.0).to(tl.float32)
    loss = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    last = (tl.cdiv(K, LEVELS) - 1) * LEVELS
    for first in range(0, last, LEVELS):
        f, v, w = gather_levels(
            first, indices, vals, weight_slice, b, in_slice, B, K, F, stride_wf, LEVELS
        )
        for t in tl.static_range(LEVELS):
            r += v[t][:, None] * w[t]
            loss += _level_weight(level_weights, first + t, K, HAS_LEVEL_WEIGHTS) * r * r
    f, v, w = gather_levels(
        last, indices, vals, weight_slice, b, in_slice, B, K, F, stride_wf, LEVELS
    )
    for t in tl.static_range(LEVELS):
        r += v[t][:, None] * w[t]
        loss += _level_weight(level_weights, last + t, K, HAS_LEVEL_WEIGHTS) * r * r
    tl.store(loss_parts + slice_ * B + b, scale * tl.sum(loss, axis=1), mask=b < B)
    if RESIDUAL:
        tl.store(residual + bd, r, mask=bd_mask)

    if GRAD_WEIGHT or GRAD_VALS or GRAD_TARGET or SUFFIX_SUMS:
        s = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        for step in range(0, last + LEVELS, LEVELS):
            first = last - step
            if step > 0:  # the last levels' rows are at hand
                f, v, w = gather_levels(
                    first, indices, vals, weight_slice, b, in_slice, B, K, F, stride_wf, LEVELS
                )
            dots = tl.zeros([BLOCK_B, LEVELS], tl.float32)
            column = tl.arange(0, LEVELS)[None, :]
            for t in tl.static_range(LEVELS - 1, -1, -1):
                j = first + t
                s += (2.0 * scale * _level_weight(level_weights, j, K, HAS_LEVEL_WEIGHTS)) * r
                if GRAD_VALS:
                    dots = tl.where(column == t, tl.sum(w[t] * s, axis=1)[:, None], dots)
                if GRAD_WEIGHT:
                    row = f[t]
                    if HAS_ROWS:
                        exists = b < tl.where(j < K, B, 0)
                        row = tl.load(rows + b * K + j, mask=exists, other=-1).to(tl.int64)
                    tl.atomic_add(
                        grad_weight + row[:, None] * D + d[None, :],
                        v[t][:, None] * s,
                        mask=(f[t] >= 0)[:, None] & in_slice,
                        sem="relaxed",
                    )
                if SUFFIX_SUMS:
                    out = (b * K + j)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
                    tl.store(suffix_sums + out, s, mask=(b < tl.where(j < K, B, 0))[:, None])
                r -= v[t][:, None] * w[t]
            if GRAD_VALS:
                tl.atomic_add(
                    grad_vals + (b * K)[:, None] + (first + column),
                    dots,
                    mask=(b < B)[:, None] & (first + column < K),
                    sem="relaxed",
                )
        if GRAD_TARGET:
            tl.store(grad_target + bd, -s, mask=bd_mask)


# One launch on an H200 at B=4096, K=128, F=65536, D=2304, float32, uniform indices: 2.51 ms. With
# one sample a program 2.72, slices 32 wide 2.66 and 128 wide 3.68, 4 levels at a time 3.16; 16
# levels take half a minute to compile. benchmarks/README.md says why.
BLOCK_B = 2
BLOCK_D = 64
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
    outputs = empty_outputs(
        weight, vals, target, wanted._replace(grad_weight=False, grad_vals=False)
    )
    indices, vals, target = indices.contiguous(), vals.contiguous(), target.contiguous()
    n_slices = triton.cdiv(d_in, BLOCK_D)
    loss_parts = target.new_empty((n_slices, n_samples), dtype=torch.float32)
    grad_vals = target.new_zeros(vals.shape if wanted.grad_vals else (0,), dtype=torch.float32)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    spread_ = None
    if wanted.grad_weight and not is_deterministic:
        spread_ = spread(indices, n_latents)
    n_copies = 0 if spread_ is None else SLOTS * COPIES
    grad_weight = target.new_zeros(
        (n_latents + n_copies, d_in) if wanted.grad_weight else (0, d_in), dtype=torch.float32
    )

    def walk(first_slice: int, n_slices: int, suffix_sums: torch.Tensor | None = None) -> None:
        # The slices vary slowest, so that the slice at work, of weight and of its gradient, stays
        # in the second-level cache: 2 * 65536 * 64 * 4 bytes = 34 MB.
        _hierarchical_kernel[(triton.cdiv(n_samples, BLOCK_B), n_slices)](
            indices,
            weight,
            vals,
            target,
            level_weights,
            None if spread_ is None else spread_.rows,
            loss_parts,
            outputs.residual,
            grad_weight,
            grad_vals,
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
            LEVELS=LEVELS,
            HAS_LEVEL_WEIGHTS=level_weights is not None,
            HAS_ROWS=spread_ is not None,
            RESIDUAL=wanted.residual,
            GRAD_WEIGHT=wanted.grad_weight and not is_deterministic,
            GRAD_VALS=wanted.grad_vals,
            GRAD_TARGET=wanted.grad_target,
            SUFFIX_SUMS=suffix_sums is not None,
            num_warps=NUM_WARPS,
        )

    if is_deterministic:
        # The order of atomic additions varies. So the slices, which all add to grad_vals, are
        # launched one after another; and their S are stored and then added up latent by latent.
        index = (index or invert(indices, n_latents)) if wanted.grad_weight else None
        suffix_sums = None
        if index is not None:
            suffix_sums = target.new_empty((n_samples * k, BLOCK_D), dtype=torch.float32)
        for slice_ in range(n_slices):
            walk(slice_, 1, suffix_sums)
            if index is not None and suffix_sums is not None:
                first = slice_ * BLOCK_D
                n_columns = min(BLOCK_D, d_in - first)
                sum_by_latent(
                    index,
                    vals,
                    suffix_sums[:, :n_columns].contiguous(),
                    grad_weight,
                    first_column=first,
                    zero_absent=False,
                )
    else:
        walk(0, n_slices)
    if spread_ is not None:
        fold_copies(spread_, grad_weight, n_latents)
        grad_weight = grad_weight[:n_latents]
    return outputs._replace(
        loss=loss_parts.sum(),
        grad_weight=grad_weight.to(weight.dtype) if wanted.grad_weight else outputs.grad_weight,
        grad_vals=grad_vals.to(vals.dtype),
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
