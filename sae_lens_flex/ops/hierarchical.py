"""The HierarchicalTopK loss in one kernel, memory flat in K.

    L = factor / (B D) * sum_b sum_j c_j |r_j|^2,   r_j = bias + sum_{i <= j} v_i w_i - target

with w_i = weight[indices[b, i]], v_i = vals[b, i] and c_j = 1 / K, or `level_weights`. A program
takes two samples and one slice of D. It walks up the levels to the residual r_K, and then down
again, some levels at a time, with two running sums along them in registers,

    r_{j-1} = r_j - v_j w_j,      S_j = S_{j+1} + 2 factor / (B D) c_j r_j,

which give the loss and every gradient (see `fused_loss`). No level is ever stored.
"""

import torch

from . import _triton, torch_backend
from ._triton import cdiv, tl, triton
from .checks import check_arguments
from .fused_loss import Outputs, Wanted, define_loss_operator, fused_loss, gradient_dtype, kept
from .inverted_index import InvertedIndex, invert, sum_by_latent
from .levels import (
    add_to_bias,
    gather_levels,
    is_wide,
    levels_from,
    levels_in_a_tile,
    offsets_of,
    pairs_of,
    store_losses,
    widened,
)
from .spread import COPIES, SLOTS, fold_copies, is_worth_spreading, spread


@triton.jit
def _weighted(r, level_weights, first, K, LEVELS: tl.constexpr, LAST_ALONE: tl.constexpr, EVEN):
    # c_j r_j; without level_weights c_j is 1, for `scale` has the 1 / K of the mean.
    level = levels_from(first, LEVELS)
    if level_weights is not None:
        c = tl.load(level_weights + level, mask=level < K, other=0.0).to(tl.float32)
        return c[:, None] * r
    elif LAST_ALONE:
        return tl.where((level == K - 1)[:, None], r, 0.0)
    elif EVEN:
        return r
    else:
        return tl.where((level < K)[:, None], r, 0.0)


@triton.jit
def _running_sum(x, start, LEVELS: tl.constexpr):
    # start + the sum of x from the highest level down to each.
    is_highest = (tl.arange(0, LEVELS) == 0)[:, None]
    return tl.cumsum(tl.where(is_highest, x + start[None, :], x), 0)


@triton.jit
def _lowest(x, LEVELS: tl.constexpr):
    is_lowest = (tl.arange(0, LEVELS) == LEVELS - 1)[:, None]
    return tl.sum(tl.where(is_lowest, x, 0.0), 0)


@triton.jit
def _add_to_loss(loss, loss_sums, part, SUMS: tl.constexpr):
    # Several sums, for one of thousands of parts would lose digits. The program that is done last
    # adds them up; it reads them by additions too, which see what the others have added.
    program = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    tl.atomic_add(loss_sums + program % SUMS, part, sem="relaxed")
    n_done = tl.atomic_add(loss_sums + SUMS, 1.0, sem="acq_rel")
    if n_done == tl.num_programs(0) * tl.num_programs(1) - 1:
        sums = tl.atomic_add(loss_sums + tl.arange(0, SUMS), tl.zeros([SUMS], tl.float32))
        tl.store(loss, tl.sum(sums))


