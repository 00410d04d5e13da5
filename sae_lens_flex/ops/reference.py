"""The losses in plain PyTorch, as short as their formulas.

Every backend is tested against this file in float64. The losses build a [B, K, D] tensor: use them
to check, or on small problems.

Symbols, here and in every file of `ops`: B samples (activations) of width D, a dictionary of F
latents, K of them kept for each sample. Level j is the reconstruction from a sample's first j
latents:

    x_hat_j = bias + sum_{i <= j} vals[i] * weight[indices[i]]
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch.nn.functional import embedding

from .checks import FLOAT_DTYPES, check_arguments, check_range, check_starts
from .policy import accumulation_dtype

DTYPES = (*FLOAT_DTYPES, torch.float64)


def rows_of(indices: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return weight[indices], or raise an IndexError that says what `indices` reaches."""
    try:
        return embedding(indices, weight)
    except IndexError:
        check_range(indices, weight.shape[0])
        raise


def _terms(
    indices: torch.Tensor, weight: torch.Tensor, vals: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    # What each kept latent adds to the reconstruction: [B, K, D].
    return vals.to(dtype).unsqueeze(-1) * rows_of(indices, weight).to(dtype)


def hierarchical_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    *,
    level_weights: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the squared error of every level, averaged over B, K and D.

    The loss of HierarchicalTopK (Balagansky et al. 2025, arXiv 2505.24473):

        mean over b, j, d of (x_hat_j[b, d] - target[b, d])^2,
        x_hat_j[b] = bias + sum_{i <= j} vals[b, i] * weight[indices[b, i]].

    It computes in float32 (in float64 where an input is float64), whatever the inputs' dtypes.

    Args:
        indices: kept latents, [B, K], integers in [0, F), in the order of the levels. A latent that
            comes twice in a row counts twice. With `starts` [n].
        weight: decoder rows, [F, D].
        vals: decode coefficients, [B, K], of any sign and order. With `starts` [n].
        bias: decoder bias, [D].
        target: activations to reconstruct, [B, D].
        level_weights: weight of each level's mean squared error, [K], not differentiated. None
            weighs each 1 / K. Or the weights of each sample, from level 0 on, where x_hat_0 = bias:
            [B, K + 1], with `starts` [n + B], sample after sample.
        starts: for rows of different length: those of sample b are the pairs starts[b] to
            starts[b + 1], [B + 1], ascending integers from 0 on. A row may be empty. Pairs from
            starts[B] on are ignored. Without `level_weights` a row of length l weighs each level
            1 / l, and an empty row level 0.

    Returns:
        The loss, a float32 (float64) scalar, differentiable in weight, vals, bias and target.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or device.
        IndexError: for a latent outside [0, F), where the device can tell.
    """
    check_arguments(indices, weight, vals, bias, target, level_weights, starts, DTYPES)
    dtype = accumulation_dtype(weight, vals, bias, target)
    if level_weights is not None:
        level_weights = level_weights.detach().to(dtype)
    if starts is None and (level_weights is None or level_weights.ndim == 1):
        x_hat = _terms(indices, weight, vals, dtype).cumsum(dim=1) + bias.to(dtype)  # [B, K, D]
        error = (x_hat - target.to(dtype).unsqueeze(1)).square().mean(dim=(0, 2))  # [K]
        return error.mean() if level_weights is None else (error * level_weights).sum()
    loss = weight.new_zeros((), dtype=dtype)
    for first, residuals in _residuals_of_samples(
        indices, weight, vals, bias, target, starts, dtype
    ):
        error = residuals.square().mean(-1)  # [l + 1]
        if level_weights is None:
            loss = loss + (error[1:].mean() if len(error) > 1 else error[0])
        else:
            loss = loss + (error * level_weights.flatten()[first : first + len(error)]).sum()
    return loss / len(target)


def _residuals_of_samples(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    starts: torch.Tensor | None,
    dtype: torch.dtype,
) -> Iterator[tuple[int, torch.Tensor]]:
    # Of each sample: where its level weights begin, and x_hat_j - target from level 0 on,
    # [l + 1, D].
    if starts is None:
        rows = list(_terms(indices, weight, vals, dtype))  # of [B, K, D]
    else:
        check_starts(starts, len(indices))
        *_, n_pairs = bounds = starts.tolist()
        terms = _terms(indices[:n_pairs], weight, vals[:n_pairs], dtype)  # [n, D]
        rows = [terms[start:end] for start, end in pairwise(bounds)]
    first = 0
    for row, x in zip(rows, target.to(dtype), strict=True):
        x_hat = torch.cat((torch.zeros_like(x).unsqueeze(0), row.cumsum(0))) + bias.to(dtype)
        yield first, x_hat - x
        first += len(x_hat)


def topk_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    *,
    starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the squared error of the reconstruction from all K latents, averaged over B and D.

        mean over b, d of (bias + sum_i vals[b, i] * weight[indices[b, i]] - target[b])[d]^2

    Arguments as in `hierarchical_sae_loss`.
    """
    check_arguments(indices, weight, vals, bias, target, None, starts, DTYPES)
    dtype = accumulation_dtype(weight, vals, bias, target)
    if starts is not None:
        of_samples = _residuals_of_samples(indices, weight, vals, bias, target, starts, dtype)
        return torch.stack([residuals[-1] for _, residuals in of_samples]).square().mean()
    x_hat = _terms(indices, weight, vals, dtype).sum(dim=1) + bias.to(dtype)  # [B, D]
    return (x_hat - target.to(dtype)).square().mean()
