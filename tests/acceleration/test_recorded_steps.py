"""Whole steps of a trainer, recorded and replayed, against ordinary ones within accelerate()."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import SAETrainer
from saes.comparison import FUSED_ARCHITECTURES, assert_close
from training.replays import Replays, recording_of

import sae_lens_flex
from sae_lens_flex.acceleration import recorded_steps
from sae_lens_flex.acceleration.recorded_steps import RecordedSteps
from sae_lens_flex.training.graph import ORDINARY_CALLS

from .trainers import BATCH, D_IN, new_trainer

Trainer = SAETrainer[Any, Any]
both_architectures = pytest.mark.parametrize("architecture", FUSED_ARCHITECTURES)
N_FIRST = ORDINARY_CALLS + 3  # until steps are replayed


class WholeSteps(Replays):
    """Pairs of trainers, of which one records whole steps.

    Attributes:
        kinds: of the steps of the one that does: "whole" or "ordinary".
    """

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(device, monkeypatch)
        self.kinds: list[str] = []
        monkeypatch.setattr(recorded_steps, "LEAST_CAPACITY", 4)
        take = RecordedSteps.take

        def noted(steps: RecordedSteps, trainer: Trainer, request: Any) -> Any:
            output = take(steps, trainer, request)
            if trainer.sae.use_cuda_graph:
                self.kinds[-1] = "ordinary" if output is None else "whole"
            return output

        monkeypatch.setattr(RecordedSteps, "take", noted)

    def pair(self, architecture: str, **fields: Any) -> tuple[Trainer, Trainer]:
        trainers = tuple(
            new_trainer(
                architecture,
                accelerated=True,
                device=self.device,
                **{"dead_feature_window": 1000, **fields},
            )
            for _ in range(2)
        )
        trainers[1].sae.use_cuda_graph = False
        for trainer in trainers:
            with torch.no_grad():
                trainer.sae.b_enc[30:].sub_(20)  # so they never fire
        return trainers  # type: ignore[return-value]

    def step(self, trainer: Trainer, seed: int, n_samples: int = BATCH) -> Any:
        """Take a step as `fit` does. The gradients of every other batch are clipped."""
        generator = torch.Generator().manual_seed(seed)
        batch = torch.randn(n_samples, D_IN, generator=generator) * (3 if seed % 2 else 0.03)
        if trainer.sae.use_cuda_graph:
            self.kinds.append("ordinary")
        with sae_lens_flex.accelerate():
            trainer.maybe_reset_sparsity()
            output = trainer.step(batch.to(self.device))
        trainer.n_training_steps += 1
        return output

    def check(
        self,
        trainers: tuple[Trainer, Trainer],
        n_steps: int,
        *,
        n_samples: int = BATCH,
        before: Callable[[Trainer], None] = lambda trainer: None,
    ) -> list[str]:
        """Take steps with both and compare all there is. Return what kinds they were."""
        first = len(self.kinds)
        for _ in range(n_steps):
            for trainer in trainers:
                before(trainer)
            seed = trainers[0].n_training_steps
            output, expected = (self.step(trainer, seed, n_samples) for trainer in trainers)
            assert_same_outputs(output, expected)
            assert_same_state(*trainers)
            follow(*trainers)
        return self.kinds[first:]


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def steps(request, monkeypatch) -> WholeSteps:
    return WholeSteps(request.param, monkeypatch)


def assert_same_outputs(output: Any, expected: Any) -> None:
    assert list(output.losses) == list(expected.losses)
    for name, loss in expected.losses.items():
        assert_close(output.losses[name], loss, name=name)
        assert output.losses[name].dtype == loss.dtype
    for name in ("loss", "sae_in", "sae_out", "hidden_pre"):
        assert_close(getattr(output, name), getattr(expected, name), name=name)
    assert output.feature_acts.is_sparse == expected.feature_acts.is_sparse
    acts, expected_acts = (each.feature_acts.to_dense() for each in (output, expected))
    assert_close(acts, expected_acts, name="feature_acts")
    assert list(output.metrics) == list(expected.metrics)
    for name, value in expected.metrics.items():
        assert_close(output.metrics[name], value, name=name)


def tensors_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights and moments by name."""
    tensors = dict(trainer.sae.named_parameters())
    for name, parameter in list(tensors.items()):
        for key, value in trainer.optimizer.state.get(parameter, {}).items():
            tensors[f"{key} of {name}"] = value
    return tensors


def assert_same_state(trainer: Trainer, expected: Trainer) -> None:
    ours, theirs = tensors_of(trainer), tensors_of(expected)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=2e-6, msg=name)
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(trainer, name), getattr(expected, name)), name
    for name in ("n_frac_active_samples", "n_training_samples"):
        assert getattr(trainer, name) == getattr(expected, name), name
    assert trainer.lr_scheduler.state_dict() == expected.lr_scheduler.state_dict()
    assert all(parameter.grad is None for parameter in trainer.sae.parameters())


@torch.no_grad()
def follow(trainer: Trainer, expected: Trainer) -> None:
    """Give a trainer the weights and moments of another, because rounding adds up."""
    theirs = tensors_of(expected)
    for name, tensor in tensors_of(trainer).items():
        tensor.copy_(theirs[name])


@both_architectures
@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"rescale_acts_by_decoder_norm": False},
        {"apply_b_dec_to_input": False},
        {"use_sparse_activations": False},
        {"normalize_activations": "layer_norm", "aux_loss_coefficient": 0.0},
    ],
    ids=lambda fields: next(iter(fields), "defaults"),
)
def test_every_step_is_the_ordinary_one(steps, architecture, autocast, fields) -> None:
    trainers = steps.pair(architecture, autocast=autocast, sae_fields=fields)
    kinds = steps.check(trainers, 12)
    assert kinds[0] == "ordinary"  # It makes the moments.
    assert set(kinds[3:]) == {"whole"}
    assert recording_of(trainers[0].sae) is not None