# Not compiled again for every divisibility of what no address depends on.
@triton.jit(do_not_specialize=["first_slice", "bias_rows", "spare_row", "B", "K", "F"])
def _hierarchical_kernel(  # outputs that are None are not wanted
    indices,
    weight,
    vals,
    bias,  # or None
    target,
    level_weights,  # or None
    rows,  # [B, K]: where in grad_weight each pair adds; None for its latent's row
    n_copied,  # the number of latents with copies; without any, rows are not read
    loss,  # [slices, B] parts to be added up, or with loss_sums a scalar
    loss_sums,  # [SUMS + 1], zeroed: the last counts the programs that are done
    residual,
    grad_weight,  # float32, zeroed, with a row to spare for what is no latent's
    grad_vals,  # float32, zeroed
    grad_bias,  # float32, zeroed: [bias_rows, D], to be added up
    grad_target,
    suffix_sums,  # [B, K, BLOCK_D], of one slice
    scale,  # factor / (B D), and / K without level_weights
    first_slice,
    bias_rows,
    spare_row,
    B,
    K,
    F,
    D,
    stride_wf,
    stride_wd,
    BLOCK_D: tl.constexpr,
    LEVELS: tl.constexpr,
    EVEN: tl.constexpr,  # whether the blocks divide B, K and D
    WIDE: tl.constexpr,  # whether an offset takes 64 bits
    LAST_ALONE: tl.constexpr,
    WALKS_DOWN: tl.constexpr,
    SUMS: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64) * 2
    slice_ = (first_slice + tl.program_id(1)).to(tl.int64)
    column = tl.arange(0, 2 * BLOCK_D)
    b = sample + column // BLOCK_D
    # At most 4 columns a thread: one layout in registers for float32 and bfloat16 alike.
    d = tl.max_contiguous(slice_ * BLOCK_D + column % BLOCK_D, 4)
    in_slice = d < D
    bd = b * D + d
    bd_mask = (b < B) & in_slice
    weight_slice = weight + d * stride_wd

    r = -tl.load(target + bd, mask=bd_mask, other=0.0).to(tl.float32)
    if bias is not None:
        r += tl.load(bias + d, mask=in_slice, other=0.0).to(tl.float32)
    error = tl.zeros([2 * BLOCK_D], tl.float32)
    last = (tl.cdiv(K, LEVELS) - 1) * LEVELS
    for first in range(0, last, LEVELS):
        _, v, w = gather_levels(
            first,
            indices,
            vals,
            weight_slice,
            sample,
            in_slice,
            B,
            K,
            F,
            stride_wf,
            BLOCK_D,
            LEVELS,
            EVEN,
            WIDE,
        )
        p = widened(v, BLOCK_D) * w
        r += tl.sum(p, 0)
        if not WALKS_DOWN:
            r_j = p + _running_sum(-p, r, LEVELS)
            c_r = _weighted(r_j, level_weights, first, K, LEVELS, LAST_ALONE, EVEN)
            error += tl.sum(c_r * r_j, 0)
    f, v, w = gather_levels(
        last,
        indices,
        vals,
        weight_slice,
        sample,
        in_slice,
        B,
        K,
        F,
        stride_wf,
        BLOCK_D,
        LEVELS,
        EVEN,
        WIDE,
    )
    r += tl.sum(widened(v, BLOCK_D) * w, 0)
    if residual is not None:
        tl.store(residual + bd, r, mask=bd_mask)

    s = tl.zeros([2 * BLOCK_D], tl.float32)
    has_copies = tl.full([LEVELS, 2], False, tl.int1)
    if rows is not None:
        has_copies = tl.load(n_copied + tl.zeros([LEVELS, 2], tl.int32)) > 0
    lowest = 0 if WALKS_DOWN else last
    for step in range(0, last - lowest + LEVELS, LEVELS):
        first = last - step
        if step > 0:  # the last levels' rows are at hand
            f, v, w = gather_levels(
                first,
                indices,
                vals,
                weight_slice,
                sample,
                in_slice,
                B,
                K,
                F,
                stride_wf,
                BLOCK_D,
                LEVELS,
                EVEN,
                WIDE,
            )
        if LAST_ALONE:
            r_j = tl.broadcast_to(r[None, :], [LEVELS, 2 * BLOCK_D])
        else:
            p = widened(v, BLOCK_D) * w
            without = _running_sum(-p, r, LEVELS)  # r_{j-1}
            r_j = p + without
            r = _lowest(without, LEVELS)
        c_r = _weighted(r_j, level_weights, first, K, LEVELS, LAST_ALONE, EVEN)
        error += tl.sum(c_r * r_j, 0)
        if WALKS_DOWN:
            S = _running_sum(c_r, s, LEVELS)  # without the factor 2 scale
            s = _lowest(S, LEVELS)
            pairs, exists = pairs_of(first, sample, B, K, LEVELS)
            if grad_vals is not None:
                dots = 2.0 * scale * tl.sum(tl.reshape(w * S, [LEVELS, 2, BLOCK_D]), 2)
                tl.atomic_add(grad_vals + pairs, dots, mask=exists, sem="relaxed")
            if grad_weight is not None:
                row = f
                if rows is not None:
                    row = tl.load(rows + pairs, mask=(f >= 0) & has_copies, other=f)
                row = tl.where(row >= 0, row, spare_row)
                at = grad_weight + d[None, :] + offsets_of(row, D, BLOCK_D, WIDE)[0]
                v_S = widened(2.0 * scale * v, BLOCK_D) * S
                if EVEN:
                    tl.atomic_add(at, v_S, sem="relaxed")
                else:
                    mask = tl.broadcast_to(in_slice[None, :], [LEVELS, 2 * BLOCK_D])
                    tl.atomic_add(at, v_S, mask=mask, sem="relaxed")
            if suffix_sums is not None:
                out = widened(pairs, BLOCK_D) * BLOCK_D + (column % BLOCK_D)[None, :]
                tl.store(suffix_sums + out, 2.0 * scale * S, mask=widened(exists, BLOCK_D))

    error = tl.where(bd_mask, error, 0.0)  # where there is no target, a bias is no error
    if loss_sums is None:
        store_losses(loss, error, scale, slice_, sample, B, BLOCK_D)
    else:
        _add_to_loss(loss, loss_sums, scale * tl.sum(error), SUMS)
    if WALKS_DOWN:
        s *= 2.0 * scale
        if grad_bias is not None:
            s_of_all = tl.where(bd_mask, s, 0.0)
            add_to_bias(grad_bias, s_of_all, 1.0, slice_, bias_rows, D, BLOCK_D)
        if grad_target is not None:
            tl.store(grad_target + bd, -s, mask=bd_mask)


