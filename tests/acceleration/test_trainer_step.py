"""A trainer within accelerate() does what SAELens's does, up to rounding."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAETrainer
from torch.optim import SGD, Adam
from torch.optim import optimizer as torch_optimizer
from torch.utils._python_dispatch import TorchDispatchMode

import sae_lens_flex
from sae_lens_flex.acceleration.adam import FusedAdam, clip_and_step

from .trainers import BATCH, SAES, new_trainer, take_steps

every_sae = pytest.mark.parametrize("sae", SAES)
Trainer = SAETrainer[Any, Any]


def assert_same_state(trainer: Trainer, expected: Trainer, tolerance: float) -> None:
    """Check weights and moments up to rounding, and what was counted bit for bit."""
    for name, parameter in expected.sae.named_parameters():
        ours = trainer.sae.get_parameter(name)
        torch.testing.assert_close(ours, parameter, rtol=0, atol=tolerance, msg=name)
        for moment in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                trainer.optimizer.state[ours][moment],
                expected.optimizer.state[parameter][moment],
                rtol=0,
                atol=tolerance,
            )
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(trainer, name), getattr(expected, name)), name
        assert not getattr(trainer, name).is_sparse
    for name in ("n_frac_active_samples", "n_training_samples", "coefficient_schedulers"):
        value, other = (getattr(each, name) for each in (trainer, expected))
        if name == "coefficient_schedulers":
            value, other = ({k: s.state_dict() for k, s in v.items()} for v in (value, other))
        assert value == other, name
    assert trainer.lr_scheduler.state_dict() == expected.lr_scheduler.state_dict()


# SAELens keeps the thresholds of "jumprelu" in float32.
@pytest.mark.parametrize("sae", [sae for sae in SAES if sae != "jumprelu"])
def test_steps_are_saelens_steps_in_float64(sae) -> None:
    trainer, expected = (
        new_trainer(sae, accelerated=True, dtype="float64"),
        new_trainer(sae, dtype="float64"),
    )
    losses = take_steps(trainer, 10, accelerated=True)
    torch.testing.assert_close(losses, take_steps(expected, 10), rtol=1e-12, atol=0)
    assert_same_state(trainer, expected, tolerance=1e-12)


@every_sae
def test_steps_are_saelens_steps_in_float32(sae) -> None:
    trainer, expected = new_trainer(sae, accelerated=True), new_trainer(sae)
    losses = take_steps(trainer, 10, accelerated=True)
    torch.testing.assert_close(losses, take_steps(expected, 10), rtol=1e-5, atol=0)
    assert_same_state(trainer, expected, tolerance=2e-5)


@pytest.mark.parametrize("sae", ["flex_topk", "topk"])
def test_steps_under_autocast_are_saelens_steps(sae) -> None:
    trainer = new_trainer(sae, accelerated=True, autocast=True)
    expected = new_trainer(sae, autocast=True)
    take_steps(trainer, 2, accelerated=True)
    take_steps(expected, 2)
    assert_same_state(trainer, expected, tolerance=2e-5)


# --- clipping


def with_gradients(size: float, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    """Return parameters, one of them not contiguous, with gradients of a norm."""
    generator = torch.Generator().manual_seed(0)
    draws = [torch.randn(37, 5, generator=generator, dtype=dtype) for _ in range(4)]
    parameters = [torch.nn.Parameter(draws[0].T), torch.nn.Parameter(draws[1])]
    for parameter, gradient in zip(parameters, (draws[2].T, draws[3]), strict=True):
        parameter.grad = gradient * size / torch.stack(draws[2:]).norm()
    return parameters


def clipped_by_torch(size: float, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    parameters = with_gradients(size, dtype)
    optimizer = FusedAdam(parameters, lr=0.1)
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return parameters


def clipped_in_step(size: float, dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    parameters = with_gradients(size, dtype)
    clip_and_step(FusedAdam(parameters, lr=0.1), iter(parameters))
    return parameters


@pytest.mark.parametrize("size", [1.001, 3, 1e4, 1e18])
def test_clipped_gradients_are_torch_s_within_two_units_in_the_last_place(size) -> None:
    for ours, theirs in zip(clipped_in_step(size), clipped_by_torch(size), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=2 * 2**-23, atol=0)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
        assert not torch.equal(ours, with_gradients(size)[0 if ours.shape == (5, 37) else 1])


@pytest.mark.parametrize("size", [0, 1e-30, 0.5, 0.999])
def test_gradients_that_need_no_clipping_give_the_same_bits(size) -> None:
    for ours, theirs in zip(clipped_in_step(size), clipped_by_torch(size), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan"), 3e38])
def test_norm_that_is_not_finite_does_the_same_to_the_gradients(bad) -> None:
    results = []
    for clip in ("step", "torch"):
        parameters = with_gradients(3)
        optimizer = FusedAdam(parameters, lr=0.1)
        gradient = parameters[1].grad
        assert gradient is not None
        gradient[:2] = bad  # twice 3e38 squared is infinite, though 3e38 is not
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        assert not norm.isfinite()
        if clip == "step":
            clip_and_step(optimizer, parameters)
        else:
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
        results.append([*parameters, *(p.grad for p in parameters)])
    torch.testing.assert_close(*results, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_are_clipped_by_torch(dtype) -> None:
    for ours, theirs in zip(clipped_in_step(3, dtype), clipped_by_torch(3, dtype), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
        assert torch.equal(ours, theirs)


class Operations(TorchDispatchMode):
    """Notes of the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **kwargs or {})


