"""The K largest pre-activations of each sample, in their places, and gradients there.

    h = products + bias
    kept[b] = the K largest of h[b] * norms among the allowed latents, of equal ones the smaller
    products[b, f] = h[b, f] where kept, else 0
    gradients[b, f] = gradients[b, f] where kept, else 0,     sums[f] = sum_b gradients[b, f]

A large part of a row is kept, so the products with it are dense, and nothing needs the kept latents
as a list. A program holds the keys of a row in registers and finds the K-th largest bit by bit,
from the highest bit down. It ends as soon as the bits found so far are those of exactly K keys,
which is long before the last bit where no keys are equal.

A kept h may be 0, or be rounded to it. It is written as -0, and what is not kept as +0. So the
place of a kept h has a bit that is not 0, and all others have none.
"""

import torch

from .keys import compared_key
from .launch import cdiv, launch, tl, triton


@triton.jit
def _pre_activations(products, bias, f, F):
    product = tl.load(products + f, mask=f < F, other=0.0).to(tl.float32)
    return product, tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)


@triton.jit
def _n_at_least(keys, bound, N_BLOCKS: tl.constexpr):
    counts = (keys[0] >= bound).to(tl.int32)
    for i in tl.static_range(1, N_BLOCKS):
        counts += (keys[i] >= bound).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def _last_of_equals(keys, key, n, BLOCK: tl.constexpr, N_BLOCKS: tl.constexpr):
    # Returns the place of the n-th key that equals `key`.
    last = 0
    n_before = 0
    for i in tl.static_range(N_BLOCKS):
        is_equal = (keys[i] == key).to(tl.int32)
        number = n_before + tl.cumsum(is_equal, axis=0)
        f = i * BLOCK + tl.arange(0, BLOCK)
        last += tl.sum(tl.where((is_equal == 1) & (number == n), f, 0), axis=0)
        n_before += tl.sum(is_equal, axis=0)
    return last


@triton.jit
def _keep_largest_kernel(
    products,  # [B, F]
    bias,
    norms,  # or None
    is_allowed,  # [F], int8, or None
    F,
    K,
    BLOCK: tl.constexpr,
    N_BLOCKS: tl.constexpr,
):
    products += tl.program_id(0).to(tl.int64) * F
    keys = ()
    for i in tl.static_range(N_BLOCKS):
        f = i * BLOCK + tl.arange(0, BLOCK)
        exists = f < F
        product, bias_of_f = _pre_activations(products, bias, f, F)
        norm = None
        if norms is not None:
            norm = tl.load(norms + f, mask=exists, other=0.0).to(tl.float32)
        if is_allowed is not None:
            exists = exists & (tl.load(is_allowed + f, mask=exists, other=0) != 0)
        keys += (tl.where(exists, compared_key(product, bias_of_f, norm), -(2**31)),)

    bound = tl.full([], -(2**31), tl.int32)
    n = tl.full([], N_BLOCKS * BLOCK, tl.int32)  # keys that are at least `bound`
    bit = tl.full([], 31, tl.int32)
    while (bit >= 0) & (n != K):
        candidate = bound ^ (tl.full([], 1, tl.int32) << bit)  # Bit 31 is that of the sign.
        n_of_candidate = _n_at_least(keys, candidate, N_BLOCKS)
        bound = tl.where(n_of_candidate >= K, candidate, bound)
        n = tl.where(n_of_candidate >= K, n_of_candidate, n)
        bit -= 1
    last = tl.full([], 2**31 - 1, tl.int32)  # which of those that equal `bound` is kept
    if (n > K) & (bound > -(2**31)):
        n_equal = 0
        for i in tl.static_range(N_BLOCKS):
            n_equal += tl.sum((keys[i] == bound).to(tl.int32), axis=0)
        last = _last_of_equals(keys, bound, K - n + n_equal, BLOCK, N_BLOCKS)

    for i in tl.static_range(N_BLOCKS):
        f = i * BLOCK + tl.arange(0, BLOCK)
        is_kept = (keys[i] > bound) | ((keys[i] == bound) & (f <= last))
        is_kept = is_kept & (keys[i] > -(2**31))
        product, bias_of_f = _pre_activations(products, bias, f, F)
        h = product + bias_of_f
        is_zero = h.to(products.dtype.element_ty).to(tl.float32) == 0.0
        bits = tl.where(is_zero, -(2**31), h.to(tl.int32, bitcast=True))
        h = tl.where(is_kept, bits, 0).to(tl.float32, bitcast=True)
        tl.store(products + f, h.to(products.dtype.element_ty), mask=f < F)


