"""The inverted index of a batch: for every latent, the (sample, level) pairs that chose it.

Sums over the pairs of each latent are what the gradients of decoder and encoder weights are. In a
real dictionary a few latents fire on most samples, so the work is dealt out in runs of equally many
pairs rather than by latent: a program adds up a run, and a second kernel joins the parts of the
latents that span runs. Without atomics, the sums are the same from run to run.
"""

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
def _load_pairs(
    start, end, latents, pairs, vals, rows, d, n_columns, pairs_per_row, PAIRS: tl.constexpr
):
    # The rows of a few pairs are on their way at once. Beyond the end the latent is -2.
    next_latents = ()
    next_pairs = ()
    next_vals = ()
    next_rows = ()
    for t in tl.static_range(PAIRS):
        n = start + t
        pair = tl.load(pairs + n, mask=n < end, other=0)
        row = rows + (pair // pairs_per_row) * n_columns + d
        row = tl.load(row, mask=d < tl.where(n < end, n_columns, 0), other=0.0)
        next_latents += (tl.load(latents + n, mask=n < end, other=-2).to(tl.int64),)
        next_pairs += (pair,)
        next_vals += (tl.load(vals + pair, mask=n < end, other=0.0).to(tl.float32),)
        next_rows += (row.to(tl.float32),)
    return next_latents, next_pairs, next_vals, next_rows


@triton.jit(do_not_specialize=["first_slice", "N", "pairs_per_row", "F", "run_length"])
def _sum_run_kernel(
    latents,
    pairs,
    vals,
    rows,
    weight,
    sums,
    partials,  # [runs, 2, n_columns]: of the latents that began before the run, and go on after it
    dots_parts,  # [slices of this launch, N]
    first_slice,
    scale,
    N,
    pairs_per_row,
    F,
    first_column,
    n_columns,
    width,  # of sums
    run_length,
    stride_wf,
    stride_wd,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
    SUMS: tl.constexpr,
    DOTS: tl.constexpr,
):
    run = tl.program_id(0).to(tl.int64)
    slice_ = (first_slice + tl.program_id(1)).to(tl.int64)
    first = run * run_length
    end = tl.minimum(first + run_length, N)
    d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)

    f = tl.load(latents + first).to(tl.int64)
    began_before = tl.load(latents + first - 1, mask=first > 0, other=-2) == f
    columns = tl.where((f >= 0) & (f < F), n_columns, 0)  # none of a latent outside [0, F)
    w = tl.zeros([BLOCK_D], tl.float32)
    if DOTS:
        w = tl.load(weight + f * stride_wf + d * stride_wd, mask=d < columns, other=0.0)
        w = w.to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    for start in range(first, end, PAIRS):
        next_latents, next_pairs, next_vals, next_rows = _load_pairs(
            start, end, latents, pairs, vals, rows, d, n_columns, pairs_per_row, PAIRS
        )
        for t in tl.static_range(PAIRS):
            latent = next_latents[t]
            if (latent != f) & (latent != -2):
                if SUMS:
                    head = partials + run * 2 * n_columns + d
                    tl.store(head, total, mask=d < tl.where(began_before, n_columns, 0))
                    out = sums + f * width + first_column + d
                    tl.store(out, total, mask=d < tl.where(began_before, 0, columns))
                f = latent
                began_before = False
                columns = tl.where((f >= 0) & (f < F), n_columns, 0)
                if DOTS:
                    w = tl.load(weight + f * stride_wf + d * stride_wd, mask=d < columns, other=0.0)
                    w = w.to(tl.float32)
                total = tl.zeros([BLOCK_D], tl.float32)
            s = scale * next_rows[t]
            total += next_vals[t] * s
            if DOTS:
                dot = dots_parts + tl.program_id(1).to(tl.int64) * N + next_pairs[t]
                tl.store(dot, tl.sum(w * s), mask=start + t < end)
    if SUMS:
        goes_on = tl.load(latents + end, mask=end < N, other=-2) == f
        is_partial = began_before | goes_on
        part = partials + (run * 2 + tl.where(began_before, 0, 1)) * n_columns + d
        tl.store(part, total, mask=d < tl.where(is_partial, n_columns, 0))
        out = sums + f * width + first_column + d
        tl.store(out, total, mask=d < tl.where(is_partial, 0, columns))


