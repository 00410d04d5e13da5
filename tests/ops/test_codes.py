"""The inverted index of a code, by counting and by sorting."""

import pytest
import torch

from sae_lens_flex.ops.codes import Code, InvertedIndex
from sae_lens_flex.ops.kernels import counting

from .comparison import DEVICES, KERNEL_DEVICES


def by_latent(
    latents: torch.Tensor, n_latents: int, use_triton: bool, deterministic: bool = False
) -> InvertedIndex:
    code = Code(latents, torch.zeros_like(latents, dtype=torch.float32))
    return code.by_latent(n_latents, use_triton=use_triton, deterministic=deterministic)


def assert_groups_the_pairs(latents: torch.Tensor, n_latents: int, use_triton: bool) -> None:
    index = by_latent(latents, n_latents, use_triton)
    assert (index.latents.dtype, index.pairs.dtype) == (torch.int32, torch.int64)
    expected, pairs = latents.flatten().clamp(-1, n_latents).sort(stable=True)
    assert torch.equal(index.latents.long(), expected.long())
    within = index.latents.long() * latents.numel() + index.pairs  # ascending if the pairs are
    assert torch.equal(within.sort().values, expected * latents.numel() + pairs)
    assert index.samples.dtype == torch.int32
    assert torch.equal(index.samples.long(), index.pairs // latents.shape[1])
    sizes = (expected + 1).bincount(minlength=n_latents + 2)
    assert torch.equal(index.starts.diff().long(), sizes[:-1])
    assert index.starts.dtype == torch.int32
    assert index.starts[0] == 0


CASES = [(1, 1, 1), (7, 3, 5), (40, 9, 300), (33, 2, 1)]


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_counting_groups_the_pairs(device, case, index_dtype, monkeypatch) -> None:
    monkeypatch.setattr(counting, "BLOCK", 32)
    n_samples, k, n_latents = case
    generator = torch.Generator().manual_seed(0)
    latents = torch.randint(-3, n_latents + 3, (n_samples, k), generator=generator)
    latents = latents.to(device, index_dtype)
    assert_groups_the_pairs(latents, n_latents, use_triton=True)
    assert_groups_the_pairs(latents.T.contiguous().T, n_latents, use_triton=True)
    assert_groups_the_pairs(latents.clamp(0, 0), n_latents, use_triton=True)


@pytest.mark.parametrize("device", DEVICES)
def test_sorting_groups_the_pairs_in_ascending_order(device) -> None:
    latents = torch.randint(-1, 8, (40, 9), device=device)
    assert_groups_the_pairs(latents, 7, use_triton=False)
    index = by_latent(latents, 7, use_triton=False)
    same = index.latents[1:] == index.latents[:-1]
    assert (index.pairs.diff()[same] > 0).all()


@pytest.mark.parametrize("device", KERNEL_DEVICES)
def test_deterministic_mode_sorts(device) -> None:
    latents = torch.randint(8, (40, 9), device=device)
    index = by_latent(latents, 8, use_triton=True, deterministic=True)
    assert torch.equal(index.pairs, by_latent(latents, 8, use_triton=False).pairs)


@pytest.mark.parametrize("device", DEVICES)
def test_other_values_keep_the_latents(device) -> None:
    code = Code(torch.tensor([[3, 1]], device=device), torch.tensor([[1.0, 2.0]], device=device))
    other = code.with_values(-code.values)
    assert other.latents is code.latents
    assert other.values.tolist() == [[-1.0, -2.0]]
    assert code.values.tolist() == [[1.0, 2.0]]
