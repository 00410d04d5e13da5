"""The budget at run time, wherever SAELens uses an SAE."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, HookedSAETransformer, TrainingSAE
from sae_lens.analysis.compat import has_transformer_bridge
from sae_lens.saes.sae import TrainStepInput

from sae_lens_flex import HierarchicalTopKSAE, HierarchicalTopKTrainingSAE

from .flows import HOOK_NAME, K, activation_batches, reconstruct, training_sae_config

BUDGETS = (1, 3, K)


@pytest.fixture(params=["returned by the runner", "loaded for inference"])
def sae(request: pytest.FixtureRequest, trained: dict[str, SimpleNamespace]) -> SAE[Any]:
    run = trained["hierarchical_topk"]
    if request.param == "loaded for inference":
        sae = SAE.load_from_disk(run.output)
        assert type(sae) is HierarchicalTopKSAE
    else:
        sae = copy.deepcopy(run.sae)
        assert type(sae) is HierarchicalTopKTrainingSAE
    return sae


@pytest.fixture
def tokens(token_dataset: Dataset) -> torch.Tensor:
    return torch.as_tensor(token_dataset[:4]["tokens"])


def test_budget_is_k_until_it_is_set(sae: SAE[Any]):
    assert sae.budget == sae.cfg.k == K


@pytest.mark.parametrize("budget", BUDGETS)
def test_encode_keeps_the_largest_latents(sae: SAE[Any], budget: int, activations: torch.Tensor):
    all_acts = sae.encode(activations)
    sae.budget = budget
    acts = sae.encode(activations)
    assert sae.budget == budget
    assert acts.shape == all_acts.shape
    assert acts.count_nonzero(-1).max() == budget
    top = all_acts.topk(budget)
    assert torch.equal(acts, torch.zeros_like(acts).scatter(-1, top.indices, top.values))


@pytest.mark.parametrize("budget", BUDGETS)
def test_forward_reconstructs_from_the_largest_latents(
    sae: SAE[Any], budget: int, activations: torch.Tensor
):
    expected = reconstruct(sae, activations, budget)
    with sae.at_budget(budget):
        torch.testing.assert_close(sae(activations), expected)
        torch.testing.assert_close(sae.decode(sae.encode(activations)), expected)


def test_at_budget_restores_what_was_before(sae: SAE[Any]):
    sae.budget = 5
    with sae.at_budget(3):
        assert sae.budget == 3
        with sae.at_budget(1):
            assert sae.budget == 1
        assert sae.budget == 3
    assert sae.budget == 5
    with pytest.raises(KeyError, match="in the block"), sae.at_budget(2):
        raise KeyError("in the block")
    assert sae.budget == 5


@pytest.mark.parametrize(
    "budget", [0, -1, K + 1, 2.5, 3.0, True, "3", None, float("nan"), [3]], ids=repr
)
def test_impossible_budget_raises_and_changes_nothing(sae: SAE[Any], budget: Any):
    sae.budget = 3
    with pytest.raises(ValueError, match=rf"budget .*1\.\.k \({K}\)"):
        sae.budget = budget
    assert sae.budget == 3
    with pytest.raises(ValueError, match="budget"), sae.at_budget(budget):
        pytest.fail("the block ran")
    assert sae.budget == 3


def test_integers_of_other_libraries_are_budgets(sae: SAE[Any], activations: torch.Tensor):
    sae.budget = np.int64(3)
    assert type(sae.budget) is int
    assert sae.encode(activations).count_nonzero(-1).max() == 3


@pytest.mark.parametrize("budget", BUDGETS)
def test_hooked_transformer_honours_the_budget(
    sae: SAE[Any], budget: int, language_model: HookedSAETransformer, tokens: torch.Tensor
):
    expected = language_model.run_with_hooks(
        tokens, fwd_hooks=[(HOOK_NAME, lambda x, hook: reconstruct(sae, x, budget))]
    )
    with sae.at_budget(budget):
        logits = language_model.run_with_saes(tokens, saes=[sae])
        torch.testing.assert_close(logits, expected)
        _, cache = language_model.run_with_cache_with_saes(tokens, saes=[sae])
        acts = cache[f"{HOOK_NAME}.hook_sae_acts_post"]
        assert acts.count_nonzero(-1).max() == budget


def test_budget_set_after_the_sae_was_attached_counts(
    sae: SAE[Any], language_model: HookedSAETransformer, tokens: torch.Tensor
):
    language_model.add_sae(sae)
    try:
        at_k = language_model(tokens)
        sae.budget = 1
        at_1 = language_model(tokens)
        with sae.at_budget(K):
            assert torch.equal(language_model(tokens), at_k)
    finally:
        language_model.reset_saes()
    expected = language_model.run_with_hooks(
        tokens, fwd_hooks=[(HOOK_NAME, lambda x, hook: reconstruct(sae, x, 1))]
    )
    torch.testing.assert_close(at_1, expected)
    assert not torch.allclose(at_1, at_k)


def test_error_term_completes_every_budget(
    sae: SAE[Any], language_model: HookedSAETransformer, tokens: torch.Tensor
):
    without_sae = language_model(tokens)
    with sae.at_budget(1):
        logits = language_model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    torch.testing.assert_close(logits, without_sae, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not has_transformer_bridge(), reason="TransformerLens 3 brought the bridge")
@pytest.mark.parametrize("budget", BUDGETS)
def test_transformer_bridge_honours_the_budget(
    sae: SAE[Any], budget: int, hf_model_dir: Path, tokens: torch.Tensor
):
    from sae_lens import SAETransformerBridge

    bridge = SAETransformerBridge.boot_transformers(str(hf_model_dir), device="cpu")
    hook_name = "blocks.0.hook_out"
    sae.cfg.metadata.hook_name = hook_name
    expected = bridge.run_with_hooks(
        tokens, fwd_hooks=[(hook_name, lambda x, hook: reconstruct(sae, x, budget))]
    )
    with sae.at_budget(budget):
        torch.testing.assert_close(bridge.run_with_saes(tokens, saes=[sae]), expected)
        _, cache = bridge.run_with_cache_with_saes(tokens, saes=[sae])
    assert cache[f"{hook_name}.hook_sae_acts_post"].count_nonzero(-1).max() == budget
    assert not torch.allclose(bridge(tokens), expected)


def test_budget_is_not_saved(sae: SAE[Any], tmp_path: Path):
    sae.save_model(tmp_path / "at k")
    with sae.at_budget(3):
        sae.save_model(tmp_path / "at 3")
        if isinstance(sae, TrainingSAE):
            sae.save_inference_model(tmp_path / "inference")
            assert SAE.load_from_disk(tmp_path / "inference").budget == K
    cfgs = [json.loads((tmp_path / name / "cfg.json").read_text()) for name in ("at k", "at 3")]
    assert cfgs[0] == cfgs[1]
    assert type(sae).load_from_disk(tmp_path / "at 3").budget == K


def test_budget_belongs_to_one_sae_alone(sae: SAE[Any]):
    other = copy.deepcopy(sae)
    other.budget = 2
    assert sae.budget == K


@pytest.mark.parametrize("has_hook", [False, True], ids=["fused", "hooked"])
def test_training_step_ignores_the_budget(has_hook: bool):
    sae = HierarchicalTopKTrainingSAE(training_sae_config("hierarchical_topk"))
    # A step with a hook on this point takes the unfused path.
    if has_hook:
        sae.hook_sae_recons.add_hook(lambda x, hook: x)

    def step() -> tuple[torch.Tensor, ...]:
        sae.zero_grad()
        output = sae.training_forward_pass(
            TrainStepInput(
                sae_in=activation_batches(1)[0],
                coefficients={},
                dead_neuron_mask=None,
                n_training_steps=0,
                is_logging_step=True,
            )
        )
        output.loss.backward()
        acts = output.feature_acts.to_dense()
        return output.loss.detach(), acts.detach(), sae.W_dec.grad, sae.W_enc.grad

    at_k = step()
    with sae.at_budget(1):
        at_1 = step()
        assert sae.budget == 1
    assert at_k[1].count_nonzero(-1).max() == K
    for actual, expected in zip(at_1, at_k, strict=True):
        assert torch.equal(actual, expected)
