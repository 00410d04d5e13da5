"""What is left to do after a walk: sums of parts, copies, dtypes, and the factor.

    grad_weight[f] = factor * (the sum of f's copies, or weight_sums[f])
    grad_values = factor * value_sums,     grad_bias = factor * the sum of bias_sums
    grad_target <- factor * grad_target,   loss = the sum of loss_sums

One launch does all. Its first programs each take a row of the gradient of weight, or part of one;
the next ones values, then columns of the bias, and one the loss. A backward pass has a factor. It
lies on the device. What the walk has stored as a gradient is only touched where the factor is not
1, by all programs together. Without a factor it is 1.
"""

from .launch import Launch, cdiv, tl, triton
from .scale import scale_part
from .tiles import COPIES, SLOTS, Sizes, row_of_copy, slots_of


@triton.jit
def _finish_row(
    weight_sums, table, grad_weight, scale, row, d, F, D, SLOTS: tl.constexpr, COPIES: tl.constexpr
):
    # Without grad_weight, `row` is a slot, and what its copies add up to goes where they belong.
    if grad_weight is None:
        f = tl.load(table + F + F + row).to(tl.int64) - 1
        slot = tl.where(f >= 0, row + 1, 0)
    else:
        f = row
        slot = tl.zeros([], tl.int64)
        if table is not None:
            slot = slots_of(f, table, F, f >= 0).to(tl.int64)
    total = tl.zeros([d.shape[0]], tl.float32)
    if slot > 0:
        for copy in tl.static_range(COPIES):
            at = row_of_copy(slot, copy, F, COPIES) * D + d
            total += tl.load(weight_sums + at, mask=d < D, other=0.0)
    elif grad_weight is not None:
        total = tl.load(weight_sums + f * D + d, mask=d < D, other=0.0)
    total *= scale
    if grad_weight is None:
        tl.store(weight_sums + f * D + d, total, mask=d < tl.where(slot > 0, D, 0))
    else:
        tl.store(grad_weight + f * D + d, total.to(grad_weight.dtype.element_ty), mask=d < D)


@triton.jit
def _scale_rows(weight_sums, table, scale, F, D, BLOCK: tl.constexpr):
    # All programs scale the rows that have no copies. `_finish_row` scales the others.
    in_a_row = tl.cdiv(D, BLOCK)
    n_programs = tl.num_programs(0).to(tl.int64)
    for part in range(tl.program_id(0).to(tl.int64), F * in_a_row, n_programs):
        f = part // in_a_row
        d = part % in_a_row * BLOCK + tl.arange(0, BLOCK)
        slot = tl.zeros([], tl.int32)
        if table is not None:
            slot = slots_of(f, table, F, f >= 0)
        mask = d < tl.where(slot == 0, D, 0)
        row = weight_sums + f * D
        tl.store(row + d, scale * tl.load(row + d, mask=mask), mask=mask)


@triton.jit
def _add_up(loss, loss_sums, SUMS: tl.constexpr):
    if loss is not None:
        tl.store(loss, tl.sum(tl.load(loss_sums + tl.arange(0, SUMS))))


