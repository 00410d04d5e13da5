"""Copies of the gradient rows of the latents that fire most.

    grad_weight[f] = sum over the copies of row f

Atomic additions to one row wait for each other. In a real dictionary a few latents fire on most
samples, and everything waits for the additions to their rows. So each of these latents gets COPIES
rows behind the F rows of the gradient. The samples take the copies in turn, and a last kernel adds
the copies up.
"""

from typing import NamedTuple

import torch

from .launch import cdiv, launch, tl, triton

FEWEST_PAIRS = 2**16  # With fewer pairs few additions meet, and copies cost more than they save.
HOT = 1 / 1024  # A latent gets copies from this share of the batch's pairs on.
SLOTS = 256  # the most latents that get copies
COPIES = 16
BLOCK = 1024


class Copies(NamedTuple):
    """Where each pair of a batch adds its part of the gradient.

    Attributes:
        rows: of each pair, int32: its latent, or one of the rows F .. F + SLOTS * COPIES. Not
            defined where that latent is outside [0, F).
        n_copied: [1], int32: the number of latents that fire often enough, also beyond SLOTS.
        hot: [SLOTS], int32: 1 + the latent to which the copies of a slot belong, or 0.
    """

    rows: torch.Tensor
    n_copied: torch.Tensor
    hot: torch.Tensor


@triton.jit
def _take_slots_kernel(
    counts, n_copied, hot, threshold, F, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    # Replaces each latent's count by its slot, or by -1.
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    counts += 1  # the bin of latent 0
    is_hot = (f < F) & (tl.load(counts + f, mask=f < F, other=0) >= threshold)
    slot = tl.atomic_add(n_copied + tl.zeros([BLOCK], tl.int32), 1, mask=is_hot, sem="relaxed")
    has_slot = is_hot & (slot < SLOTS)
    tl.store(hot + slot, f + 1, mask=has_slot)
    tl.store(counts + f, tl.where(has_slot, slot, -1), mask=f < F)


@triton.jit
def _rows_kernel(latents, slots, rows, n_pairs, K, F, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(latents + n, mask=n < n_pairs, other=-1)
    slot = tl.load(slots + 1 + f, mask=(f >= 0) & (f < F), other=-1)
    row = tl.where(slot >= 0, F + slot * COPIES + (n // K) % COPIES, f)
    tl.store(rows + n, row.to(tl.int32), mask=n < n_pairs)


@triton.jit
def _add_up_kernel(hot, grad_weight, F, D, COPIES: tl.constexpr, BLOCK: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    f = tl.load(hot + slot).to(tl.int64) - 1
    if f >= 0:
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for copy in range(COPIES):
            row = F + slot * COPIES + copy
            total += tl.load(grad_weight + row * D + d, mask=d < D, other=0.0)
        tl.store(grad_weight + f * D + d, total, mask=d < D)


def is_worth_copies(latents: torch.Tensor) -> bool:
    """Return whether a batch is large enough to gain by copies; `latents` are its pairs'."""
    return latents.numel() >= FEWEST_PAIRS


def assign_copies(latents: torch.Tensor, counts: torch.Tensor, k: int) -> Copies:
    """Give copies to the latents that fire most.

    Args:
        latents: of each pair, contiguous.
        counts: how often each latent comes, [F + 2], as `counting.count` returns it. Overwritten.
        k: pairs that share a sample, about: the copies are taken in turn by so many at once.
    """
    n_pairs, n_latents = latents.numel(), len(counts) - 2
    state = latents.new_zeros(SLOTS + 1, dtype=torch.int32)
    hot, n_copied = state[:SLOTS], state[SLOTS:]
    rows = torch.empty_like(latents, dtype=torch.int32)
    launch(
        _take_slots_kernel,
        (cdiv(n_latents, BLOCK),),
        (counts, n_copied, hot),
        (HOT * n_pairs,),
        (n_latents,),
        SLOTS=SLOTS,
        BLOCK=BLOCK,
    )
    launch(
        _rows_kernel,
        (cdiv(n_pairs, BLOCK),),
        (latents, counts, rows),
        (),
        (n_pairs, k, n_latents),
        COPIES=COPIES,
        BLOCK=BLOCK,
    )
    return Copies(rows, n_copied, hot)


def add_up_copies(copies: Copies, grad_weight: torch.Tensor, n_latents: int) -> None:
    """Add the copies to their latents' rows.

    Args:
        copies: as `assign_copies` returned them.
        grad_weight: the gradient's F rows and, behind them, the copies: [>= F + SLOTS * COPIES, D],
            float32. No pair has added to the row of a latent with copies.
        n_latents: F.
    """
    d_in = grad_weight.shape[1]
    launch(
        _add_up_kernel,
        (SLOTS, cdiv(d_in, BLOCK)),
        (copies.hot, grad_weight),
        (),
        (n_latents, d_in),
        COPIES=COPIES,
        BLOCK=BLOCK,
    )
