"""The K largest pre-activations of each sample, in their places, and gradients there.

    h = products + bias
    kept[b] = the K largest of h[b] * norms among the allowed latents, of equal ones the smaller
    products[b, f] = h[b, f] where kept, else 0
    gradients[b, f] = gradients[b, f] where kept, else 0,     sums[f] = sum_b gradients[b, f]

A large part of a row is kept, so the products with it are dense, and nothing needs the kept latents
as a list. What is kept is noted in bits, since a kept h may be 0: bit f % 8 of byte f / 8.

A program holds the keys of a row in registers, and looks for a bound that exactly K of them exceed.
It goes down from the largest key by steps of 1, 2, 4 ... octaves until K keys or more exceed the
bound, and from there halves what is between. Where no such bound exists, because keys are equal, it
ends at the K-th largest key itself.
"""

import torch

from .keys import compared_key
from .launch import cdiv, launch, tl, triton


@triton.jit
def _n_above(keys, bound, N_BLOCKS: tl.constexpr):
    # Signs of differences are added, since of comparisons the compiler would make twice as many
    # instructions. No difference may overflow.
    counts = (bound - keys[0]) >> 31
    for i in tl.static_range(1, N_BLOCKS):
        counts += (bound - keys[i]) >> 31
    return -tl.sum(counts, axis=0)


