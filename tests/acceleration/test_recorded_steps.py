"""Whole steps of a trainer, recorded and replayed, against ordinary ones within accelerate()."""

import copy
import gc
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAETrainer
from saes.comparison import EVERY_ARCHITECTURE, FUSED_ARCHITECTURES, assert_close
from torch._subclasses.fake_tensor import FakeTensorMode
from training.comparison import F, case
from training.replays import Replays, recording_of

import sae_lens_flex
from sae_lens_flex.acceleration import dead_bound, recorded_steps
from sae_lens_flex.acceleration.dead_bound import HORIZON, PERIOD, DeadBound, _Count
from sae_lens_flex.acceleration.mixing_buffer import mixing_buffer
from sae_lens_flex.acceleration.recorded_steps import RecordedSteps
from sae_lens_flex.acceleration.whole_step import Moments, Settings, Trained, whole_step
from sae_lens_flex.ops.kernels.adam import Adam
from sae_lens_flex.ops.kernels.launch import Launch
from sae_lens_flex.saes import fused_topk
from sae_lens_flex.training import graph
from sae_lens_flex.training.graph import ORDINARY_CALLS, Recorder
from sae_lens_flex.training.matryoshka import widths_on
from sae_lens_flex.training.requests import Inputs, WantedGradients, Weights

from .trainers import BATCH, D_IN, D_SAE, new_trainer

Trainer = SAETrainer[Any, Any]
every_architecture = pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE)
N_FIRST = ORDINARY_CALLS + 3  # until steps are replayed