WAITS = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "unique", "_to_copy"}


def test_the_step_is_one_norm_and_one_kernel_without_a_wait() -> None:
    parameters = with_gradients(3)
    optimizer = FusedAdam(parameters, lr=0.1)
    clip_and_step(optimizer, parameters)  # makes the moments
    with Operations() as operations:
        clip_and_step(optimizer, parameters)
    assert operations.names.count("_fused_adam_") == 1
    assert operations.names.count("_foreach_norm") == 1
    assert not {"_foreach_mul_", "mul_", "mul", *WAITS} & set(operations.names)


def noted(step: Callable[[], Any], note: Callable[[], None]) -> Callable[[], None]:
    def note_and_step() -> None:
        note()
        step()

    return note_and_step


def test_hooks_before_the_optimizer_s_step_see_clipped_gradients() -> None:
    for register in ("object", "global", "step"):
        trainer, norms = new_trainer(accelerated=True), []

        def note(*_: Any, trainer: Any = trainer, norms: Any = norms) -> None:
            parameters = trainer.sae.parameters()
            norms.append(torch.stack([p.grad.norm() for p in parameters]).norm().item())

        handle = None
        if register == "object":
            trainer.optimizer.register_step_pre_hook(note)
        elif register == "global":
            handle = torch_optimizer.register_optimizer_step_pre_hook(note)
        else:
            trainer.optimizer.step = noted(trainer.optimizer.step, note)  # type: ignore
        take_steps(trainer, 4, accelerated=True)
        if handle is not None:
            handle.remove()
        assert len(norms) == 4
        assert max(norms) == pytest.approx(1, abs=1e-5)
        expected = new_trainer()
        take_steps(expected, 4)
        assert_same_state(trainer, expected, tolerance=2e-5)


def test_hooks_see_the_gradients_that_they_see_in_saelens() -> None:
    seen: list[list[torch.Tensor]] = []
    for accelerated in (False, True):
        trainer, gradients = new_trainer(accelerated=accelerated), []
        weight = trainer.sae.W_dec
        weight.register_hook(lambda g, to=gradients: to.append(g.clone()))
        weight.register_post_accumulate_grad_hook(lambda p, to=gradients: to.append(p.grad.clone()))
        trainer.optimizer.register_step_post_hook(
            lambda *_, to=gradients, p=weight: to.append(p.grad.clone())
        )
        take_steps(trainer, 4, accelerated=accelerated)
        seen.append(gradients)
    assert len(seen[0]) == 12
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-6)