@triton.jit(do_not_specialize=["n_of_weight", "n_of_values", "n_of_bias", "n_pairs", "n_of_target"])
def _finish_walk_kernel(
    loss_sums,  # [SUMS]
    loss,  # None where the walk has added it up
    factor,  # a scalar, or None for 1
    weight_sums,  # [n_rows, D], or None
    table,  # which latents have copies (see `tiles`), or None
    grad_weight,  # [F, D]; None where weight_sums itself becomes the gradient
    value_sums,  # [n_pairs], or None
    grad_values,
    bias_sums,  # [BIAS_ROWS, D], or None
    grad_bias,
    grad_target,  # where there is a factor; or None
    n_of_weight,  # programs
    n_of_values,
    n_of_bias,
    n_pairs,
    n_of_target,  # elements
    F,
    D,
    SUMS: tl.constexpr,
    SLOTS: tl.constexpr,
    COPIES: tl.constexpr,
    BIAS_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS_BLOCK: tl.constexpr,
):
    scale = 1.0
    if factor is not None:
        scale = tl.load(factor)
        if scale != 1.0:
            if grad_weight is None and weight_sums is not None:
                _scale_rows(weight_sums, table, scale, F, D, BLOCK)
            if grad_target is not None:
                scale_part(grad_target, scale, n_of_target, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    n_of_all = n_of_weight + n_of_values + n_of_bias
    if program < n_of_weight:
        if table is not None or grad_weight is not None:
            in_a_row = tl.cdiv(D, BLOCK)
            d = program % in_a_row * BLOCK + tl.arange(0, BLOCK)
            row = program // in_a_row
            _finish_row(weight_sums, table, grad_weight, scale, row, d, F, D, SLOTS, COPIES)
    elif program < n_of_weight + n_of_values:
        if value_sums is not None:
            n = (program - n_of_weight) * BLOCK + tl.arange(0, BLOCK)
            total = scale * tl.load(value_sums + n, mask=n < n_pairs)
            tl.store(grad_values + n, total.to(grad_values.dtype.element_ty), mask=n < n_pairs)
    elif program < n_of_all:
        if bias_sums is not None:
            d = (program - n_of_weight - n_of_values) * BIAS_BLOCK + tl.arange(0, BIAS_BLOCK)
            at = tl.arange(0, BIAS_ROWS)[:, None] * D + d[None, :]
            total = scale * tl.sum(tl.load(bias_sums + at, mask=(d < D)[None, :], other=0.0), 0)
            tl.store(grad_bias + d, total.to(grad_bias.dtype.element_ty), mask=d < D)
    elif program == n_of_all:
        _add_up(loss, loss_sums, SUMS)


BLOCK = 1024
BIAS_BLOCK = 64
SCALING_PROGRAMS = 1024  # at most, to scale what is already there


def finish(
    sizes: Sizes,
    *,
    n_sums: int,
    has_copies: bool,
    casts_weight: bool,
    n_values: int,
    bias_rows: int,
    has_factor: bool = False,
    n_target: int = 0,
) -> Launch:
    """Return the launch that does what is left after a walk.

    It takes loss_sums, loss, factor, weight_sums, table, grad_weight, value_sums, grad_values,
    bias_sums, grad_bias and grad_target, as `_finish_walk_kernel` describes them. Sums and factor
    are float32.

    Args:
        sizes: of the batch.
        n_sums: sums of the loss, a power of two.
        has_copies: whether latents may have copies.
        casts_weight: whether the gradient of weight is another tensor than its sums.
        n_values: sums of the gradient of values.
        bias_rows: rows of bias_sums, a power of two; 0 for none.
        has_factor: whether there is one.
        n_target: elements of the gradient of target that the factor multiplies.
    """
    d_in = sizes.d_in
    n_rows = sizes.n_latents if casts_weight else SLOTS if has_copies else 0
    n_programs = (
        n_rows * cdiv(d_in, BLOCK),
        cdiv(n_values, BLOCK),
        cdiv(d_in, BIAS_BLOCK) if bias_rows else 0,
    )
    n_all = sum(n_programs) + 1
    if has_factor:
        n_scaled = max(n_target, 0 if casts_weight else sizes.n_latents * d_in)
        n_all = max(n_all, min(SCALING_PROGRAMS, cdiv(n_scaled, BLOCK)))
    return Launch(
        _finish_walk_kernel,
        (n_all,),
        (*n_programs, n_values, n_target, sizes.n_latents, d_in),
        SUMS=n_sums,
        SLOTS=SLOTS,
        COPIES=COPIES,
        BIAS_ROWS=max(1, bias_rows),
        BLOCK=BLOCK,
        BIAS_BLOCK=BIAS_BLOCK,
    )
