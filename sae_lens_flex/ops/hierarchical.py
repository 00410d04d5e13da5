"""The HierarchicalTopK loss in one kernel, memory flat in K.

    L = factor / (B D) * sum_b sum_j c_j |r_j|^2,   r_j = bias + sum_{i <= j} v_i w_i - target

with w_i = weight[indices[b, i]], v_i = vals[b, i] and c_j = 1 / K, or `level_weights`. A program
takes two samples and one slice of D. It walks up the levels with the residual r in registers,
adding up the loss, and then down again, peeling one latent off r at each level, with the suffix sum
S of the scaled residuals; S gives every gradient (see `fused_loss`). No level is ever stored.
"""

import torch

from . import _triton, torch_backend
from ._triton import cdiv, tl, triton
from .checks import check_arguments
from .fused_loss import Outputs, Wanted, define_loss_operator, fused_loss
from .inverted_index import InvertedIndex, invert, sum_by_latent
from .levels import gather_levels
from .spread import COPIES, SLOTS, fold_copies, is_worth_spreading, spread


@triton.jit
def _level_weight(level_weights, j, K, LAST_ALONE: tl.constexpr, EVEN: tl.constexpr):
    # Without level_weights 1, for `scale` has the 1 / K of the mean.
    if level_weights is not None:
        return tl.load(level_weights + j, mask=j < K, other=0.0).to(tl.float32)
    elif LAST_ALONE:
        return tl.where(j == K - 1, 1.0, 0.0)
    elif EVEN:
        return 1.0
    else:
        return tl.where(j < K, 1.0, 0.0)


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


