"""The sparse encoder of BatchTopK: the largest pre-activations of a whole batch.

    h = rows @ W_enc + b_enc,     kept = the n largest positive h * norms of the [B, F] of the batch

A sample then has as many latents as it happens to have among them, in ascending order. Of equal
compared values those of earlier samples are kept, and of one sample those of smaller latents. The
pre-activations of the whole batch never exist at once, and are computed once.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from .chunks import for_each_chunk
from .codes import Code
from .kernels import candidates as kernels
from .kernels.selection import group_maxima
from .selection import Encoder, chunk_rows

GROUP = 8  # neighbouring latents

# The kernels take this many of `select`'s chunks at once. The work on the candidates of a chunk is
# the same whatever the chunk's size, so fewer chunks are less work.
CHUNKS_AT_ONCE = 2


class Pairs(NamedTuple):
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


def select_over_batch(
    rows: torch.Tensor, encoder: Encoder, n_kept: int, *, use_triton: bool
) -> Code:
    """Return the code of a batch, whose rows have different lengths.

    Args:
        rows: what is multiplied with W_enc, [B, D], contiguous, in the dtype of the products.
        encoder: W_enc is rounded to that dtype.
        n_kept: pairs to keep in all, 0..B F. Where fewer are positive, the last places of the code
            are of no sample.
        use_triton: whether the kernels select. The host then does not wait for the device.
    """
    n_samples, n_latents = rows.shape[0], encoder.weight.shape[1]
    if n_kept == 0:
        dtype = torch.promote_types(rows.dtype, encoder.bias.dtype)
        none = rows.new_empty(0, dtype=torch.int64)
        return Code(none, none.to(dtype), none.new_zeros(n_samples + 1))
    if use_triton:
        return _select_by_triton(rows, encoder, n_kept)
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
        part = Pairs(samples + chunk.start, latents, *values)
        return lambda: largest.add(part)

    for_each_chunk(walk, n_samples, n_rows, rows.device)
    kept = largest.kept()
    bounds = torch.arange(n_samples + 1, device=rows.device)
    starts = torch.searchsorted(kept.samples, bounds)
    n_unused = n_kept - len(kept.latents)
    latents, hidden = (pad(part, (0, n_unused)) for part in (kept.latents, kept.hidden))
    return Code(latents, hidden, starts)


def _select_by_triton(rows: torch.Tensor, encoder: Encoder, n_kept: int) -> Code:
    """Select without waiting for the device.

    The n largest maxima of groups of neighbouring latents give a bound that at least n
    pre-activations reach. n groups hold all that may be among the n largest, so there is a place
    for each.
    """
    n_samples, n_latents = rows.shape[0], encoder.weight.shape[1]
    n_rows = CHUNKS_AT_ONCE * chunk_rows(n_samples, n_latents, rows.dtype, rows.device)
    weight, bias = encoder.weight.to(rows.dtype), encoder.bias.contiguous()
    norms = None if encoder.norms is None else encoder.norms.contiguous()
    dtype = torch.promote_types(rows.dtype, bias.dtype)
    bound = rows.new_ones(1, dtype=torch.int32)  # the smallest key of a positive number
    parts = []
    for start in range(0, n_samples, n_rows):
        products = rows[start : start + n_rows] @ weight  # [b, F]
        maxima = group_maxima(products, bias, norms, GROUP)
        if maxima.numel() > n_kept:
            bound = bound.maximum(maxima.flatten().topk(n_kept, sorted=False).values.min())
        found = kernels.candidates(
            *(products, bias, norms, maxima, bound),
            n_largest=n_kept,
            first_sample=start,
            dtype=dtype,
        )
        del products, maxima
        part, smallest = _first_largest_keys(found, n_kept, n_samples)
        bound = bound.maximum(smallest + 1)  # Of equal ones the earlier are kept.
        parts.append(part)
    kept = parts[0]
    if len(parts) > 1:
        joined = kernels.Candidates(*map(torch.cat, zip(*parts, strict=True)))
        kept, _ = _first_largest_keys(joined, n_kept, n_samples)
    bounds = torch.arange(n_samples + 1, dtype=torch.int32, device=rows.device)
    starts = torch.searchsorted(kept.samples, bounds)
    return Code(kept.latents.long(), kept.hidden, starts)


def _first_largest_keys(
    found: kernels.Candidates, n: int, n_samples: int
) -> tuple[kernels.Candidates, torch.Tensor]:
    """Return n places with the n largest candidates, in their order, and the smallest key, [1].

    Where there are fewer candidates, the last places are unused: of the sample number n_samples,
    with latent and hidden 0.
    """
    keys = found.keys
    smallest = keys.topk(min(n, len(keys)), sorted=False).values.min()
    is_above, is_equal = keys > smallest, keys == smallest
    n_equal = n - is_above.sum()
    is_kept = (is_above | (is_equal & (is_equal.cumsum(0) <= n_equal))) & (keys > 0)
    places = is_kept.nonzero_static(size=n, fill_value=-1).squeeze(-1)
    is_unused = places < 0
    kept = [part[places].masked_fill_(is_unused, 0) for part in found]
    kept[1].masked_fill_(is_unused, n_samples)
    if len(keys) < n:
        smallest = torch.zeros_like(smallest)
    return kernels.Candidates(*kept), smallest


class _Largest:
    """The largest of the candidates that were added.

    Attributes:
        bound: what is not above it is not among them: 0 at first, then the smallest of the kept.
            Of equal ones the earlier are kept, so later ones must be above it.
    """

    def __init__(self, n_kept: int) -> None:
        self.n_kept = n_kept
        self.bound: torch.Tensor | float = 0.0
        self._parts: list[Pairs] = []
        self._n = 0

    def add(self, part: Pairs) -> None:
        """Add candidates that come after all others in the batch."""
        self._parts.append(part)
        self._n += len(part.latents)
        if self._n > 2 * self.n_kept:
            self.kept()

    def kept(self) -> Pairs:
        """Return the n_kept largest, or all where there are no more."""
        candidates = Pairs(*map(torch.cat, zip(*self._parts, strict=True)))
        if self._n > self.n_kept:
            candidates, self.bound = first_largest(candidates, self.n_kept)
        self._parts, self._n = [candidates], len(candidates.latents)
        return candidates


def first_largest(candidates: Pairs, n: int) -> tuple[Pairs, torch.Tensor | float]:
    """Return the n largest of more candidates, in their order, and the smallest of them.

    Of candidates that equal the smallest, the first are kept.
    """
    compared = candidates.compared
    if n == 0:
        return Pairs(*(part[:0] for part in candidates)), torch.inf
    values = compared.topk(n, sorted=False).values
    smallest = torch.where(values.isnan(), torch.inf, values).min()
    is_above, is_equal = (compared > smallest) | compared.isnan(), compared == smallest
    if values.isnan().all():
        is_above, is_equal = torch.zeros_like(is_above), compared.isnan()
    n_equal = n - is_above.sum()
    is_kept = is_above | (is_equal & (is_equal.cumsum(0) <= n_equal))
    return Pairs(*(part[is_kept] for part in candidates)), smallest
