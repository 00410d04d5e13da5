"""The K largest pre-activations of each activation, exactly and in descending order.

`torch.topk` passes over a row of F pre-activations many times. The kernels here read it once, for
the maxima of groups of neighbouring latents: the K groups with the largest maxima hold K latents
that no other exceeds, for a latent outside them is at most its group's maximum, which K maxima
reach. The K-th largest maximum, and then the K-th largest latent among those groups, are found bit
by bit, from the highest down, with the candidates in registers.

The encoder's bias and the norms by which latents are compared are applied on the way, in float32,
so that only the bare products x @ W_enc are ever written.
"""

from typing import NamedTuple

import torch

from . import _triton
from ._triton import cdiv, tl, triton


class Selection(NamedTuple):
    """The kept latents.

    Attributes:
        indices: [B, K], int64.
        hidden: their pre-activations, [B, K].
    """

    indices: torch.Tensor
    hidden: torch.Tensor


@triton.jit
def _sortable(values):
    # float32 to int32 in the same order; NaN is the largest, as in torch.topk.
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _compared(products, b_enc, norms):
    values = products.to(tl.float32) + b_enc
    if norms is not None:
        values *= norms
    return _sortable(values)


@triton.jit
def _kth_largest(keys, K):
    kth = tl.where(tl.sum((keys >= 0).to(tl.int32), axis=0) >= K, 0, -(2**31))
    for step in range(31):
        candidate = kth | (1 << (30 - step))
        kth = tl.where(tl.sum((keys >= candidate).to(tl.int32), axis=0) >= K, candidate, kth)
    return kth


@triton.jit
def _places(keys, mask, K):
    # Numbers the K largest keys 0..K-1, those above the K-th first; of equal ones the first are
    # taken. Returns the places and which keys have one.
    kth = _kth_largest(keys, K)
    is_above = (keys > kth) & mask
    is_level = (keys == kth) & mask
    n_above = tl.sum(is_above.to(tl.int32), axis=0)
    above = tl.cumsum(is_above.to(tl.int32), axis=0) - 1
    level = tl.cumsum(is_level.to(tl.int32), axis=0) - 1 + n_above
    return tl.where(is_above, above, level), is_above | (is_level & (level < K))


