"""The pre-activations of some samples that may be among the n largest of a batch, in its order.

    groups = those with the n largest maxima; of equal maxima the first groups
    candidates = all (b, f) of these groups with key(b, f) >= bound

The key is that of (products[b, f] + bias[f]) * norms[f], a group is a few neighbouring latents, and
the bound is no smaller than the n-th largest maximum. Each of the groups above the bound has a key
above it, and each of those that equal it has one that equals it. So the first groups hold as many
keys as are wanted, and a key in a later group comes after them.

One kernel counts a sample's groups. With the counts summed up, each sample knows where its own go,
and another kernel writes them. A third one reads the products of these groups alone.
"""

from typing import NamedTuple

import torch

from .keys import compared_key
from .launch import cdiv, launch, tl, triton


@triton.jit
def _load_maxima(maxima, start, n_groups, BLOCK: tl.constexpr):
    group = start + tl.arange(0, BLOCK)
    return group, tl.load(maxima + group, mask=group < n_groups, other=-(2**31))


@triton.jit
def _count_groups_kernel(
    maxima,  # [B, n_groups]
    bound,  # [1]
    n_above,  # [B]
    n_equal,  # [B]
    n_groups,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    at_least = tl.load(bound)
    above = tl.zeros([BLOCK], tl.int32)
    equal = tl.zeros([BLOCK], tl.int32)
    for start in range(0, n_groups, BLOCK):
        _, keys = _load_maxima(maxima + b * n_groups, start, n_groups, BLOCK)
        above += (keys > at_least).to(tl.int32)
        equal += (keys == at_least).to(tl.int32)
    tl.store(n_above + b, tl.sum(above))
    tl.store(n_equal + b, tl.sum(equal))


@triton.jit
def _write_groups_kernel(
    maxima,
    bound,  # [1]
    ends,  # [B], int64: where each sample's groups end
    n_above,  # [B]
    n_taken,  # [B]: how many whose maximum is `bound` a sample takes
    groups,  # [n], int64: b n_groups + the group
    n_groups,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    at_least = tl.load(bound)
    taken = tl.load(n_taken + b)
    place = tl.load(ends + b) - tl.load(n_above + b) - taken
    n_before = 0  # with the maximum `bound`, in the blocks before
    for start in range(0, n_groups, BLOCK):
        group, key = _load_maxima(maxima + b * n_groups, start, n_groups, BLOCK)
        is_equal = (key == at_least).to(tl.int32)
        number = n_before + tl.cumsum(is_equal, axis=0)
        is_taken = (key > at_least) | ((is_equal == 1) & (number <= taken))
        at = place + tl.cumsum(is_taken.to(tl.int32), axis=0) - 1
        tl.store(groups + at, b * n_groups + group, mask=is_taken)
        n_before += tl.sum(is_equal)
        place += tl.sum(is_taken.to(tl.int32))


@triton.jit
def _write_candidates_kernel(
    products,  # [B, F]
    bias,
    norms,  # or None
    bound,  # [1]
    groups,  # [n_places / GROUP]: b n_groups + the group, or -1
    keys,  # [n_places], and likewise:
    samples,
    latents,
    hidden,
    n_places,
    first_sample,
    F,
    n_groups,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = place < n_places
    group = tl.load(groups + place // GROUP, mask=exists, other=-1)
    b = group // n_groups
    f = group % n_groups * GROUP + place % GROUP
    is_latent = (group >= 0) & (f < F)
    product = tl.load(products + b * F + f, mask=is_latent, other=0.0)
    bias_of_f = tl.load(bias + f, mask=is_latent, other=0.0).to(tl.float32)
    norm = None
    if norms is not None:
        norm = tl.load(norms + f, mask=is_latent, other=0.0).to(tl.float32)
    key = compared_key(product, bias_of_f, norm)
    is_candidate = is_latent & (key >= tl.load(bound))
    tl.store(keys + place, tl.where(is_candidate, key, 0), mask=exists)
    tl.store(samples + place, (first_sample + b).to(tl.int32), mask=is_candidate)
    tl.store(latents + place, f.to(tl.int32), mask=is_candidate)
    h = product.to(tl.float32) + bias_of_f
    tl.store(hidden + place, h.to(hidden.dtype.element_ty), mask=is_candidate)


BLOCK = 2048


class Candidates(NamedTuple):
    """Pre-activations that reach a bound, in the order of the batch, and unused places.

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
    n_largest: int,
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
        bound: [1], int32, above 0, and no smaller than the n_largest-th largest of maxima.
        n_largest: how many of the largest the candidates hold.
        first_sample: the number of the first of these samples.
        dtype: of `hidden`.
    """
    n_samples, n_latents = products.shape
    n_groups = maxima.shape[1]
    size = triton.next_power_of_2(cdiv(n_latents, n_groups))
    n_above, n_equal = products.new_empty((2, n_samples), dtype=torch.int32)
    launch(
        _count_groups_kernel,
        (n_samples,),
        (maxima, bound, n_above, n_equal),
        (),
        (n_groups,),
        BLOCK=BLOCK,
    )
    n_before = n_above.sum() + n_equal.cumsum(0) - n_equal
    n_taken = (n_largest - n_before).clamp_min(0).minimum(n_equal).to(torch.int32)
    ends = (n_above + n_taken).cumsum(0)
    groups = maxima.new_full((min(n_largest, maxima.numel()),), -1, dtype=torch.int64)
    launch(
        _write_groups_kernel,
        (n_samples,),
        (maxima, bound, ends, n_above, n_taken, groups),
        (),
        (n_groups,),
        BLOCK=BLOCK,
    )
    n_places = len(groups) * size
    keys, samples, latents = (products.new_empty(n_places, dtype=torch.int32) for _ in range(3))
    hidden = products.new_empty(n_places, dtype=dtype)
    launch(
        _write_candidates_kernel,
        (cdiv(n_places, BLOCK),),
        (products, bias, norms, bound, groups, keys, samples, latents, hidden),
        (),
        (n_places, first_sample, n_latents, n_groups),
        GROUP=size,
        BLOCK=BLOCK,
    )
    return Candidates(keys, samples, latents, hidden)
