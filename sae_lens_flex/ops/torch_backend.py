"""The fused losses by PyTorch alone, for every device without Triton.

It walks the batch in chunks, so that its memory does not grow with B * K * D, and computes the
gradients by the formulas of `fused_loss` while a chunk's rows are at hand.
"""

import torch

from .checks import check_range
from .fused_loss import Outputs, Wanted, accumulation_dtype, gradient_dtype, kept
from .inverted_index import InvertedIndex

# A chunk's [b, K, D] tensors have about this many elements. On a CPU 2^18 (1 MiB in float32) keeps
# the handful of them in the second-level cache; a GPU wants work enough to fill it.
CPU_CHUNK_ELEMENTS = 2**18
GPU_CHUNK_ELEMENTS = 2**24


def hierarchical(
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
    """Compute the loss over all levels; arguments and result as in `fused_loss`."""
    k = indices.shape[1]
    if level_weights is None:
        dtype = accumulation_dtype(weight, vals, target)
        level_weights = weight.new_full((k,), 1 / k, dtype=dtype)
    return _walk_batch(indices, weight, vals, bias, target, level_weights, read, factor, wanted)


def topk(
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
    """Compute the loss of level K; arguments and result as in `fused_loss`."""
    return _walk_batch(indices, weight, vals, bias, target, None, read, factor, wanted)


def _walk_batch(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    level_weights: torch.Tensor | None,
    read: torch.Tensor,
    factor: float,
    wanted: Wanted,
) -> Outputs:
    """Level weights [K], or None for level K alone."""
    check_range(indices, weight.shape[0])
    dtype = accumulation_dtype(weight, vals, target)

    def new(like: torch.Tensor | None, is_wanted: bool) -> torch.Tensor | None:
        if like is None or not is_wanted:
            return None
        dtype = gradient_dtype(like.dtype)
        return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)

    residual = new(target.to(dtype), wanted.residual)
    grad_vals, grad_target = new(vals, wanted.grad_vals), new(target, wanted.grad_target)
    grad_weight = grad_bias = None
    if wanted.grad_weight:
        grad_weight = weight.new_zeros(weight.shape, dtype=dtype)
    if bias is not None and wanted.grad_bias:
        grad_bias = bias.new_zeros(bias.shape, dtype=dtype)
    loss = target.new_zeros((), dtype=dtype)
    scale = factor / target.numel()
    n_samples, k = indices.shape
    is_cpu = weight.device.type == "cpu"
    chunk_elements = CPU_CHUNK_ELEMENTS if is_cpu else GPU_CHUNK_ELEMENTS
    chunk = max(1, chunk_elements // (k * weight.shape[1]))
    if level_weights is not None:
        level_weights = level_weights.to(dtype).view(1, k, 1)

    for start in range(0, n_samples, chunk):
        rows = slice(start, start + chunk)
        w = read[indices[rows].long()].to(dtype)
        v = vals[rows].to(dtype)
        x = target[rows].to(dtype)
        if bias is not None:
            x = x - bias.to(dtype)
        if level_weights is None:
            r = torch.bmm(v.unsqueeze(1), w) - x.unsqueeze(1)
            loss += r.square().sum()
            s = (2 * scale) * r
        else:
            r = (v.unsqueeze(-1) * w).cumsum(dim=1).sub_(x.unsqueeze(1))
            g = r * level_weights
            loss += torch.dot(g.flatten(), r.flatten())
            s = g.flip(1).cumsum_(dim=1).flip(1).mul_(2 * scale)
        if residual is not None:
            residual[rows] = r[:, -1]
        if grad_vals is not None:
            grad_vals[rows] = (w * s).sum(-1).to(grad_vals.dtype)
        if grad_bias is not None:
            grad_bias += s[:, 0].sum(0)
        if grad_target is not None:
            grad_target[rows] = s[:, 0].neg().to(grad_target.dtype)
        if grad_weight is not None:
            grad_weight.index_add_(0, indices[rows].flatten(), (v.unsqueeze(-1) * s).flatten(0, 1))
    if grad_weight is not None:
        grad_weight = kept(grad_weight, weight)
    if grad_bias is not None and bias is not None:
        grad_bias = kept(grad_bias, bias)
    return Outputs(
        loss=loss * scale,
        residual=residual,
        grad_weight=grad_weight,
        grad_vals=grad_vals,
        grad_bias=grad_bias,
        grad_target=grad_target,
    )
