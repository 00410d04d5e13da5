"""The decoder losses by PyTorch alone, for every device without Triton.

The batch is walked in chunks, so the memory does not grow with B * K * D. The gradients come by the
formulas of `requests` while a chunk's rows are at hand.
"""

import torch

from .checks import check_range
from .policy import accumulation_dtype, in_dtype, no_autocast
from .products import chunk_samples
from .requests import DecoderLoss, LossAndGradients


def decoder_loss(request: DecoderLoss) -> LossAndGradients:
    """Compute what a request asks for.

    Raises:
        IndexError: for a latent outside [0, F).
    """
    with no_autocast(request.weight.device):
        return _walk_batch(request)


def _walk_batch(request: DecoderLoss) -> LossAndGradients:
    code, weight, bias, target = request.code, request.weight, request.bias, request.target
    wanted, scale = request.wanted, request.scale
    check_range(code.latents, weight.shape[0])
    n_samples, k = code.latents.shape
    d_in = weight.shape[1]
    dtype = accumulation_dtype(weight, code.values, target)

    def new(is_wanted: object, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor | None:
        return target.new_zeros(shape, dtype=dtype) if is_wanted else None

    residual = new(wanted.residual, n_samples, d_in)
    grad_values = new(wanted.values, n_samples, k, dtype=wanted.values or dtype)
    grad_target = new(wanted.target, n_samples, d_in, dtype=wanted.target or dtype)
    grad_weight = new(wanted.weight, *weight.shape)
    grad_bias = new(wanted.bias, d_in)
    loss = target.new_zeros((), dtype=dtype)
    level_weights = None  # [1, K, 1], or None for level K alone
    if isinstance(request.levels, torch.Tensor):
        level_weights = request.levels.to(dtype).view(1, k, 1)
    elif request.levels == "every":
        level_weights = target.new_full((1, k, 1), 1 / k, dtype=dtype)

    n_rows = chunk_samples(code, d_in)
    for start in range(0, n_samples, n_rows):
        chunk = slice(start, start + n_rows)
        w = weight[code.latents[chunk].long()].to(dtype)  # [b, K, D]
        v = code.values[chunk].to(dtype)  # [b, K]
        x = target[chunk].to(dtype)  # [b, D]
        if bias is not None:
            x = x - bias.to(dtype)
        if level_weights is None:
            r = torch.bmm(v.unsqueeze(1), w) - x.unsqueeze(1)  # [b, 1, D]
            loss += r.square().sum()
            s = (2 * scale) * r
        else:
            r = (v.unsqueeze(-1) * w).cumsum(dim=1).sub_(x.unsqueeze(1))  # [b, K, D]
            g = r * level_weights
            loss += torch.dot(g.flatten(), r.flatten())
            s = g.flip(1).cumsum_(dim=1).flip(1).mul_(2 * scale)
        if residual is not None:
            residual[chunk] = r[:, -1]
        if grad_values is not None:
            grad_values[chunk] = (w * s).sum(-1).to(grad_values.dtype)
        if grad_bias is not None:
            grad_bias += s[:, 0].sum(0)
        if grad_target is not None:
            grad_target[chunk] = s[:, 0].neg().to(grad_target.dtype)
        if grad_weight is not None:
            pairs = code.latents[chunk].flatten()
            grad_weight.index_add_(0, pairs, (v.unsqueeze(-1) * s).flatten(0, 1))
    return LossAndGradients(
        loss=loss * scale,
        residual=residual,
        weight=None if grad_weight is None else in_dtype(grad_weight, wanted.weight),
        values=grad_values,
        bias=None if grad_bias is None else in_dtype(grad_bias, wanted.bias),
        target=grad_target,
    )
