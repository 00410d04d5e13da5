"""Reconstructions from several prefixes of an activation's latents, at the cost of the longest."""

from collections.abc import Iterator, Sequence

import torch

from .fused_loss import fused_loss


@torch.no_grad()
def prefix_residuals(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    target: torch.Tensor,
    budgets: Sequence[int],
    backend: str = "auto",
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield each budget j with sum_{i <= j} vals[:, i] * weight[indices[:, i]] - target.

    Each residual starts from the one before, so that every latent is added once.

    Args:
        indices: kept latents, [B, K], in the order of the levels.
        weight: [F, D], vals: [B, K], target: [B, D].
        budgets: ascending, within 1..K.
        backend: "auto", "triton" or "torch".

    Yields:
        The budget and its residual, [B, D], float32 (float64 for float64 inputs).
    """
    residual, start = -target, 0
    for budget in budgets:
        _, residual = fused_loss(
            "topk_loss",
            indices[:, start:budget],
            weight,
            vals[:, start:budget],
            None,
            -residual,
            backend=backend,
            needs_residual=True,
        )
        start = budget
        yield budget, residual
