"""The inverted index of a batch: for every latent, the (sample, level) pairs that chose it."""

from typing import NamedTuple

import torch

from ._triton import tl, triton


class InvertedIndex(NamedTuple):
    """The pairs (b, t) of a batch, grouped by the latent that they chose.

    Attributes:
        latents: indices[b, t] of each pair, ascending, [B * K], int32. What lies outside [0, F) is
            -1 or F.
        pairs: b * K + t of each pair, [B * K], int64, ascending among those of one latent.
    """

    latents: torch.Tensor
    pairs: torch.Tensor


def invert(indices: torch.Tensor, n_latents: int) -> InvertedIndex:
    """Group the pairs of `indices` ([B, K]) by latent, with one radix sort."""
    latents = indices.flatten().clamp(-1, n_latents).to(torch.int32)
    latents, pairs = latents.sort(stable=True)
    return InvertedIndex(latents, pairs)


@triton.jit
def _sum_by_latent_kernel(
    starts,  # [F + 1]
    pairs,
    vals,
    rows,
    sums,
    first_column,
    n_columns,
    stride,  # of rows
    width,  # of sums
    pairs_per_row,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row = d < n_columns
    total = tl.zeros([BLOCK_D], tl.float32)
    for n in range(tl.load(starts + f), tl.load(starts + f + 1)):
        pair = tl.load(pairs + n)
        row = tl.load(rows + (pair // pairs_per_row) * stride + d, mask=in_row, other=0.0)
        total += tl.load(vals + pair).to(tl.float32) * row
    tl.store(sums + f * width + first_column + d, total, mask=in_row)


def sum_by_latent(
    index: InvertedIndex,
    vals: torch.Tensor,
    rows: torch.Tensor,
    sums: torch.Tensor,
    first_column: int = 0,
    n_columns: int | None = None,
) -> None:
    """Add up vals * rows over the pairs of each latent, in the index's order.

    One program a latent, without atomics: the result is the same from run to run, and a latent that
    fires often makes its program slow.

    Args:
        index: of the batch.
        vals: [B, K], contiguous.
        rows: what the pairs refer to, contiguous: [B, n] for a row a sample, [B * K, n] for a row a
            pair.
        sums: where the sums go, [F, D], contiguous, float32.
        first_column: where in `sums` the columns of `rows` begin.
        n_columns: how many of them to add up; None for all.
    """
    n_latents, width = sums.shape
    stride = rows.shape[1]
    n_columns = stride if n_columns is None else n_columns
    latents = torch.arange(n_latents + 1, device=sums.device, dtype=torch.int32)
    starts = torch.searchsorted(index.latents, latents)
    block = 64
    _sum_by_latent_kernel[(n_latents, triton.cdiv(n_columns, block))](
        starts,
        index.pairs,
        vals,
        rows,
        sums,
        first_column,
        n_columns,
        stride,
        width,
        index.pairs.numel() // rows.shape[0],
        BLOCK_D=block,
        num_warps=1,  # pyright: ignore[reportCallIssue]
    )
