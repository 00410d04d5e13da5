"""Copies of the gradient rows of the latents that fire most.

Atomic additions to one row queue up. In a real dictionary a few latents fire on most samples, and
their rows hold up all others; so each of them gets COPIES rows behind the gradient's own, which the
samples take in turn, and which are added up at the end.
"""

from typing import NamedTuple

import torch

from . import _triton
from ._triton import cdiv, tl, triton
from .inverted_index import count_kernel

FEWEST_PAIRS = 2**16  # below, the queues are short
HOT = 1 / 1024  # share of the batch's pairs from which a latent gets copies
SLOTS = 256  # latents with copies, at most
COPIES = 16
BLOCK = 1024


class Spread(NamedTuple):
    """Where each pair of a batch adds its contribution.

    Attributes:
        rows: [B, K], int32: indices[b, t], or one of the rows F .. F + SLOTS * COPIES. Without
            meaning where indices[b, t] is no latent.
        n_copied: [1], int32: the number of latents that have copies, or would with enough slots.
        hot: [SLOTS], int32: 1 + the latent that the rows of a slot belong to, or 0.
    """

    rows: torch.Tensor
    n_copied: torch.Tensor
    hot: torch.Tensor


@triton.jit
def _take_slots_kernel(
    counts, n_copied, hot, threshold, F, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts += 1  # the bin of latent 0
    is_hot = (f < F) & (tl.load(counts + f, mask=f < F, other=0) >= threshold)
    slot = tl.atomic_add(n_copied + tl.zeros([BLOCK], tl.int32), 1, mask=is_hot, sem="relaxed")
    has_slot = is_hot & (slot < SLOTS)
    tl.store(hot + slot, f + 1, mask=has_slot)
    tl.store(counts + f, tl.where(has_slot, slot, -1), mask=f < F)


@triton.jit
def _rows_kernel(indices, slots, rows, n_pairs, K, F, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(indices + n, mask=n < n_pairs, other=-1)
    slot = tl.load(slots + 1 + f, mask=(f >= 0) & (f < F), other=-1)
    row = tl.where(slot >= 0, F + slot * COPIES + (n // K) % COPIES, f)
    tl.store(rows + n, row.to(tl.int32), mask=n < n_pairs)


@triton.jit
def _fold_kernel(hot, grad_weight, F, D, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    f = tl.load(hot + slot).to(tl.int64) - 1
    if f >= 0:
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for copy in range(COPIES):
            row = F + slot * COPIES + copy
            total += tl.load(grad_weight + row * D + d, mask=d < D, other=0.0)
        tl.store(grad_weight + f * D + d, total, mask=d < D)


def is_worth_spreading(indices: torch.Tensor) -> bool:
    """Return whether a batch is large enough to gain by copies."""
    return indices.numel() >= FEWEST_PAIRS


def spread(indices: torch.Tensor, n_latents: int) -> Spread:
    """Give copies to the latents that fire most among `indices` ([B, K], contiguous)."""
    n_pairs = indices.numel()
    state = indices.new_zeros(SLOTS + 4 + n_latents + 2, dtype=torch.int32)
    hot, n_copied, counts = state[:SLOTS], state[SLOTS : SLOTS + 1], state[SLOTS + 4 :]  # aligned
    rows = torch.empty_like(indices, dtype=torch.int32)
    over_pairs = (cdiv(n_pairs, BLOCK),)
    _triton.launch(
        count_kernel, over_pairs, (indices, counts), (), (n_pairs, n_latents), BLOCK=BLOCK
    )
    _triton.launch(
        _take_slots_kernel,
        (cdiv(n_latents, BLOCK),),
        (counts, n_copied, hot),
        (HOT * n_pairs,),
        (n_latents,),
        SLOTS=SLOTS,
        BLOCK=BLOCK,
    )
    _triton.launch(
        _rows_kernel,
        over_pairs,
        (indices, counts, rows),
        (),
        (n_pairs, indices.shape[1], n_latents),
        COPIES=COPIES,
        BLOCK=BLOCK,
    )
    return Spread(rows, n_copied, hot)


def fold_copies(spread: Spread, grad_weight: torch.Tensor, n_latents: int) -> None:
    """Add up the copies, the rows of `grad_weight` from n_latents on, into the rows before."""
    d_in = grad_weight.shape[1]
    _triton.launch(
        _fold_kernel,
        (SLOTS, cdiv(d_in, BLOCK)),
        (spread.hot, grad_weight),
        (),
        (n_latents, d_in),
        COPIES=COPIES,
        BLOCK=BLOCK,
    )
