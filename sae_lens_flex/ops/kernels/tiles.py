"""Tiles: what the kernels that read rows of weight share.

A tile has the shape [LEVELS, 2 BLOCK_D]. Its rows are levels, from the highest down. Its columns
are one slice of D of an even sample, followed by the same slice of the next sample. With two
samples each of a warp's 32 threads has at least four columns. A thread has all rows of its columns,
so a sum along the levels stays in its registers.
"""

from typing import NamedTuple

import torch

from .launch import cdiv, tl, triton

# Latents that fire often have copies of their row of the gradient (see `copies`): COPIES rows for
# each of up to SLOTS latents, behind the F rows. Which latents have copies stands in a table,
# int32, whose parts are, one after the other,
#     counts  [F]      how often each latent came,
#     slots   [F]      1 + the slot of a latent with copies, or 0,
#     hot     [SLOTS]  1 + the latent of each slot, or 0,
#     n_hot   [1]      the number of latents that fire often enough, also beyond SLOTS.
SLOTS = 256
COPIES = 16


def table_size(n_latents: int) -> int:
    """Return the number of elements of the table of copies."""
    return 2 * n_latents + SLOTS + 1


class Sizes(NamedTuple):
    """B, K, F, D and the strides of weight."""

    n_samples: int
    k: int
    n_latents: int
    d_in: int
    stride_wf: int
    stride_wd: int

    def is_wide(self, n_rows: int = 0) -> bool:
        """Return whether an offset in weight, or in n_rows rows of its width, takes 64 bits."""
        return max(self.n_latents * self.stride_wf, n_rows * self.d_in) >= 2**31

    def are_even(self, levels: int, columns: int) -> bool:
        """Return whether pairs of samples, and tiles of these levels and columns, divide all."""
        return self.n_samples % 2 == 0 and self.k % levels == 0 and self.d_in % columns == 0


class Batch(NamedTuple):
    """The tensors that a kernel reads.

    Attributes:
        latents: the kept latents, [B, K], int32 or int64, contiguous; with `starts` [n]. The
            kernels skip one that is outside [0, F).
        values: what each latent's row is multiplied by, in the same shape, contiguous.
        weight: the rows, [F, D], of any strides.
        bias: [D], contiguous, or None for zeros.
        target: [B, D], contiguous, or None for zeros.
        starts: where the pairs of each sample begin, and where the last sample's end, [B + 1],
            int64. None for K pairs of each.
    """

    latents: torch.Tensor
    values: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor | None
    starts: torch.Tensor | None = None

    def sizes(self) -> Sizes:
        """Return the sizes; with `starts` K is the mean length of a row, rounded up."""
        if self.starts is None:
            n_samples, k = self.latents.shape
        else:
            n_samples = len(self.starts) - 1
            k = max(1, cdiv(len(self.latents), n_samples))
        return Sizes(n_samples, k, *self.weight.shape, *self.weight.stride())


SLICE_BYTES = 256  # of a row of weight, for a program that only reads it


def slice_width(weight: torch.Tensor) -> int:
    """Return the number of columns that a program takes of `weight` which only reads it."""
    return SLICE_BYTES // weight.element_size()


LEVELS = 16
"""Rows of weight that a program loads at once. With 16 it uses all 255 registers of a thread."""


def levels_in_a_tile(k: int) -> int:
    """Return the number of rows of the tiles for K levels."""
    return LEVELS if k > LEVELS // 2 else LEVELS // 2


@triton.jit
def levels_from(first, LEVELS: tl.constexpr):
    """Return the levels of a tile's rows, [LEVELS]."""
    return first + (LEVELS - 1 - tl.arange(0, LEVELS))


@triton.jit
def pairs_of(first, sample, starts, B, K, LEVELS: tl.constexpr):
    """Return the pairs of some levels of two samples, and whether each pair exists.

    Both are [LEVELS, 2]; the levels are first..first + LEVELS.
    """
    level = levels_from(first, LEVELS)[:, None]
    b = sample + tl.arange(0, 2)[None, :]
    if starts is None:
        return b * K + level, level < tl.where(b < B, K, 0)
    else:
        start = tl.load(starts + b, mask=b < B, other=0)
        return start + level, level < tl.load(starts + b + 1, mask=b < B, other=0) - start


@triton.jit
def highest_level(sample, starts, B, K):
    """Return the number of levels of the longer of two samples' rows, at least 1."""
    if starts is None:
        return K
    else:
        b = sample + tl.arange(0, 2)
        ends = tl.load(starts + b + 1, mask=b < B, other=0)
        lengths = ends - tl.load(starts + b, mask=b < B, other=0)
        return tl.maximum(tl.max(lengths), 1).to(tl.int32)


