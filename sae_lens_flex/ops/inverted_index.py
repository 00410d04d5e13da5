"""The inverted index of a batch: for every latent, the (sample, level) pairs that chose it.

Sums over the pairs of each latent are what the gradients of decoder and encoder weights are. In a
real dictionary a few latents fire on most samples, so the work is dealt out in runs of equally many
pairs rather than by latent: a program adds up a run, and a second kernel joins the parts of the
latents that span runs.

With `torch.use_deterministic_algorithms(True)` and on other backends than Triton's, the pairs of a
latent are in ascending order, and so the sums are the same from run to run.
"""

from typing import NamedTuple

import torch

from . import _triton
from ._triton import cdiv, tl, triton


class InvertedIndex(NamedTuple):
    """The pairs (b, t) of a batch, grouped by the latent that they chose.

    Attributes:
        latents: indices[b, t] of each pair, ascending, [B * K], int32. What lies outside [0, F) is
            -1 or F.
        pairs: b * K + t of each pair, [B * K], int64.
        samples: b of each pair, [B * K], int32.
        starts: the pairs of latent f are those from starts[f + 1] to starts[f + 2], [F + 2], int32,
            or int64 from 2^31 pairs on.
    """

    latents: torch.Tensor
    pairs: torch.Tensor
    samples: torch.Tensor
    starts: torch.Tensor


@triton.jit
def bin_of(f, F):
    """Return the bin in which a latent is counted: 1 + f, or 0 or F + 1 for what is no latent."""
    return tl.minimum(tl.maximum(f.to(tl.int64), -1), F) + 1


