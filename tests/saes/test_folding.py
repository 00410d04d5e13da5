"""Folding norms and normalizations into the weights, and saving for inference."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from comparison import D_IN, FUSED_ARCHITECTURES, K, assert_close, random_activations, trained_sae
from sae_lens import SAE, TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

KINDS = (*FUSED_ARCHITECTURES, "hierarchical_topk_inference")

every_kind = pytest.mark.parametrize("kind", KINDS)
b_dec_applied_or_not = pytest.mark.parametrize(
    "apply_b_dec", [True, False], ids=["b_dec_applied", "b_dec_not_applied"]
)
rescaled_or_not = pytest.mark.parametrize(
    "rescale", [True, False], ids=["rescaled", "not_rescaled"]
)


def sae_of(kind: str, path: Any, **fields: Any) -> Any:
    """A training SAE, or the inference SAE of its checkpoint, with unfolded decoder norms."""
    if kind != "hierarchical_topk_inference":
        return trained_sae(kind, **fields)
    trained_sae("hierarchical_topk", **fields).save_model(path)
    return SAE.load_from_disk(path)


def outputs(sae: Any, sae_in: torch.Tensor) -> Iterator[torch.Tensor]:
    """The reconstruction at every budget that the SAE takes."""
    for budget in range(1, K + 1) if hasattr(sae, "budget") else [K]:
        with sae.at_budget(budget) if hasattr(sae, "budget") else nullcontext():
            yield sae(sae_in).detach()


def assert_same_outputs(values: Iterator[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for value, expected_value in zip(values, expected, strict=True):
        assert_close(value, expected_value, name="output")


@every_kind
@b_dec_applied_or_not
def test_folding_decoder_norms_keeps_the_outputs(kind, tmp_path, apply_b_dec) -> None:
    sae = sae_of(kind, tmp_path, apply_b_dec_to_input=apply_b_dec)
    expected = list(outputs(sae, random_activations()))
    sae.fold_W_dec_norm()
    assert_close(sae.W_dec.norm(dim=-1), torch.ones(sae.cfg.d_sae), name="norms")
    assert_same_outputs(outputs(sae, random_activations()), expected)


@every_kind
def test_folding_decoder_norms_is_refused_where_it_changes_the_choice(kind, tmp_path) -> None:
    sae = sae_of(kind, tmp_path, rescale_acts_by_decoder_norm=False)
    with pytest.raises(NotImplementedError, match="rescale_acts_by_decoder_norm"):
        sae.fold_W_dec_norm()


@every_kind
@rescaled_or_not
@b_dec_applied_or_not
def test_folding_a_scaling_factor_takes_raw_activations(
    kind, tmp_path, rescale, apply_b_dec
) -> None:
    sae = sae_of(
        kind,
        tmp_path,
        normalize_activations="expected_average_only_in",
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec,
    )
    factor = 0.3
    expected = [output / factor for output in outputs(sae, random_activations() * factor)]
    sae.fold_activation_norm_scaling_factor(factor)
    assert sae.cfg.normalize_activations == "none"
    assert_same_outputs(outputs(sae, random_activations()), expected)


@every_kind
@rescaled_or_not
@b_dec_applied_or_not
def test_folding_a_whitening_takes_raw_activations(kind, tmp_path, rescale, apply_b_dec) -> None:
    sae = sae_of(
        kind,
        tmp_path,
        normalize_activations="covariance_whitening",
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec,
    )
    mixing = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(4))
    sae_in = random_activations() @ mixing + 1
    scaler = ActivationScaler()
    scaler.estimate_whitening(D_IN, iter([random_activations(4096, D_IN) @ mixing + 1]), 1)
    expected = [scaler.unscale(output) for output in outputs(sae, scaler.scale(sae_in))]
    whitening = scaler.whitening
    assert whitening is not None
    sae.fold_activation_whitening(
        mean=whitening.mean,
        whitening_matrix=whitening.matrix,
        unwhitening_matrix=whitening.inverse_matrix,
    )
    assert sae.cfg.normalize_activations == "none"
    for output, expected_output in zip(outputs(sae, sae_in), expected, strict=True):
        assert_close(output, expected_output, 1e-4, "output")


@pytest.mark.parametrize("architecture", FUSED_ARCHITECTURES)
@rescaled_or_not
@b_dec_applied_or_not
@pytest.mark.parametrize("normalization", ["none", "layer_norm", "constant_norm_rescale"])
def test_saved_inference_model_gives_the_same_outputs(
    architecture, tmp_path, rescale, apply_b_dec, normalization
) -> None:
    sae = trained_sae(
        architecture,
        rescale_acts_by_decoder_norm=rescale,
        apply_b_dec_to_input=apply_b_dec,
        normalize_activations=normalization,
        aux_loss_coefficient=0,
    )
    weights = {name: parameter.clone() for name, parameter in sae.named_parameters()}
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    sae_in = random_activations()
    expected = list(outputs(sae, sae_in))
    if architecture == "flex_topk":
        assert not hasattr(loaded, "budget")
    assert_same_outputs(outputs(loaded, sae_in), expected)
    assert_close(loaded.encode(sae_in), sae.encode(sae_in), name="feature_acts")
    for name, parameter in sae.named_parameters():
        assert torch.equal(parameter, weights[name])


@pytest.mark.parametrize("architecture", FUSED_ARCHITECTURES)
def test_saved_training_model_loads_bit_equal(architecture, tmp_path) -> None:
    levels = {"budgets": [1, K]} if architecture == "hierarchical_topk" else {}
    sae = trained_sae(architecture, backend="torch", **levels)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert type(loaded) is type(sae)
    assert loaded.cfg == sae.cfg
    for name, parameter in sae.named_parameters():
        assert torch.equal(loaded.get_parameter(name), parameter)
