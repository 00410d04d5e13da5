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
def _residual_kernel(
    indices,
    weight,
    vals,
    target,
    loss_parts,  # [slices, B]
    residual,
    scale,  # factor / (B D)
    B,
    K,
    F,
    D,
    stride_wf,
    stride_wd,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_batch = b < B
    in_slice = d < D
    bd = b[:, None] * D + d[None, :]
    bd_mask = in_batch[:, None] & in_slice[None, :]
    weight_slice = weight + d[None, :].to(tl.int64) * stride_wd

    r = -tl.load(target + bd, mask=bd_mask, other=0.0).to(tl.float32)
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
    tl.store(loss_parts + tl.program_id(1) * B + b, scale * tl.sum(r * r, axis=1), mask=in_batch)
    tl.store(residual + bd, r, mask=bd_mask)


@triton.jit
def _gradients_kernel(
    latents,
    pairs,
    weight,
    vals,
    residual,
    grad_weight,  # float32, zeroed
    grad_vals_parts,  # [slices, B * K]
    scale,  # 2 factor / (B D)
    N,  # B * K
    K,
    F,
    D,
    stride_wf,
    stride_wd,
    RUN: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    GRAD_VALS: tl.constexpr,
):
    # A program takes a run of RUN pairs, however few latents they belong to: no latent, however
    # often it fires, makes one program's work longer. A latent whose pairs lie in one run is
    # stored; one that spans runs is added atomically, once a run.
    first = tl.program_id(0) * RUN
    last = tl.minimum(first + RUN, N) - 1
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    weight_slice = weight + d.to(tl.int64) * stride_wd

    f = tl.load(latents + first).to(tl.int64)
    before = tl.load(latents + first - 1, mask=first > 0, other=-1).to(tl.int64)
    is_shared = (first > 0) & (before == f)
    width = tl.where((f >= 0) & (f < F), D, 0)  # a latent outside [0, F) has no columns
    w = tl.zeros([BLOCK_D], tl.float32)
    if GRAD_VALS:
        w = tl.load(weight_slice + f * stride_wf, mask=d < width, other=0.0)
        w = w.to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for n in range(first, last + 1):
        latent = tl.load(latents + n).to(tl.int64)
        if latent != f:
            if GRAD_WEIGHT:
                out = grad_weight + f * D + d
                if is_shared:
                    tl.atomic_add(out, total, mask=d < width, sem="relaxed")
                else:
                    tl.store(out, total, mask=d < width)
            f = latent
            is_shared = False
            width = tl.where((f >= 0) & (f < F), D, 0)
            if GRAD_VALS:
                w = tl.load(weight_slice + f * stride_wf, mask=d < width, other=0.0)
                w = w.to(tl.float32)
            total = tl.zeros([BLOCK_D], tl.float32)
        pair = tl.load(pairs + n)
        s = scale * tl.load(residual + (pair // K) * D + d, mask=d < D, other=0.0)
        if GRAD_WEIGHT:
            total += tl.load(vals + pair).to(tl.float32) * s
        if GRAD_VALS:
            tl.store(grad_vals_parts + tl.program_id(1).to(tl.int64) * N + pair, tl.sum(w * s))
    if GRAD_WEIGHT:
        after = tl.load(latents + last + 1, mask=last + 1 < N, other=-1).to(tl.int64)
        is_shared = is_shared | ((last + 1 < N) & (after == f))
        out = grad_weight + f * D + d
        if is_shared:
            tl.atomic_add(out, total, mask=d < width, sem="relaxed")
        else:
            tl.store(out, total, mask=d < width)


RESIDUAL_BLOCK_B = 2
RESIDUAL_BLOCK_D = 64
RESIDUAL_NUM_WARPS = 1
RUN = 32
GRADIENTS_BLOCK_D = 256
GRADIENTS_NUM_WARPS = 1


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
    residual = target.new_empty(target.shape, dtype=torch.float32)
    indices, vals = indices.contiguous(), vals.contiguous()
    scale = factor / target.numel()
    n_slices = triton.cdiv(d_in, RESIDUAL_BLOCK_D)
    loss_parts = target.new_empty((n_slices, n_samples), dtype=torch.float32)
    _residual_kernel[(triton.cdiv(n_samples, RESIDUAL_BLOCK_B), n_slices)](
        indices,
        weight,
        vals,
        target.contiguous(),
        loss_parts,
        residual,
        scale,
        n_samples,
        k,
        n_latents,
        d_in,
        weight.stride(0),
        weight.stride(1),
        BLOCK_B=RESIDUAL_BLOCK_B,
        BLOCK_D=RESIDUAL_BLOCK_D,
        num_warps=RESIDUAL_NUM_WARPS,  # pyright: ignore[reportCallIssue]
    )
    grad_weight, grad_vals, grad_target = outputs[2:]
    if wanted.grad_weight or wanted.grad_vals:
        index = invert(indices, n_latents)
        n_slices = triton.cdiv(d_in, GRADIENTS_BLOCK_D)
        grad_weight = target.new_zeros(
            weight.shape if wanted.grad_weight else (0,), dtype=torch.float32
        )
        grad_vals_parts = target.new_empty(
            (n_slices, n_samples, k) if wanted.grad_vals else (0,), dtype=torch.float32
        )
        is_deterministic = torch.are_deterministic_algorithms_enabled()
        _gradients_kernel[(triton.cdiv(n_samples * k, RUN), n_slices)](
            index.latents,
            index.pairs,
            weight,
            vals,
            residual,
            grad_weight,
            grad_vals_parts,
            2 * scale,
            n_samples * k,
            k,
            n_latents,
            d_in,
            weight.stride(0),
            weight.stride(1),
            RUN=RUN,
            BLOCK_D=GRADIENTS_BLOCK_D,
            GRAD_WEIGHT=wanted.grad_weight and not is_deterministic,
            GRAD_VALS=wanted.grad_vals,
            num_warps=GRADIENTS_NUM_WARPS,  # pyright: ignore[reportCallIssue]
        )
        if wanted.grad_weight and is_deterministic:  # the order of atomic additions varies
            sum_by_latent(index, vals, 2 * scale * residual, grad_weight)
        grad_weight = grad_weight.to(weight.dtype)
        if wanted.grad_vals:
            grad_vals = grad_vals_parts.sum(0).to(vals.dtype)
    if wanted.grad_target:
        grad_target = (-2 * scale * residual).to(target.dtype)
    return Outputs(
        loss=loss_parts.sum(),
        residual=residual if wanted.residual else outputs.residual,
        grad_weight=grad_weight,
        grad_vals=grad_vals,
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
    loss, _ = fused_loss(
        "topk_loss", indices, weight, vals, subtract_bias(target, bias), backend="triton"
    )
    return loss