# Loss and gradients took 2.30, 2.20 and 2.28 ms of an H200 with float32 and uniform, float32 and
# Zipf, bfloat16 and uniform indices at B=4096, K=128, F=65536, D=2304; with tiles of 8 levels 2.88,
# 2.82 and 2.82. Of slices 64 wide, one of weight and one of its gradient share the second-level
# cache: 2 * 65536 * 64 * 4 bytes = 34 MB. benchmarks/README.md has what else was tried.
BLOCK_D = 64
NUM_WARPS = 1
# Additions to dL/dbias queue, so the programs of a large batch take this many rows in turn. Up to
# SMALL_BATCH samples share one, and the loss's parts are added up by the kernel, which spares two
# launches: a small batch waits for the host.
BIAS_ROWS = 64
SMALL_BATCH = 1024
LOSS_SUMS = 32


def launch(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    level_weights: torch.Tensor | None,
    read: torch.Tensor,
    index: InvertedIndex | None,
    factor: float,
    wanted: Wanted,
    *,
    last_alone: bool = False,
) -> Outputs:
    """Compute the loss of all levels, or of the last one alone; arguments as in `fused_loss`."""
    n_samples, k = indices.shape
    n_latents, d_in = weight.shape
    indices, vals, target = indices.contiguous(), vals.contiguous(), target.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    scale = factor / target.numel()
    if level_weights is not None:
        level_weights = level_weights.contiguous()
    elif not last_alone:
        scale /= k
    n_slices = cdiv(d_in, BLOCK_D)
    levels = levels_in_a_tile(k)
    is_even = n_samples % 2 == 0 and k % levels == 0 and d_in % BLOCK_D == 0
    is_deterministic = torch.are_deterministic_algorithms_enabled()

    def new(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return target.new_empty(shape, dtype=dtype)

    n_rows = n_latents
    spread_ = grad_weight = None
    if wanted.grad_weight:
        # First, for it keeps the device busy while the host prepares the rest.
        has_copies = not is_deterministic and is_worth_spreading(indices)
        if not is_deterministic:
            n_rows += (SLOTS * COPIES if has_copies else 0) + 1
        grad_weight = new((n_rows, d_in)).zero_()
        spread_ = spread(indices, n_latents) if has_copies else None
    residual = new((n_samples, d_in)) if wanted.residual else None
    grad_target = None
    if wanted.grad_target:
        grad_target = new((n_samples, d_in), gradient_dtype(target.dtype))
    n_programs = cdiv(n_samples, 2)
    is_small = n_samples <= SMALL_BATCH and not is_deterministic
    bias_rows = 1 if n_samples <= SMALL_BATCH else BIAS_ROWS
    if is_deterministic:
        bias_rows = n_programs  # nothing to be added twice
    loss = new(() if is_small else (n_slices, n_samples))
    # What else is added to, zeroed at once. The host takes longer to launch with unaligned tensors,
    # so the next begins at a multiple of 16 bytes.
    sizes = [
        LOSS_SUMS + 4 if is_small else 0,  # with room for the count
        n_samples * k if wanted.grad_vals else 0,
        -n_samples * k % 4,
        bias_rows * d_in if wanted.grad_bias else 0,
    ]
    loss_sums, grad_vals, _, grad_bias = new((sum(sizes),)).zero_().split_with_sizes(sizes)

    def walk(first_slice: int, n_slices: int, suffix_sums: torch.Tensor | None = None) -> None:
        # The slices vary slowest, so that the slice at work stays in the second-level cache.
        _triton.launch(
            _hierarchical_kernel,
            (n_programs, n_slices),
            (
                indices,
                read,
                vals,
                bias,
                target,
                level_weights,
                None if spread_ is None else spread_.rows,
                None if spread_ is None else spread_.n_copied,
                loss,
                loss_sums if is_small else None,
                residual,
                None if is_deterministic else grad_weight,
                grad_vals if wanted.grad_vals else None,
                grad_bias if wanted.grad_bias else None,
                grad_target,
                suffix_sums,
            ),
            (scale,),
            (first_slice, bias_rows, n_rows - 1, n_samples, k, n_latents, d_in, *read.stride()),
            BLOCK_D=BLOCK_D,
            LEVELS=levels,
            EVEN=is_even,
            WIDE=is_wide(read, n_rows),
            LAST_ALONE=last_alone,
            WALKS_DOWN=any(wanted[1:]),
            SUMS=LOSS_SUMS,
            num_warps=NUM_WARPS,
        )

    if is_deterministic:
        # The order of atomic additions varies. So the slices, which all add to grad_vals, are
        # launched one after another; and their S are stored and then added up latent by latent.
        suffix_sums = vals_in_order = None
        if wanted.grad_weight:
            index = index or invert(indices, n_latents, use_triton=True)
            suffix_sums = new((n_samples * k, BLOCK_D))
            vals_in_order = vals.flatten()[index.pairs]
        for slice_ in range(n_slices):
            walk(slice_, 1, suffix_sums)
            if index is not None and suffix_sums is not None and vals_in_order is not None:
                first = slice_ * BLOCK_D
                n_columns = min(BLOCK_D, d_in - first)
                sum_by_latent(
                    index,
                    vals_in_order,
                    suffix_sums[:, :n_columns].contiguous(),
                    grad_weight,
                    first_column=first,
                    zero_absent=False,
                )
    else:
        walk(0, n_slices)
    if spread_ is not None and grad_weight is not None:
        fold_copies(spread_, grad_weight, n_latents)
    if wanted.grad_bias and bias_rows > 1:
        grad_bias = grad_bias.view(bias_rows, d_in).sum(0)
    if grad_weight is not None:
        grad_weight = kept(grad_weight[:n_latents], weight)
    return Outputs(
        loss=loss if is_small else loss.sum(),
        residual=residual,
        grad_weight=grad_weight,
        grad_vals=kept(grad_vals.view(n_samples, k), vals) if wanted.grad_vals else None,
        grad_bias=kept(grad_bias, bias) if bias is not None and wanted.grad_bias else None,
        grad_target=grad_target,
    )


define_loss_operator("hierarchical_loss", triton=launch, torch_=torch_backend.hierarchical)


def triton_hierarchical_sae_loss(
    indices: torch.Tensor,
    weight: torch.Tensor,
    vals: torch.Tensor,
    bias: torch.Tensor,
    target: torch.Tensor,
    *,
    level_weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the squared error of every level, averaged over B, K and D, by fused kernels.

    The same function as `hierarchical_sae_loss`, whose docstring has the formula and the arguments,
    without its [B, K, D] tensor. It accumulates in float32 whatever the inputs' dtypes, and comes
    to the residual of a level by subtracting from that of the last what the levels above add: where
    these are a thousand times as large, three digits of it are lost. With
    `torch.use_deterministic_algorithms(True)` its results are the same from run to run.

    Args:
        indices: [B, K], int32 or int64. A latent outside [0, F) is ignored; with the environment
            variable SAE_LENS_FLEX_CHECK_INDICES=1, set before the import, it is an IndexError.
        weight: [F, D], vals: [B, K], bias: [D], target: [B, D]: float32, bfloat16 or float16.
        level_weights: [K], not differentiated. None weighs each level 1 / K.

    Returns:
        The loss, a float32 scalar, differentiable in weight, vals, bias and target by one backward
        pass, which gives away the gradients that the forward pass computed.

    Raises:
        TypeError, ValueError: for an argument of the wrong type, dtype, shape or device.
        RuntimeError: where Triton or its device is missing, for a second backward pass through the
            same graph, and for a second derivative.
    """
    check_arguments(indices, weight, vals, bias, target, level_weights)
    loss, _ = fused_loss(
        "hierarchical_loss",
        indices,
        weight,
        vals,
        bias,
        target,
        level_weights=level_weights,
        backend="triton",
    )
    return loss