def set_to_zero(parameter: torch.Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.zero_()


def test_a_hook_s_edit_of_a_gradient_is_clipped_and_applied() -> None:
    trainers = [new_trainer(accelerated=True), new_trainer()]
    for trainer, accelerated in zip(trainers, (True, False), strict=True):
        trainer.sae.W_dec.register_hook(lambda g: g * 100)
        trainer.sae.b_enc.register_post_accumulate_grad_hook(set_to_zero)
        take_steps(trainer, 6, accelerated=accelerated)
    assert_same_state(*trainers, tolerance=2e-5)


def test_another_clip_grad_norm_is_called(monkeypatch) -> None:
    clip, norms = torch.nn.utils.clip_grad_norm_, []
    trainer, expected = new_trainer(accelerated=True), new_trainer()
    take_steps(expected, 4)
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args).item())
    )
    take_steps(trainer, 4, accelerated=True)
    assert len(norms) == 4
    assert max(norms) > 1
    assert_same_state(trainer, expected, tolerance=2e-5)


def test_frozen_and_exchanged_parameters_train_as_in_saelens() -> None:
    trainers = [new_trainer("topk", accelerated=True), new_trainer("topk")]
    for trainer, accelerated in zip(trainers, (True, False), strict=True):
        trainer.sae.b_dec.requires_grad_(False)
        take_steps(trainer, 2, accelerated=accelerated)
        # The optimizer does not know it. SAELens counts it in the norm, and steps do not move it.
        trainer.sae.W_enc = torch.nn.Parameter(trainer.sae.W_enc.detach().clone())
        take_steps(trainer, 4, accelerated=accelerated)
    ours, theirs = (trainer.sae for trainer in trainers)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(ours.get_parameter(name), parameter, rtol=0, atol=2e-5)


# --- trainers


def test_trainer_from_before_the_block_keeps_its_optimizer() -> None:
    trainer, expected = new_trainer(), new_trainer()
    take_steps(trainer, 6, accelerated=True)
    take_steps(expected, 6)
    assert type(trainer.optimizer) is Adam
    assert_same_state(trainer, expected, tolerance=0)


def test_trainer_from_within_the_block_goes_on_after_it() -> None:
    trainer, expected = new_trainer(accelerated=True), new_trainer()
    for each, accelerated in ((trainer, True), (expected, False)):
        take_steps(each, 3, accelerated=accelerated)
        take_steps(each, 3, seed=1)
    assert type(trainer.optimizer) is FusedAdam
    assert_same_state(trainer, expected, tolerance=2e-5)


class OwnStep(SAETrainer[Any, Any]):
    def _train_step(self, sae: Any, sae_in: torch.Tensor) -> Any:
        self.own_steps = getattr(self, "own_steps", 0) + 1
        return super()._train_step(sae, sae_in)


class OwnOptimizer(SAETrainer[Any, Any]):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.optimizer: Any = SGD(self.sae.parameters(), lr=0.1)


@pytest.mark.parametrize("trainer_class", [OwnStep, OwnOptimizer])
def test_subclass_is_honoured(trainer_class) -> None:
    trainer = new_trainer(accelerated=True, trainer_class=trainer_class)
    expected = new_trainer(trainer_class=trainer_class)
    take_steps(trainer, 6, accelerated=True)
    take_steps(expected, 6)
    for name, parameter in expected.sae.named_parameters():
        torch.testing.assert_close(trainer.sae.get_parameter(name), parameter, rtol=0, atol=2e-5)
    if trainer_class is OwnStep:
        assert trainer.own_steps == 6