@triton.jit(do_not_specialize=["N", "F"])
def count_kernel(indices, counts, N, F, BLOCK: tl.constexpr):
    """Count the pairs of every latent in its bin of `counts`, [F + 2], zeroed."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(indices + n, mask=n < N, other=0)
    tl.atomic_add(counts + bin_of(f, F), 1, mask=n < N, sem="relaxed")


@triton.jit(do_not_specialize=["N", "K", "F"])
def _place_kernel(indices, ends, latents, pairs, samples, N, K, F, BLOCK: tl.constexpr):
    # Every bin is filled from its end down, which makes starts of the ends.
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    in_bin = bin_of(tl.load(indices + n, mask=mask, other=0), F)
    place = tl.atomic_add(ends + in_bin, -1, mask=mask, sem="relaxed") - 1
    tl.store(latents + place, (in_bin - 1).to(tl.int32), mask=mask)
    tl.store(pairs + place, n, mask=mask)
    tl.store(samples + place, (n // K).to(tl.int32), mask=mask)


COUNT_BLOCK = 1024


def _is_countable(n_pairs: int) -> bool:
    return n_pairs < 2**31  # in 32 bits


def shapes_only(like: torch.Tensor, n_pairs: int, n_latents: int) -> InvertedIndex:
    """Return an index without values."""
    return InvertedIndex(
        latents=like.new_empty(n_pairs, dtype=torch.int32),
        pairs=like.new_empty(n_pairs, dtype=torch.int64),
        samples=like.new_empty(n_pairs, dtype=torch.int32),
        starts=like.new_empty(
            n_latents + 2, dtype=torch.int32 if _is_countable(n_pairs) else torch.int64
        ),
    )


def invert(indices: torch.Tensor, n_latents: int, use_triton: bool) -> InvertedIndex:
    """Group the pairs of `indices` ([B, K], int32 or int64) by latent, of which there are F.

    By counting, or, for a fixed order, by a radix sort, which takes twice as long: 0.15 ms for
    B=4096, K=128 on an H200, where counting takes 0.08.
    """
    n_pairs, k = indices.numel(), indices.shape[1]
    is_countable = _is_countable(n_pairs)
    if not (use_triton and is_countable) or torch.are_deterministic_algorithms_enabled():
        latents = indices.flatten().clamp(-1, n_latents).to(torch.int32)
        latents, pairs = latents.sort(stable=True)
        bins = torch.arange(-1, n_latents + 1, dtype=torch.int32, device=indices.device)
        starts = torch.searchsorted(latents, bins, out_int32=is_countable)
        return InvertedIndex(latents, pairs, (pairs // k).to(torch.int32), starts)
    indices = indices.contiguous()
    latents, samples = (indices.new_empty(n_pairs, dtype=torch.int32) for _ in range(2))
    pairs = indices.new_empty(n_pairs, dtype=torch.int64)
    counts = indices.new_zeros(n_latents + 2, dtype=torch.int32)
    grid = (cdiv(n_pairs, COUNT_BLOCK),)
    _triton.launch(
        count_kernel, grid, (indices, counts), (), (n_pairs, n_latents), BLOCK=COUNT_BLOCK
    )
    starts = counts.cumsum(0, dtype=torch.int32)
    _triton.launch(
        _place_kernel,
        grid,
        (indices, starts, latents, pairs, samples),
        (),
        (n_pairs, k, n_latents),
        BLOCK=COUNT_BLOCK,
    )
    return InvertedIndex(latents, pairs, samples, starts)


@triton.jit
def _load_pairs(
    start,
    length,
    latents,
    pairs,
    row_of,
    vals,
    rows,
    weight_slice,
    latent,  # of the pair before
    column,
    F,
    n_columns,
    stride_wf,
    PAIRS: tl.constexpr,
):
    # The rows of a few pairs are on their way at once, and those of weight where a new latent
    # begins. Beyond the end the latent is -2.
    next_latents = ()
    next_vals = ()
    next_rows = ()
    next_weights = ()
    for t in tl.static_range(PAIRS):
        exists = start + t < length
        f = tl.load(latents + (start + t), mask=exists, other=-2)
        row = rows + tl.load(row_of + (start + t), mask=exists, other=0).to(tl.int64) * n_columns
        next_rows += (
            tl.load(row, mask=column < tl.where(exists, n_columns, 0), other=0.0).to(tl.float32),
        )
        next_latents += (f,)
        pair = start + t
        if pairs is not None:
            pair = tl.load(pairs + (start + t), mask=exists, other=0)
        next_vals += (tl.load(vals + pair, mask=exists, other=0.0).to(tl.float32),)
        if weight_slice is not None:
            begins = (f != latent) & (f >= 0) & (f < F)
            mask = column < tl.where(begins, n_columns, 0)
            w = tl.load(weight_slice + f.to(tl.int64) * stride_wf, mask=mask, other=0.0)
            next_weights += (w.to(tl.float32),)
        latent = f
    return next_latents, next_vals, next_rows, next_weights


@triton.jit(do_not_specialize=["first_slice", "N", "F", "run_length"])
def _sum_run_kernel(
    latents,
    pairs,  # where in vals each pair's is, [N]; None where they are in the index's order
    row_of,  # each pair's row of `rows`, [N]
    vals,
    rows,
    weight,  # or None for no dots
    sums,  # or None
    partials,  # [runs, 2, n_columns]: of the latents that began before the run, and go on after it
    dots_parts,  # [slices of this launch, N], or None
    scale,
    first_slice,
    N,
    F,
    first_column,
    n_columns,
    width,  # of sums
    run_length,
    stride_wf,
    stride_wd,
    BLOCK_D: tl.constexpr,
    PAIRS: tl.constexpr,
    EVEN: tl.constexpr,  # whether the slices divide the columns
):
    run = tl.program_id(0).to(tl.int64)
    slice_ = (first_slice + tl.program_id(1)).to(tl.int64)
    first = run * run_length
    length = tl.minimum(run_length, N - first).to(tl.int32)
    d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)
    # To be compared with n_columns; with EVEN it is known to be less.
    column = tl.zeros([BLOCK_D], tl.int64) if EVEN else d
    d = tl.max_contiguous(d, 4)  # one layout in registers for float32 and bfloat16 alike
    latents += first
    row_of += first
    if pairs is not None:
        pairs += first
    else:
        vals += first
    rows += d
    weight_slice = None
    if weight is not None:
        weight_slice = weight + d * stride_wd
        dots_parts += tl.program_id(1).to(tl.int64) * N + first
    if sums is not None:
        sums += first_column + d
        partials += run * 2 * n_columns + d

    goes_on = tl.load(latents - 1, mask=run > 0, other=-2) == tl.load(latents)
    f = tl.full([], -2, tl.int32)  # no latent
    began_before = goes_on & False
    total = tl.zeros([BLOCK_D], tl.float32)
    w = total
    for start in range(0, length, PAIRS):
        next_latents, next_vals, next_rows, next_weights = _load_pairs(
            start,
            length,
            latents,
            pairs,
            row_of,
            vals,
            rows,
            weight_slice,
            f,
            column,
            F,
            n_columns,
            stride_wf,
            PAIRS,
        )
        for t in tl.static_range(PAIRS):
            latent = next_latents[t]
            if (latent != f) & (latent != -2):
                if sums is not None:
                    total *= scale
                    tl.store(partials, total, mask=column < tl.where(began_before, n_columns, 0))
                    is_whole = (f >= 0) & (f < F) & ~began_before
                    tl.store(
                        sums + f.to(tl.int64) * width,
                        total,
                        mask=column < tl.where(is_whole, n_columns, 0),
                    )
                began_before = goes_on & (f == -2)  # only the first may have
                f = latent
                total = tl.zeros([BLOCK_D], tl.float32)
                if weight is not None:
                    w = next_weights[t]
            total += next_vals[t] * next_rows[t]
            if weight is not None:
                dot = tl.sum(w * next_rows[t])
                tl.store(dots_parts + (start + t), dot, mask=start + t < length)
    if sums is not None:
        total *= scale
        goes_on = tl.load(latents + length, mask=first + length < N, other=-2) == f
        part = partials + tl.where(began_before, 0, n_columns)
        tl.store(part, total, mask=column < tl.where(began_before | goes_on, n_columns, 0))
        is_whole = (f >= 0) & (f < F) & ~(began_before | goes_on)
        tl.store(
            sums + f.to(tl.int64) * width, total, mask=column < tl.where(is_whole, n_columns, 0)
        )


@triton.jit
def _join_runs(latents, partials, sums, run, d, N, F, n_columns, width, run_length):
    # A latent that spans runs is added up by the program of the run in which it begins.
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
        in_slice = d < n_columns
        total = tl.load(partials + (run * 2 + 1) * n_columns + d, mask=in_slice, other=0.0)
        for more in range(1, n_more + 1):
            head = partials + (run + more) * 2 * n_columns + d
            total += tl.load(head, mask=in_slice, other=0.0)
        tl.store(sums + f * width + d, total, mask=in_slice)


@triton.jit
def _zero_absent(starts, sums, block, d, F, n_columns, width, BLOCK_F: tl.constexpr):
    f = block * BLOCK_F + tl.arange(0, BLOCK_F)
    start = tl.load(starts + 1 + f, mask=f < F, other=0)
    is_absent = (f < F) & (start == tl.load(starts + 2 + f, mask=f < F, other=0))
    zeros = tl.zeros([BLOCK_F, d.shape[0]], sums.dtype.element_ty)
    mask = is_absent[:, None] & (d < n_columns)[None, :]
    tl.store(sums + (f * width)[:, None] + d[None, :], zeros, mask=mask)


@triton.jit
def _add_dots(
    parts, pairs, dots, scale, block, n_parts, N, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    n = block * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    total = tl.zeros([BLOCK], tl.float32)
    for _ in range(n_parts):
        total += tl.load(parts + n, mask=mask, other=0.0)
        parts += N
    out = dots + tl.load(pairs + n, mask=mask, other=0)
    total *= scale
    if ADDS:
        total += tl.load(out, mask=mask, other=0.0)
    tl.store(out, total, mask=mask)


# One launch for what the sums over runs leave to be done. Some programs of each slice do the first,
# the next the second, and the rest share the third among the slices.
@triton.jit(do_not_specialize=["first_slice", "n_joining", "n_zeroing", "N", "F", "run_length"])
def _finish_kernel(
    latents,
    pairs,
    starts,
    partials,
    sums,  # or None
    dots_parts,
    dots,  # or None
    scale,
    first_slice,
    n_joining,  # programs
    n_zeroing,
    N,
    F,
    first_column,
    n_columns,
    width,
    run_length,
    ADDS: tl.constexpr,  # whether there are dots of other slices already
    BLOCK_D: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    slice_ = tl.program_id(1)
    if program < n_joining + n_zeroing:
        if sums is not None:
            sums += first_column
            d = (first_slice + slice_) * BLOCK_D + tl.arange(0, BLOCK_D)
            if program < n_joining:
                _join_runs(latents, partials, sums, program, d, N, F, n_columns, width, run_length)
            else:
                block = program - n_joining
                _zero_absent(starts, sums, block, d, F, n_columns, width, BLOCK_F)
    elif dots is not None:
        n_slices = tl.num_programs(1)
        block = (program - n_joining - n_zeroing) * n_slices + slice_
        _add_dots(dots_parts, pairs, dots, scale, block, n_slices, N, ADDS, BLOCK)


BLOCK_D = 256
PAIRS = 2
NUM_WARPS = 1
SHORTEST_RUN = 32
MOST_RUNS = 2048  # which bounds `partials`: 2 * 2048 * D floats, 38 MB at D = 2304
MOST_DOTS = 2**23  # and this the parts of the dots that a launch writes: 32 MiB
MOST_SCATTERED = 2**18  # vals; more are put in the index's order before they are read
BLOCK = 512
BLOCK_F = 16


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
        vals: [B, K], contiguous, or [B K], in the index's order.
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
    run_length = max(SHORTEST_RUN, cdiv(n_pairs, MOST_RUNS))
    n_runs = cdiv(n_pairs, run_length)
    n_slices = cdiv(n_columns, BLOCK_D)
    like_sums = weight if sums is None else sums
    assert like_sums is not None, "neither sums nor dots are asked for"
    n_latents, width = like_sums.shape
    partials = dots = dots_parts = None
    n_joining = n_zeroing = n_adding = 0
    slices_per_launch = n_slices
    if sums is not None:
        partials = rows.new_empty((n_runs, 2, n_columns), dtype=torch.float32)
        n_joining = n_runs
        n_zeroing = cdiv(n_latents, BLOCK_F) if zero_absent else 0
    if weight is not None:
        dots = rows.new_empty(vals.shape, dtype=torch.float32)
        # Their parts are written a few slices at a time.
        slices_per_launch = min(n_slices, max(1, MOST_DOTS // n_pairs))
        dots_parts = rows.new_empty((slices_per_launch, n_pairs), dtype=torch.float32)
        n_adding = cdiv(n_pairs, BLOCK)
    if vals.ndim == 2 and n_pairs > MOST_SCATTERED:
        vals = vals.flatten()[index.pairs]
    sizes = (n_pairs, n_latents, first_column, n_columns, width, run_length)
    for first_slice in range(0, n_slices, slices_per_launch):
        slices = min(slices_per_launch, n_slices - first_slice)
        _triton.launch(
            _sum_run_kernel,
            (n_runs, slices),
            (
                index.latents,
                index.pairs if vals.ndim == 2 else None,
                index.pairs if rows.shape[0] == n_pairs else index.samples,
                vals,
                rows,
                weight,
                sums,
                partials,
                dots_parts,
            ),
            (scale,),
            (first_slice, *sizes, *((0, 0) if weight is None else weight.stride())),
            BLOCK_D=BLOCK_D,
            PAIRS=PAIRS,
            EVEN=n_columns % BLOCK_D == 0,
            num_warps=NUM_WARPS,
        )
        _triton.launch(
            _finish_kernel,
            (n_joining + n_zeroing + cdiv(n_adding, slices), slices),
            (index.latents, index.pairs, index.starts, partials, sums, dots_parts, dots),
            (scale,),
            (first_slice, n_joining, n_zeroing, *sizes),
            ADDS=first_slice > 0,
            BLOCK_D=BLOCK_D,
            BLOCK_F=BLOCK_F,
            BLOCK=BLOCK,
        )
    return dots