@triton.jit
def widened(x, BLOCK_D: tl.constexpr):
    """Return a tile whose columns repeat the value of their sample; x is [LEVELS, 2]."""
    of_first, of_next = tl.split(x)
    is_next = (tl.arange(0, 2 * BLOCK_D) >= BLOCK_D)[None, :]
    return tl.where(is_next, of_next[:, None], of_first[:, None])


@triton.jit
def offsets_of(rows, stride, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Return a tile of the offsets at which rows begin, and a tile of whether there is a row.

    `rows` is [LEVELS, 2], with -1 for no row. Without WIDE offsets have 32 bits: an address then
    takes two instructions in place of six.
    """
    rows = widened(rows, BLOCK_D)
    if WIDE:
        return rows.to(tl.int64) * stride, rows >= 0
    else:
        return rows * stride, rows >= 0


@triton.jit
def gather_levels(
    first,
    latents,
    values,
    weight_slice,  # [2 BLOCK_D]: addresses of the columns in the first row of weight
    sample,  # the even one
    in_slice,  # [2 BLOCK_D]: whether the column exists
    starts,  # or None
    B,
    K,
    F,
    stride_wf,
    BLOCK_D: tl.constexpr,
    LEVELS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return what `gather_pairs` does, for some levels of two samples."""
    pairs, exists = pairs_of(first, sample, starts, B, K, LEVELS)
    return gather_pairs(
        pairs,
        exists,
        latents,
        values,
        weight_slice,
        in_slice,
        F,
        stride_wf,
        BLOCK_D,
        EVEN,
        WIDE,
    )


@triton.jit
def gather_pairs(
    pairs,  # [LEVELS, 2]
    exists,  # [LEVELS, 2]
    latents,
    values,
    weight_slice,  # [2 BLOCK_D]: addresses of the columns in the first row of weight
    in_slice,  # [2 BLOCK_D]: whether the column exists
    F,
    stride_wf,
    BLOCK_D: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return the pairs' latents and values, [LEVELS, 2], and their rows of weight, a tile.

    The latents are int32, the values and rows float32. A pair that does not exist, or one whose
    latent is outside [0, F), has latent -1, value 0 and a row of zeros. With EVEN all pairs and
    columns exist, and the loads have no masks.
    """
    if EVEN:
        f = tl.load(latents + pairs)
        v = tl.load(values + pairs)
    else:
        f = tl.load(latents + pairs, mask=exists, other=-1)
        v = tl.load(values + pairs, mask=exists, other=0.0)
    is_latent = f.to(tl.int64).to(tl.uint64) < F.to(tl.uint64)  # false for a negative one too
    f = tl.where(is_latent, f.to(tl.int32), -1)  # F is less than 2^31
    v = tl.where(is_latent, v.to(tl.float32), 0.0)
    at, mask = offsets_of(f, stride_wf, BLOCK_D, WIDE)
    if not EVEN:
        mask &= in_slice[None, :]
    w = tl.load(weight_slice[None, :] + at, mask=mask, other=0.0)
    return f, v, w.to(tl.float32)


@triton.jit
def has_hot_latents(table, F, SLOTS: tl.constexpr):
    """Return whether any latent has copies, by the table of copies."""
    return tl.load(table + F + F + SLOTS) > 0


@triton.jit
def slots_of(f, table, F, mask):
    """Return 1 + the slot of latents, or 0; `f` is within [0, F) where `mask` is true."""
    return tl.load(table + F + f, mask=mask, other=0)


@triton.jit
def row_of_copy(slot, copy, F, COPIES: tl.constexpr):
    """Return the row of a slot's copy; `slot` counts from 1."""
    return F + (slot - 1) * COPIES + copy


@triton.jit
def add_to_loss(loss_sums, part, n_sums):
    """Add a program's part of the loss to one of the sums, [n_sums].

    The programs take the sums in turn. A single sum of thousands of parts would lose digits.
    """
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.atomic_add(loss_sums + program % n_sums, part, sem="relaxed")


@triton.jit
def add_to_bias(grad_bias, s, scale, slice_, n_rows, D, BLOCK_D: tl.constexpr):
    """Add scale times two samples' columns, [2 BLOCK_D], to a row of grad_bias, [n_rows, D].

    The programs take the rows in turn, because atomic additions to one row wait for each other.
    """
    both = tl.sum(tl.reshape(s, [2, BLOCK_D]), 0)
    row = (tl.program_id(0) % n_rows).to(tl.int64)
    d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.atomic_add(grad_bias + row * D + d, scale * both, mask=d < D, sem="relaxed")
