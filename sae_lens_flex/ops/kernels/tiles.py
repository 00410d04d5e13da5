"""Tiles: what the kernels that read rows of weight share.

A tile has the shape [LEVELS, 2 BLOCK_D]. Its rows are levels, from the highest down. Its columns
are one slice of D of an even sample, followed by the same slice of the next sample. With two
samples each of a warp's 32 threads has at least four columns. A thread has all rows of its columns,
so a sum along the levels stays in its registers.
"""

from typing import NamedTuple

import torch

from .launch import cdiv, tl, triton


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

    def sizes(self) -> tuple[int, int, int, int]:
        """Return B, K, F and D; with `starts` K is the mean length of a row, rounded up."""
        n_latents, d_in = self.weight.shape
        if self.starts is None:
            n_samples, k = self.latents.shape
        else:
            n_samples = len(self.starts) - 1
            k = max(1, cdiv(len(self.latents), n_samples))
        return n_samples, k, n_latents, d_in

    def is_even(self, levels: int, block_d: int) -> bool:
        """Return whether tiles of so many levels and columns divide the batch."""
        n_samples, k, _, d_in = self.sizes()
        is_rectangle = self.starts is None
        return is_rectangle and n_samples % 2 == 0 and k % levels == 0 and d_in % block_d == 0


def is_wide(weight: torch.Tensor, n_rows: int = 0) -> bool:
    """Return whether an offset in `weight`, or in n_rows rows of its width, takes 64 bits."""
    n_latents, d_in = weight.shape
    return max(n_latents * weight.stride(0), n_rows * d_in) >= 2**31


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
    """Return some levels' latents and values, [LEVELS, 2], and their rows of weight, a tile.

    The latents are int32, the values and rows float32. A pair beyond the batch or a
    row's end, or one whose latent is outside [0, F), has latent -1, value 0 and a row of zeros.
    With EVEN all samples, levels and columns exist, and the loads have no masks.
    """
    pairs, exists = pairs_of(first, sample, starts, B, K, LEVELS)
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
def store_losses(loss_parts, error, scale, slice_, sample, B, BLOCK_D: tl.constexpr):
    """Store scale times the sums of two samples' columns, [2 BLOCK_D], in [slices, B] parts."""
    b = sample + tl.arange(0, 2)
    of_sample = tl.sum(tl.reshape(error, [2, BLOCK_D]), 1)
    tl.store(loss_parts + slice_ * B + b, scale * of_sample, mask=b < B)


@triton.jit
def add_to_bias(grad_bias, s, scale, slice_, n_rows, D, BLOCK_D: tl.constexpr):
    """Add scale times two samples' columns, [2 BLOCK_D], to a row of grad_bias, [n_rows, D].

    The programs take the rows in turn, because atomic additions to one row wait for each other.
    """
    both = tl.sum(tl.reshape(s, [2, BLOCK_D]), 0)
    row = (tl.program_id(0) % n_rows).to(tl.int64)
    d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.atomic_add(grad_bias + row * D + d, scale * both, mask=d < D, sem="relaxed")