class WholeSteps(Replays):
    """Pairs of trainers, of which one records whole steps.

    Attributes:
        kinds: of the steps of the one that does: "whole" or "ordinary".
        forms: for how many dead latents its whole steps were.
        last: what its last step returned.
    """

    def __init__(self, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(device, monkeypatch)
        self.kinds: list[str] = []
        self.forms: list[int] = []
        self.last: Any = None
        monkeypatch.setattr(recorded_steps, "LEAST_CAPACITY", 4)
        take = RecordedSteps.take

        def noted(steps: RecordedSteps, trainer: Trainer, *arguments: Any) -> Any:
            output = take(steps, trainer, *arguments)
            if trainer.sae.use_cuda_graph:
                self.kinds[-1] = "ordinary" if output is None else "whole"
            return output

        capacity_for = RecordedSteps._capacity_for

        def noted_capacity(*args: Any) -> int:
            self.forms.append(capacity_for(*args))
            return self.forms[-1]

        monkeypatch.setattr(RecordedSteps, "take", noted)
        monkeypatch.setattr(RecordedSteps, "_capacity_for", noted_capacity)

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
            # Else rounding decides about the update by a gradient that is nearly zero.
            trainer.optimizer.param_groups[0]["eps"] = 1e-4
            with torch.no_grad():
                trainer.sae.b_enc[30:].sub_(20)  # so they never fire
        return trainers  # type: ignore[return-value]

    def step(self, trainer: Trainer, seed: int, n_samples: int = BATCH) -> Any:
        """Take a step as `fit` does. The gradients of every other batch are clipped."""
        generator = torch.Generator().manual_seed(seed)
        d_in = trainer.sae.cfg.d_in
        batch = torch.randn(n_samples, d_in, generator=generator) * (3 if seed % 2 else 0.03)
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
            self.last = output
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
    """The weights, moments and thresholds by name."""
    tensors = dict(trainer.sae.named_buffers())
    for name, parameter in trainer.sae.named_parameters():
        tensors[name] = parameter
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


@every_architecture
@pytest.mark.parametrize(
    ("autocast", "fields"),
    [
        (False, {}),
        (True, {}),
        (True, {"rescale_acts_by_decoder_norm": False}),
        (True, {"apply_b_dec_to_input": False}),
        (False, {"use_sparse_activations": False}),
        (False, {"normalize_activations": "layer_norm", "aux_loss_coefficient": 0.0}),
    ],
    ids=lambda value: next(iter(value), "defaults") if isinstance(value, dict) else str(value),
)
def test_every_step_is_the_ordinary_one(steps, architecture, autocast, fields) -> None:
    if architecture == "flex_matryoshka_batchtopk" and "normalize_activations" in fields:
        pytest.skip("it takes no such normalization")
    trainers = steps.pair(architecture, autocast=autocast, sae_fields=fields)
    kinds = steps.check(trainers, 12)
    assert kinds[0] == "ordinary"  # It makes the moments.
    assert set(kinds[3:]) == {"whole"}
    assert recording_of(trainers[0].sae) is not None


@pytest.fixture
def too_large(steps, monkeypatch) -> WholeSteps:
    """Pairs of trainers whose steps are too large to be recorded."""
    if steps.device == "cuda":
        monkeypatch.setattr(graph, "MOST_RECORDED_WEIGHTS", 0)
    else:
        monkeypatch.setattr(fused_topk, "is_worth_recording", lambda *_, **__: False)
        monkeypatch.setattr(recorded_steps, "is_worth_launching", lambda *_: True)
    return steps


@every_architecture
def test_steps_too_large_to_be_recorded_are_whole_ones(too_large, architecture) -> None:
    trainers = too_large.pair(architecture, autocast=True, dead_feature_window=17)
    for trainer in trainers:
        trainer.cfg.logger.log_to_wandb = True
        trainer.cfg.logger.wandb_log_frequency = 5
    kinds = too_large.check(trainers, 20)
    assert set(kinds[1:]) == {"whole"}
    assert too_large.last.losses["auxiliary_reconstruction_loss"] > 0
    assert trainers[0].sae._recorder is None


def test_large_step_takes_few_latents_that_are_not_dead(too_large, monkeypatch) -> None:
    taken = []

    def noted(*arguments: Any, **options: Any) -> Any:
        taken.append(arguments[-1])
        return whole_step(*arguments, **options)

    monkeypatch.setattr(recorded_steps, "whole_step", noted)
    trainers = too_large.pair("flex_topk", dead_feature_window=22)
    too_large.check(trainers, 26)
    assert taken[0] == 0
    assert taken[-1] == 20  # for 18 that are dead, with 4 as the least capacity


def test_large_step_with_a_loss_for_each_width_is_ordinary_once_latents_are_dead(too_large) -> None:
    fields = {"matryoshka_widths": [12, 33, 45, D_SAE], "use_matryoshka_aux_loss": True}
    trainers = too_large.pair(
        "flex_matryoshka_batchtopk", dead_feature_window=22, sae_fields=fields
    )
    kinds = too_large.check(trainers, 26)
    assert kinds[1] == "whole"
    assert kinds[-1] == "ordinary"
    assert too_large.last.losses["auxiliary_reconstruction_loss"] > 0


def test_large_step_is_ordinary_where_all_latents_may_be_dead(too_large) -> None:
    trainers = too_large.pair("flex_topk", dead_feature_window=2)
    assert set(too_large.check(trainers, 5)) == {"ordinary"}
    assert too_large.last.losses["auxiliary_reconstruction_loss"] > 0


# --- dead latents


def revive(trainer: Trainer) -> None:
    """Let latents fire that have not."""
    with torch.no_grad():
        trainer.sae.b_enc[30:36].add_(25)


every_auxiliary_loss = pytest.mark.parametrize(
    ("architecture", "own"),
    [
        *((name, {}) for name in EVERY_ARCHITECTURE),
        (
            "flex_matryoshka_batchtopk",
            {"matryoshka_widths": [12, 33, 45, D_SAE], "use_matryoshka_aux_loss": True},
        ),
    ],
    ids=[*EVERY_ARCHITECTURE, "aux_loss_by_width"],
)


@every_auxiliary_loss
@pytest.mark.parametrize("d_in", [D_IN, 40])
def test_dead_latents_come_and_go(steps, architecture, own, d_in) -> None:
    # With d_in // 2 = 20 all 18 dead latents are kept; with 8 the largest of them.
    fields = {"d_in": d_in, **own}
    trainers = steps.pair(architecture, dead_feature_window=36, sae_fields=fields)
    forms, auxiliary = steps.forms, []
    for _ in range(43):
        assert set(steps.check(trainers, 1)[3:]) <= {"whole"}
        auxiliary.append(steps.last.losses["auxiliary_reconstruction_loss"].item())
    assert auxiliary[:37] == [0] * 37
    assert min(auxiliary[37:]) > 0
    dead = trainers[0].dead_neurons
    assert dead[30:].all()
    # No latent can be dead at the first steps; later some may be that are not.
    assert forms[0] == 0
    assert 0 < max(forms) <= 32
    for trainer in trainers:
        revive(trainer)
    assert set(steps.check(trainers, 4)) == {"whole"}
    assert trainers[0].dead_neurons.sum() < dead.sum()


def test_steps_are_ordinary_until_the_number_of_dead_latents_is_bounded(steps) -> None:
    trainers = steps.pair("flex_topk", dead_feature_window=1000)
    steps.check(trainers, 6)

    def age(trainer: Trainer) -> None:
        trainer.n_forward_passes_since_fired[20:] += 2000

    steps.check(trainers, 1, before=age)
    assert steps.last.losses["auxiliary_reconstruction_loss"] > 0
    assert steps.check(trainers, 4)[-1] == "whole"
    for trainer in trainers:
        trainer.n_forward_passes_since_fired = torch.zeros(D_SAE, device=steps.device)
    steps.check(trainers, 1)
    assert steps.last.losses["auxiliary_reconstruction_loss"] == 0
    for trainer in trainers:
        trainer.cfg.dead_feature_window = 0
    steps.check(trainers, 3)
    assert steps.last.losses["auxiliary_reconstruction_loss"] > 0


def test_number_of_dead_latents_is_bounded_anew_after_steps_without_a_loss_on_them(steps) -> None:
    trainers = steps.pair("flex_topk", dead_feature_window=36)
    steps.check(trainers, 4)
    for coefficient, n_steps in ((0, 40), (1, 4)):
        for trainer in trainers:
            trainer.sae.cfg.aux_loss_coefficient = coefficient
        steps.check(trainers, n_steps)
    assert steps.last.losses["auxiliary_reconstruction_loss"] > 0


def test_bound_holds_for_the_steps_that_it_is_read_in() -> None:
    generator, bound, of_parts = torch.Generator().manual_seed(0), DeadBound(), DeadBound()
    parts = [slice(0, 70), slice(70, 300)]
    since_fired, window, n_exact = torch.zeros(300), 50, 0
    rates = torch.rand(300, generator=generator) ** 6
    for _ in range(400):
        n_dead = int((since_fired > window).sum())
        at_most = bound.at_step(since_fired, window)
        assert n_dead <= at_most
        in_parts = [int((since_fired[part] > window).sum()) for part in parts]
        assert max(in_parts) <= of_parts.at_step(since_fired, window, parts) <= at_most
        n_exact += at_most == 0
        has_fired = torch.rand(300, generator=generator) < rates
        since_fired.add_(1).masked_fill_(has_fired, 0)
        bound.after_step()
        of_parts.after_step()
    # Until the first count is read that was taken when a latent might die within the horizon.
    assert n_exact == -(-(window - HORIZON + 1) // PERIOD) * PERIOD + PERIOD


class Copied:
    """Stands for an event after a copy."""

    def __init__(self) -> None:
        self.n_waits = 0

    def synchronize(self) -> None:
        self.n_waits += 1


def test_host_waits_for_the_first_count_and_for_those_that_are_steps_old(monkeypatch) -> None:
    bound, since_fired, events = DeadBound(), torch.zeros(10), []

    def late(step: int, count: torch.Tensor, copied: None) -> Any:
        events.append(Copied())
        return _Count(step, count, events[-1])

    monkeypatch.setattr(dead_bound, "_Count", late)
    for step in range(4 * PERIOD):
        bound.at_step(since_fired, 1000)
        since_fired += 1
        bound.after_step()
        assert events[0].n_waits == 1
        if step >= PERIOD:
            assert events[1].n_waits == (step >= 2 * PERIOD)
    assert [event.n_waits for event in events] == [1, 1, 1, 0]
    since_fired.zero_()
    bound.at_step(since_fired, 1000)
    assert events[-1].n_waits == 1


# --- what a user changes between steps


def add_input_hook(trainer: Trainer) -> Callable[[], None]:
    trainer.sae.hook_sae_input.add_hook(lambda x, hook: x + 1)
    return trainer.sae.reset_hooks


def add_recons_hook(trainer: Trainer) -> Callable[[], None]:
    trainer.sae.hook_sae_recons.add_hook(lambda x, hook: 2 * x)
    return trainer.sae.reset_hooks


def add_gradient_hook(trainer: Trainer) -> Callable[[], None]:
    return trainer.sae.W_dec.register_hook(lambda gradient: 3 * gradient).remove


def add_accumulation_hook(trainer: Trainer) -> Callable[[], None]:
    def double(parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        parameter.grad.mul_(2)

    return trainer.sae.b_enc.register_post_accumulate_grad_hook(double).remove


def add_pre_hook(trainer: Trainer) -> Callable[[], None]:
    def halve(optimizer: Any, *_: Any) -> None:
        for parameter in optimizer.param_groups[0]["params"]:
            parameter.grad.div_(2)

    return trainer.optimizer.register_step_pre_hook(halve).remove


def add_post_hook(trainer: Trainer) -> Callable[[], None]:
    def shrink(optimizer: Any, *_: Any) -> None:
        with torch.no_grad():
            for parameter in optimizer.param_groups[0]["params"]:
                parameter.sub_(parameter.grad / 100)

    return trainer.optimizer.register_step_post_hook(shrink).remove


def replace_step(trainer: Trainer) -> Callable[[], None]:
    step = trainer.optimizer.step

    def twice() -> None:
        step()
        step()

    trainer.optimizer.step = twice  # type: ignore[method-assign]
    return lambda: setattr(trainer.optimizer, "step", step)


def replace_forward_pass(trainer: Trainer) -> Callable[[], None]:
    forward = trainer.sae.training_forward_pass

    def doubled(step_input: Any) -> Any:
        output = forward(step_input)
        return replace(output, loss=0.1 * output.loss)

    trainer.sae.training_forward_pass = doubled
    return lambda: delattr(trainer.sae, "training_forward_pass")


def replace_decode(trainer: Trainer) -> Callable[[], None]:
    decode = trainer.sae.decode
    trainer.sae.decode = lambda feature_acts: 2 * decode(feature_acts)
    return lambda: delattr(trainer.sae, "decode")


def add_parameter(trainer: Trainer) -> Callable[[], None]:
    trainer.sae.scale = torch.nn.Parameter(torch.ones(3, device=trainer.sae.device))
    return lambda: delattr(trainer.sae, "scale")


def watch_for_anomalies(trainer: Trainer) -> Callable[[], None]:
    torch.autograd.set_detect_anomaly(True)
    return lambda: torch.autograd.set_detect_anomaly(False)  # type: ignore[return-value]


def replace_threshold_update(trainer: Trainer) -> Callable[[], None]:
    sae = trainer.sae

    def halved(acts: torch.Tensor) -> None:
        assert not acts.is_sparse
        sae.topk_threshold.fill_(float(acts.amax()) / 2)

    sae.update_topk_threshold = halved
    return lambda: delattr(sae, "update_topk_threshold")


class OtherDead(SAETrainer[Any, Any]):
    @property
    def dead_neurons(self) -> torch.Tensor:
        return self.n_forward_passes_since_fired >= 0


def count_others_as_dead(trainer: Trainer) -> Callable[[], None]:
    trainer.__class__ = OtherDead
    return lambda: setattr(trainer, "__class__", SAETrainer)


def subclass_sae(trainer: Trainer) -> Callable[[], None]:
    base = type(trainer.sae)

    def halved(self: Any, step_input: Any) -> Any:
        output = base.training_forward_pass(self, step_input)
        return replace(output, loss=0.5 * output.loss)

    trainer.sae.__class__ = type("Halved", (base,), {"training_forward_pass": halved})
    return lambda: setattr(trainer.sae, "__class__", base)


def add_gradient(trainer: Trainer) -> Callable[[], None]:
    trainer.sae.b_dec.grad = torch.full_like(trainer.sae.b_dec, 0.1)
    return lambda: None


CHANGES = {
    "input hook": (add_input_hook, "whole"),
    "recons hook": (add_recons_hook, "ordinary"),
    "gradient hook": (add_gradient_hook, "ordinary"),
    "accumulation hook": (add_accumulation_hook, "ordinary"),
    "optimizer's pre hook": (add_pre_hook, "ordinary"),
    "optimizer's post hook": (add_post_hook, "ordinary"),
    "optimizer's step": (replace_step, "ordinary"),
    "forward pass": (replace_forward_pass, "ordinary"),
    "decode": (replace_decode, "ordinary"),
    "another parameter": (add_parameter, "ordinary"),
    "anomaly detection": (watch_for_anomalies, "ordinary"),
    "trainer's dead latents": (count_others_as_dead, "ordinary"),
    "threshold's update": (replace_threshold_update, "ordinary"),
    "subclass of the SAE": (subclass_sae, "ordinary"),
    "a gradient of someone": (add_gradient, "ordinary"),
}


@pytest.mark.filterwarnings("ignore:training steps take the unfused path")
@pytest.mark.parametrize("change", CHANGES)
def test_what_is_hooked_or_replaced_works_and_can_be_taken_back(steps, change) -> None:
    of_batch = change == "threshold's update"
    trainers = steps.pair("flex_batchtopk" if of_batch else "hierarchical_topk")
    steps.check(trainers, N_FIRST)
    add, kind = CHANGES[change]
    for _ in range(2):
        undo = [add(trainer) for trainer in trainers]
        assert set(steps.check(trainers, 1 if change == "a gradient of someone" else 2)) == {kind}
        for each in undo:
            each()
        assert steps.check(trainers, 4)[-1] == "whole"


def test_replaced_clipping_is_called(steps, monkeypatch) -> None:
    trainers = steps.pair("flex_topk")
    steps.check(trainers, N_FIRST)
    clip, norms = torch.nn.utils.clip_grad_norm_, []
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args).item())
    )
    assert set(steps.check(trainers, 2)) == {"ordinary"}
    assert len(norms) == 4


