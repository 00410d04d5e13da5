"""The K largest pre-activations of each sample, in their places, and gradients there.

    h = products + bias
    kept[b] = the K largest of h[b] * norms among the allowed latents, of equal ones the smaller
    products[b, f] = h[b, f] where kept, else 0
    gradients[b, f] = gradients[b, f] where kept, else 0,     sums[f] = sum_b gradients[b, f]

A large part of a row is kept, so the products with it are dense, and nothing needs the kept latents
as a list. A program holds the keys of a row in registers, and looks for a bound that exactly K of
them reach. It goes down from the largest key by steps of 1, 2, 4 ... octaves until K keys or more
reach the bound, and from there halves what is between. Where no such bound exists, because keys are
equal, it ends at the K-th largest key itself.

A kept h may be 0, or be rounded to it. It is written as -0, and what is not kept as +0. So the
place of a kept h has a bit that is not 0, and all others have none.
"""

import torch

from .keys import compared_key
from .launch import cdiv, launch, tl, triton


@triton.jit
def _n_at_least(keys, bound, N_BLOCKS: tl.constexpr):
    counts = (keys[0] >= bound).to(tl.int32)
    for i in tl.static_range(1, N_BLOCKS):
        counts += (keys[i] >= bound).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def _write(products, bias, f, F, is_kept):
    product = tl.load(products + f, mask=f < F, other=0.0, eviction_policy="evict_first")
    h = product.to(tl.float32) + tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)
    is_zero = h.to(products.dtype.element_ty).to(tl.float32) == 0.0
    bits = tl.where(is_zero, -(2**31), h.to(tl.int32, bitcast=True))
    h = tl.where(is_kept, bits, 0).to(tl.float32, bitcast=True)
    tl.store(products + f, h.to(products.dtype.element_ty), mask=f < F)


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
    OCTAVE: tl.constexpr,
):
    products += tl.program_id(0).to(tl.int64) * F
    keys = ()
    largest = tl.full([BLOCK], -(2**31), tl.int32)
    for i in tl.static_range(N_BLOCKS):
        f = i * BLOCK + tl.arange(0, BLOCK)
        exists = f < F
        # `_write` reads all this once more, so it is to stay in the cache. There the policies are
        # others, lest the compiler hold it in registers meanwhile, which the keys fill.
        product = tl.load(products + f, mask=exists, other=0.0, eviction_policy="evict_last")
        bias_of_f = tl.load(bias + f, mask=exists, other=0.0, eviction_policy="evict_last")
        norm = None
        if norms is not None:
            norm = tl.load(norms + f, mask=exists, other=0.0).to(tl.float32)
        if is_allowed is not None:
            exists = exists & (tl.load(is_allowed + f, mask=exists, other=0) != 0)
        key = compared_key(product, bias_of_f.to(tl.float32), norm)
        key = tl.where(exists, key, -(2**31))
        keys += (key,)
        largest = tl.maximum(largest, key)

    low = tl.full([], -(2**31), tl.int64)
    n = tl.full([], N_BLOCKS * BLOCK, tl.int32)  # keys that are at least `low`, K or more
    high = tl.max(largest, axis=0).to(tl.int64) + 1  # which fewer than K are
    step = tl.full([], OCTAVE, tl.int64)
    while (n != K) & (high - low > 1):
        middle = tl.maximum(high - step, (low + high) >> 1)
        n_of_middle = _n_at_least(keys, middle.to(tl.int32), N_BLOCKS)
        is_low = n_of_middle >= K
        low = tl.where(is_low, middle, low)
        n = tl.where(is_low, n_of_middle, n)
        high = tl.where(is_low, high, middle)
        step = tl.minimum(2 * step, 2**32)
    bound = low.to(tl.int32)
    if (n > K) & (bound > -(2**31)):
        n_equal = 0
        for i in tl.static_range(N_BLOCKS):
            n_equal += tl.sum((keys[i] == bound).to(tl.int32), axis=0)
        n_left = K - n + n_equal  # of those that equal the K-th largest
        for i in tl.static_range(N_BLOCKS):
            is_equal = (keys[i] == bound).to(tl.int32)
            is_kept = (keys[i] > bound) | ((is_equal == 1) & (tl.cumsum(is_equal) <= n_left))
            n_left -= tl.sum(is_equal, axis=0)
            _write(products, bias, i * BLOCK + tl.arange(0, BLOCK), F, is_kept)
    else:
        bound = tl.maximum(bound, -(2**31) + 1)
        for i in tl.static_range(N_BLOCKS):
            _write(products, bias, i * BLOCK + tl.arange(0, BLOCK), F, keys[i] >= bound)


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


BLOCK = 4096
MOST_LATENTS = 8 * BLOCK
# A thread holds 40 keys of 20,480 and 64 at most. Of 16 warps with 64 registers a thread a
# multiprocessor of an H100 runs two at once. A longer row needs more registers.
KEYS_OF_A_WARP = 1280
MOST_WARPS = 16
MAX_REGISTERS = 64
OCTAVE = 2**23  # keys from one power of two to the next
ROWS = 32
COLUMNS = 256

_INTEGERS = {2: torch.int16, 4: torch.int32}


def fits(n_latents: int, dtype: torch.dtype) -> bool:
    """Return whether registers can hold the keys of F latents, whose products have that dtype."""
    return n_latents <= MOST_LATENTS and dtype.itemsize in _INTEGERS


def _num_warps(n_keys: int) -> int:
    warps = 1
    while warps < MOST_WARPS and warps * KEYS_OF_A_WARP < n_keys:
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
    n_blocks = cdiv(n_latents, block)
    n_keys = n_blocks * block
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
        N_BLOCKS=n_blocks,
        OCTAVE=OCTAVE,
        num_warps=_num_warps(n_keys),
        max_registers=MAX_REGISTERS if n_keys <= KEYS_OF_A_WARP * MOST_WARPS else None,
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