@triton.jit
def _group_maxima_kernel(
    products,  # [B, F]
    b_enc,
    norms,  # or None
    maxima,  # [B, n_groups]
    B,
    F,
    n_groups,
    ROWS: tl.constexpr,
    BLOCK_GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
):
    groups = tl.program_id(0) * BLOCK_GROUPS + tl.arange(0, BLOCK_GROUPS)
    f = groups[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    in_row = f < F
    bias = tl.load(b_enc + f, mask=in_row, other=0.0).to(tl.float32)
    norm = None
    if norms is not None:
        norm = tl.load(norms + f, mask=in_row, other=0.0).to(tl.float32)
    first = tl.program_id(1).to(tl.int64) * ROWS
    for step in range(ROWS):  # the same bias and norms for all of them
        b = tl.minimum(first + step, B - 1)
        product = tl.load(products + b * F + f, mask=in_row, other=0.0)
        keys = tl.where(in_row, _compared(product, bias, norm), -(2**31))
        tl.store(maxima + b * n_groups + groups, tl.max(keys, axis=1), mask=groups < n_groups)


@triton.jit
def _choose_groups_kernel(maxima, groups, n_groups, K, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK)
    mask = group < n_groups
    keys = tl.load(maxima + b * n_groups + group, mask=mask, other=-(2**31))
    place, is_chosen = _places(keys, mask, K)
    tl.store(groups + b * K + place, group, mask=is_chosen)


@triton.jit
def _choose_latents_kernel(
    products,
    b_enc,
    norms,  # or None
    groups,  # [B, K]
    chosen,  # [B, K], a key in the upper half, the latent's complement in the lower
    F,
    K,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    candidate = tl.arange(0, BLOCK)
    mask = candidate < K * GROUP
    group = tl.load(groups + b * K + candidate // GROUP, mask=mask, other=0)
    f = group * GROUP + candidate % GROUP
    mask = mask & (f < F)
    bias = tl.load(b_enc + f, mask=mask, other=0.0).to(tl.float32)
    norm = None
    if norms is not None:
        norm = tl.load(norms + f, mask=mask, other=0.0).to(tl.float32)
    product = tl.load(products + b * F + f, mask=mask, other=0.0)
    keys = tl.where(mask, _compared(product, bias, norm), -(2**31))
    place, is_chosen = _places(keys, mask, K)
    packed = (keys.to(tl.int64) << 32) | (0xFFFFFFFF - f.to(tl.int64))
    tl.store(chosen + b * K + place, packed, mask=is_chosen)


@triton.jit
def _order_kernel(
    products,
    b_enc,
    chosen,
    indices,
    hidden,
    F,
    K,
    BLOCK: tl.constexpr,
    SORT: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    t = tl.arange(0, BLOCK)
    mask = t < K
    packed = tl.load(chosen + b * K + t, mask=mask, other=-(2**63))
    if SORT:
        packed = tl.sort(packed, descending=True)  # pyright: ignore[reportArgumentType]
    f = 0xFFFFFFFF - (packed & 0xFFFFFFFF)  # pyright: ignore[reportOperatorIssue]
    product = tl.load(products + b * F + f, mask=mask, other=0.0).to(tl.float32)
    h = product + tl.load(b_enc + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(indices + b * K + t, f, mask=mask)
    tl.store(hidden + b * K + t, h.to(hidden.dtype.element_ty), mask=mask)


# A program holds a row's maxima, and then its candidates, in registers: at 16384 of them 64 for
# each of 256 threads.
MAX_BLOCK = 16384
MAXIMA_ROWS = 16
MAXIMA_BLOCK = 2048


def _group_size(n_latents: int, k: int) -> int:
    """Return the power of two that makes about as many groups as candidates."""
    group = 1
    while group * group * k < n_latents and 2 * group * k <= n_latents:
        group *= 2
    return group


def _num_warps(block: int) -> int:
    return min(8, max(1, block // 512))


def fits_kernels(n_latents: int, k: int) -> bool:
    """Return whether the kernels can hold what they need for k of F latents in registers."""
    group = _group_size(n_latents, k)
    return max(k * group, cdiv(n_latents, group)) <= MAX_BLOCK


def select_by_triton(
    products: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    out: Selection,
    is_sorted: bool = True,
) -> None:
    """Select as `select` does, by kernels; the products are contiguous and `fits_kernels`."""
    n_samples, n_latents = products.shape
    k = out.indices.shape[1]
    b_enc, norms = b_enc.contiguous(), None if norms is None else norms.contiguous()
    group = _group_size(n_latents, k)
    n_groups = cdiv(n_latents, group)
    maxima = products.new_empty((n_samples, n_groups), dtype=torch.int32)
    groups = products.new_empty((n_samples, k), dtype=torch.int32)
    chosen = products.new_empty((n_samples, k), dtype=torch.int64)
    block_groups = max(1, MAXIMA_BLOCK // group)
    _triton.launch(
        _group_maxima_kernel,
        (cdiv(n_groups, block_groups), cdiv(n_samples, MAXIMA_ROWS)),
        (products, b_enc, norms, maxima),
        (),
        (n_samples, n_latents, n_groups),
        ROWS=MAXIMA_ROWS,
        BLOCK_GROUPS=block_groups,
        GROUP=group,
    )
    block = triton.next_power_of_2(n_groups)
    _triton.launch(
        _choose_groups_kernel,
        (n_samples,),
        (maxima, groups),
        (),
        (n_groups, k),
        BLOCK=block,
        num_warps=_num_warps(block),
    )
    block = triton.next_power_of_2(k * group)
    _triton.launch(
        _choose_latents_kernel,
        (n_samples,),
        (products, b_enc, norms, groups, chosen),
        (),
        (n_latents, k),
        GROUP=group,
        BLOCK=block,
        num_warps=_num_warps(block),
    )
    block = triton.next_power_of_2(k)
    _triton.launch(
        _order_kernel,
        (n_samples,),
        (products, b_enc, chosen, out.indices, out.hidden),
        (),
        (n_latents, k),
        BLOCK=block,
        SORT=is_sorted,
        num_warps=_num_warps(block),
    )


def select_by_torch(
    products: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    out: Selection,
    is_sorted: bool = True,
) -> None:
    """Select as `select` does, by PyTorch; overwrites the products where it can."""
    in_place = torch.promote_types(products.dtype, b_enc.dtype) == products.dtype
    hidden = products.add_(b_enc) if in_place else products + b_enc
    compared = hidden if norms is None else hidden * norms
    indices = compared.topk(out.indices.shape[1], sorted=is_sorted).indices
    out.indices.copy_(indices)
    torch.gather(hidden, -1, indices, out=out.hidden)


def select(
    products: torch.Tensor,
    b_enc: torch.Tensor,
    norms: torch.Tensor | None,
    out: Selection,
    use_triton: bool,
    is_sorted: bool = True,
) -> None:
    """Write the K largest of (products + b_enc) * norms in each row, in descending order.

    Args:
        products: x @ W_enc, [B, F], contiguous. May be overwritten.
        b_enc: [F].
        norms: [F], or None for 1.
        out: contiguous, with K <= F. `hidden` is products + b_enc, without the norms.
        use_triton: whether the kernels may be used.
        is_sorted: without it, in any order.
    """
    fits = fits_kernels(products.shape[1], out.indices.shape[1])
    by = select_by_triton if use_triton and fits else select_by_torch
    by(products, b_enc, norms, out, is_sorted)