def test_input_that_needs_a_gradient_makes_an_ordinary_step(steps) -> None:
    trainers = steps.pair("flex_topk")
    steps.check(trainers, N_FIRST)
    for trainer in trainers:
        scale = torch.ones((), device=steps.device, requires_grad=True)
        trainer.sae.hook_sae_input.add_hook(lambda x, hook, scale=scale: x * scale)
    assert set(steps.check(trainers, 3)) == {"ordinary"}


@pytest.mark.parametrize("frozen", [("W_dec",), ("W_enc", "b_enc"), ("b_dec",)], ids="-".join)
def test_frozen_weights_stay_and_the_others_train(steps, frozen) -> None:
    trainers = steps.pair("hierarchical_topk", dead_feature_window=2)
    steps.check(trainers, N_FIRST)
    for is_frozen in (True, False):
        for trainer in trainers:
            for name in frozen:
                trainer.sae.get_parameter(name).requires_grad_(not is_frozen)
        before = [trainers[0].sae.get_parameter(name).clone() for name in frozen]
        assert set(steps.check(trainers, 8)) == {"whole"}
        after = [trainers[0].sae.get_parameter(name) for name in frozen]
        for old, new in zip(before, after, strict=True):
            assert torch.equal(old, new) == is_frozen


def test_batches_of_another_size(steps) -> None:
    trainers = steps.pair("flex_topk")
    for n_samples in (BATCH, 7, BATCH):
        steps.check(trainers, 2 * N_FIRST, n_samples=n_samples)
    assert set(steps.kinds[3:]) == {"whole"}


