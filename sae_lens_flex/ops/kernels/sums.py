"""Sums over the pairs of each latent: sparse gradients, and the dots of the same rows.

    sums[f] = scale * sum of values[b, t] * row over the pairs (b, t) that chose f,
    dots[b, t] = scale * weight[latents[b, t]] . row

where a pair's row belongs to its sample or to the pair itself. In a real dictionary a few latents
fire on most samples, so the work is not dealt out by latent. A program takes a run: the same number
of pairs of the inverted index as every other program. A second kernel joins the parts of the
latents that span runs.
"""

import torch

from .launch import cdiv, launch, tl, triton


@triton.jit
def _load_pairs(
    start,
    length,
    latents,
    pairs,
    row_of,
    values,
    rows,
    weight_slice,
    latent,  # of the pair before
    column,
    F,
    n_columns,
    stride_wf,
    PAIRS: tl.constexpr,
):
    # Loads the rows of a few pairs at once, and a row of weight where a new latent begins. Beyond
    # the end the latent is -2.
    next_latents = ()
    next_values = ()
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
        next_values += (tl.load(values + pair, mask=exists, other=0.0).to(tl.float32),)
        if weight_slice is not None:
            begins = (f != latent) & (f >= 0) & (f < F)
            mask = column < tl.where(begins, n_columns, 0)
            w = tl.load(weight_slice + f.to(tl.int64) * stride_wf, mask=mask, other=0.0)
            next_weights += (w.to(tl.float32),)
        latent = f
    return next_latents, next_values, next_rows, next_weights