@triton.jit
def _write(products, bias, kept, i, F, is_kept, BLOCK: tl.constexpr):
    f = i * BLOCK + tl.arange(0, BLOCK)
    product = tl.load(products + f, mask=f < F, other=0.0, cache_modifier=".cg")
    h = product.to(tl.float32) + tl.load(bias + f, mask=f < F, other=0.0).to(tl.float32)
    h = tl.where(is_kept, h, 0.0).to(products.dtype.element_ty)
    tl.store(products + f, h, mask=f < F, cache_modifier=".cg")
    bits = tl.reshape(is_kept.to(tl.int32), [BLOCK // 8, 8]) << tl.arange(0, 8)[None, :]
    byte = i * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    tl.store(kept + byte, tl.sum(bits, axis=1).to(tl.uint8), mask=byte * 8 < F)


@triton.jit
def _keep_largest_kernel(
    products,  # [B, F]
    bias,
    norms,  # or None
    is_allowed,  # [F], int8, or None
    kept,  # [B, F / 8]
    F,
    K,
    BLOCK: tl.constexpr,
    N_BLOCKS: tl.constexpr,
    OCTAVE: tl.constexpr,
):
    # Products pass by the first cache. So it holds bias and norms, which all rows read.
    products += tl.program_id(0).to(tl.int64) * F
    kept += tl.program_id(0).to(tl.int64) * tl.cdiv(F, 8)
    keys = ()
    greatest = tl.full([BLOCK], -(2**31 - 1), tl.int32)
    for i in tl.static_range(N_BLOCKS):
        f = i * BLOCK + tl.arange(0, BLOCK)
        exists = f < F
        product = tl.load(products + f, mask=exists, other=0.0, cache_modifier=".cg")
        bias_of_f = tl.load(bias + f, mask=exists, other=0.0, eviction_policy="evict_last")
        norm = None
        if norms is not None:
            norm = tl.load(norms + f, mask=exists, other=0.0, eviction_policy="evict_last")
            norm = norm.to(tl.float32)
        if is_allowed is not None:
            allowed = tl.load(is_allowed + f, mask=exists, other=0, eviction_policy="evict_last")
            exists = exists & (allowed != 0)
        key = compared_key(product, bias_of_f.to(tl.float32), norm)
        key = tl.where(exists, key, -(2**31 - 1))
        keys += (key,)
        greatest = tl.maximum(greatest, key)
    largest = tl.max(greatest, axis=0)

    # Keys and bounds of different signs are too far apart to subtract. So keys that are on the
    # other side of 0 than the bound become 0 or 1, which changes no count.
    n_high = _n_above(keys, 0, N_BLOCKS)
    is_positive = n_high >= K
    least = tl.where(is_positive, 0, -(2**31 - 1))
    most = tl.where(is_positive, 2**31 - 1, 1)
    clamped = ()
    for i in tl.static_range(N_BLOCKS):
        clamped += (tl.minimum(tl.maximum(keys[i], least), most),)
    keys = clamped
    low = least
    n_low = n_high  # keys above `low`, K or more unless all that are allowed are fewer
    high = largest
    if is_positive:
        n_high = 0  # keys above `high`, fewer than K
    else:
        high = tl.minimum(high, 0)
        n_low = _n_above(keys, low, N_BLOCKS)
    step = tl.full([], OCTAVE, tl.int32)
    while (n_low > K) & (high - low > 1):
        middle = high - tl.minimum(step, (high - low) >> 1)
        n = _n_above(keys, middle, N_BLOCKS)
        is_low = n >= K
        low = tl.where(is_low, middle, low)
        n_low = tl.where(is_low, n, n_low)
        high = tl.where(is_low, high, middle)
        n_high = tl.where(is_low, n_high, n)
        step = 2 * tl.minimum(step, 2**29)
    if n_low > K:
        n_left = K - n_high  # of those that equal the K-th largest, which is `high`
        for i in tl.static_range(N_BLOCKS):
            is_equal = (keys[i] == high).to(tl.int32)
            is_kept = (keys[i] > high) | ((is_equal == 1) & (tl.cumsum(is_equal) <= n_left))
            n_left -= tl.sum(is_equal, axis=0)
            _write(products, bias, kept, i, F, is_kept, BLOCK)
    else:
        for i in tl.static_range(N_BLOCKS):
            _write(products, bias, kept, i, F, keys[i] > low, BLOCK)


@triton.jit
def _at_kept_kernel(
    kept,  # [B, F / 8]
    gradients,  # [B, F]
    sums,  # [blocks of rows, F], or None
    B,
    F,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    byte = tl.program_id(0) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    exists = (b < B)[:, None] & (byte * 8 < F)[None, :]
    bits = tl.load(kept + b[:, None] * tl.cdiv(F, 8) + byte[None, :], mask=exists, other=0)
    bits = (bits.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    is_kept = tl.reshape(bits, [ROWS, BLOCK]) != 0
    f = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    exists = (b < B)[:, None] & (f < F)[None, :]
    place = b[:, None] * F + f[None, :]
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
ROWS = 16
COLUMNS = 512


def fits(n_latents: int, dtype: torch.dtype) -> bool:
    """Return whether registers can hold the keys of F latents, whose products have that dtype."""
    return n_latents <= MOST_LATENTS and dtype.itemsize <= 4


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
) -> torch.Tensor:
    """Write the pre-activations of the K largest latents of each row over its products, and zeros.

    Args:
        products: x @ W_enc, [B, F], contiguous, F as `fits` allows.
        bias: [F].
        norms: what the pre-activations are multiplied by to be compared, [F]; None for 1.
        is_allowed: which latents may be kept, [F], bool; None for all. Of fewer than K all are
            kept.
        k: latents to keep, 1..F.

    Returns:
        What was kept, in bits: latent f of a row is bit f % 8 of byte f // 8, [B, ceil(F / 8)].
    """
    n_samples, n_latents = products.shape
    block = min(BLOCK, max(8, triton.next_power_of_2(n_latents)))
    n_blocks = cdiv(n_latents, block)
    n_keys = n_blocks * block
    kept = products.new_empty((n_samples, cdiv(n_latents, 8)), dtype=torch.uint8)
    launch(
        _keep_largest_kernel,
        (n_samples,),
        (
            products,
            bias.contiguous(),
            None if norms is None else norms.contiguous(),
            None if is_allowed is None else is_allowed.contiguous().view(torch.int8),
            kept,
        ),
        (),
        (n_latents, k),
        BLOCK=block,
        N_BLOCKS=n_blocks,
        OCTAVE=OCTAVE,
        num_warps=_num_warps(n_keys),
        max_registers=MAX_REGISTERS if n_keys <= KEYS_OF_A_WARP * MOST_WARPS else None,
    )
    return kept


def at_kept(
    gradients: torch.Tensor, kept: torch.Tensor, *, wants_sums: bool
) -> torch.Tensor | None:
    """Zero the gradients, in place, where nothing was kept; return their sums over the batch.

    Args:
        gradients: [B, F], contiguous.
        kept: what `keep_largest` returned, [B, ceil(F / 8)].
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
        (kept, gradients, sums),
        (),
        (n_samples, n_latents),
        ROWS=ROWS,
        BLOCK=COLUMNS,
    )
    return None if sums is None else sums.sum(0)