def test_step_replaced_on_the_object_is_called() -> None:
    trainer = new_trainer(accelerated=True)
    step, calls = trainer._train_step, []
    trainer._train_step = lambda **kwargs: (calls.append(kwargs), step(**kwargs))[1]  # type: ignore
    take_steps(trainer, 3, accelerated=True)
    assert [call["sae_in"].shape[0] for call in calls] == [BATCH] * 3


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("resumed", [True, False])
@pytest.mark.parametrize("sae", ["flex_topk", "standard"])
def test_checkpoints_pass_between_accelerated_and_plain_trainers(
    sae, begun, resumed, tmp_path: Path
) -> None:
    trainer = new_trainer(sae, accelerated=begun)
    take_steps(trainer, 5, accelerated=begun)
    trainer.save_checkpoint("halfway", base_path=tmp_path)
    other = new_trainer(sae, accelerated=resumed)
    other.load_trainer_state(tmp_path / "halfway")
    other.sae.load_weights_from_checkpoint(tmp_path / "halfway")
    for each, accelerated in ((trainer, begun), (other, resumed)):
        take_steps(each, 5, accelerated=accelerated, seed=1)
    assert_same_state(other, trainer, tolerance=0 if begun == resumed else 2e-5)


def test_saved_state_is_that_of_a_plain_trainer(tmp_path: Path) -> None:
    states = []
    for accelerated in (True, False):
        trainer = new_trainer(accelerated=accelerated)
        take_steps(trainer, 5, accelerated=accelerated)
        trainer.save_trainer_state(tmp_path)
        states.append(torch.load(tmp_path / "trainer_state.pt"))
    moments = [state["optimizer"].pop("state") for state in states]
    torch.testing.assert_close(*moments, rtol=0, atol=2e-5)
    for state in states:
        state["counts"] = [
            state.pop(n) for n in ("act_freq_scores", "n_forward_passes_since_fired")
        ]
    counts = [state.pop("counts") for state in states]
    torch.testing.assert_close(*counts, rtol=0, atol=0)
    assert states[0] == states[1]


def test_backward_through_what_a_clipping_step_wrote_raises() -> None:
    for of_gradient in (False, True):
        (weight,) = parameters = [torch.nn.Parameter(torch.ones(3))]
        optimizer = FusedAdam(parameters, lr=0.1)
        (weight**3).sum().backward()
        saved = weight.grad if of_gradient else weight
        other = torch.ones(3, requires_grad=True)
        loss = (saved * other).sum()
        clip_and_step(optimizer, parameters)
        assert not hasattr(copy.copy(optimizer), "grad_scale") or optimizer.grad_scale is None
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_error_in_a_step_leaves_no_scale_behind() -> None:
    parameters = with_gradients(3)
    optimizer = FusedAdam(parameters, lr=0.1)

    def fail(*_: Any) -> None:
        raise ValueError("after the step")

    handle = optimizer.register_step_post_hook(fail)
    with pytest.raises(ValueError, match="after the step"):
        clip_and_step(optimizer, parameters)
    handle.remove()
    assert optimizer.grad_scale is None


def test_statistics_of_many_activations_are_exact() -> None:
    # Single ones added to 2^24 in float32 would be lost.
    trainers = [new_trainer(accelerated=True), new_trainer()]
    for trainer, accelerated in zip(trainers, (True, False), strict=True):
        trainer.act_freq_scores += 2**24
        take_steps(trainer, 3, accelerated=accelerated)
    scores, expected = (trainer.act_freq_scores for trainer in trainers)
    assert torch.equal(scores, expected)
    assert (scores > 2**24).any()


def test_nested_blocks_give_one_accelerated_trainer() -> None:
    with sae_lens_flex.accelerate(), sae_lens_flex.accelerate():
        trainer = new_trainer()
        take_steps(trainer, 3)
    expected = new_trainer(accelerated=True)
    take_steps(expected, 3, accelerated=True)
    assert_same_state(trainer, expected, tolerance=0)
