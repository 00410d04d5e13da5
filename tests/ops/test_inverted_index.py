"""The inverted index, by counting and by sorting."""

import pytest
import torch

from sae_lens_flex.ops import inverted_index
from sae_lens_flex.ops.inverted_index import invert

from .comparison import DEVICES, KERNEL_DEVICES


def assert_groups_the_pairs(indices: torch.Tensor, n_latents: int, use_triton: bool) -> None:
    index = invert(indices, n_latents, use_triton)
    assert (index.latents.dtype, index.pairs.dtype) == (torch.int32, torch.int64)
    expected, pairs = indices.flatten().clamp(-1, n_latents).sort(stable=True)
    assert torch.equal(index.latents.long(), expected.long())
    within = index.latents.long() * indices.numel() + index.pairs  # ascending if the pairs are
    assert torch.equal(within.sort().values, expected * indices.numel() + pairs)
    assert index.samples.dtype == torch.int32
    assert torch.equal(index.samples.long(), index.pairs // indices.shape[1])
    sizes = (expected + 1).bincount(minlength=n_latents + 2)
    assert torch.equal(index.starts.diff().long(), sizes[:-1])
    assert index.starts[0] == 0


CASES = [(1, 1, 1), (7, 3, 5), (40, 9, 300), (33, 2, 1)]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_counting_groups_the_pairs(device, case, index_dtype, monkeypatch) -> None:
    monkeypatch.setattr(inverted_index, "COUNT_BLOCK", 32)
    n_samples, k, n_latents = case
    generator = torch.Generator().manual_seed(0)
    indices = torch.randint(-3, n_latents + 3, (n_samples, k), generator=generator)
    indices = indices.to(device, index_dtype)
    assert_groups_the_pairs(indices, n_latents, use_triton=True)
    assert_groups_the_pairs(indices.T.contiguous().T, n_latents, use_triton=True)
    assert_groups_the_pairs(indices.clamp(0, 0), n_latents, use_triton=True)


@pytest.mark.parametrize("device", DEVICES)
def test_sorting_groups_the_pairs_in_ascending_order(device) -> None:
    indices = torch.randint(-1, 8, (40, 9), device=device)
    assert_groups_the_pairs(indices, 7, use_triton=False)
    index = invert(indices, 7, use_triton=False)
    same = index.latents[1:] == index.latents[:-1]
    assert (index.pairs.diff()[same] > 0).all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_deterministic_algorithms_sort(device, monkeypatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    indices = torch.randint(8, (40, 9), device=device)
    index = invert(indices, 8, use_triton=True)
    assert torch.equal(index.pairs, invert(indices, 8, use_triton=False).pairs)
