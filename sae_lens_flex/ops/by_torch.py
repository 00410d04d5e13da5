"""The decoder losses by PyTorch alone, for every device without Triton.

The batch is walked in chunks, so the memory does not grow with B * K * D. The gradients come by the
formulas of `requests` while a chunk's rows are at hand.
"""

from collections.abc import Callable

import torch

from .checks import check_range
from .chunks import for_each
from .policy import accumulation_dtype, in_dtype, no_autocast
from .products import chunks_of, rows_of_weight, scatter
from .requests import DecoderLoss, LossAndGradients, are_of_samples


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
    if code.latents.numel() > 0:
        check_range(code.latents, weight.shape[0])
    n_samples, d_in = target.shape
    dtype = accumulation_dtype(weight, code.values, target)

    def new(is_wanted: object, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor | None:
        return target.new_zeros(shape, dtype=dtype) if is_wanted else None

    # In the loss of the last level alone every pair of a sample shares one S, 2 scale r_K. So the
    # gradient of weight is summed latent by latent, once all r_K are known.
    is_last_level = isinstance(request.levels, str) and request.levels == "last"
    by_latent = is_last_level and wanted.weight is not None
    residual = new(wanted.residual or by_latent, n_samples, d_in)
    grad_values = new(wanted.values, *code.values.shape, dtype=wanted.values or dtype)
    grad_target = new(wanted.target, n_samples, d_in, dtype=wanted.target or dtype)
    grad_weight = new(wanted.weight, *weight.shape)
    grad_bias = new(wanted.bias, d_in)
    loss = target.new_zeros((), dtype=dtype)
    of_samples = level_weights = level_errors = None  # [1, K, 1], or None for the last level alone
    if are_of_samples(request.levels, code) and isinstance(request.levels, torch.Tensor):
        of_samples = request.levels.to(dtype)
        level_errors = new(request.wants_level_errors, *of_samples.shape)
    elif isinstance(request.levels, torch.Tensor):
        level_weights = request.levels.to(dtype).view(1, -1, 1)
    elif request.levels == "every":
        k = code.latents.shape[1]
        level_weights = target.new_full((1, k, 1), 1 / k, dtype=dtype)

    def walk(chunk: slice) -> Callable[[], None]:
        rows = code.rows(chunk)
        w = rows_of_weight(rows, weight, dtype)  # [b, K, D]
        v = rows.values.to(dtype)  # [b, K]
        x = target[chunk].to(dtype)  # [b, D]
        if bias is not None:
            x = x - bias.to(dtype)
        g_0 = None
        if is_last_level:
            r = torch.bmm(v.unsqueeze(1), w) - x.unsqueeze(1)  # [b, 1, D]
            part = r.square().sum()
            s = (2 * scale) * r
        else:
            r = (v.unsqueeze(-1) * w).cumsum(dim=1).sub_(x.unsqueeze(1))  # [b, K, D]
            if level_weights is not None:
                g = r * level_weights
                part = torch.dot(g.flatten(), r.flatten())
            else:
                assert of_samples is not None
                exists, cells = rows.levels(chunk.start)  # [b, K + 1]
                c = torch.zeros_like(exists, dtype=dtype)
                c[exists] = of_samples.reshape(-1)[cells]
                all_r = torch.cat((-x.unsqueeze(1), r), dim=1)  # [b, K + 1, D]
                counted = all_r.masked_fill((c == 0).unsqueeze(-1), 0)
                errors = counted.square().sum(-1)
                part = (c * errors).sum()
                if level_errors is not None:
                    level_errors.view(-1)[cells] = errors[exists]
                g = counted * c.unsqueeze(-1)
                g_0, g = (2 * scale) * g[:, 0], g[:, 1:]
            s = g.flip(1).cumsum_(dim=1).flip(1).mul_(2 * scale)
        if residual is not None:
            residual[chunk] = r[:, -1]
        if grad_values is not None:
            rows.write((w * s).sum(-1), grad_values)
        s_0 = s[:, 0] if g_0 is None else s[:, 0] + g_0
        if grad_target is not None:
            grad_target[chunk] = s_0.neg().to(grad_target.dtype)
        of_weight = None
        if grad_weight is not None and not by_latent:
            of_weight = rows.of_pairs(v.unsqueeze(-1) * s)  # [b K, D]

        def add() -> None:
            loss.add_(part)
            if grad_bias is not None:
                grad_bias.add_(s_0.sum(0))
            if grad_weight is not None and of_weight is not None:
                grad_weight.index_add_(0, rows.of_pairs(rows.latents), of_weight)

        return add

    for_each(walk, chunks_of(code, d_in), target.device)
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
        level_errors=level_errors,
    )
