"""A decoder that is trained on for one budget."""

import pytest
import torch

import sae_lens_flex
from benchmarks.quality.kinds import make_kind
from benchmarks.quality.sources import Sizes, SyntheticSource, small_synthetic
from benchmarks.quality.worker import Training, Worker, topk_with_free_decoder


@pytest.mark.parametrize("rescales", [False, True])
@pytest.mark.parametrize("subtracts", [False, True])
def test_topk_with_free_decoder_reconstructs_the_same(rescales, subtracts):
    torch.manual_seed(0)
    cfg = sae_lens_flex.HierarchicalTopKSAEConfig(
        d_in=16,
        d_sae=64,
        k=8,
        device="cpu",
        rescale_acts_by_decoder_norm=rescales,
        apply_b_dec_to_input=subtracts,
    )
    sae = sae_lens_flex.HierarchicalTopKSAE(cfg)
    for parameter in sae.parameters():
        parameter.data = torch.randn_like(parameter) / 4
    x = torch.randn(100, 16) + 1
    for k in (1, 5, 8):
        with sae.at_budget(k):
            torch.testing.assert_close(topk_with_free_decoder(sae, k)(x), sae(x))
    topk = topk_with_free_decoder(sae, 5)
    before = topk.encode(x)
    topk.W_dec.data = torch.randn_like(topk.W_dec)
    topk.b_dec.data += 1
    assert torch.equal(topk.encode(x), before)


def test_tuning_changes_the_decoder_only_and_explains_more(tmp_path):
    source = SyntheticSource(small_synthetic(256), Sizes(20_000, 2000, 1000), "cpu")
    source.collect(0)
    training = Training(64, 20_000, 250, "cpu", False, tuning=10_000)
    worker = Worker(lambda: source, training)
    kind = make_kind("even", 8, 64, [2, 8])
    known = worker.train(kind, 3e-3, 0, tmp_path)
    rows = worker.measure(kind, known, tmp_path)
    tuned = {row["budget"]: row for row in rows if row.get("tuned")}
    plain = {row["budget"]: row for row in rows if not row.get("tuned") and not row["threshold"]}
    assert tuned.keys() == plain.keys() == {2, 8}
    for k in (2, 8):
        assert tuned[k]["tuned"] == 10_000
        assert tuned[k]["l0"] == plain[k]["l0"]
        assert tuned[k]["explained_variance"] > plain[k]["explained_variance"]
    sae = worker._load(tmp_path)
    again = worker._load(tmp_path / "tuned_2" / f"{tuned[2]['tuning_lr']:g}")
    expected = topk_with_free_decoder(sae, 2)
    assert torch.equal(again.W_enc, expected.W_enc)
    assert torch.equal(again.b_enc, expected.b_enc)
    assert not torch.equal(again.W_dec, expected.W_dec)
    assert not torch.equal(again.b_dec, expected.b_dec)
