"""The architectures of a batch against SAELens's."""

from typing import Any

import pytest
import torch
from comparison import (
    D_SAE,
    FEW_DEAD,
    MANY_DEAD,
    STOCK,
    assert_close,
    assert_same_gradients,
    assert_same_losses,
    copy_weights,
    dead_mask,
    new_sae,
    random_activations,
    run_step,
    step_input,
    trained_sae,
)
from trainings import OPTIONS, TRAININGS, Training, adam, silence, update

# An architecture, and fields of its own. Of small widths many samples have no latent.
CASES = {
    "flex_batchtopk": ("flex_batchtopk", {}),
    "matryoshka": ("flex_matryoshka_batchtopk", {"matryoshka_widths": [3, 8, 20]}),
    "matryoshka-aux_loss_by_width": (
        "flex_matryoshka_batchtopk",
        {"matryoshka_widths": [6, 11, 30], "use_matryoshka_aux_loss": True},
    ),
}
every_case = pytest.mark.parametrize(("architecture", "own"), CASES.values(), ids=CASES)


def same_sae(architecture: str, **fields: Any) -> tuple[Any, Any]:
    """SAELens's SAE and ours, with equal weights."""
    return trained_sae(STOCK[architecture], **fields), trained_sae(architecture, **fields)


def has_a_near_tie(compared: torch.Tensor, n: int) -> bool:
    """Whether rounding decides which n of each row are the largest."""
    if compared.shape[1] <= n:
        return False
    highest = compared.relu().topk(n + 1).values
    is_near = highest[:, -2] - highest[:, -1] <= 2e-6 * compared.abs().max()
    return bool((is_near & (highest[:, -2] > 0)).any())


def near_ties(sae: Any, expected: Any, dead: torch.Tensor, d_in: int) -> bool:
    """Whether rounding decides what a step of SAELens's keeps: for the main loss, or the other."""
    n_kept = int(sae.activation_fn.k * len(expected.hidden_pre))
    if has_a_near_tie(expected.hidden_pre.flatten().unsqueeze(0), n_kept):
        return True
    of_dead = expected.hidden_pre[:, dead]
    return has_a_near_tie(
        of_dead - of_dead.amin().clamp(max=0) if of_dead.numel() else of_dead, d_in // 2
    )


@pytest.mark.parametrize("training", TRAININGS)
@pytest.mark.parametrize("options", OPTIONS)
@every_case
def test_every_step_is_that_of_stock(architecture, own, training: Training, options) -> None:
    if own and options not in ({}, OPTIONS[0].values[0], OPTIONS[3].values[0]):
        pytest.skip("the options do not meet what matryoshka adds")
    torch.manual_seed(0)
    fields = {**training.fields(), "k": training.k + 0.3, **options, **own}
    stock = new_sae(STOCK[architecture], **fields)
    flex = new_sae(architecture, **fields, backend=training.backend)
    optimizer = adam(stock)
    steps_since_fired = torch.zeros(training.d_sae, device=training.device)
    dead_counts, n_ties = [], 0
    for step, batch in enumerate(training.batches()):
        if step in (0, training.n_steps // 2):
            silence(stock, training.few_dead if step == 0 else training.many_dead)
        copy_weights(stock, flex)
        dead = steps_since_fired > training.dead_window
        dead_counts.append(int(dead.sum()))

        expected = run_step(stock, batch, dead)
        output = run_step(flex, batch, dead)

        if near_ties(stock, expected, dead, training.d_in):
            n_ties += 1
            flex.topk_threshold.copy_(stock.topk_threshold)
        else:
            assert_close(output.sae_out, expected.sae_out, name="sae_out")
            assert_same_losses(output, expected)
            assert_same_gradients(flex, stock)
            assert_close(output.feature_acts.to_dense(), expected.feature_acts, name="acts")
            assert_close(flex.topk_threshold, stock.topk_threshold, 1e-6, "topk_threshold")
            assert torch.equal(output.metrics["topk_threshold"], flex.topk_threshold)
            assert list(output.metrics) == list(expected.metrics)
        assert (expected.losses["auxiliary_reconstruction_loss"] > 0) == (dead_counts[-1] > 0)

        update(stock, optimizer)
        steps_since_fired += 1
        steps_since_fired[expected.feature_acts.bool().any(0)] = 0
    assert n_ties <= 2 * training.most_ties * training.n_steps
    # The auxiliary loss has met no dead latent, fewer than the d_in // 2 it takes, and more.
    assert dead_counts[0] == 0
    assert any(0 < n_dead < training.d_in // 2 for n_dead in dead_counts)
    assert any(n_dead > training.d_in // 2 for n_dead in dead_counts)


def matryoshka_pair(**fields: Any) -> tuple[Any, Any]:
    # Width 1 is mostly level 0, and some samples have no latent below 12.
    fields = {"matryoshka_widths": [1, 12, 30, D_SAE], "k": 2, **fields}
    architecture = "flex_matryoshka_batchtopk"
    return trained_sae(STOCK[architecture], **fields), trained_sae(architecture, **fields)


WEIGHTS = {
    "one_inner": {"inner_mse_loss_12": 2.0},
    "outer": {"mse_loss": 1.0},
    "all_inner": {"inner_mse_loss_1": 1.0, "inner_mse_loss_12": 0.0, "inner_mse_loss_30": -3.0},
    "auxiliary": {"auxiliary_reconstruction_loss": 1.5},
    "auxiliary_and_inner": {"auxiliary_reconstruction_loss": 1.5, "inner_mse_loss_30": 1.0},
    "with_total": {"total": 1.0, "inner_mse_loss_30": 0.5},
}


@pytest.mark.parametrize("by_width", [False, True])
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_each_loss_of_a_width_has_its_gradient(weights, by_width) -> None:
    pair = matryoshka_pair(use_matryoshka_aux_loss=by_width)
    for sae in pair:
        output = sae.training_forward_pass(step_input(random_activations(), dead_mask(MANY_DEAD)))
        losses = {**output.losses, "total": output.loss}
        sum(weight * losses[name] for name, weight in weights.items()).backward()
    stock, flex = pair
    for name, parameter in stock.named_parameters():
        gradient = flex.get_parameter(name).grad
        if parameter.grad is None or not parameter.grad.any():
            assert gradient is None or not gradient.any()
        else:
            assert_close(gradient, parameter.grad, name=name)


def test_losses_of_widths_are_differentiated_one_after_the_other() -> None:
    stock, flex = matryoshka_pair()
    dead = dead_mask(FEW_DEAD)
    expected = run_step(stock, random_activations(), dead)
    output = flex.training_forward_pass(step_input(random_activations(), dead))
    for loss in output.losses.values():
        loss.backward(retain_graph=True)
    assert_same_losses(output, expected)
    assert_same_gradients(flex, stock)
    output.loss.backward()
    for parameter in stock.parameters():
        parameter.grad.mul_(2)
    assert_same_gradients(flex, stock)
