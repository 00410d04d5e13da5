"""The reported activations: what the trainer counts with is what a dense tensor would give."""

import pytest
import torch
from ops.comparison import DEVICES

from sae_lens_flex.ops.codes import Code
from sae_lens_flex.training.firing import SparseActs, feature_acts

N_SAMPLES, F, K = 5024, 7, 2
# Half a unit in the last place; a float64 sum is rounded at every addition.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 1e-13}


def ones(dtype: torch.dtype, device: str = "cpu") -> Code:
    """A code in which latent 3 fires on every sample, and another one on some."""
    latents = torch.stack((torch.full((N_SAMPLES,), 3), torch.arange(N_SAMPLES) % 3), dim=-1)
    return Code(latents.to(device), torch.ones(N_SAMPLES, K, dtype=dtype, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_sums_are_those_of_the_dense_tensor(dtype, device) -> None:
    code = ones(dtype, device)
    acts = feature_acts(code, F, is_sparse=True)
    dense = feature_acts(code, F, is_sparse=False)
    assert type(dense) is torch.Tensor
    assert torch.equal(acts.to_dense(), dense)
    # Beyond 256 or 2048 a count is no number of 16 bits.
    nearest = torch.tensor(N_SAMPLES).to(dtype)
    for total in (acts.sum(0), acts.sum(-2), acts.sum(dim=0), dense.sum(0)):
        assert total.dtype == dtype
        assert total[3] == nearest
        assert total[4:].eq(0).all()
        assert torch.equal(total, dense.sum(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_firing_is_counted_exactly(dtype) -> None:
    # As the trainer does: `bool` or `> 0`, then `float`, then a sum.
    acts = feature_acts(ones(dtype), F, is_sparse=True)
    assert isinstance(acts, SparseActs)
    counts = acts.bool().float().sum(0)
    assert counts.tolist() == [1675, 1675, 1674, N_SAMPLES, 0, 0, 0]
    assert acts.float().sum(0).tolist() == counts.tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_sums_of_fractions_are_rounded_once(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(N_SAMPLES, K, generator=generator).to(dtype)
    code = Code(ones(dtype).latents, values)
    total = feature_acts(code, F, is_sparse=True).sum(0)
    exact = feature_acts(Code(code.latents, values.double()), F, is_sparse=False).sum(0)
    assert total.dtype == dtype
    error = ((total.double() - exact).abs() / exact.clamp_min(1)).max()
    assert error < TOLERANCE[dtype]


def test_no_firing_sums_to_zero() -> None:
    code = Code(torch.zeros(4, 1, dtype=torch.int64), torch.zeros(4, 1))
    acts = feature_acts(code, F, is_sparse=True)
    assert acts.bool().sum(0).to_dense().eq(0).all()
    assert acts.sum(0).eq(0).all()


@pytest.mark.parametrize("is_sparse", [True, False], ids=["sparse", "dense"])
def test_shape_and_layout(is_sparse) -> None:
    acts = feature_acts(ones(torch.float32), F, is_sparse=is_sparse)
    assert acts.shape == (N_SAMPLES, F)
    assert acts.layout == (torch.sparse_coo if is_sparse else torch.strided)
