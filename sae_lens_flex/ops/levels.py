"""What the kernels that walk the levels share: tiles of a few levels of two samples.

A tile is [LEVELS, 2 BLOCK_D]: its rows are levels from the highest down, and its columns one slice
of D, first of an even sample and then of the next, so that each of a warp's 32 threads has four
columns or more. It has all rows of them: sums along the levels stay in its registers.
"""

import torch

from ._triton import tl, triton


def is_wide(weight: torch.Tensor, n_rows: int = 0) -> bool:
    """Return whether offsets in `weight`, or in n_rows rows as long, take 64 bits."""
    n_latents, d_in = weight.shape
    return max(n_latents * weight.stride(0), n_rows * d_in) >= 2**31


LEVELS = 16
"""Rows of weight on their way at once; at 16, all 255 registers of a thread are in use."""


def levels_in_a_tile(k: int) -> int:
    return LEVELS if k > LEVELS // 2 else LEVELS // 2


@triton.jit
def levels_from(first, LEVELS: tl.constexpr):
    """Return the levels of a tile's rows, [LEVELS]."""
    return first + (LEVELS - 1 - tl.arange(0, LEVELS))


@triton.jit
def pairs_of(first, sample, B, K, LEVELS: tl.constexpr):
    """Return b K + t of the levels first..first + LEVELS of two samples, and which there are."""
    level = levels_from(first, LEVELS)[:, None]
    b = sample + tl.arange(0, 2)[None, :]
    return b * K + level, level < tl.where(b < B, K, 0)


@triton.jit
def widened(x, BLOCK_D: tl.constexpr):
    """Return the tile of what two samples have at each level, [LEVELS, 2]."""
    of_first, of_next = tl.split(x)
    is_next = (tl.arange(0, 2 * BLOCK_D) >= BLOCK_D)[None, :]
    return tl.where(is_next, of_next[:, None], of_first[:, None])


@triton.jit
def offsets_of(rows, stride, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Return the tile of where rows of two samples begin, and whether they are any: -1 is none.

    Without WIDE, in 32 bits, an address is two instructions in place of six.
    """
    rows = widened(rows, BLOCK_D)
    if WIDE:
        return rows.to(tl.int64) * stride, rows >= 0
    else:
        return rows * stride, rows >= 0


@triton.jit
def gather_levels(
    first,
    indices,
    vals,
    weight_slice,  # [2 BLOCK_D]: pointers to the columns of weight
    sample,  # the first of the two
    in_slice,  # [2 BLOCK_D]
    B,
    K,
    F,
    stride_wf,
    BLOCK_D: tl.constexpr,
    LEVELS: tl.constexpr,
    EVEN: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return the latents and values, [LEVELS, 2], and rows of weight of some levels, a tile.

    They are int32, float32 and float32. What is no latent, or beyond the batch or K, is -1, 0 and a
    row of zeros. With EVEN all samples, levels and columns exist, and nothing is spent on asking.
    """
    pairs, exists = pairs_of(first, sample, B, K, LEVELS)
    if EVEN:
        f = tl.load(indices + pairs)
        v = tl.load(vals + pairs)
    else:
        f = tl.load(indices + pairs, mask=exists, other=-1)
        v = tl.load(vals + pairs, mask=exists, other=0.0)
    is_latent = f.to(tl.int64).to(tl.uint64) < F.to(tl.uint64)  # nor is a negative one
    f = tl.where(is_latent, f.to(tl.int32), -1)  # there are fewer than 2^31
    v = tl.where(is_latent, v.to(tl.float32), 0.0)
    at, mask = offsets_of(f, stride_wf, BLOCK_D, WIDE)
    if not EVEN:
        mask &= in_slice[None, :]
    w = tl.load(weight_slice[None, :] + at, mask=mask, other=0.0)
    return f, v, w.to(tl.float32)


@triton.jit
def store_losses(loss_parts, error, scale, slice_, sample, B, BLOCK_D: tl.constexpr):
    """Store what two samples' columns, [2 BLOCK_D], add to the loss: two of [slices, B] parts."""
    b = sample + tl.arange(0, 2)
    of_sample = tl.sum(tl.reshape(error, [2, BLOCK_D]), 1)
    tl.store(loss_parts + slice_ * B + b, scale * of_sample, mask=b < B)


@triton.jit
def add_to_bias(grad_bias, s, scale, slice_, n_rows, D, BLOCK_D: tl.constexpr):
    """Add scale times two samples' columns, [2 BLOCK_D], to one row of grad_bias, [n_rows, D].

    The programs take the rows in turn: additions to one queue.
    """
    both = tl.sum(tl.reshape(s, [2, BLOCK_D]), 0)
    row = (tl.program_id(0) % n_rows).to(tl.int64)
    d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)
    tl.atomic_add(grad_bias + row * D + d, scale * both, mask=d < D, sem="relaxed")
