"""Sparse codes: the kept latents of a batch, and the same pairs grouped by latent.

A pair (b, t) is latent number t of sample b. Its number is b K + t; in rows of different length it
is starts[b] + t.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from .kernels import counting


@dataclass(frozen=True)
class Code:
    """The kept latents of a batch: as many of each sample, or rows of different length.

    Attributes:
        latents: [B, K], int64 or int32; of each sample in the order of the levels. With `starts`
            [n], sample after sample.
        values: what belongs to each of them, in the same shape: pre-activations, or decode
            coefficients, or gradients of either.
        starts: the pairs of sample b are those from starts[b] to starts[b + 1], [B + 1], int64,
            from 0 on. A row may be empty. Pairs from starts[B] on belong to no sample; they have
            latent 0 and value 0. None for K of each sample.
    """

    latents: torch.Tensor
    values: torch.Tensor
    starts: torch.Tensor | None = None

    @property
    def n_samples(self) -> int:
        """B."""
        return len(self.latents) if self.starts is None else len(self.starts) - 1

    def with_values(self, values: torch.Tensor) -> "Code":
        """Return the same latents with other values, in the shape of the present ones."""
        return Code(self.latents, values, self.starts)

    def samples(self) -> torch.Tensor:
        """Return the sample of each pair, [n], int64: the last one for a pair of no sample."""
        pairs = torch.arange(self.latents.numel(), device=self.latents.device)
        if self.starts is None:
            return pairs // self.latents.shape[1]
        return torch.searchsorted(self.starts[1:-1], pairs, right=True)

    def of_pairs(self, of_samples: torch.Tensor) -> torch.Tensor:
        """Return what to multiply `values` by, given a number for each sample, [B, 1]."""
        return of_samples if self.starts is None else of_samples.flatten()[self.samples()]

    def sum_by_sample(self, of_pairs: torch.Tensor) -> torch.Tensor:
        """Return the sum over each sample's pairs, [B, 1], of a tensor in the shape of `values`."""
        if self.starts is None:
            return of_pairs.sum(-1, keepdim=True)
        sums = of_pairs.new_zeros(self.n_samples)
        return sums.index_add_(0, self.samples(), of_pairs).unsqueeze(-1)

    def by_width(self, widths: torch.Tensor) -> "Code":
        """Return the same pairs with each row cut in M parts, which are rows of their own.

        Row b M + m has the latents of sample b from width m - 1 on that are below width m.

        Args:
            widths: [M], int64, ascending. The latents of each row ascend, too.
        """
        assert self.starts is not None
        n_parts = len(widths)
        n_rows = self.n_samples * n_parts
        rows = self.samples() * n_parts + parts_of(self.latents, widths)
        pairs = torch.arange(len(rows), device=rows.device)
        rows.masked_fill_(pairs >= self.starts[-1], n_rows)  # those of no sample
        bounds = torch.arange(n_rows + 1, device=rows.device)
        return Code(self.latents, self.values, torch.searchsorted(rows, bounds))

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
        n_pairs, k = self.latents.numel(), self.latents.shape[-1]
        fits_32_bits = n_pairs < 2**31
        if use_triton and fits_32_bits and not deterministic:
            unsorted = self.latents.contiguous()
            # The sums are where the bins end; `place` replaces them by where they start.
            starts = counting.count(unsorted, n_latents).cumsum(0, dtype=torch.int32)
            latents, pairs, samples = counting.place(unsorted, starts, n_latents)
        else:
            latents = self.latents.flatten().clamp(-1, n_latents).to(torch.int32)
            latents, pairs = latents.sort(stable=True)
            bins = torch.arange(-1, n_latents + 1, dtype=torch.int32, device=latents.device)
            starts = torch.searchsorted(latents, bins, out_int32=fits_32_bits)
            samples = (pairs // max(k, 1)).to(torch.int32)
        if self.starts is not None:
            samples = self.samples()[pairs].to(torch.int32)
        return InvertedIndex(latents, pairs, samples, starts)

    def chunks(self, most_pairs: int) -> list[slice]:
        """Return consecutive samples whose rows, padded to the longest, have so many pairs at most.

        A chunk has a sample at least. With `starts` it waits for the device.
        """
        if self.starts is None:
            n_rows = max(1, most_pairs // self.latents.shape[1])
            return [slice(b, b + n_rows) for b in range(0, self.n_samples, n_rows)]
        if self.n_samples == 0:
            return []
        chunks, first, longest = [], 0, 1
        for b, length in enumerate(self.starts.diff().tolist()):
            longest = max(longest, length)
            if b > first and (b + 1 - first) * longest > most_pairs:
                chunks.append(slice(first, b))
                first, longest = b, max(1, length)
        return [*chunks, slice(first, self.n_samples)]

    def rows(self, samples: slice) -> "Rows":
        """Return the rows of some consecutive samples."""
        if self.starts is None:
            latents = self.latents[samples]
            n_rows, k = latents.shape
            pairs = slice(samples.start * k, (samples.start + n_rows) * k)
            return Rows(latents, self.values[samples], pairs, None)
        starts = self.starts[samples.start : samples.stop + 1]
        pairs = slice(int(starts[0]), int(starts[-1]))
        lengths = starts.diff().unsqueeze(-1)
        level = torch.arange(max(1, int(lengths.max())), device=starts.device)
        exists = level < lengths  # [b, L]
        latents, values = (part.new_zeros(exists.shape) for part in (self.latents, self.values))
        latents[exists], values[exists] = self.latents[pairs], self.values[pairs]
        return Rows(latents, values, pairs, exists)


def parts_of(latents: torch.Tensor, widths: torch.Tensor) -> torch.Tensor:
    """Return the number of the first width above each latent; of the last one where there is none.

    Args:
        latents: of any shape.
        widths: [M], int64, ascending.
    """
    return torch.bucketize(latents, widths, right=True).clamp_max_(len(widths) - 1)


class Rows(NamedTuple):
    """Rows of a code, padded to the longest, of length L.

    Attributes:
        latents: [b, L]; 0 beyond the end of a row.
        values: [b, L]; 0 there.
        pairs: which of the code's pairs they are.
        exists: whether there is a pair, [b, L]; None where there is everywhere.
    """

    latents: torch.Tensor
    values: torch.Tensor
    pairs: slice
    exists: torch.Tensor | None

    def of_pairs(self, of_rows: torch.Tensor) -> torch.Tensor:
        """Return what [b, L, ...] has for each pair that there is: [n of them, ...]."""
        return of_rows.flatten(0, 1) if self.exists is None else of_rows[self.exists]

    def write(self, of_rows: torch.Tensor, out: torch.Tensor) -> None:
        """Write a number for each pair, [b, L], to its place in `out`, [B, K] or [n]."""
        out.view(-1)[self.pairs] = self.of_pairs(of_rows).to(out.dtype)

    def levels(self, first_sample: int) -> tuple[torch.Tensor, slice]:
        """Return the levels of the rows, from level 0 on.

        Args:
            first_sample: of the rows.

        Returns:
            Whether there is a level, [b, L + 1], and where the levels are in level weights of each
            sample (see `requests.Levels`).
        """
        n_rows, length = self.latents.shape
        exists = self.latents.new_ones((n_rows, length + 1), dtype=torch.bool)
        if self.exists is not None:
            exists[:, 1:] = self.exists
        first, last = self.pairs.start + first_sample, self.pairs.stop + first_sample + n_rows
        return exists, slice(first, last)


class InvertedIndex(NamedTuple):
    """The pairs of a batch, grouped by the latent that they chose.

    Attributes:
        latents: the latent of each of the n pairs, ascending, [n], int32: -1 or F for one outside
            [0, F).
        pairs: the number of each pair, [n], int64.
        samples: b of each pair, [n], int32.
        starts: the pairs of latent f are those from starts[f + 1] to starts[f + 2], [F + 2], int32;
            int64 from 2^31 pairs on.
        written_later: latents whose sums need not be written where no pair chose them, [F], bool;
            None for none. The kernels then leave them as they are.
    """

    latents: torch.Tensor
    pairs: torch.Tensor
    samples: torch.Tensor
    starts: torch.Tensor
    written_later: torch.Tensor | None = None

    def with_rows_of(self, code: Code) -> "InvertedIndex":
        """Return the index of the same pairs in other rows, those of `code`."""
        return self._replace(samples=code.samples()[self.pairs].to(torch.int32))
