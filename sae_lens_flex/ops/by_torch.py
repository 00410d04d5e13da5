"""The decoder losses by PyTorch alone, for every device without Triton.

The batch is walked in chunks, so the memory does not grow with B * K * D. The gradients come by the
formulas of `requests` while a chunk's rows are at hand. Where pairs of a sample share one S, that
of weight is summed at the end.
"""

from collections.abc import Callable

import torch

from .checks import check_range
from .chunks import for_each
from .codes import parts_of
from .policy import accumulation_dtype, in_dtype
from .products import chunks_of, rows_of_weight, scatter
from .requests import DecoderLoss, LossAndGradients, are_of_samples, weighted_sum


def decoder_loss(request: DecoderLoss) -> LossAndGradients:
    """Compute what a request asks for.

    Raises:
        IndexError: for a latent outside [0, F).
    """
    code, weight, bias, target = request.code, request.weight, request.bias, request.target
    wanted, scale = request.wanted, request.scale
    if code.latents.numel() > 0:
        check_range(code.latents, weight.shape[0])
    n_samples, d_in = target.shape
    dtype = accumulation_dtype(weight, code.values, target)

    def new(is_wanted: object, *shape: int, dtype: torch.dtype = dtype) -> torch.Tensor | None:
        return target.new_zeros(shape, dtype=dtype) if is_wanted else None

    # In the loss of the last level alone every pair of a sample shares one S, 2 scale r_K, and of
    # nested dictionaries the pairs of each part. So the gradient of weight is summed latent by
    # latent, once all S are known.
    is_last_level = isinstance(request.levels, str) and request.levels == "last"
    widths = request.widths
    by_latent = (is_last_level or widths is not None) and wanted.weight is not None
    n_sums = 1 if widths is None else len(widths)  # S of a sample
    suffix_sums = new(by_latent, n_samples, n_sums, d_in)
    residual = new(wanted.residual, n_samples, d_in)
    grad_values = new(wanted.values, *code.values.shape, dtype=wanted.values or dtype)
    grad_target = new(wanted.target, n_samples, d_in, dtype=wanted.target or dtype)
    grad_weight = new(wanted.weight, *weight.shape)
    grad_bias = new(wanted.bias, d_in)
    loss = target.new_zeros((), dtype=dtype)
    width_errors = new(widths is not None, n_sums)
    of_samples = level_weights = None  # [1, K or M, 1], or None for the last level alone
    if widths is None and are_of_samples(request.levels, code):
        assert isinstance(request.levels, torch.Tensor)
        of_samples = request.levels.to(dtype)
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
        g_0 = part_of_row = None
        if is_last_level:
            r = torch.bmm(v.unsqueeze(1), w) - x.unsqueeze(1)  # [b, 1, D]
            part = r.square().sum()
            s = (2 * scale) * r
        elif widths is not None:
            assert level_weights is not None
            below = rows.latents.unsqueeze(1) < widths.view(-1, 1)  # [b, M, K]
            part_of_row = parts_of(rows.latents, widths)  # [b, K]
            r = torch.bmm(v.unsqueeze(1).where(below, 0), w) - x.unsqueeze(1)  # [b, M, D]
            part = r.square().sum((0, 2))  # [M]
            g = (r * level_weights).masked_fill_(level_weights == 0, 0)
            s = _from_each_on(g).mul_(2 * scale)
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
                part = (c * counted.square().sum(-1)).sum()
                g = counted * c.unsqueeze(-1)
                g_0, g = (2 * scale) * g[:, 0], g[:, 1:]
            s = _from_each_on(g).mul_(2 * scale)
        if residual is not None:
            residual[chunk] = r[:, -1]
        if suffix_sums is not None:
            suffix_sums[chunk] = s
        if grad_values is not None:
            if part_of_row is None:
                dots = (w * s).sum(-1)
            else:
                dots = torch.bmm(w, s.mT).gather(2, part_of_row.unsqueeze(-1)).squeeze(-1)
            rows.write(dots, grad_values)
        s_0 = s[:, 0] if g_0 is None else s[:, 0] + g_0
        if grad_target is not None:
            grad_target[chunk] = s_0.neg().to(grad_target.dtype)
        of_weight = None
        if grad_weight is not None and not by_latent:
            of_weight = rows.of_pairs(v.unsqueeze(-1) * s)  # [b K, D]

        def add() -> None:
            (loss if width_errors is None else width_errors).add_(part)
            if grad_bias is not None:
                grad_bias.add_(s_0.sum(0))
            if grad_weight is not None and of_weight is not None:
                grad_weight.index_add_(0, rows.of_pairs(rows.latents), of_weight)

        return add

    for_each(walk, chunks_of(code, d_in), target.device)
    if suffix_sums is not None and grad_weight is not None:
        index = request.index or code.by_latent(
            len(weight), use_triton=False, deterministic=request.deterministic
        )
        if widths is not None:
            index = index.with_rows_of(code.by_width(widths))
        scatter(index, code.values, suffix_sums.flatten(0, 1), out=grad_weight, use_triton=False)
    if width_errors is not None:
        assert isinstance(request.levels, torch.Tensor)
        loss = weighted_sum(width_errors, request.levels)
    return LossAndGradients(
        loss=loss * scale,
        residual=residual,
        weight=None if grad_weight is None else in_dtype(grad_weight, wanted.weight),
        values=grad_values,
        bias=None if grad_bias is None else in_dtype(grad_bias, wanted.bias),
        target=grad_target,
        width_errors=width_errors,
    )


def _from_each_on(of_levels: torch.Tensor) -> torch.Tensor:
    """Return at each level the sum of it and of those after it, [b, levels, D]."""
    return of_levels.flip(1).cumsum_(dim=1).flip(1)
