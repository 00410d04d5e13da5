"""flex_topk against SAELens's topk."""

from typing import Any

import pytest
import torch
from comparison import (
    FEW_DEAD,
    MANY_DEAD,
    assert_close,
    assert_same_gradients,
    assert_same_losses,
    copy_weights,
    dead_mask,
    new_sae,
    random_activations,
    run_step,
    trained_sae,
)
from sae_lens import SAE
from sae_lens.saes.topk_sae import TopKSAE
from trainings import OPTIONS, TRAININGS, Training, adam, steps_beside, update


def new_pair(training: Training, options: dict[str, Any]) -> tuple[Any, Any]:
    """SAELens's SAE and ours, from the same initialization."""
    torch.manual_seed(0)
    stock = new_sae("topk", **training.fields(), **options)
    flex = new_sae("flex_topk", **training.fields(), **options, backend=training.backend)
    copy_weights(stock, flex)
    return stock, flex


def has_a_near_tie(hidden_pre: torch.Tensor, k: int) -> bool:
    """Whether rounding decides which k latents of a sample are the largest."""
    if hidden_pre.shape[1] <= k:
        return False
    highest = hidden_pre.topk(k + 1).values
    return bool((highest[:, -2] - highest[:, -1] <= 2e-6 * hidden_pre.abs().max()).any())


# The interpreter is slow: it gets the options that differ most.
TRAININGS_WITH_OPTIONS = [
    pytest.param(
        *training.values,
        *options.values,
        id=f"{options.id}-{training.id}",
        marks=training.marks,
    )
    for training in TRAININGS
    for options in OPTIONS
    if training.id != "triton-cpu" or options.id in ("default", "neither")
]


@pytest.mark.parametrize(("training", "options"), TRAININGS_WITH_OPTIONS)
def test_every_step_has_the_losses_and_gradients_of_stock_topk(training, options) -> None:
    stock, flex = new_pair(training, options)
    n_ties = 0
    for expected, output, dead in steps_beside(training, stock, flex):
        assert_close(output.sae_out, expected.sae_out, name="sae_out")
        if has_a_near_tie(expected.hidden_pre[:, dead], training.d_in // 2):
            n_ties += 1
        else:
            assert_same_losses(output, expected)
            assert_same_gradients(flex, stock)
    assert n_ties <= training.most_ties * training.n_steps


@pytest.mark.parametrize(
    ("training", "options"),
    [each for each in TRAININGS_WITH_OPTIONS if each.id != "neither-triton-cpu"],
)
def test_training_without_dead_latents_stays_with_stock_topk(training, options) -> None:
    stock, flex = new_pair(training, options)
    initial = {name: value.clone() for name, value in stock.state_dict().items()}
    optimizers = adam(stock), adam(flex)
    for step, batch in enumerate(training.batches()):
        expected, output = run_step(stock, batch), run_step(flex, batch)
        if not torch.equal(output.feature_acts.to_dense() > 0, expected.feature_acts > 0):
            # From here on the two train different latents.
            assert has_a_near_tie(expected.hidden_pre, training.k)
            assert step >= training.n_steps // 10
            break
        assert_close(output.loss, expected.loss, 1e-4, "loss")
        update(stock, optimizers[0])
        update(flex, optimizers[1])
    for name, parameter in stock.named_parameters():
        assert not torch.equal(parameter, initial[name])
        assert_close(flex.get_parameter(name), parameter, 1e-4, name)


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("options", OPTIONS[:4])
def test_run_time_normalization_matches_stock_topk(normalization, options) -> None:
    fields = {"normalize_activations": normalization, "aux_loss_coefficient": 0, **options}
    stock, flex = trained_sae("topk", **fields), trained_sae("flex_topk", **fields)
    attributes = set(vars(flex))
    batch = random_activations()

    expected, output = run_step(stock, batch), run_step(flex, batch)

    assert_same_losses(output, expected)
    assert_same_gradients(flex, stock)
    assert_close(output.sae_out, expected.sae_out, name="sae_out")
    assert set(vars(flex)) == attributes


@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_dead_latents_do_not_end_a_normalized_run(normalization) -> None:
    fields = {"normalize_activations": normalization, "aux_loss_coefficient": 0}
    flex = trained_sae("flex_topk", **fields)
    without_dead = run_step(flex, random_activations())
    output = run_step(flex, random_activations(), dead_mask(MANY_DEAD))
    assert output.losses["auxiliary_reconstruction_loss"] == 0
    assert torch.equal(output.loss, without_dead.loss)


@pytest.mark.parametrize("n_dead", [0, 1, FEW_DEAD, MANY_DEAD])
@pytest.mark.parametrize("coefficient", [0, 1 / 32, 1.0])
def test_aux_loss_coefficient_means_what_it_means_in_stock_topk(n_dead, coefficient) -> None:
    fields = {"aux_loss_coefficient": coefficient}
    stock, flex = trained_sae("topk", **fields), trained_sae("flex_topk", **fields)
    dead = dead_mask(n_dead)
    expected = run_step(stock, random_activations(), dead)
    output = run_step(flex, random_activations(), dead)
    assert_same_losses(output, expected)
    assert_same_gradients(flex, stock)


def test_gradient_of_the_input_matches_stock_topk() -> None:
    stock, flex = trained_sae("topk"), trained_sae("flex_topk")
    inputs = [random_activations().requires_grad_() for _ in range(2)]
    run_step(stock, inputs[0], dead_mask(MANY_DEAD))
    run_step(flex, inputs[1], dead_mask(MANY_DEAD))
    assert_close(inputs[1].grad, inputs[0].grad, name="gradient of sae_in")


def test_saved_for_inference_it_is_a_stock_topk(tmp_path) -> None:
    flex = trained_sae("flex_topk")
    flex.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is TopKSAE
    assert loaded.cfg.architecture() == "topk"
    batch = random_activations()
    assert_close(loaded(batch), flex(batch), name="output")
    assert_close(loaded.encode(batch), flex.encode(batch), name="feature_acts")


def test_its_training_checkpoint_loads_as_a_stock_topk(tmp_path) -> None:
    flex = trained_sae("flex_topk")
    flex.save_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    assert type(loaded) is TopKSAE
    assert torch.equal(loaded(random_activations()), flex(random_activations()))
