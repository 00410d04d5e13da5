"""The K largest pre-activations of each sample, exactly and in descending order.

    latents[b] = the K largest of (products[b] + bias) * norms, of equal ones the smaller latent,
    hidden[b, t] = (products + bias)[b, latents[b, t]]

`torch.topk` reads a row of F pre-activations many times. The kernels here read it once, for the
largest of every group of neighbouring latents. The K groups with the largest maxima hold the K
largest latents: a latent of another group is at most its group's maximum, and K maxima are no
smaller. The K-th largest maximum, and then the K-th largest latent of those groups, are found bit
by bit from the highest bit down, with the candidates in registers.

The kernels add the bias and multiply by the norms in float32 as they read, so nothing but the bare
products x @ W_enc is ever written.
"""

import torch

from .keys import compared_key
from .launch import cdiv, launch, tl, triton


@triton.jit
def _kth_largest(keys, K):
    kth = tl.where(tl.sum((keys >= 0).to(tl.int32), axis=0) >= K, 0, -(2**31))
    for step in range(31):
        candidate = kth | (1 << (30 - step))
        kth = tl.where(tl.sum((keys >= candidate).to(tl.int32), axis=0) >= K, candidate, kth)
    return kth


@triton.jit
def _places(keys, mask, K):
    # Numbers the K largest keys 0..K-1, those above the K-th largest first. Of keys that equal the
    # K-th largest it takes the first. Returns the numbers, and which keys have one.
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
    bias,
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
    bias_of_f = tl.load(bias + f, mask=in_row, other=0.0).to(tl.float32)
    norm = None
    if norms is not None:
        norm = tl.load(norms + f, mask=in_row, other=0.0).to(tl.float32)
    first = tl.program_id(1).to(tl.int64) * ROWS
    for step in range(ROWS):  # bias and norms are loaded once for all rows
        b = tl.minimum(first + step, B - 1)
        product = tl.load(products + b * F + f, mask=in_row, other=0.0)
        keys = tl.where(in_row, compared_key(product, bias_of_f, norm), -(2**31))
        tl.store(maxima + b * n_groups + groups, tl.max(keys, axis=1), mask=groups < n_groups)


@triton.jit
def _choose_groups_kernel(maxima, groups, n_groups, K, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    group = tl.arange(0, BLOCK)
    mask = group < n_groups
    keys = tl.load(maxima + b * n_groups + group, mask=mask, other=-(2**31))
    _, is_chosen = _places(keys, mask, K)
    # In ascending order, so the candidates of the next kernel are, too: of equal latents it takes
    # the first.
    place = tl.cumsum(is_chosen.to(tl.int32), axis=0) - 1
    tl.store(groups + b * K + place, group, mask=is_chosen)


@triton.jit
def _choose_latents_kernel(
    products,
    bias,
    norms,  # or None
    groups,  # [B, K], ascending
    chosen,  # [B, K]: a key in the upper 32 bits, the latent's complement in the lower
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
    bias_of_f = tl.load(bias + f, mask=mask, other=0.0).to(tl.float32)
    norm = None
    if norms is not None:
        norm = tl.load(norms + f, mask=mask, other=0.0).to(tl.float32)
    product = tl.load(products + b * F + f, mask=mask, other=0.0)
    keys = tl.where(mask, compared_key(product, bias_of_f, norm), -(2**31))
    place, is_chosen = _places(keys, mask, K)
    packed = (keys.to(tl.int64) << 32) | (0xFFFFFFFF - f.to(tl.int64))
    tl.store(chosen + b * K + place, packed, mask=is_chosen)


@triton.jit
def _order_kernel(
    products,
    bias,
    chosen,
    latents,
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
    h = product + tl.load(bias + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(latents + b * K + t, f, mask=mask)
    tl.store(hidden + b * K + t, h.to(hidden.dtype.element_ty), mask=mask)


# A program holds a row's maxima, or its candidates, in registers. Of 16384 each of 256 threads
# holds 64.
MAX_BLOCK = 16384
MAXIMA_ROWS = 16
MAXIMA_BLOCK = 2048


def _group_size(n_latents: int, k: int) -> int:
    """Return the power of two with which there are about as many groups as candidates."""
    group = 1
    while group * group * k < n_latents and 2 * group * k <= n_latents:
        group *= 2
    return group


def _num_warps(block: int) -> int:
    return min(8, max(1, block // 512))


def most_latents(k: int) -> int:
    """Return of how many latents the kernels choose K: a row's maxima and candidates fit."""
    group = 1
    while 2 * group * k <= MAX_BLOCK:
        group *= 2
    return max(MAX_BLOCK, group * group * k) if k <= MAX_BLOCK else 0


def group_maxima(
    products: torch.Tensor, bias: torch.Tensor, norms: torch.Tensor | None, group: int
) -> torch.Tensor:
    """Return the key of the largest of each `group` neighbouring latents, [B, n_groups], int32.

    Args:
        products, bias, norms: as for `largest`, contiguous.
        group: a power of two.
    """
    n_samples, n_latents = products.shape
    n_groups = cdiv(n_latents, group)
    maxima = products.new_empty((n_samples, n_groups), dtype=torch.int32)
    block_groups = max(1, MAXIMA_BLOCK // group)
    launch(
        _group_maxima_kernel,
        (cdiv(n_groups, block_groups), cdiv(n_samples, MAXIMA_ROWS)),
        (products, bias, norms, maxima),
        (),
        (n_samples, n_latents, n_groups),
        ROWS=MAXIMA_ROWS,
        BLOCK_GROUPS=block_groups,
        GROUP=group,
    )
    return maxima


def largest(
    products: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    *,
    latents: torch.Tensor,
    hidden: torch.Tensor,
    is_sorted: bool = True,
) -> None:
    """Write the K largest latents of each row, and their pre-activations.

    Args:
        products: x @ W_enc, [B, F], contiguous.
        bias: [F].
        norms: what the pre-activations are multiplied by to be compared, [F]; None for 1.
        latents: where the latents go, [B, K], int64, contiguous; F at most `most_latents`.
        hidden: where products + bias go, [B, K], contiguous.
        is_sorted: False allows any order.
    """
    n_samples, n_latents = products.shape
    k = latents.shape[1]
    bias, norms = bias.contiguous(), None if norms is None else norms.contiguous()
    group = _group_size(n_latents, k)
    n_groups = cdiv(n_latents, group)
    maxima = group_maxima(products, bias, norms, group)
    groups = products.new_empty((n_samples, k), dtype=torch.int32)
    chosen = products.new_empty((n_samples, k), dtype=torch.int64)
    block = triton.next_power_of_2(n_groups)
    launch(
        _choose_groups_kernel,
        (n_samples,),
        (maxima, groups),
        (),
        (n_groups, k),
        BLOCK=block,
        num_warps=_num_warps(block),
    )
    block = triton.next_power_of_2(k * group)
    launch(
        _choose_latents_kernel,
        (n_samples,),
        (products, bias, norms, groups, chosen),
        (),
        (n_latents, k),
        GROUP=group,
        BLOCK=block,
        num_warps=_num_warps(block),
    )
    block = triton.next_power_of_2(k)
    launch(
        _order_kernel,
        (n_samples,),
        (products, bias, chosen, latents, hidden),
        (),
        (n_latents, k),
        BLOCK=block,
        SORT=is_sorted,
        num_warps=_num_warps(block),
    )