@triton.jit(do_not_specialize=["first_slice", "N", "F", "run_length"])
def _sum_run_kernel(
    latents,
    pairs,  # where in values a pair's value is, [N]; None where values have the index's order
    row_of,  # each pair's row of `rows`, [N]
    values,
    rows,
    weight,  # None for no dots
    sums,  # or None
    partials,  # [runs, 2, n_columns]: sums of the latent that began before the run, and of the one
    # that goes on after it
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
    # Masks compare `column` with n_columns. With EVEN every column exists, and zeros say so.
    column = tl.zeros([BLOCK_D], tl.int64) if EVEN else d
    d = tl.max_contiguous(d, 4)  # float32 and bfloat16 then have the same layout in registers
    latents += first
    row_of += first
    if pairs is not None:
        pairs += first
    else:
        values += first
    rows += d
    weight_slice = None
    if weight is not None:
        weight_slice = weight + d * stride_wd
        dots_parts += tl.program_id(1).to(tl.int64) * N + first
    if sums is not None:
        sums += first_column + d
        partials += run * 2 * n_columns + d

    first_latent = tl.load(latents)
    goes_on = tl.load(latents - 1, mask=run > 0, other=-2) == first_latent
    if weight is None:
        # The latents ascend, so the run has nothing to add to a sum. Of several processes each has
        # many such pairs: those of the others' latents.
        length = tl.where(first_latent < F, length, 0)
    f = tl.full([], -2, tl.int32)  # which no latent is
    began_before = goes_on & False
    total = tl.zeros([BLOCK_D], tl.float32)
    w = total
    for start in range(0, length, PAIRS):
        next_latents, next_values, next_rows, next_weights = _load_pairs(
            start,
            length,
            latents,
            pairs,
            row_of,
            values,
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
                began_before = goes_on & (f == -2)  # true of the run's first latent at most
                f = latent
                total = tl.zeros([BLOCK_D], tl.float32)
                if weight is not None:
                    w = next_weights[t]
            total += next_values[t] * next_rows[t]
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
    # Adds up the latent that begins in this run and goes on in the next, if there is one.
    first = run * run_length
    n = first + run_length
    f = tl.load(latents + n - 1, mask=n < N, other=-1).to(tl.int64)
    begins = tl.load(latents + first - 1, mask=first > 0, other=-2) != f
    goes_on = begins & (f >= 0) & (f < F) & (tl.load(latents + n, mask=n < N, other=-2) == f)
    n_more = 0  # runs after this one
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
def _zero_absent(starts, written_later, sums, block, d, F, n_columns, width, BLOCK_F: tl.constexpr):
    f = block * BLOCK_F + tl.arange(0, BLOCK_F)
    start = tl.load(starts + 1 + f, mask=f < F, other=0)
    is_absent = (f < F) & (start == tl.load(starts + 2 + f, mask=f < F, other=0))
    if written_later is not None:
        is_absent = is_absent & (tl.load(written_later + f, mask=f < F, other=0) == 0)
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


# One launch does what is left after the sums over runs: joining runs, zeroing the sums of absent
# latents, adding up the parts of the dots. Of each slice the first programs join, the next ones
# zero; the rest share the dots among the slices.
@triton.jit(do_not_specialize=["first_slice", "n_joining", "n_zeroing", "N", "F", "run_length"])
def _finish_kernel(
    latents,
    pairs,
    starts,
    written_later,  # or None
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
    ADDS: tl.constexpr,  # whether `dots` holds the dots of earlier slices
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
                _zero_absent(starts, written_later, sums, block, d, F, n_columns, width, BLOCK_F)
    elif dots is not None:
        n_slices = tl.num_programs(1)
        block = (program - n_joining - n_zeroing) * n_slices + slice_
        _add_dots(dots_parts, pairs, dots, scale, block, n_slices, N, ADDS, BLOCK)


BLOCK_D = 256
PAIRS = 2
NUM_WARPS = 1
SHORTEST_RUN = 32
MOST_RUNS = 2048  # bounds `partials` to 2 * 2048 * D floats, 38 MB at D = 2304
MOST_DOTS = 2**23  # bounds the parts of the dots that a launch writes to 32 MiB
MOST_SCATTERED = 2**18  # Above this number, values are put in the index's order before the launch.
BLOCK = 512
BLOCK_F = 16


def sum_by_latent(
    index: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None],
    values: torch.Tensor,
    rows: torch.Tensor,
    *,
    sums: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    in_order: bool = False,
    rows_of_pairs: bool = False,
    scale: float = 1.0,
    first_column: int = 0,
    zero_absent: bool = True,
) -> torch.Tensor | None:
    """Write the sums of each latent; return the dots.

    Args:
        index: the inverted index of the batch: latents, pairs, samples, starts and
            `written_later`, as in `codes.InvertedIndex`.
        values: of each pair, [B, K] or [N], contiguous; with `in_order` in the index's order.
        rows: contiguous: [B, n] for a row a sample; with `rows_of_pairs` [N, n].
        sums: where the sums go, [F, >= n], contiguous, of any floating dtype. None for no sums.
        weight: [F, n], for the dots. None for no dots.
        in_order: whether `values` are in the index's order.
        rows_of_pairs: whether each pair has a row, not each sample.
        scale: multiplies sums and dots.
        first_column: the column of `sums` at which the columns of `rows` begin.
        zero_absent: whether to zero the sums of the latents that no pair chose, but for those
            that are written later.

    Returns:
        The dots, in the shape of `values`, float32, or None.
    """
    latents, pairs, samples, starts, written_later = index
    if written_later is not None:
        written_later = written_later.contiguous().view(torch.int8)
    n_pairs, n_columns = pairs.numel(), rows.shape[1]
    run_length = max(SHORTEST_RUN, cdiv(n_pairs, MOST_RUNS))
    n_runs = cdiv(n_pairs, run_length)
    n_slices = cdiv(n_columns, BLOCK_D)
    like_sums = weight if sums is None else sums
    assert like_sums is not None, "neither sums nor dots are wanted"
    n_latents, width = like_sums.shape
    partials = dots = dots_parts = None
    n_joining = n_zeroing = n_adding = 0
    slices_per_launch = n_slices
    if sums is not None:
        partials = rows.new_empty((n_runs, 2, n_columns), dtype=torch.float32)
        n_joining = n_runs
        n_zeroing = cdiv(n_latents, BLOCK_F) if zero_absent else 0
    if weight is not None:
        dots = rows.new_empty(values.shape, dtype=torch.float32)
        # A launch writes the parts of a few slices, which bounds their memory.
        slices_per_launch = min(n_slices, max(1, MOST_DOTS // max(1, n_pairs)))
        dots_parts = rows.new_empty((slices_per_launch, n_pairs), dtype=torch.float32)
        n_adding = cdiv(n_pairs, BLOCK)
    if not in_order and n_pairs > MOST_SCATTERED:
        values, in_order = values.flatten()[pairs], True
    sizes = (n_pairs, n_latents, first_column, n_columns, width, run_length)
    for first_slice in range(0, n_slices, slices_per_launch):
        slices = min(slices_per_launch, n_slices - first_slice)
        launch(
            _sum_run_kernel,
            (n_runs, slices),
            (
                latents,
                None if in_order else pairs,
                pairs if rows_of_pairs else samples,
                *(values, rows, weight, sums, partials, dots_parts),
            ),
            (scale,),
            (first_slice, *sizes, *((0, 0) if weight is None else weight.stride())),
            BLOCK_D=BLOCK_D,
            PAIRS=PAIRS,
            EVEN=n_columns % BLOCK_D == 0,
            num_warps=NUM_WARPS,
        )
        launch(
            _finish_kernel,
            (n_joining + n_zeroing + cdiv(n_adding, slices), slices),
            (latents, pairs, starts, written_later, partials, sums, dots_parts, dots),
            (scale,),
            (first_slice, n_joining, n_zeroing, *sizes),
            ADDS=first_slice > 0,
            BLOCK_D=BLOCK_D,
            BLOCK_F=BLOCK_F,
            BLOCK=BLOCK,
        )
    return dots
