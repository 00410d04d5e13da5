"""A step over several processes: what each of them holds, and what they exchange.

Of w ranks, rank r holds the latents F_r of the encoder and the part D_r of the decoder's width,

    W_enc[:, F_r],  b_enc[F_r],  W_dec[:, D_r],  b_dec,

and brings B_r samples of the batch of B. The reconstruction is separable over the width, so with
the kept latents of all samples at hand each rank computes its part of every level, of the residual
and of dL/dW_dec by itself. What the ranks exchange in a step is

    the rows to encode      all-gather                      [B, D]
    the target              all-to-all                      [B, D] in all, [B, D_r] for a rank
    the decoder's norms     all-reduce of |W_dec[f, D_r]|^2 [F]
    the candidates          all-to-all of the min(k, F_r) largest of each rank, by sample
    the kept latents        all-gather of the k largest of them, with their values, [B, k]
    dL/dv                   all-reduce                      [B, k]
    the loss and dL/db_dec  all-reduce                      [1 + D]

`Whole` stands for one process, which exchanges nothing. Every rank must call the same collectives
in the same order, so nothing that differs between ranks may decide whether one is called.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ..ops.codes import Code, InvertedIndex
from ..ops.policy import accumulation_dtype
from ..ops.selection import largest_candidates

# So many elements of a matrix are squared at once.
SQUARED_ELEMENTS = 2**22


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return this rank's part of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Split(NamedTuple):
    """Consecutive parts of a range, one for each rank, which may be empty.

    Attributes:
        sizes: of the parts.
    """

    sizes: tuple[int, ...]

    @classmethod
    def even(cls, n: int, n_parts: int) -> "Split":
        """Split n as DTensor and `torch.chunk` do: equal parts, the last ones smaller or empty."""
        size = -(-n // n_parts)
        return cls(tuple(max(0, min(size, n - part * size)) for part in range(n_parts)))

    def part(self, rank: int) -> slice:
        """Return the part of a rank."""
        end = sum(self.sizes[: rank + 1])
        return slice(end - self.sizes[rank], end)

    @property
    def parts(self) -> list[slice]:
        """The parts of all ranks."""
        ends = list(accumulate(self.sizes))
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]


def gather_rows(rows: torch.Tensor, size: int, group: Any) -> torch.Tensor:
    """Return the rows of all `size` ranks, which have equally many: [n, ...] -> [size n, ...]."""
    out = rows.new_empty((size * len(rows), *rows.shape[1:]))
    # The older name warns where there is the newer one, from PyTorch 2.13 on.
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(out, rows.contiguous(), group=group)
    return out


class Whole:
    """One process, which holds everything. What several would exchange is returned as it is."""

    is_sharded = False

    @property
    def size(self) -> int:
        """Number of ranks."""
        return 1

    def own(self, split: Split | None, n: int) -> slice:
        """Return which of n this rank holds."""
        return slice(0, n)

    def own_latents(self, n_latents: int) -> slice:
        """Return which of the F latents this rank's encoder holds."""
        return slice(0, n_latents)

    def latents_of_all(self, n_latents: int) -> list[slice]:
        """Return which of the F latents each rank's encoder holds."""
        return [slice(0, n_latents)]

    def own_width(self, d_in: int) -> slice:
        """Return which part of the width D this rank's decoder holds."""
        return slice(0, d_in)

    def n_samples(self, n_own: int) -> int:
        """Return B, given this rank's number of samples."""
        return n_own

    def all_samples(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all ranks' samples: [B_r, n] -> [B, n]."""
        return rows

    def by_width(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this rank's columns of all ranks' samples: [B_r, D] -> [B, D_r]."""
        return rows

    def by_sample(self, columns: torch.Tensor) -> torch.Tensor:
        """Return this rank's samples with all ranks' columns: [B, D_r] -> [B_r, D]."""
        return columns

    def all_columns(self, columns: torch.Tensor, split: Split | None) -> torch.Tensor:
        """Return all ranks' columns of n, which they hold by `split`: [b, n_r] -> [b, n]."""
        return columns

    def all_width(self, vector: torch.Tensor) -> torch.Tensor:
        """Return a vector with zeros where other ranks hold the width: [D_r] -> [D]."""
        return vector

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of the ranks' tensors, of one shape; the argument may be overwritten."""
        return tensor

    def sum_both(
        self, scalar: torch.Tensor, vector: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the sums of the ranks' scalars and of their vectors, of one dtype."""
        return scalar, vector

    def norms(self, rows: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        """Return the norms of a matrix's rows, [F].

        Args:
            rows: this rank's columns of them, [F, D_r].
            own: the norms of these, [F], where they are at hand.
        """
        return rows.norm(dim=-1) if own is None else own

    def bias_to_compare(self, b_enc: torch.Tensor, *, use_triton: bool) -> torch.Tensor:
        """Return b_enc in the dtype with which candidates are to be selected for `merge`."""
        return b_enc

    def merge(
        self,
        code: Code,
        norms: torch.Tensor | None,
        k: int,
        *,
        dtype: torch.dtype,
        split: Split | None = None,
    ) -> Code:
        """Return the k largest of all ranks' candidates.

        Args:
            code: this rank's, descending in each sample, of equal values the smaller latent first,
                [B, min(k, n_r)] each. Its latents are numbered from 0.
            norms: what the values are multiplied by to be compared, [n], or None for 1.
            k: latents to keep, at most n.
            dtype: of the values to return.
            split: by which the ranks hold the n latents; None for the dictionary's.

        Returns:
            As one process would select, [B, k] each.
        """
        return code

    def by_own_latent(
        self, code: Code, n_latents: int, *, use_triton: bool, deterministic: bool
    ) -> InvertedIndex:
        """Group a code's pairs by latent, numbered from this rank's first one.

        The latents of other ranks have numbers from F_r on. Products with the encoder ignore them.

        Args:
            code: of F latents.
            n_latents: F.
            use_triton, deterministic: as in `Code.by_latent`.
        """
        return code.by_latent(n_latents, use_triton=use_triton, deterministic=deterministic)


WHOLE = Whole()


@dataclass(frozen=True)
class Shards(Whole):
    """One of several processes.

    Attributes:
        group: of the ranks; its backend fits the tensors' device.
        rank: of this process in the group.
        latents: by which the ranks hold the F latents.
        width: by which they hold the width D.
        samples: by which they bring the B samples of a step.
    """

    group: Any
    rank: int
    latents: Split
    width: Split
    samples: Split = field(default=Split(()))

    is_sharded = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "Shards":
        return self  # A group of processes is not copied.

    @property
    def size(self) -> int:
        """Number of ranks."""
        return len(self.latents.sizes)

    def own(self, split: Split | None, n: int) -> slice:
        assert split is not None
        return split.part(self.rank)

    def own_latents(self, n_latents: int) -> slice:
        return self.latents.part(self.rank)

    def latents_of_all(self, n_latents: int) -> list[slice]:
        return self.latents.parts

    def own_width(self, d_in: int) -> slice:
        return self.width.part(self.rank)

    def n_samples(self, n_own: int) -> int:
        return sum(self.samples.sizes)

    def all_samples(self, rows: torch.Tensor) -> torch.Tensor:
        return self._all_rows(rows, self.samples)

    def by_width(self, rows: torch.Tensor) -> torch.Tensor:
        blocks = [rows[:, part] for part in self.width.parts]
        n_own = self.width.sizes[self.rank]
        shapes = [(n, n_own) for n in self.samples.sizes]
        return self._exchange(blocks, shapes).view(sum(self.samples.sizes), n_own)

    def by_sample(self, columns: torch.Tensor) -> torch.Tensor:
        blocks = [columns[part] for part in self.samples.parts]
        n_own = self.samples.sizes[self.rank]
        shapes = [(n_own, n) for n in self.width.sizes]
        return torch.cat(_blocks(self._exchange(blocks, shapes), shapes), dim=1)

    def all_columns(self, columns: torch.Tensor, split: Split | None) -> torch.Tensor:
        assert split is not None
        return self._all_rows(columns.T, split).T.contiguous()

    def all_width(self, vector: torch.Tensor) -> torch.Tensor:
        out = vector.new_zeros(sum(self.width.sizes))
        out[self.width.part(self.rank)] = vector
        return out

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.itemsize < 4:  # Sums of 16-bit numbers are rounded once, at the end.
            return self.sum(tensor.float()).to(tensor.dtype)
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def sum_both(
        self, scalar: torch.Tensor, vector: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if vector is None:
            return self.sum(scalar), None
        both = self.sum(torch.cat((scalar.view(1), vector.to(scalar.dtype))))
        return both[0].clone(), both[1:].to(vector.dtype)

    def norms(self, rows: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        if own is not None:
            return self.sum(own.square()).sqrt_()
        # Not by squaring norms, whose rounding could tell apart what one process finds equal.
        dtype = accumulation_dtype(rows)
        n_rows = max(1, SQUARED_ELEMENTS // rows.shape[1])
        squares = [part.to(dtype).square().sum(-1) for part in rows.split(n_rows)]
        return self.sum(torch.cat(squares)).sqrt_().to(rows.dtype)

    def bias_to_compare(self, b_enc: torch.Tensor, *, use_triton: bool) -> torch.Tensor:
        # The kernels compare in float32 before they round.
        return b_enc.float() if use_triton and b_enc.itemsize < 4 else b_enc

    def merge(
        self,
        code: Code,
        norms: torch.Tensor | None,
        k: int,
        *,
        dtype: torch.dtype,
        split: Split | None = None,
    ) -> Code:
        split = split or self.latents
        # Each rank merges its part of the samples, whosever they are.
        samples = Split.even(len(code.latents), self.size)
        # The candidates of a smaller rank are smaller latents and come first.
        largest = largest_candidates(self._candidates(code, k, split, samples), norms, k)
        packed = _pack(largest.latents, largest.values)
        merged = _unpack(self._all_rows(packed, samples), dtype)
        return Code(merged.latents.long(), merged.values.contiguous())

    def _candidates(self, code: Code, k: int, split: Split, samples: Split) -> Code:
        """Return all ranks' candidates for this rank's part of the samples, in order of the ranks.

        Their latents are int32 (int64 with float64 values).
        """
        packed = _pack(code.latents + split.part(self.rank).start, code.values)
        shapes = [(samples.sizes[self.rank], 2 * min(k, n)) for n in split.sizes]
        received = self._exchange([packed[part] for part in samples.parts], shapes)
        parts = [_unpack(block, code.values.dtype) for block in _blocks(received, shapes)]
        latents = torch.cat([part.latents for part in parts], dim=1)
        return Code(latents, torch.cat([part.values for part in parts], dim=1))

    def by_own_latent(
        self, code: Code, n_latents: int, *, use_triton: bool, deterministic: bool
    ) -> InvertedIndex:
        own = self.latents.part(self.rank)
        # The remainder puts the latents before this rank's behind all others. In bins of their own
        # they do not wait for each other: the kernels count by atomic additions.
        latents = (code.latents - own.start).remainder_(n_latents)
        index = Code(latents, code.values).by_latent(
            n_latents, use_triton=use_triton, deterministic=deterministic
        )
        # A product reads the rows of ignored pairs, too. If all have one, it stays in the cache.
        samples = index.samples * (index.latents < own.stop - own.start)
        return index._replace(samples=samples)

    # --- collectives

    def _all_rows(self, rows: torch.Tensor, split: Split) -> torch.Tensor:
        """Return all ranks' rows, which they hold by `split`: [n_r, m] -> [n, m]."""
        most, width = max(split.sizes), rows.shape[1:]
        if rows.shape[0] < most:
            padding = rows.new_zeros((most - rows.shape[0], *width))
            rows = torch.cat((rows, padding))
        out = gather_rows(rows, self.size, self.group)
        if min(split.sizes) == most:
            return out
        return torch.cat([out[r * most : r * most + n] for r, n in enumerate(split.sizes)])

    def _exchange(
        self, blocks: Sequence[torch.Tensor], shapes: Sequence[tuple[int, int]]
    ) -> torch.Tensor:
        """Send a block to each rank; return what came, one block of these shapes after another."""
        n_sent = [block.numel() for block in blocks]
        sent = blocks[0].new_empty(sum(n_sent))
        for block, part in zip(blocks, sent.split_with_sizes(n_sent), strict=True):
            part.view(block.shape).copy_(block)
        sizes = [rows * columns for rows, columns in shapes]
        received = sent.new_empty(sum(sizes))
        dist.all_to_all_single(received, sent, sizes, n_sent, group=self.group)
        return received


def _blocks(elements: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """Return views of the blocks of these shapes that lie one after another."""
    parts = elements.split_with_sizes([rows * columns for rows, columns in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]


def _pack(latents: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Return integers that hold both, to travel together: [b, k] each -> [b, 2 k]."""
    is_long = values.dtype == torch.float64
    floats, integers = (torch.float64, torch.int64) if is_long else (torch.float32, torch.int32)
    return torch.cat((latents.to(integers), values.to(floats).view(integers)), dim=1)


def _unpack(packed: torch.Tensor, dtype: torch.dtype) -> Code:
    """Return what `_pack` got, with values of that dtype: [b, 2 k] -> [b, k] each."""
    latents, values = packed.chunk(2, dim=1)
    floats = torch.float64 if packed.dtype == torch.int64 else torch.float32
    return Code(latents, values.view(floats).to(dtype))
