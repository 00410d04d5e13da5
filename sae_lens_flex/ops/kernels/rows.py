"""Rows of a matrix that some latents choose, each at most once; and columns.

    take:  out[i] = matrix[latents[i]], rounded; 0 where not is_used[i]
    add:   matrix[latents[i]] += rows[i] where is_used[i]
    sum:   out = sum of factors[i] * matrix[latents[i]] where is_used[i]
    take columns:  out[:, i] = matrix[:, latents[i]]

No two of the latents that are used are equal, so no two programs of `add` write the same row.
"""

import torch

from .launch import MOST_PROGRAMS, cdiv, launch, tl, triton


@triton.jit
def _take_rows_kernel(matrix, latents, is_used, out, D, stride_f, stride_d, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    width = D
    if is_used is not None:
        width = tl.where(tl.load(is_used + i) != 0, D, 0)
    row = matrix + tl.load(latents + i).to(tl.int64) * stride_f
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        w = tl.load(row + d.to(tl.int64) * stride_d, mask=d < width, other=0.0)
        tl.store(out + i * D + d, w.to(out.dtype.element_ty), mask=d < D)


@triton.jit
def _add_rows_kernel(matrix, latents, is_used, counts_as_zero, rows, D, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    f = tl.load(latents + i).to(tl.int64)
    width = D
    if is_used is not None:
        width = tl.where(tl.load(is_used + i) != 0, D, 0)
    n_read = width
    if counts_as_zero is not None:
        n_read = tl.where(tl.load(counts_as_zero + f) != 0, 0, width)
    row = matrix + f * D
    for start in range(0, width, BLOCK):
        d = start + tl.arange(0, BLOCK)
        total = tl.load(row + d, mask=d < n_read, other=0.0).to(tl.float32)
        total += tl.load(rows + i * D + d, mask=d < width, other=0.0).to(tl.float32)
        tl.store(row + d, total.to(matrix.dtype.element_ty), mask=d < width)


@triton.jit
def _sum_rows_kernel(
    matrix,
    latents,
    is_used,
    factors,
    sums,  # [programs, D]
    N,
    D,
    stride_f,
    stride_d,
    STEPS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    first = tl.program_id(1).to(tl.int64) * (STEPS * ROWS)
    column = matrix + d.to(tl.int64)[None, :] * stride_d
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(STEPS):
        i = first + step * ROWS + tl.arange(0, ROWS)
        exists = i < N
        if is_used is not None:
            exists = exists & (tl.load(is_used + i, mask=exists, other=0) != 0)
        f = tl.load(latents + i, mask=exists, other=0).to(tl.int64)
        factor = tl.load(factors + i, mask=exists, other=0.0).to(tl.float32)
        mask = exists[:, None] & (d < D)[None, :]
        w = tl.load(column + f[:, None] * stride_f, mask=mask, other=0.0).to(tl.float32)
        total += factor[:, None] * w
    tl.store(sums + tl.program_id(1).to(tl.int64) * D + d, tl.sum(total, axis=0), mask=d < D)


@triton.jit
def _take_columns_kernel(matrix, latents, out, F, n_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    f = tl.load(latents + i, mask=i < n_columns, other=0)
    taken = tl.load(matrix + row * F + f, mask=i < n_columns, other=0.0)
    tl.store(out + row * n_columns + i, taken, mask=i < n_columns)


BLOCK = 1024
SUM_STEPS = 8
SUM_ROWS = 8
SUM_BLOCK = 256


def _as_bytes(mask: torch.Tensor | None) -> torch.Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.int8)


def take_rows(
    matrix: torch.Tensor,
    latents: torch.Tensor,
    is_used: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return rows of a matrix in `dtype`, [n, D], and zeros for what is not used.

    Args:
        matrix: [F, D], of any strides.
        latents: [n], contiguous.
        is_used: [n], bool; None for all.
        dtype: floating.
    """
    d_in = matrix.shape[1]
    out = matrix.new_empty((len(latents), d_in), dtype=dtype)
    if out.numel() > 0:
        launch(
            _take_rows_kernel,
            (len(latents),),
            (matrix, latents, _as_bytes(is_used), out),
            (),
            (d_in, *matrix.stride()),
            BLOCK=BLOCK,
        )
    return out


def take_columns(matrix: torch.Tensor, latents: torch.Tensor, out: torch.Tensor) -> None:
    """Write columns of a matrix.

    Args:
        matrix: [B, F], contiguous.
        latents: [n], contiguous.
        out: [B, n], contiguous, of the matrix's dtype.
    """
    n_rows, n_columns = out.shape
    if out.numel() > 0:
        launch(
            _take_columns_kernel,
            (n_rows, cdiv(n_columns, BLOCK)),
            (matrix, latents, out),
            (),
            (matrix.shape[1], n_columns),
            BLOCK=BLOCK,
        )


def add_rows(
    matrix: torch.Tensor,
    latents: torch.Tensor,
    is_used: torch.Tensor | None,
    rows: torch.Tensor,
    counts_as_zero: torch.Tensor | None = None,
) -> None:
    """Add rows to those of a matrix, in place; each sum is rounded once.

    Args:
        matrix: [F, D], contiguous.
        latents: [n], contiguous; those that are used differ.
        is_used: [n], bool; None for all.
        rows: [n, D], contiguous.
        counts_as_zero: which rows of the matrix count as zeros, whatever they hold, [F], bool.
    """
    if rows.numel() > 0:
        launch(
            _add_rows_kernel,
            (len(latents),),
            (matrix, latents, _as_bytes(is_used), _as_bytes(counts_as_zero), rows),
            (),
            (matrix.shape[1],),
            BLOCK=BLOCK,
        )


def sum_rows(
    matrix: torch.Tensor,
    latents: torch.Tensor,
    is_used: torch.Tensor | None,
    factors: torch.Tensor,
) -> torch.Tensor:
    """Return the sum of rows of a matrix, each times its factor, [D], float32.

    Args:
        matrix: [F, D], of any strides.
        latents: [n], contiguous.
        is_used: [n], bool; None for all.
        factors: [n], contiguous.
    """
    d_in, n_rows = matrix.shape[1], len(latents)
    n_programs = cdiv(n_rows, SUM_STEPS * SUM_ROWS)
    if n_programs > MOST_PROGRAMS[1]:
        n = MOST_PROGRAMS[1] * SUM_STEPS * SUM_ROWS
        parts = [
            (latents[part], None if is_used is None else is_used[part], factors[part])
            for part in (slice(n), slice(n, None))
        ]
        first, rest = [sum_rows(matrix, *part) for part in parts]
        return first + rest
    sums = matrix.new_empty((n_programs, d_in), dtype=torch.float32)
    if n_programs > 0:
        launch(
            _sum_rows_kernel,
            (cdiv(d_in, SUM_BLOCK), n_programs),
            (matrix, latents, _as_bytes(is_used), factors, sums),
            (),
            (n_rows, d_in, *matrix.stride()),
            STEPS=SUM_STEPS,
            ROWS=SUM_ROWS,
            BLOCK=SUM_BLOCK,
        )
    return sums.sum(0)
