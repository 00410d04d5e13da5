"""The inverted index of a batch: for every latent, the (sample, level) pairs that chose it."""

from typing import NamedTuple

import torch


class InvertedIndex(NamedTuple):
    """The pairs (b, t) of a batch, grouped by the latent that they chose.

    Attributes:
        latents: indices[b, t] of each pair, ascending, [B * K], int32. What lies outside [0, F) is
            -1 or F.
        pairs: b * K + t of each pair, [B * K], int64, ascending among those of one latent.
    """

    latents: torch.Tensor
    pairs: torch.Tensor


def invert(indices: torch.Tensor, n_latents: int) -> InvertedIndex:
    """Group the pairs of `indices` ([B, K]) by latent, with one radix sort."""
    latents = indices.flatten().clamp(-1, n_latents).to(torch.int32)
    latents, pairs = latents.sort(stable=True)
    return InvertedIndex(latents, pairs)
