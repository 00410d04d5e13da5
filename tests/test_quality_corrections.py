"""The correction of a budget."""

import pytest
import torch

import sae_lens_flex
from benchmarks.quality.sources import fit_corrections


@pytest.fixture(params=[False, True], ids=["", "rescaled"])
def sae(request):
    torch.manual_seed(0)
    cfg = sae_lens_flex.HierarchicalTopKSAEConfig(
        d_in=16, d_sae=64, k=8, device="cpu", rescale_acts_by_decoder_norm=request.param
    )
    sae = sae_lens_flex.HierarchicalTopKSAE(cfg)
    for parameter in sae.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    return sae


def test_correction_is_least_squares(sae):
    x = torch.randn(300, 16) + 1
    corrections = fit_corrections(sae, x, [2, 8])
    for budget, (gain, shift) in corrections.items():
        sae.budget = budget
        x_hat = sae(x).detach()
        # E|x - g x_hat - s|^2 as one system in g and s.
        rows = torch.cat([x_hat.reshape(-1, 1), torch.eye(16).repeat(300, 1)], 1)
        expected = torch.linalg.lstsq(rows.double(), x.reshape(-1, 1).double()).solution[:, 0]
        assert gain == pytest.approx(float(expected[0]), rel=1e-4)
        torch.testing.assert_close(shift.double(), expected[1:], rtol=1e-4, atol=1e-5)


def test_sae_at_one_budget_takes_its_correction_up(sae):
    x = torch.randn(300, 16) + 1
    gain, shift = fit_corrections(sae, x, [2])[2]
    sae.budget = 2
    expected = gain * sae(x) + shift
    bias = gain * sae.b_dec + shift
    sae.b_enc.data += (bias - sae.b_dec) @ sae.W_enc
    sae.W_dec.data *= gain
    sae.b_dec.data = bias.data
    torch.testing.assert_close(sae(x), expected, rtol=1e-4, atol=1e-5)