@triton.jit
def _at_kept_kernel(
    kept,  # [B, F]: the bits of what `_keep_largest_kernel` wrote, as integers
    gradients,  # [B, F]
    sums,  # [blocks of rows, F], or None
    B,
    F,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = b[:, None] * F + f[None, :]
    exists = (b < B)[:, None] & (f < F)[None, :]
    is_kept = tl.load(kept + place, mask=exists, other=0) != 0
    gradient = tl.load(gradients + place, mask=exists, other=0.0).to(tl.float32)
    gradient = tl.where(is_kept, gradient, 0.0)
    tl.store(gradients + place, gradient.to(gradients.dtype.element_ty), mask=exists)
    if sums is not None:
        row = tl.program_id(1).to(tl.int64) * F
        tl.store(sums + row + f, tl.sum(gradient, axis=0), mask=f < F)


# A program's threads hold 40 keys each of 20,480, and 64 at most.
BLOCK = 4096
MOST_LATENTS = 8 * BLOCK
KEYS_OF_A_WARP = 1280
MOST_WARPS = 16
ROWS = 32
COLUMNS = 256

_INTEGERS = {2: torch.int16, 4: torch.int32}


def fits(n_latents: int, dtype: torch.dtype) -> bool:
    """Return whether registers can hold the keys of F latents, whose products have that dtype."""
    return n_latents <= MOST_LATENTS and dtype.itemsize in _INTEGERS


def _num_warps(n_latents: int) -> int:
    warps = 1
    while warps < MOST_WARPS and warps * KEYS_OF_A_WARP < n_latents:
        warps *= 2
    return warps


def keep_largest(
    products: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    is_allowed: torch.Tensor | None,
    k: int,
) -> None:
    """Write the pre-activations of the K largest latents of each row over its products.

    A kept one that is 0 becomes -0, and what is not kept +0.

    Args:
        products: x @ W_enc, [B, F], contiguous, F as `fits` allows.
        bias: [F].
        norms: what the pre-activations are multiplied by to be compared, [F]; None for 1.
        is_allowed: which latents may be kept, [F], bool; None for all. Of fewer than K all are
            kept.
        k: latents to keep, 1..F.
    """
    n_samples, n_latents = products.shape
    block = min(BLOCK, triton.next_power_of_2(n_latents))
    launch(
        _keep_largest_kernel,
        (n_samples,),
        (
            products,
            bias.contiguous(),
            None if norms is None else norms.contiguous(),
            None if is_allowed is None else is_allowed.contiguous().view(torch.int8),
        ),
        (),
        (n_latents, k),
        BLOCK=block,
        N_BLOCKS=cdiv(n_latents, block),
        num_warps=_num_warps(n_latents),
    )


def at_kept(
    gradients: torch.Tensor, kept: torch.Tensor, *, wants_sums: bool
) -> torch.Tensor | None:
    """Zero the gradients, in place, where nothing was kept; return their sums over the batch.

    Args:
        gradients: [B, F], contiguous.
        kept: what `keep_largest` wrote, [B, F].
        wants_sums: whether the sums are wanted.

    Returns:
        [F], float32, or None.
    """
    n_samples, n_latents = gradients.shape
    n_blocks = cdiv(n_samples, ROWS)
    sums = None
    if wants_sums:
        sums = gradients.new_empty((n_blocks, n_latents), dtype=torch.float32)
    launch(
        _at_kept_kernel,
        (cdiv(n_latents, COLUMNS), n_blocks),
        (kept.view(_INTEGERS[kept.itemsize]), gradients, sums),
        (),
        (n_samples, n_latents),
        ROWS=ROWS,
        BLOCK=COLUMNS,
    )
    return None if sums is None else sums.sum(0)
