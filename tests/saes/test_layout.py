"""W_enc lies latent by latent in memory: whatever is done to an SAE, and invisibly in its files."""

import copy
from typing import Any

import pytest
import torch
from comparison import (
    D_IN,
    D_SAE,
    EVERY_ARCHITECTURE,
    MANY_DEAD,
    STOCK,
    copy_weights,
    dead_mask,
    new_sae,
    random_activations,
    run_step,
    trained_sae,
)
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file

from sae_lens_flex import from_topk

every_architecture = pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)


def is_latent_major(tensor: torch.Tensor) -> bool:
    return tensor.shape == (D_IN, D_SAE) and tensor.T.is_contiguous()


def fold(sae: Any) -> Any:
    sae.fold_W_dec_norm()
    sae.fold_activation_norm_scaling_factor(0.5)
    return sae


def assigned(sae: Any) -> Any:
    other = new_sae(sae.cfg.architecture())
    weights = {name: value.contiguous().clone() for name, value in sae.state_dict().items()}
    other.load_state_dict(weights, assign=True)
    return other


CHANGES = {
    "new": lambda sae: sae,
    "copied": copy.deepcopy,
    "in float64": lambda sae: sae.to(torch.float64),
    "folded": fold,
    "loaded": assigned,
    "moved": lambda sae: sae.to("meta"),
}


@every_architecture
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_w_enc_stays_latent_major(architecture, change) -> None:
    sae = change(trained_sae(architecture))
    assert is_latent_major(sae.W_enc)
    assert sae.W_dec.is_contiguous()


@every_architecture
@pytest.mark.parametrize("use_fused_path", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("n_dead", [0, MANY_DEAD])
def test_its_gradient_is_latent_major(architecture, use_fused_path, n_dead) -> None:
    sae = trained_sae(architecture)
    sae.use_fused_path = use_fused_path
    run_step(sae, random_activations(), dead_mask(n_dead))
    assert is_latent_major(sae.W_enc.grad)


@every_architecture
@pytest.mark.parametrize("save", ["save_model", "save_inference_model"])
def test_files_are_those_of_stock_topk(architecture, save, tmp_path) -> None:
    sae, stock = trained_sae(architecture), trained_sae(STOCK[architecture])
    for name, each in (("ours", sae), ("stock", stock)):
        getattr(each, save)(tmp_path / name)
    weights = load_file(tmp_path / "ours" / "sae_weights.safetensors")
    expected = load_file(tmp_path / "stock" / "sae_weights.safetensors")
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(weights[name], value)
    assert is_latent_major(sae.W_enc)


@every_architecture
def test_a_checkpoint_loads_latent_major(architecture, tmp_path) -> None:
    sae = trained_sae(architecture)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert is_latent_major(loaded.W_enc)
    resumed = new_sae(architecture)
    resumed.load_weights_from_checkpoint(tmp_path)
    assert is_latent_major(resumed.W_enc)
    for other in (loaded, resumed):
        assert torch.equal(other.W_enc, sae.W_enc)
    if "batchtopk" not in architecture:  # which SAELens cannot use before they are jumprelu
        assert SAE.load_from_disk(tmp_path).W_enc.is_contiguous()


def test_training_from_a_topk_is_latent_major() -> None:
    stock = trained_sae("topk")
    started = from_topk(stock)
    assert is_latent_major(started.W_enc)
    assert torch.equal(started.W_enc, stock.W_enc)
    assert stock.W_enc.is_contiguous()


@every_architecture
def test_steps_do_not_depend_on_the_layout(architecture) -> None:
    sae, contiguous = trained_sae(architecture), trained_sae(architecture)
    copy_weights(sae, contiguous)
    contiguous.W_enc.data = contiguous.W_enc.data.contiguous()
    for each in (sae, contiguous):
        run_step(each, random_activations(), dead_mask(MANY_DEAD))
    assert contiguous.W_enc.grad.is_contiguous()
    torch.testing.assert_close(contiguous.W_enc.grad, sae.W_enc.grad)