SETTINGS: dict[str, Callable[[Trainer], None]] = {
    "k": lambda t: setattr(t.sae.cfg, "k", 5) or setattr(t.sae.activation_fn, "k", 5),
    "aux_loss_coefficient": lambda t: setattr(t.sae.cfg, "aux_loss_coefficient", 0.25),
    "no aux_loss_coefficient": lambda t: setattr(t.sae.cfg, "aux_loss_coefficient", 0),
    "rescaling": lambda t: setattr(t.sae.cfg, "rescale_acts_by_decoder_norm", False),
    "betas": lambda t: t.optimizer.param_groups[0].update(betas=(0.5, 0.9)),
    "eps": lambda t: t.optimizer.param_groups[0].update(eps=1e-2),
    "weight_decay": lambda t: t.optimizer.param_groups[0].update(weight_decay=0.1),
    "decoupled": lambda t: t.optimizer.param_groups[0].update(
        weight_decay=0.1, decoupled_weight_decay=True
    ),
    "maximize": lambda t: t.optimizer.param_groups[0].update(maximize=True),
    "learning rate": lambda t: t.optimizer.param_groups[0].update(lr=0.5),
    "window": lambda t: setattr(t.cfg, "dead_feature_window", 10),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_edited_between_steps_act_at_once(steps, setting) -> None:
    trainers = steps.pair("flex_topk", dead_feature_window=3)
    steps.check(trainers, N_FIRST)
    for trainer in trainers:
        SETTINGS[setting](trainer)
    assert set(steps.check(trainers, 6)[-4:]) == {"whole"}


def test_amsgrad_makes_ordinary_steps(steps) -> None:
    trainers = steps.pair("flex_topk")
    steps.check(trainers, N_FIRST)
    for trainer in trainers:
        trainer.optimizer.param_groups[0]["amsgrad"] = True
        for state in trainer.optimizer.state.values():
            state["max_exp_avg_sq"] = torch.zeros_like(state["exp_avg_sq"])
    assert set(steps.check(trainers, 2)) == {"ordinary"}


def test_threshold_settings_edited_between_steps_act_at_once(steps) -> None:
    trainers = steps.pair("flex_batchtopk")
    steps.check(trainers, N_FIRST)
    edits = (
        lambda sae: setattr(sae.cfg, "topk_threshold_lr", 0.5),
        lambda sae: setattr(sae.activation_fn, "k", 2.5),
        lambda sae: setattr(sae, "topk_threshold", torch.full_like(sae.topk_threshold, 7)),
        lambda sae: sae.topk_threshold.zero_(),
    )
    for edit in edits:
        for trainer in trainers:
            edit(trainer.sae)
        before = trainers[0].sae.topk_threshold.clone()
        assert set(steps.check(trainers, 4)) == {"whole"}
        assert trainers[0].sae.topk_threshold != before
        assert steps.last.metrics["topk_threshold"] == trainers[0].sae.topk_threshold


@pytest.mark.parametrize("most_dead", [0, 7])
@pytest.mark.parametrize(
    ("widths", "by_width"), [((), False), ((3, 9, F), False), ((3, 9, F), True)]
)
def test_no_shape_depends_on_the_data(monkeypatch, widths, by_width, most_dead) -> None:
    # Tensors without values: whatever asks for one, or whose shape depends on one, raises.
    monkeypatch.setattr(Launch, "__call__", lambda *_: None)
    made = case(("triton", "cpu"), k=13, over_batch=True, widths=widths)
    settings = Settings(Adam((0.9, 0.99), 1e-8), 3, 1.0, by_width, 0.1)
    wanted = WantedGradients(*[True] * 4, *[False] * 3)
    widths_on.cache_clear()
    try:
        with FakeTensorMode() as mode:
            weights = Weights(*map(mode.from_tensor, made.weights))
            inputs = Inputs(*map(mode.from_tensor, made.inputs[:2]))
            moments = tuple(
                Moments(torch.zeros_like(w), torch.zeros_like(w), torch.zeros(())) for w in weights
            )
            threshold = torch.zeros((), dtype=torch.float64)
            trained = Trained(weights, moments, torch.zeros(F), torch.ones(()), threshold)
            result = whole_step(trained, inputs, made.spec, wanted, settings, most_dead)
    finally:
        widths_on.cache_clear()
    assert result.losses.shape == (3 + max(0, len(widths) - 1),)
    assert result.at.shape == (2, 13)
    assert result.main.hidden_pre.shape == (13,)


def test_budgets_edited_between_steps_act_at_once(steps) -> None:
    trainers = steps.pair("hierarchical_topk", sae_fields={"budgets": [1, 4, 8]})
    steps.check(trainers, N_FIRST)
    recording = recording_of(trainers[0].sae)
    for budgets in ([8], [2, 8], None, [3, 8]):
        for trainer in trainers:
            trainer.sae.cfg.budgets = budgets
        assert set(steps.check(trainers, 2)) == {"whole"}
        assert (recording_of(trainers[0].sae) is recording) == (budgets in ([8], [2, 8]))


def test_level_weights_edited_between_steps_act_at_once(steps) -> None:
    trainers = steps.pair("hierarchical_topk", sae_fields={"budgets": [1, 4, 8]})
    steps.check(trainers, N_FIRST)
    recording = recording_of(trainers[0].sae)
    for weights in ([1.0, 2.0, 3.0], [0, 0, 1], None):
        for trainer in trainers:
            trainer.sae.cfg.level_weights = weights
        assert set(steps.check(trainers, 2)) == {"whole"}
        assert recording_of(trainers[0].sae) is recording  # The weights are an input.


# --- a run


@every_architecture
def test_schedules_windows_and_logging(steps, architecture) -> None:
    trainers = steps.pair(architecture, lr_warm_up_steps=10, feature_sampling_window=3)
    for trainer in trainers:
        trainer.cfg.logger.log_to_wandb = True
        trainer.cfg.logger.wandb_log_frequency = 2
    scores = trainers[0].act_freq_scores
    assert set(steps.check(trainers, 16)[3:]) == {"whole"}
    assert trainers[0].act_freq_scores is not scores
    assert bool(steps.last.metrics) == (architecture != "flex_topk")


@pytest.mark.parametrize("architecture", ["hierarchical_topk", "flex_matryoshka_batchtopk"])
def test_outputs_outlast_the_next_steps(steps, architecture) -> None:
    trainers = steps.pair(architecture, dead_feature_window=2)
    steps.check(trainers, N_FIRST)
    outputs = []
    for seed in range(4):
        outputs.append([steps.step(trainer, seed) for trainer in trainers])
        follow(*trainers)
    for output, expected in outputs:
        assert_same_outputs(output, expected)
        assert not output.loss.requires_grad


@pytest.mark.parametrize("architecture", ["hierarchical_topk", "flex_batchtopk"])
def test_resumed_trainer(steps, architecture, tmp_path: Path) -> None:
    trainers = steps.pair(architecture, dead_feature_window=2)
    steps.check(trainers, N_FIRST)
    trainers[1].save_checkpoint("halfway", base_path=tmp_path)
    steps.check(trainers, 4)
    others = steps.pair(architecture, dead_feature_window=2)
    for trainer in (*trainers, *others):  # the trainers themselves, and new ones
        trainer.load_trainer_state(tmp_path / "halfway")
        trainer.sae.load_weights_from_checkpoint(tmp_path / "halfway")
        assert trainer.n_training_steps == N_FIRST
    for pair in (trainers, others):
        assert set(steps.check(pair, N_FIRST)[-4:]) == {"whole"}


def test_steps_with_and_without_the_block_take_turns(steps) -> None:
    trainers = steps.pair("flex_topk")
    for _ in range(2):
        steps.check(trainers, N_FIRST)
        for trainer in trainers:  # SAELens's own step
            trainer.step(torch.ones(BATCH, D_IN, device=steps.device))
            trainer.n_training_steps += 1
        assert_same_state(*trainers)


def test_evaluation_gives_the_memory_back(steps) -> None:
    trainers = steps.pair("flex_topk")
    for _ in range(2):
        steps.check(trainers, N_FIRST)
        sae = trainers[0].sae
        assert recording_of(sae) is not None
        sae.eval()
        assert sae._recorder is None


def test_sae_keeps_no_recording_beside_that_of_whole_steps(steps) -> None:
    trainers = steps.pair("flex_topk", dead_feature_window=36)
    steps.check(trainers, 45)
    assert len(trainers[0].sae._recorder.recordings) == 2  # with and without dead latents


def test_recordings_of_several_processes_end_with_the_block() -> None:
    recorder = Recorder()
    with sae_lens_flex.accelerate():
        recorded_steps._of_several.add(recorder)
        recorder._forms = {None: "a recording"}
        assert recorder.recordings
    assert not recorder.recordings


def test_trainers_record_for_themselves(steps) -> None:
    pairs = [steps.pair(architecture) for architecture in FUSED_ARCHITECTURES]
    for _ in range(N_FIRST + 2):
        for pair in pairs:
            steps.check(pair, 1)
    assert steps.kinds[-2:] == ["whole", "whole"]
    recordings = [recording_of(pair[0].sae) for pair in pairs]
    assert recordings[0] is not recordings[1]
    twins = [copy.deepcopy(trainer) for trainer in pairs[0]]
    for _ in range(N_FIRST):
        steps.check(pairs[0], 1)
        steps.check(tuple(twins), 1)
    assert steps.kinds[-2:] == ["whole", "whole"]


def test_backward_through_what_a_whole_step_wrote_raises(steps) -> None:
    trainers = steps.pair("flex_topk")
    steps.check(trainers, N_FIRST)
    sae = trainers[0].sae
    loss = sae(torch.ones(2, D_IN, device=steps.device)).square().sum()
    assert set(steps.check(trainers, 1)) == {"whole"}
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# --- on a GPU


@pytest.fixture
def on_gpu(monkeypatch) -> WholeSteps:
    return WholeSteps("cuda", monkeypatch)


@pytest.mark.gpu
@every_auxiliary_loss
@pytest.mark.parametrize("n_dead", [0, 18])
def test_replays_wait_for_nothing(on_gpu, architecture, own, n_dead) -> None:
    (trainer, _) = on_gpu.pair(architecture, sae_fields=own)
    trainer.n_forward_passes_since_fired[D_SAE - n_dead :] = 2000
    for seed in range(2 * N_FIRST):
        on_gpu.step(trainer, seed)
    assert recording_of(trainer.sae) is not None
    batch = torch.randn(BATCH, D_IN, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with sae_lens_flex.accelerate():
            outputs = [trainer.step(batch) for _ in range(2 * PERIOD)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (outputs[-1].losses["auxiliary_reconstruction_loss"] > 0) == (n_dead > 0)


@pytest.mark.gpu
def test_memory_stays_flat(on_gpu) -> None:
    (trainer, _) = on_gpu.pair("hierarchical_topk", dead_feature_window=40)
    used = []
    for seed in range(300):
        output = on_gpu.step(trainer, seed)
        if seed in (100, 200, 299):
            del output
            gc.collect()  # of other tests
            used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert set(on_gpu.kinds[-250:]) == {"whole"}
    assert max(on_gpu.forms) > 0
    assert used[0] == used[1] == used[2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_learning_rate_is_not_rounded_to_the_default_dtype(dtype) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        rate = RecordedSteps()._learning_rate_on(torch.device("cpu"), 1e-3)
    finally:
        torch.set_default_dtype(default)
    assert rate.dtype == torch.float32
    assert rate == torch.tensor(1e-3, dtype=torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [True, False], ids=["its own stream", "the same stream"])
def test_steps_are_recorded_while_another_thread_makes_batches(on_gpu, own_stream) -> None:
    is_over, n_products, errors = threading.Event(), [0], []

    def produce() -> None:
        try:
            stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
            with torch.cuda.stream(stream):
                factor = torch.randn(256, 256, device="cuda")
                product, expected = factor, (factor.double() @ factor.double()).float()
                batches = mixing_buffer(64, 16, (factor[:40].clone() for _ in count()))
                while not is_over.is_set():
                    product = factor @ factor
                    next(batches)
                    n_products[0] += 1
                    time.sleep(1e-4)
                torch.testing.assert_close(product, expected, rtol=1e-2, atol=1e-1)
        except Exception as error:
            errors.append(error)

    trainers = on_gpu.pair("hierarchical_topk", dead_feature_window=36)
    producer = threading.Thread(target=produce)
    producer.start()
    try:
        for n_samples in (BATCH, 9):
            on_gpu.check(trainers, 45, n_samples=n_samples)
            assert len(trainers[0].sae._recorder.recordings) > 0
    finally:
        is_over.set()
        producer.join()
    assert errors == []
    assert n_products[0] > 100
    assert on_gpu.kinds.count("whole") >= 80
