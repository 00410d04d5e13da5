"""Sparse codes: the kept latents of a batch, and the same pairs grouped by latent.

A pair (b, t) is latent number t of sample b. Its number is b K + t.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .kernels import counting


@dataclass(frozen=True)
class Code:
    """The kept latents of a batch.

    Attributes:
        latents: [B, K], int64 or int32; of each sample in the order of the levels.
        values: what belongs to each of them, [B, K]: pre-activations, or decode coefficients, or
            gradients of either.
    """

    latents: torch.Tensor
    values: torch.Tensor

    def with_values(self, values: torch.Tensor) -> "Code":
        """Return the same latents with other values, [B, K]."""
        return Code(self.latents, values)

    def by_latent(
        self, n_latents: int, *, use_triton: bool, deterministic: bool
    ) -> "InvertedIndex":
        """Group the pairs by latent.

        Args:
            n_latents: F.
            use_triton: whether kernels may count. Sorting takes twice as long: 0.15 ms for B=4096,
                K=128 on an H200, where counting takes 0.08.
            deterministic: whether a latent's pairs are to be in ascending order, so that sums over
                them are the same from run to run. It takes sorting.
        """
        n_pairs, k = self.latents.numel(), self.latents.shape[1]
        fits_32_bits = n_pairs < 2**31
        if use_triton and fits_32_bits and not deterministic:
            unsorted = self.latents.contiguous()
            # The sums are where the bins end; `place` replaces them by where they start.
            starts = counting.count(unsorted, n_latents).cumsum(0, dtype=torch.int32)
            return InvertedIndex(*counting.place(unsorted, starts, n_latents), starts)
        latents = self.latents.flatten().clamp(-1, n_latents).to(torch.int32)
        latents, pairs = latents.sort(stable=True)
        bins = torch.arange(-1, n_latents + 1, dtype=torch.int32, device=latents.device)
        starts = torch.searchsorted(latents, bins, out_int32=fits_32_bits)
        return InvertedIndex(latents, pairs, (pairs // k).to(torch.int32), starts)


class InvertedIndex(NamedTuple):
    """The pairs of a batch, grouped by the latent that they chose.

    Attributes:
        latents: the latent of each pair, ascending, [B * K], int32: -1 or F for one outside [0, F).
        pairs: the number b K + t of each pair, [B * K], int64.
        samples: b of each pair, [B * K], int32.
        starts: the pairs of latent f are those from starts[f + 1] to starts[f + 2], [F + 2], int32;
            int64 from 2^31 pairs on.
    """

    latents: torch.Tensor
    pairs: torch.Tensor
    samples: torch.Tensor
    starts: torch.Tensor
