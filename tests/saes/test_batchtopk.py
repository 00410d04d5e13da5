"""The architectures of a batch against SAELens's."""

from typing import Any

import pytest
import torch
from comparison import (
    STOCK,
    assert_close,
    assert_same_gradients,
    assert_same_losses,
    copy_weights,
    new_sae,
    run_step,
    trained_sae,
)
from trainings import OPTIONS, TRAININGS, Training, adam, silence, update

ARCHITECTURES = ("flex_batchtopk",)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


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
@every_architecture
def test_every_step_is_that_of_stock(architecture, training: Training, options) -> None:
    torch.manual_seed(0)
    fields = {**training.fields(), "k": training.k + 0.3, **options}
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
