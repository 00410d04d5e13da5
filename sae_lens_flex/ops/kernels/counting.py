"""How often each latent comes in a batch, and where its pairs go in the inverted index.

    counts[f + 1] = number of pairs (b, t) with latents[b, t] = f

The pairs are then placed bin by bin. Which pair of a bin comes first varies from run to run: the
programs take the places of a bin by atomic additions.
"""

import torch

from .launch import cdiv, launch, tl, triton


@triton.jit
def _bin_of(f, F):
    # 1 + f for a latent; 0 or F + 1 for what lies outside [0, F).
    return tl.minimum(tl.maximum(f.to(tl.int64), -1), F) + 1


@triton.jit(do_not_specialize=["N", "F"])
def _count_kernel(latents, counts, N, F, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(latents + n, mask=n < N, other=0)
    tl.atomic_add(counts + _bin_of(f, F), 1, mask=n < N, sem="relaxed")


@triton.jit(do_not_specialize=["N", "K", "F"])
def _place_kernel(unsorted, ends, latents, pairs, samples, N, K, F, BLOCK: tl.constexpr):
    # A bin is filled from its end down. When all bins are full, `ends` holds their starts.
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    in_bin = _bin_of(tl.load(unsorted + n, mask=mask, other=0), F)
    place = tl.atomic_add(ends + in_bin, -1, mask=mask, sem="relaxed") - 1
    tl.store(latents + place, (in_bin - 1).to(tl.int32), mask=mask)
    tl.store(pairs + place, n, mask=mask)
    tl.store(samples + place, (n // K).to(tl.int32), mask=mask)


BLOCK = 1024


def count(latents: torch.Tensor, n_latents: int) -> torch.Tensor:
    """Return the number of pairs in every bin, [F + 2], int32.

    Bin 1 + f belongs to latent f. Bins 0 and F + 1 belong to what lies below and above [0, F).

    Args:
        latents: [B, K] or [n], contiguous.
        n_latents: F.
    """
    counts = latents.new_zeros(n_latents + 2, dtype=torch.int32)
    n_pairs = latents.numel()
    launch(
        _count_kernel,
        (cdiv(n_pairs, BLOCK),),
        (latents, counts),
        (),
        (n_pairs, n_latents),
        BLOCK=BLOCK,
    )
    return counts


def place(
    unsorted: torch.Tensor, ends: torch.Tensor, n_latents: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the pairs of a batch grouped by latent: `latents`, `pairs` and `samples`.

    They are the fields of those names of `codes.InvertedIndex`.

    Args:
        unsorted: the latents, [B, K], contiguous; or [n] of rows of different length, for which
            `samples` has no meaning.
        ends: where each bin of `count` ends, [F + 2], int32. Each is replaced by where its bin
            starts.
        n_latents: F.
    """
    n_pairs, k = unsorted.numel(), unsorted.shape[-1]
    latents, samples = (unsorted.new_empty(n_pairs, dtype=torch.int32) for _ in range(2))
    pairs = unsorted.new_empty(n_pairs, dtype=torch.int64)
    launch(
        _place_kernel,
        (cdiv(n_pairs, BLOCK),),
        (unsorted, ends, latents, pairs, samples),
        (),
        (n_pairs, k, n_latents),
        BLOCK=BLOCK,
    )
    return latents, pairs, samples
