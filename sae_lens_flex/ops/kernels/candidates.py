"""The pre-activations of some samples that reach a bound, in the order of the batch.

    candidates = all (b, f) with key(b, f) > bound, and of those with key(b, f) = bound the first n

The key is that of (products[b, f] + bias[f]) * norms[f]. One kernel counts a sample's candidates.
With the counts summed up, each sample knows where its own go, and another kernel writes them. Both
read the products of those groups of neighbouring latents alone whose largest reaches the bound.
"""

from typing import NamedTuple

import torch

from .keys import compared_key
from .launch import cdiv, launch, tl, triton


@triton.jit
def _keys_of(
    products, bias, norms, maxima, bound, start, F, GROUP: tl.constexpr, BLOCK: tl.constexpr
):
    # The keys of the latents from `start` on; of those that are not in a group that reaches the
    # bound, the smallest there is.
    f = start + tl.arange(0, BLOCK)
    reaches = tl.load(maxima + f // GROUP, mask=f < F, other=-(2**31)) >= bound
    in_group = reaches & (f < F)
    product = tl.load(products + f, mask=in_group, other=0.0)
    bias_of_f = tl.load(bias + f, mask=in_group, other=0.0).to(tl.float32)
    norm = None
    if norms is not None:
        norm = tl.load(norms + f, mask=in_group, other=0.0).to(tl.float32)
    keys = tl.where(in_group, compared_key(product, bias_of_f, norm), -(2**31))
    return f, keys, product.to(tl.float32) + bias_of_f


@triton.jit
def _count_candidates_kernel(
    products,  # [B, F]
    bias,
    norms,  # or None
    maxima,  # [B, n_groups]
    bound,  # [1]
    n_above,  # [B]
    n_equal,  # [B]
    F,
    n_groups,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    at_least = tl.load(bound)
    above = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, F, BLOCK):
        _, keys, _ = _keys_of(
            products + b * F, bias, norms, maxima + b * n_groups, at_least, start, F, GROUP, BLOCK
        )
        above += (keys > at_least).to(tl.int32)
        equal += (keys == at_least).to(tl.int32)
    tl.store(n_above + b, tl.sum(above))
    tl.store(n_equal + b, tl.sum(equal))


@triton.jit
def _write_candidates_kernel(
    products,
    bias,
    norms,  # or None
    maxima,
    bound,  # [1]
    ends,  # [B], int64: where each sample's candidates end
    n_above,  # [B]
    n_taken,  # [B]: how many with the key `bound` a sample takes
    keys,  # [capacity], and likewise:
    samples,
    latents,
    hidden,
    first_sample,
    F,
    n_groups,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    at_least = tl.load(bound)
    taken = tl.load(n_taken + b)
    place = tl.load(ends + b) - tl.load(n_above + b) - taken
    n_before = 0  # with the key `bound`, in the blocks before
    for start in range(0, F, BLOCK):
        f, key, h = _keys_of(
            products + b * F, bias, norms, maxima + b * n_groups, at_least, start, F, GROUP, BLOCK
        )
        is_equal = (key == at_least).to(tl.int32)
        number = n_before + tl.cumsum(is_equal, axis=0)
        is_candidate = (key > at_least) | ((is_equal == 1) & (number <= taken))
        at = place + tl.cumsum(is_candidate.to(tl.int32), axis=0) - 1
        tl.store(keys + at, key, mask=is_candidate)
        tl.store(samples + at, (first_sample + b).to(tl.int32) + f * 0, mask=is_candidate)
        tl.store(latents + at, f, mask=is_candidate)
        tl.store(hidden + at, h.to(hidden.dtype.element_ty), mask=is_candidate)
        n_before += tl.sum(is_equal)
        place += tl.sum(is_candidate.to(tl.int32))


BLOCK = 2048


class Candidates(NamedTuple):
    """Pre-activations that reached a bound, in the order of the batch; then, unused places.

    Attributes:
        keys: [n], int32; 0 in an unused place.
        samples: [n], int32.
        latents: [n], int32.
        hidden: products + bias, [n].
    """

    keys: torch.Tensor
    samples: torch.Tensor
    latents: torch.Tensor
    hidden: torch.Tensor


def candidates(
    products: torch.Tensor,
    bias: torch.Tensor,
    norms: torch.Tensor | None,
    maxima: torch.Tensor,
    bound: torch.Tensor,
    *,
    n_of_bound: int,
    capacity: int,
    first_sample: int,
    dtype: torch.dtype,
) -> Candidates:
    """Return the candidates of some samples.

    Args:
        products: x @ W_enc, [B, F], contiguous.
        bias: [F], contiguous.
        norms: what the pre-activations are multiplied by to be compared, [F], contiguous; None
            for 1.
        maxima: the largest key of each group of neighbouring latents, [B, n_groups]; the size of a
            group is a power of two, and F / n_groups rounded up.
        bound: [1], int32, above 0.
        n_of_bound: how many candidates with the key `bound` are taken.
        capacity: no fewer than there are candidates.
        first_sample: the number of the first of these samples.
        dtype: of `hidden`.
    """
    n_samples, n_latents = products.shape
    n_groups = maxima.shape[1]
    group = triton.next_power_of_2(cdiv(n_latents, n_groups))
    n_above, n_equal = products.new_empty((2, n_samples), dtype=torch.int32)
    tensors = (products, bias, norms, maxima, bound)
    launch(
        _count_candidates_kernel,
        (n_samples,),
        (*tensors, n_above, n_equal),
        (),
        (n_latents, n_groups),
        GROUP=group,
        BLOCK=BLOCK,
    )
    n_before = n_equal.cumsum(0) - n_equal
    n_taken = (n_of_bound - n_before).clamp_min(0).minimum(n_equal).to(torch.int32)
    ends = (n_above + n_taken).cumsum(0)
    keys = products.new_zeros(capacity, dtype=torch.int32)
    samples, latents = (torch.empty_like(keys) for _ in range(2))
    hidden = products.new_empty(capacity, dtype=dtype)
    launch(
        _write_candidates_kernel,
        (n_samples,),
        (*tensors, ends, n_above, n_taken, keys, samples, latents, hidden),
        (),
        (first_sample, n_latents, n_groups),
        GROUP=group,
        BLOCK=BLOCK,
    )
    return Candidates(keys, samples, latents, hidden)