@triton.jit(do_not_specialize=["N", "F", "run_length"])
def _join_runs_kernel(
    latents,
    partials,
    sums,
    N,
    F,
    first_column,
    n_columns,
    width,
    run_length,
    BLOCK_D: tl.constexpr,
):
    # A latent that spans runs is added up by the program of the run in which it begins.
    run = tl.program_id(0).to(tl.int64)
    first = run * run_length
    n = first + run_length
    f = tl.load(latents + n - 1, mask=n < N, other=-1).to(tl.int64)
    begins = tl.load(latents + first - 1, mask=first > 0, other=-2) != f
    goes_on = begins & (f >= 0) & (f < F) & (tl.load(latents + n, mask=n < N, other=-2) == f)
    n_more = 0  # runs
    while goes_on:
        n_more += 1
        n += run_length
        last = tl.load(latents + n - 1, mask=n < N, other=-2)
        goes_on = (last == f) & (tl.load(latents + n, mask=n < N, other=-2) == f)
    if n_more > 0:
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_slice = d < n_columns
        total = tl.load(partials + (run * 2 + 1) * n_columns + d, mask=in_slice, other=0.0)
        for more in range(1, n_more + 1):
            head = partials + (run + more) * 2 * n_columns + d
            total += tl.load(head, mask=in_slice, other=0.0)
        tl.store(sums + f * width + first_column + d, total, mask=in_slice)


@triton.jit
def _zero_absent_kernel(starts, sums, first_column, n_columns, width, BLOCK_D: tl.constexpr):
    f = tl.program_id(0).to(tl.int64)
    if tl.load(starts + f) == tl.load(starts + f + 1):
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        out = sums + f * width + first_column + d
        tl.store(out, tl.zeros([BLOCK_D], tl.float32), mask=d < n_columns)


BLOCK_D = 256
PAIRS = 4
NUM_WARPS = 1
SHORTEST_RUN = 32
MOST_RUNS = 2048  # which bounds `partials`: 2 * 2048 * D floats, 38 MB at D = 2304
MOST_DOTS = 2**23  # and this the parts of the dots that a launch writes: 32 MiB


def sum_by_latent(
    index: InvertedIndex,
    vals: torch.Tensor,
    rows: torch.Tensor,
    sums: torch.Tensor | None,
    *,
    scale: float = 1.0,
    weight: torch.Tensor | None = None,
    first_column: int = 0,
    zero_absent: bool = True,
) -> torch.Tensor | None:
    """Set sums[f] = scale * sum of vals[b, t] * row over the pairs (b, t) that chose f.

    Args:
        index: of the batch.
        vals: [B, K], contiguous.
        rows: what the pairs refer to, contiguous: [B, n] for a row a sample, [B * K, n] for a row a
            pair.
        sums: where the sums go, [F, >= n], contiguous, of any floating dtype; None for no sums.
        scale: multiplies sums and dots.
        weight: [F, n], for the dots.
        first_column: where in `sums` the columns of `rows` begin.
        zero_absent: whether to zero the sums of the latents that no pair chose.

    Returns:
        With a weight the dots, scale * weight[indices[b, t]] . row, [B, K], float32.
    """
    n_pairs, n_columns = index.pairs.numel(), rows.shape[1]
    pairs_per_row = n_pairs // rows.shape[0]
    run_length = max(SHORTEST_RUN, triton.cdiv(n_pairs, MOST_RUNS))
    n_runs = triton.cdiv(n_pairs, run_length)
    n_slices = triton.cdiv(n_columns, BLOCK_D)
    has_sums, has_dots = sums is not None, weight is not None
    like_sums = weight if sums is None else sums
    assert like_sums is not None, "neither sums nor dots are asked for"
    n_latents, width = like_sums.shape
    partials = rows.new_empty((n_runs, 2, n_columns) if has_sums else (0,), dtype=torch.float32)
    slices_per_launch = max(1, MOST_DOTS // n_pairs) if has_dots else n_slices
    dots = None
    for first_slice in range(0, n_slices, slices_per_launch):
        slices = min(slices_per_launch, n_slices - first_slice)
        dots_parts = rows.new_empty(
            (slices, *vals.shape) if has_dots else (0,), dtype=torch.float32
        )
        _sum_run_kernel[(n_runs, slices)](
            index.latents,
            index.pairs,
            vals,
            rows,
            weight,
            sums,
            partials,
            dots_parts,
            first_slice,
            scale,
            n_pairs,
            pairs_per_row,
            n_latents,
            first_column,
            n_columns,
            width,
            run_length,
            *(weight.stride() if weight is not None else (0, 0)),
            BLOCK_D=BLOCK_D,
            PAIRS=PAIRS,
            SUMS=has_sums,
            DOTS=has_dots,
            num_warps=NUM_WARPS,
        )
        if has_dots:
            dots = dots_parts.sum(0) if dots is None else dots.add_(dots_parts.sum(0))
    if has_sums:
        _join_runs_kernel[(n_runs, n_slices)](
            index.latents,
            partials,
            sums,
            n_pairs,
            n_latents,
            first_column,
            n_columns,
            width,
            run_length,
            BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS,
        )
        if zero_absent:
            latents = torch.arange(n_latents + 1, device=rows.device, dtype=torch.int32)
            starts = torch.searchsorted(index.latents, latents, out_int32=True)
            block = 1024
            _zero_absent_kernel[(n_latents, triton.cdiv(n_columns, block))](
                starts, sums, first_column, n_columns, width, BLOCK_D=block
            )
    return dots
