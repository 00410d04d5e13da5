"""The decoder losses by PyTorch alone, for every device without Triton.

The batch is walked in chunks, so the memory does not grow with B * K * D. The gradients come by the
formulas of `requests` while a chunk's rows are at hand.
"""

from collections.abc import Callable

import torch

from .checks import check_range
from .chunks import for_each_chunk
from .policy import accumulation_dtype, in_dtype, no_autocast
from .products import chunk_samples, scatter
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

    # In the loss of level K alone every pair of a sample shares one S, 2 scale r_K. So the gradient
    # of weight is summed latent by latent, once all r_K are known.
    is_last_level = isinstance(request.levels, str) and request.levels == "last"
    by_latent = is_last_level and wanted.weight is not None
    residual = new(wanted.residual or by_latent, n_samples, d_in)
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

    def walk(chunk: slice) -> Callable[[], None]:
        w = weight[code.latents[chunk].long()].to(dtype)  # [b, K, D]
        v = code.values[chunk].to(dtype)  # [b, K]
        x = target[chunk].to(dtype)  # [b, D]
        if bias is not None:
            x = x - bias.to(dtype)
        if level_weights is None:
            r = torch.bmm(v.unsqueeze(1), w) - x.unsqueeze(1)  # [b, 1, D]
            part = r.square().sum()
            s = (2 * scale) * r
        else:
            r = (v.unsqueeze(-1) * w).cumsum(dim=1).sub_(x.unsqueeze(1))  # [b, K, D]
            g = r * level_weights
            part = torch.dot(g.flatten(), r.flatten())
            s = g.flip(1).cumsum_(dim=1).flip(1).mul_(2 * scale)
        if residual is not None:
            residual[chunk] = r[:, -1]
        if grad_values is not None:
            grad_values[chunk] = (w * s).sum(-1).to(grad_values.dtype)
        if grad_target is not None:
            grad_target[chunk] = s[:, 0].neg().to(grad_target.dtype)
        of_weight = None
        if grad_weight is not None and not by_latent:
            of_weight = (v.unsqueeze(-1) * s).flatten(0, 1)  # [b K, D]

        def add() -> None:
            loss.add_(part)
            if grad_bias is not None:
                grad_bias.add_(s[:, 0].sum(0))
            if grad_weight is not None and of_weight is not None:
                grad_weight.index_add_(0, code.latents[chunk].flatten(), of_weight)

        return add

    for_each_chunk(walk, n_samples, chunk_samples(code, d_in), target.device)
    if by_latent and grad_weight is not None and residual is not None:
        index = request.index or code.by_latent(
            len(weight), use_triton=False, deterministic=request.deterministic
        )
        scatter(index, code.values, 2 * scale * residual, out=grad_weight, use_triton=False)
    return LossAndGradients(
        loss=loss * scale,
        residual=residual if wanted.residual else None,
        weight=None if grad_weight is None else in_dtype(grad_weight, wanted.weight),
        values=grad_values,
        bias=None if grad_bias is None else in_dtype(grad_bias, wanted.bias),
        target=grad_target,
    )
