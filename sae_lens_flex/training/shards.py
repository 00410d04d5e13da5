"""What one of w processes holds of a dictionary, and what they exchange in a step.

The encoder is cut by latents, because a latent is chosen from whole activations. The decoder is cut
by the model's width, because the error of a reconstruction is a sum over the width. Rank r has

    W_enc[:, F_r], b_enc[F_r], W_dec[:, D_r],        b_dec as every rank has it,

and B_r of the B samples. A step is the same code for one process and for many: for one process
(`Whole`) every function here returns what it was given.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
import torch.distributed as dist

from ..ops.codes import Code


class Whole:
    """One process, which holds the dictionary and the batch."""

    is_whole = True

    def count_samples(self, n_own: int) -> int:
        """Return B, of which the rank has n_own."""
        return n_own

    def norms(self, W_dec: torch.Tensor) -> torch.Tensor:
        """Return the norms of the decoder's rows, [F], from the rank's part, [F, D_r]."""
        return W_dec.norm(dim=-1)

    def whole_norms(self, norms: torch.Tensor) -> torch.Tensor:
        """Return the norms of the decoder's rows, [F], from those of the rank's part, [F]."""
        return norms

    def gather_samples(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all samples, [B, n], from those of the rank's samples, [B_r, n]."""
        return rows

    def own_columns(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rank's columns for all samples, [B, D_r], from its samples', [B_r, D]."""
        return rows

    def own_samples(self, columns: torch.Tensor) -> torch.Tensor:
        """Return the rank's samples, [B_r, D], from its columns of all samples, [B, D_r]."""
        return columns

    def own_width(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the rank's part, [D_r], of a vector [D] that every rank has."""
        return vector

    def at_own_width(self, part: torch.Tensor) -> torch.Tensor:
        """Return a vector [D] with the rank's part, [D_r], in its place and zeros elsewhere."""
        return part

    def own_latents(self, vector: torch.Tensor) -> torch.Tensor:
        """Return the rank's part, [F_r], of a vector [F] that every rank has."""
        return vector

    def own_code(self, code: Code) -> Code:
        """Number the latents from the rank's first on. Others' are then outside [0, F_r)."""
        return code

    def merge(self, code: Code, norms: torch.Tensor | None, k: int) -> Code:
        """Return the k largest of each sample among all latents, [B, k].

        Args:
            code: the k largest, or all, among the rank's own latents, [B, min(k, F_r)],
                descending, of equal compared values the smaller latent first.
            norms: what values are multiplied by to be compared, [F], or None for 1.
            k: latents to keep.
        """
        return code

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of the ranks' tensors, on every rank the same. It may be in place."""
        return tensor


WHOLE = Whole()


def bounds(n: int, size: int) -> tuple[int, ...]:
    """Return where the shares of n things begin, and n: [size + 1]. DTensor cuts at the same."""
    share = math.ceil(n / size)
    return tuple(min(rank * share, n) for rank in range(size + 1))


@dataclass(frozen=True)
class Shards(Whole):
    """
    One rank of several.

    Attributes:
        group: the ranks; its collectives are those of the tensors' device.
        cpu_group: the same ranks, for what the host has to know.
        rank, size: of this process, w.
        latents, width: where the ranks' shares begin, [w + 1].
        batch: the number of samples of each rank, [w].
    """

    group: dist.ProcessGroup
    cpu_group: dist.ProcessGroup
    rank: int
    size: int
    latents: tuple[int, ...]
    width: tuple[int, ...]
    batch: tuple[int, ...] = ()

    is_whole = False

    def of_step(self, n_samples: int, is_logging_step: bool, k: int) -> Self:
        """Exchange the numbers of samples. Every rank has to call it, once a step.

        Raises:
            ValueError: on every rank, where the ranks take different steps.
        """
        own = torch.tensor([n_samples, int(is_logging_step), k])
        steps = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(steps, own, group=self.cpu_group)
        batch, are_logging, ks = zip(*(step.tolist() for step in steps), strict=True)
        for name, values in (("is_logging_step", are_logging), ("k", ks)):
            if len(set(values)) > 1:
                raise ValueError(f"{name} differs between the ranks: {list(values)}")
        if sum(batch) == 0:
            raise ValueError("sae_in has no activation on any rank, expected one at least")
        return replace(self, batch=batch)

    def count_samples(self, n_own: int) -> int:
        return sum(self.batch)

    def with_latents(self, starts: tuple[int, ...]) -> Self:
        """Return the shards of some latents, of which each rank's begin at `starts`, [w + 1]."""
        return replace(self, latents=starts)

    def part(self, name: str) -> slice:
        """Return which columns of a weight, or which elements of a bias, the rank has."""
        if name == "b_dec":
            return slice(None)
        starts = self.width if name == "W_dec" else self.latents
        return slice(starts[self.rank], starts[self.rank + 1])

    # --- sums

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def norms(self, W_dec: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(W_dec.dtype, torch.float32)
        norms = torch.linalg.vector_norm(W_dec, dim=-1, dtype=dtype)
        return self.whole_norms(norms).to(W_dec.dtype)

    def whole_norms(self, norms: torch.Tensor) -> torch.Tensor:
        return self.sum(norms.square()).sqrt()

    # --- samples, columns and latents

    def gather_samples(self, rows: torch.Tensor) -> torch.Tensor:
        most = max(self.batch)
        padded = rows.new_zeros(most, rows.shape[1])
        padded[: len(rows)] = rows
        gathered = rows.new_empty(self.size * most, rows.shape[1])
        dist.all_gather_into_tensor(_bytes(gathered), _bytes(padded), group=self.group)
        if sum(self.batch) == len(gathered):
            return gathered
        parts = gathered.split(most)
        return torch.cat([part[:n] for part, n in zip(parts, self.batch, strict=True)])

    def own_columns(self, rows: torch.Tensor) -> torch.Tensor:
        n_own, widths = len(rows), _lengths(self.width)
        sent = torch.cat([part.flatten() for part in rows.split(widths, dim=1)])
        received = self._all_to_all(
            sent,
            [n_own * width for width in widths],
            [n * widths[self.rank] for n in self.batch],
        )
        return received.view(-1, widths[self.rank])

    def own_samples(self, columns: torch.Tensor) -> torch.Tensor:
        return self._by_sample(columns, _lengths(self.width))

    def own_width(self, vector: torch.Tensor) -> torch.Tensor:
        return vector[self.width[self.rank] : self.width[self.rank + 1]]

    def at_own_width(self, part: torch.Tensor) -> torch.Tensor:
        vector = part.new_zeros(self.width[-1])
        self.own_width(vector).copy_(part)
        return vector

    def own_latents(self, vector: torch.Tensor) -> torch.Tensor:
        return vector[self.latents[self.rank] : self.latents[self.rank + 1]]

    def own_code(self, code: Code) -> Code:
        return Code(code.latents - self.latents[self.rank], code.values)

    def merge(self, code: Code, norms: torch.Tensor | None, k: int) -> Code:
        widths = [min(k, n) for n in _lengths(self.latents)]
        latents = self._by_sample(code.latents + self.latents[self.rank], widths)
        values = self._by_sample(code.values, widths)  # [B_r, w k]
        compared = values if norms is None else values * norms[latents]
        # Equal values keep their order: by rank, so by latent, and on a rank by latent.
        order = compared.sort(dim=-1, descending=True, stable=True).indices[:, :k]
        return Code(
            self.gather_samples(latents.gather(-1, order)),
            self.gather_samples(values.gather(-1, order)),
        )

    def _by_sample(self, rows: torch.Tensor, widths: list[int]) -> torch.Tensor:
        """Return for the rank's samples, side by side, what all ranks have, [B_r, sum of widths].

        Args:
            rows: of all samples, [B, widths[rank]].
            widths: of each rank's rows, [w].
        """
        n_own = self.batch[self.rank]
        sizes = [n_own * width for width in widths]
        received = self._all_to_all(
            rows.flatten(), [n * widths[self.rank] for n in self.batch], sizes
        )
        parts = received.split(sizes)
        return torch.cat([part.view(n_own, -1) for part in parts], dim=1)

    def _all_to_all(self, sent: torch.Tensor, n_sent: list[int], n: list[int]) -> torch.Tensor:
        received = sent.new_empty(sum(n))
        n_bytes = sent.itemsize
        dist.all_to_all_single(
            _bytes(received),
            _bytes(sent.contiguous()),
            [n_bytes * each for each in n],
            [n_bytes * each for each in n_sent],
            group=self.group,
        )
        return received


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's memory as bytes: not every backend sends every dtype."""
    return tensor.flatten().view(torch.uint8)


def _lengths(starts: tuple[int, ...]) -> list[int]:
    return [end - start for start, end in pairwise(starts)]