# Compiling takes some seconds: not again for every divisibility of what no address depends on.
@triton.jit(do_not_specialize=["first_slice", "bias_rows", "B", "K", "F"])
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
    grad_weight,  # float32, zeroed
    grad_vals,  # float32, zeroed
    grad_bias,  # float32, zeroed: [bias_rows, D], to be added up
    grad_target,
    suffix_sums,  # [B, K, BLOCK_D], of one slice
    scale,  # factor / (B D), and / K without level_weights
    first_slice,
    bias_rows,
    B,
    K,
    F,
    D,
    stride_wf,
    stride_wd,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LEVELS: tl.constexpr,
    EVEN: tl.constexpr,  # whether the blocks divide B, K and D
    LAST_ALONE: tl.constexpr,
    WALKS_DOWN: tl.constexpr,
    SUMS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    in_batch = b < B
    slice_ = (first_slice + tl.program_id(1)).to(tl.int64)
    d = slice_ * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    in_slice = d < D
    bd = b[:, None] * D + d
    bd_mask = in_batch[:, None] & in_slice
    indices += b * K
    vals += b * K
    weight_slice = weight + d * stride_wd

    r = -tl.load(target + bd, mask=bd_mask, other=0.0).to(tl.float32)
    if bias is not None:
        r += tl.load(bias + d, mask=in_slice, other=0.0).to(tl.float32)
    error = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
    last = (tl.cdiv(K, LEVELS) - 1) * LEVELS
    for first in range(0, last, LEVELS):
        f, is_latent, v, w = gather_levels(
            first,
            indices,
            vals,
            weight_slice,
            b,
            in_slice,
            B,
            K,
            F,
            stride_wf,
            LEVELS,
            EVEN,
        )
        for t in tl.static_range(LEVELS):
            r += v[t][:, None] * w[t]
            error += _level_weight(level_weights, first + t, K, LAST_ALONE, EVEN) * r * r
    f, is_latent, v, w = gather_levels(
        last, indices, vals, weight_slice, b, in_slice, B, K, F, stride_wf, LEVELS, EVEN
    )
    for t in tl.static_range(LEVELS):
        r += v[t][:, None] * w[t]
        error += _level_weight(level_weights, last + t, K, LAST_ALONE, EVEN) * r * r
    error = tl.where(bd_mask, error, 0.0)  # where there is no target, a bias is no error
    if loss_sums is None:
        tl.store(loss + slice_ * B + b, scale * tl.sum(error, axis=1), mask=in_batch)
    else:
        _add_to_loss(loss, loss_sums, scale * tl.sum(error), SUMS)
    if residual is not None:
        tl.store(residual + bd, r, mask=bd_mask)

    if WALKS_DOWN:
        s = tl.zeros([BLOCK_B, BLOCK_D], tl.float32)
        has_copies = tl.full([BLOCK_B], False, tl.int1)
        if rows is not None:
            has_copies = tl.load(n_copied + tl.zeros([BLOCK_B], tl.int32)) > 0
        level = tl.arange(0, LEVELS)[None, :]
        for step in range(0, last + LEVELS, LEVELS):
            first = last - step
            if step > 0:  # the last levels' rows are at hand
                f, is_latent, v, w = gather_levels(
                    first,
                    indices,
                    vals,
                    weight_slice,
                    b,
                    in_slice,
                    B,
                    K,
                    F,
                    stride_wf,
                    LEVELS,
                    EVEN,
                )
            rows_of_f = f
            if rows is not None:
                rows_of_f = ()
                for t in tl.static_range(LEVELS):
                    mask = is_latent[t] & has_copies
                    row = tl.load(rows + b * K + (first + t), mask=mask, other=f[t])
                    rows_of_f += (row,)
            dots = tl.zeros([BLOCK_B, LEVELS], tl.float32)
            for t in tl.static_range(LEVELS - 1, -1, -1):
                c = _level_weight(level_weights, first + t, K, LAST_ALONE, EVEN)
                s += (2.0 * scale) * c * r
                if grad_vals is not None:
                    dots = tl.where(level == t, tl.sum(w[t] * s, axis=1)[:, None], dots)
                if grad_weight is not None:
                    mask = is_latent[t][:, None]
                    if not EVEN:
                        mask &= in_slice
                    row = rows_of_f[t].to(tl.int64)  # pyright: ignore[reportAttributeAccessIssue]
                    tl.atomic_add(
                        grad_weight + row[:, None] * D + d,
                        v[t][:, None] * s,
                        mask=mask,
                        sem="relaxed",
                    )
                if suffix_sums is not None:
                    out = (b * K + (first + t))[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
                    exists = b < tl.where(first + t < K, B, 0)
                    tl.store(suffix_sums + out, s, mask=exists[:, None])
                r -= v[t][:, None] * w[t]
            if grad_vals is not None:
                tl.atomic_add(
                    grad_vals + (b * K)[:, None] + (first + level),
                    dots,
                    mask=in_batch[:, None] & (first + level < K),
                    sem="relaxed",
                )
        if grad_bias is not None:
            s_of_all = tl.sum(tl.where(bd_mask, s, 0.0), axis=0)[None, :]
            row = (tl.program_id(0) % bias_rows).to(tl.int64)
            tl.atomic_add(grad_bias + row * D + d, s_of_all, mask=in_slice, sem="relaxed")
        if grad_target is not None:
            tl.store(grad_target + bd, -s, mask=bd_mask)


# In one run on an H200 at B=4096, K=128, F=65536, D=2304, loss and gradients took, with float32 and
# uniform, float32 and Zipf, bfloat16 and uniform indices, 2.68, 2.22 and 2.44 ms. One sample a
# program: 2.64, 2.24, 2.55; four: 3.11, 2.64, 2.88. Slices 32 wide: 2.57, 2.32, 2.72; 128 wide,
# by 4 levels: 3.63, 2.50, 3.20. 16 levels take half a minute to compile. benchmarks/README.md has
# the reasons.
BLOCK_B = 2
BLOCK_D = 64
LEVELS = 8
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
    is_even = n_samples % BLOCK_B == 0 and k % LEVELS == 0 and d_in % BLOCK_D == 0
    is_deterministic = torch.are_deterministic_algorithms_enabled()

    def new(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return target.new_empty(shape, dtype=dtype)

    spread_ = grad_weight = None
    if wanted.grad_weight:
        # First, for it keeps the device busy while the host prepares the rest.
        has_copies = not is_deterministic and is_worth_spreading(indices)
        n_copies = SLOTS * COPIES if has_copies else 0
        grad_weight = new((n_latents + n_copies, d_in)).zero_()
        spread_ = spread(indices, n_latents) if has_copies else None
    residual = new((n_samples, d_in)) if wanted.residual else None
    grad_target = new((n_samples, d_in), target.dtype) if wanted.grad_target else None
    n_programs = cdiv(n_samples, BLOCK_B)
    is_small = n_samples <= SMALL_BATCH and not is_deterministic
    bias_rows = 1 if n_samples <= SMALL_BATCH else BIAS_ROWS
    if is_deterministic:
        bias_rows = n_programs  # nothing to be added twice
    loss = new(() if is_small else (n_slices, n_samples))
    # What else is added to, zeroed at once.
    sizes = [
        LOSS_SUMS + 4 if is_small else 0,  # with room for the count, and aligned
        bias_rows * d_in if wanted.grad_bias else 0,
        n_samples * k if wanted.grad_vals else 0,
    ]
    loss_sums, grad_bias, grad_vals = new((sum(sizes),)).zero_().split_with_sizes(sizes)

    def walk(first_slice: int, n_slices: int, suffix_sums: torch.Tensor | None = None) -> None:
        # The slices vary slowest, so that the slice at work, of weight and of its gradient, stays
        # in the second-level cache: 2 * 65536 * 64 * 4 bytes = 34 MB.
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
            (first_slice, bias_rows, n_samples, k, n_latents, d_in, *read.stride()),
            BLOCK_B=BLOCK_B,
            BLOCK_D=BLOCK_D,
            LEVELS=LEVELS,
            EVEN=is_even,
            LAST_ALONE=last_alone,
            WALKS_DOWN=any(wanted[1:]),
            SUMS=LOSS_SUMS,
            num_warps=NUM_WARPS,
        )

    if is_deterministic:
        # The order of atomic additions varies. So the slices, which all add to grad_vals, are
        # launched one after another; and their S are stored and then added up latent by latent.
        suffix_sums = None
        if wanted.grad_weight:
            index = index or invert(indices, n_latents, use_triton=True)
            suffix_sums = new((n_samples * k, BLOCK_D))
        for slice_ in range(n_slices):
            walk(slice_, 1, suffix_sums)
            if index is not None and suffix_sums is not None:
                first = slice_ * BLOCK_D
                n_columns = min(BLOCK_D, d_in - first)
                sum_by_latent(
                    index,
                    vals,
                    suffix_sums[:, :n_columns].contiguous(),
                    grad_weight,
                    first_column=first,
                    zero_absent=False,
                )
    else:
        walk(0, n_slices)
    if spread_ is not None and grad_weight is not None:
        fold_copies(spread_, grad_weight, n_latents)
        grad_weight = grad_weight[:n_latents]
    if wanted.grad_bias and bias_rows > 1:
        grad_bias = grad_bias.view(bias_rows, d_in).sum(0)
    return Outputs(
        loss=loss if is_small else loss.sum(),
        residual=residual,
        grad_weight=None if grad_weight is None else grad_weight.to(weight.dtype),
        grad_vals=grad_vals.view(n_samples, k).to(vals.dtype) if wanted.grad_vals else None,
        grad_bias=grad_bias.to(bias.dtype) if bias is not None and wanted.grad_bias else None,
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
    without its [B, K, D] tensor. It accumulates in float32 whatever the inputs' dtypes. With
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
