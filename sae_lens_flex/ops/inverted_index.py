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
    """

    latents: torch.Tensor
    pairs: torch.Tensor


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


@triton.jit(do_not_specialize=["N", "F"])
def _place_kernel(indices, ends, latents, pairs, N, F, BLOCK: tl.constexpr):
    # Every bin is filled from its end down.
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    in_bin = bin_of(tl.load(indices + n, mask=mask, other=0), F)
    place = tl.atomic_add(ends + in_bin, -1, mask=mask, sem="relaxed") - 1
    tl.store(latents + place, (in_bin - 1).to(tl.int32), mask=mask)
    tl.store(pairs + place, n, mask=mask)


COUNT_BLOCK = 1024


def invert(indices: torch.Tensor, n_latents: int, use_triton: bool) -> InvertedIndex:
    """Group the pairs of `indices` ([B, K], int32 or int64) by latent, of which there are F.

    By counting, or, for a fixed order, by a radix sort, which takes twice as long: 0.15 ms for
    B=4096, K=128 on an H200, where counting takes 0.08.
    """
    is_countable = indices.numel() < 2**31  # in 32 bits
    if not (use_triton and is_countable) or torch.are_deterministic_algorithms_enabled():
        latents = indices.flatten().clamp(-1, n_latents).to(torch.int32)
        return InvertedIndex(*latents.sort(stable=True))
    indices = indices.contiguous()
    n_pairs = indices.numel()
    latents = indices.new_empty(n_pairs, dtype=torch.int32)
    pairs = indices.new_empty(n_pairs, dtype=torch.int64)
    counts = indices.new_zeros(n_latents + 2, dtype=torch.int32)
    grid, sizes = (cdiv(n_pairs, COUNT_BLOCK),), (n_pairs, n_latents)
    _triton.launch(count_kernel, grid, (indices, counts), (), sizes, BLOCK=COUNT_BLOCK)
    ends = counts.cumsum(0, dtype=torch.int32)
    _triton.launch(
        _place_kernel, grid, (indices, ends, latents, pairs), (), sizes, BLOCK=COUNT_BLOCK
    )
    return InvertedIndex(latents, pairs)


@triton.jit(do_not_specialize=["N", "pairs_per_row", "F"])
def _order_pairs_kernel(
    latents,
    pairs,
    vals,
    ordered_rows,  # [N], int32: the row that each pair refers to
    ordered_vals,  # [N], float32
    is_present,  # [F], zeroed, or None
    N,
    pairs_per_row,
    F,
    BLOCK: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = n < N
    pair = tl.load(pairs + n, mask=mask, other=0)
    tl.store(ordered_rows + n, (pair // pairs_per_row).to(tl.int32), mask=mask)
    tl.store(ordered_vals + n, tl.load(vals + pair, mask=mask, other=0.0).to(tl.float32), mask=mask)
    if is_present is not None:
        f = tl.load(latents + n, mask=mask, other=-1)
        tl.store(is_present + f, 1, mask=(f >= 0) & (f < F))


@triton.jit
def _load_pairs(
    start,
    length,
    latents,
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
        next_vals += (tl.load(vals + (start + t), mask=exists, other=0.0),)
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
    row_of,  # as the two after, in the order of the index: [N]
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
def _zero_absent_kernel(
    is_present,
    sums,
    F,
    first_column,
    n_columns,
    width,
    BLOCK_F: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    f = tl.program_id(0).to(tl.int64) * BLOCK_F + tl.arange(0, BLOCK_F)
    is_absent = tl.load(is_present + f, mask=f < F, other=1) == 0
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    out = sums + (f * width + first_column)[:, None] + d[None, :]
    zeros = tl.zeros([BLOCK_F, BLOCK_D], sums.dtype.element_ty)
    tl.store(out, zeros, mask=is_absent[:, None] & (d < n_columns)[None, :])


@triton.jit(do_not_specialize=["n_parts", "N"])
def _add_dots_kernel(
    parts, pairs, dots, scale, n_parts, N, ADDS: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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


BLOCK_D = 256
PAIRS = 2
NUM_WARPS = 1
SHORTEST_RUN = 32
MOST_RUNS = 2048  # which bounds `partials`: 2 * 2048 * D floats, 38 MB at D = 2304
MOST_DOTS = 2**23  # and this the parts of the dots that a launch writes: 32 MiB
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
        vals: [B, K], contiguous.
        rows: what the pairs refer to, contiguous: [B, n] for a row a sample, [B * K, n] for a row a
            pair.
        sums: where the sums go, [F, >= n], contiguous, of any floating dtype; None for no sums.
        scale: multiplies sums and dots.
        weight: [F, n], for the dots.
        first_column: where in `sums` the columns of `rows` begin.
        zero_absent: whether to zero the sums of the latents that no pair chose.

    Returns:
        With a weight the dots, scale * weight[indices[b, t]] . row, [B, K], in the dtype of vals.
    """
    n_pairs, n_columns = index.pairs.numel(), rows.shape[1]
    run_length = max(SHORTEST_RUN, cdiv(n_pairs, MOST_RUNS))
    n_runs = cdiv(n_pairs, run_length)
    n_slices = cdiv(n_columns, BLOCK_D)
    like_sums = weight if sums is None else sums
    assert like_sums is not None, "neither sums nor dots are asked for"
    n_latents, width = like_sums.shape
    over_pairs = (cdiv(n_pairs, BLOCK),)

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return rows.new_empty(shape, dtype=dtype)

    is_present = None
    if sums is not None and zero_absent:
        is_present = new(n_latents, dtype=torch.uint8).zero_()
    row_of, ordered_vals = new(n_pairs, dtype=torch.int32), new(n_pairs)
    _triton.launch(
        _order_pairs_kernel,
        over_pairs,
        (index.latents, index.pairs, vals, row_of, ordered_vals, is_present),
        (),
        (n_pairs, n_pairs // rows.shape[0], n_latents),
        BLOCK=BLOCK,
    )
    if is_present is not None:
        _triton.launch(
            _zero_absent_kernel,
            (cdiv(n_latents, BLOCK_F), n_slices),
            (is_present, sums),
            (),
            (n_latents, first_column, n_columns, width),
            BLOCK_F=BLOCK_F,
            BLOCK_D=BLOCK_D,
        )
    partials = None if sums is None else new(n_runs, 2, n_columns)
    # The dots' parts are written a few slices at a time.
    slices_per_launch = n_slices if weight is None else max(1, MOST_DOTS // n_pairs)
    dots = None if weight is None else new(*vals.shape)
    for first_slice in range(0, n_slices, slices_per_launch):
        slices = min(slices_per_launch, n_slices - first_slice)
        dots_parts = None if weight is None else new(slices, n_pairs)
        _triton.launch(
            _sum_run_kernel,
            (n_runs, slices),
            (index.latents, row_of, ordered_vals, rows, weight, sums, partials, dots_parts),
            (scale,),
            (
                first_slice,
                n_pairs,
                n_latents,
                first_column,
                n_columns,
                width,
                run_length,
                *((0, 0) if weight is None else weight.stride()),
            ),
            BLOCK_D=BLOCK_D,
            PAIRS=PAIRS,
            EVEN=n_columns % BLOCK_D == 0,
            num_warps=NUM_WARPS,
        )
        if dots is not None:
            _triton.launch(
                _add_dots_kernel,
                over_pairs,
                (dots_parts, index.pairs, dots),
                (scale,),
                (slices, n_pairs),
                ADDS=first_slice > 0,
                BLOCK=BLOCK,
            )
    if sums is not None:
        _triton.launch(
            _join_runs_kernel,
            (n_runs, n_slices),
            (index.latents, partials, sums),
            (),
            (n_pairs, n_latents, first_column, n_columns, width, run_length),
            BLOCK_D=BLOCK_D,
            num_warps=NUM_WARPS,
        )
    return None if dots is None else dots.to(vals.dtype)
