"""Copies of the gradient rows of the latents that fire most.

    grad_weight[f] = sum over the copies of row f

Atomic additions to one row wait for each other. In a real dictionary a few latents fire on most
samples, and everything waits for the additions to their rows. So each of these latents gets COPIES
rows behind the F rows of the gradient. The samples take the copies in turn, and `finish` adds the
copies up. A table, which `tiles` describes, says which latents have copies.
"""

import math

from .launch import Launch, cdiv, tl, triton
from .tiles import SLOTS

# With fewer pairs few additions meet, and with fewer samples few are to one row, since a latent
# mostly comes once in a sample. Copies then cost more than they save.
FEWEST_PAIRS = 2**16
FEWEST_SAMPLES = 2048
HOT = 1 / 1024  # A latent gets copies from this share of the batch's pairs on.
BLOCK = 1024


@triton.jit(do_not_specialize=["threshold", "n_pairs"])
def _choose_kernel(latents, table, threshold, n_pairs, F, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(latents + n, mask=n < n_pairs, other=-1)
    is_latent = (f >= 0) & (f < F)
    before = tl.atomic_add(table + f, 1, mask=is_latent, sem="relaxed")
    is_hot = is_latent & (before == threshold - 1)  # true of one pair of a latent
    hot = table + F + F
    slot = tl.atomic_add(hot + SLOTS + tl.zeros([BLOCK], tl.int32), 1, mask=is_hot, sem="relaxed")
    has_slot = is_hot & (slot < SLOTS)
    tl.store(hot + slot, (f + 1).to(tl.int32), mask=has_slot)
    tl.store(table + F + f, slot + 1, mask=has_slot)


def is_worth_copies(n_samples: int, n_pairs: int) -> bool:
    """Return whether a batch is large enough to gain by copies."""
    return n_pairs >= FEWEST_PAIRS and n_samples >= FEWEST_SAMPLES


def choose(n_pairs: int, n_latents: int) -> Launch:
    """Return the launch that gives copies to the latents that fire most.

    It takes the latents, [B, K], contiguous, and the table.
    """
    threshold = max(1, math.ceil(HOT * n_pairs))
    return Launch(
        _choose_kernel,
        (cdiv(n_pairs, BLOCK),),
        (threshold, n_pairs, n_latents),
        SLOTS=SLOTS,
        BLOCK=BLOCK,
    )
