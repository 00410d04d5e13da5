"""The step of SAELens's trainer: same results, fewer passes over gradients and activations."""

from dataclasses import replace
from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

from .adam import clip_and_step
from .recorded_steps import RecordedSteps, may_take_whole_steps


def train_step(self: SAETrainer[Any, Any], sae: Any, sae_in: torch.Tensor) -> TrainStepOutput:
    """Train an SAE on a batch, as a method of `SAETrainer`.

    Args:
        sae: the trainer's.
        sae_in: activations, [batch, d_in].
    """
    output = _on_device(self, sae, sae_in)
    self.lr_scheduler.step()
    for scheduler in self.coefficient_schedulers.values():
        scheduler.step()
    return output


def _on_device(trainer: SAETrainer[Any, Any], sae: Any, sae_in: torch.Tensor) -> TrainStepOutput:
    """Do what the device does in a step. The host goes on without waiting for it."""
    step_input = TrainStepInput(
        sae_in=sae_in,
        dead_neuron_mask=None,
        coefficients=trainer.get_coefficients(),
        n_training_steps=trainer.n_training_steps,
        is_logging_step=trainer._is_logging_step(),
    )
    is_plain = may_take_whole_steps(trainer, sae) and sae._takes_fused_path(step_input)
    if not (is_plain and sae.training):  # Telling all its parts takes the host a while.
        sae.train()
    with trainer.autocast_if_enabled:
        if is_plain:
            steps = RecordedSteps.of(trainer)
            most_dead = steps.most_dead(trainer, sae)
            shards = sae._shards_of(step_input, whole_step_for=most_dead)
            request = sae._request(step_input, shards)
            output = steps.take(trainer, request, most_dead)
            if output is not None:
                return output
            output = sae._differentiable_step(request, trainer.dead_neurons)
            count_firing(trainer, output.feature_acts)
            steps.after_step()
        else:
            output = trainer.sae.training_forward_pass(
                step_input=replace(step_input, dead_neuron_mask=trainer.dead_neurons)
            )
            count_firing(trainer, output.feature_acts)
    output.loss.backward()
    clip_and_step(trainer.optimizer, sae.parameters())
    trainer.optimizer.zero_grad()
    return output


@torch.no_grad()
def count_firing(trainer: SAETrainer[Any, Any], feature_acts: torch.Tensor) -> None:
    """Add a batch to the trainer's statistics: how often each latent fired, and how long ago.

    Args:
        trainer: whose statistics.
        feature_acts: [batch, d_sae], dense or sparse.
    """
    fired = feature_acts.bool().float()
    counts = fired.sum(0)
    # SAELens sums a second time, over dimension -2.
    has_fired = (counts if fired.ndim == 2 else fired.sum(-2)).bool()
    if has_fired.is_sparse:
        has_fired = has_fired.to_dense()
    trainer.n_forward_passes_since_fired += 1
    trainer.n_forward_passes_since_fired[has_fired] = 0
    trainer.act_freq_scores += counts
    trainer.n_frac_active_samples += trainer.cfg.train_batch_size_samples
