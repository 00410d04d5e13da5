"""The sparse encoder of BatchTopK: the largest pre-activations of a whole batch.

    h = rows @ W_enc + b_enc,     kept = the n largest positive h * norms of the [B, F] of the batch

A sample then has as many latents as it happens to have among them, in ascending order. Of equal
compared values those of earlier samples are kept, and of one sample those of smaller latents. The
pre-activations of the whole batch never exist at once, and are computed once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from .chunks import for_each_chunk
from .codes import Code
from .selection import Encoder, chunk_rows


class Candidates(NamedTuple):
    """Pairs that may be among the largest, in the order of the batch.

    Attributes:
        samples: [n], int64, ascending.
        latents: [n], int64, ascending in each sample.
        hidden: their pre-activations h, [n].
        compared: h * norms, [n]; positive, or NaN, which counts as the largest.
    """

    samples: torch.Tensor
    latents: torch.Tensor
    hidden: torch.Tensor
    compared: torch.Tensor


def select_over_batch(rows: torch.Tensor, encoder: Encoder, n_kept: int) -> Code:
    """Return the code of a batch, whose rows have different lengths.

    Args:
        rows: what is multiplied with W_enc, [B, D], contiguous, in the dtype of the products.
        encoder: W_enc is rounded to that dtype.
        n_kept: pairs to keep in all, 0..B F. There are fewer where fewer are positive.
    """
    n_samples, n_latents = rows.shape[0], encoder.weight.shape[1]
    n_rows = chunk_rows(n_samples, n_latents, rows.dtype, rows.device)
    if rows.device.type != "cpu":  # Of a first chunk all positive ones are candidates.
        n_rows = min(n_rows, max(1, 4 * n_kept // n_latents))
    weight = encoder.weight.to(rows.dtype)
    largest = _Largest(n_kept)

    def walk(chunk: slice) -> Callable[[], None]:
        hidden = rows[chunk] @ weight + encoder.bias  # [b, F]
        compared = hidden if encoder.norms is None else hidden * encoder.norms
        is_candidate = ~(compared <= largest.bound)
        samples, latents = is_candidate.nonzero(as_tuple=True)
        values = hidden[is_candidate], compared[is_candidate]
        part = Candidates(samples + chunk.start, latents, *values)
        return lambda: largest.add(part)

    for_each_chunk(walk, n_samples, n_rows, rows.device)
    kept = largest.kept()
    bounds = torch.arange(n_samples + 1, device=rows.device)
    return Code(kept.latents, kept.hidden, torch.searchsorted(kept.samples, bounds))


class _Largest:
    """The largest of the candidates that were added.

    Attributes:
        bound: what is not above it is not among them: 0 at first, then the smallest of the kept.
            Of equal ones the earlier are kept, so later ones must be above it.
    """

    def __init__(self, n_kept: int) -> None:
        self.n_kept = n_kept
        self.bound: torch.Tensor | float = 0.0
        self._parts: list[Candidates] = []
        self._n = 0

    def add(self, part: Candidates) -> None:
        """Add candidates that come after all others in the batch."""
        self._parts.append(part)
        self._n += len(part.latents)
        if self._n > 2 * self.n_kept:
            self.kept()

    def kept(self) -> Candidates:
        """Return the n_kept largest, or all where there are no more."""
        candidates = Candidates(*map(torch.cat, zip(*self._parts, strict=True)))
        if self._n > self.n_kept:
            candidates, self.bound = first_largest(candidates, self.n_kept)
        self._parts, self._n = [candidates], len(candidates.latents)
        return candidates


def first_largest(candidates: Candidates, n: int) -> tuple[Candidates, torch.Tensor | float]:
    """Return the n largest of more candidates, in their order, and the smallest of them.

    Of candidates that equal the smallest, the first are kept.
    """
    compared = candidates.compared
    if n == 0:
        return Candidates(*(part[:0] for part in candidates)), torch.inf
    smallest = compared.topk(n, sorted=False).values
    smallest = torch.where(smallest.isnan(), torch.inf, smallest).min()  # NaN counts as the largest
    compared = torch.where(compared.isnan(), torch.inf, compared)
    is_above, is_equal = compared > smallest, compared == smallest
    n_equal = n - is_above.sum()
    is_kept = is_above | (is_equal & (is_equal.cumsum(0) <= n_equal))
    return Candidates(*(part[is_kept] for part in candidates)), smallest
