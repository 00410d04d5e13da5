"""fused_adam: which optimizers it makes, their checkpoints, and what autograd knows of a step."""

import contextlib
import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.training import sae_trainer
from torch.optim import Adam

import sae_lens_flex

D_IN, D_SAE, K, BATCH = 16, 48, 8, 24
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
every_device = pytest.mark.parametrize("device", DEVICES)


def new_trainer(
    architecture: str = "flex_topk", device: str = "cpu", fused: bool = False
) -> SAETrainer[Any, Any]:
    torch.manual_seed(0)
    fields = {"d_in": D_IN, "d_sae": D_SAE, "k": K, "device": device}
    sae = TrainingSAE.from_dict({"architecture": architecture, **fields})
    cfg = SAETrainerConfig(
        total_training_samples=1000 * BATCH,
        train_batch_size_samples=BATCH,
        lr=1e-3,
        lr_end=1e-3,
        device=device,
        dead_feature_window=2,
    )
    with sae_lens_flex.fused_adam() if fused else contextlib.nullcontext():
        return SAETrainer(cfg=cfg, sae=sae, data_provider=iter(()))


def take_steps(trainer: SAETrainer[Any, Any], n: int, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n):
        trainer.step(torch.randn(BATCH, D_IN, generator=generator))


def is_fused(trainer: SAETrainer[Any, Any]) -> bool:
    return bool(trainer.optimizer.param_groups[0]["fused"])


def assert_same_weights(
    trainer: SAETrainer[Any, Any], expected: SAETrainer[Any, Any], tolerance: float = 1e-5
) -> None:
    for name, parameter in expected.sae.named_parameters():
        torch.testing.assert_close(
            trainer.sae.get_parameter(name), parameter, rtol=0, atol=tolerance, msg=name
        )


def repeat_tolerance(device: str) -> float:
    """Return by how much the weights of equal runs may differ."""
    # On a GPU atomic additions come in any order.
    return 1e-5 if device == "cuda" else 0


@every_device
def test_only_trainers_made_within_the_block_are_fused(device) -> None:
    before = new_trainer(device=device)
    with sae_lens_flex.fused_adam():
        within = new_trainer(device=device)
    after = new_trainer(device=device)
    assert sae_trainer.Adam is Adam
    assert [is_fused(trainer) for trainer in (before, within, after)] == [False, True, False]
    for trainer in (before, within, after):
        take_steps(trainer, 5)
    assert_same_weights(after, before, repeat_tolerance(device))
    assert_same_weights(within, before)


def test_blocks_nest_and_end_with_an_error() -> None:
    with sae_lens_flex.fused_adam():
        with sae_lens_flex.fused_adam():
            assert is_fused(new_trainer())
        assert is_fused(new_trainer())
        with pytest.raises(ValueError, match="within"), sae_lens_flex.fused_adam():
            raise ValueError("within")
        assert is_fused(new_trainer())
    assert not is_fused(new_trainer())


@every_device
@pytest.mark.parametrize("begun_fused", [True, False])
@pytest.mark.parametrize("resumed_fused", [True, False])
def test_resumed_run_is_fused_where_the_block_says_so(
    begun_fused, resumed_fused, device, tmp_path: Path
) -> None:
    trainer = new_trainer(device=device, fused=begun_fused)
    take_steps(trainer, 5)
    trainer.save_checkpoint("halfway", base_path=tmp_path)
    resumed = new_trainer(device=device, fused=resumed_fused)
    resumed.load_trainer_state(tmp_path / "halfway")
    resumed.sae.load_weights_from_checkpoint(tmp_path / "halfway")
    assert is_fused(resumed) == resumed_fused
    for each in (trainer, resumed):
        take_steps(each, 5, seed=1)
    assert_same_weights(
        resumed, trainer, repeat_tolerance(device) if begun_fused == resumed_fused else 1e-5
    )


@every_device
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("begun", "resumed"), [("topk", "flex_topk"), ("flex_topk", "topk")])
def test_state_passes_between_stock_topk_and_flex_topk(
    begun, resumed, fused, device, tmp_path: Path
) -> None:
    trainer = new_trainer(begun, device, fused)
    take_steps(trainer, 5)
    trainer.save_checkpoint("halfway", base_path=tmp_path)
    other = new_trainer(resumed, device, fused)
    other.load_trainer_state(tmp_path / "halfway")
    other.sae.load_weights_from_checkpoint(tmp_path / "halfway")
    for each in (trainer, other):
        take_steps(each, 2, seed=1)
    assert_same_weights(other, trainer)


def test_its_state_is_as_that_of_plain_adam() -> None:
    fused, plain = new_trainer(fused=True), new_trainer()
    for trainer in (fused, plain):
        take_steps(trainer, 2)
    state, expected = fused.optimizer.state_dict(), plain.optimizer.state_dict()
    assert state["param_groups"] == expected["param_groups"]
    assert state["state"].keys() == expected["state"].keys()
    before = copy.deepcopy(state)
    plain.optimizer.load_state_dict(state)
    assert not is_fused(plain)
    assert is_fused(fused)
    assert state["param_groups"] == before["param_groups"]


def fused_optimizer(device: str, *shapes: tuple[int, ...]) -> Adam:
    """Return the optimizer that a trainer would build, of new parameters."""
    parameters = [torch.nn.Parameter(torch.ones(shape, device=device)) for shape in shapes]
    with sae_lens_flex.fused_adam():
        return sae_trainer.Adam(parameters, lr=0.1)


def loaded(optimizer: Adam) -> Adam:
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


COPIES = {
    "as-built": lambda optimizer: optimizer,
    "state-loaded": loaded,
    "copied": copy.deepcopy,
    "pickled": lambda optimizer: pickle.loads(pickle.dumps(optimizer)),
}


@every_device
@pytest.mark.parametrize("made", COPIES.values(), ids=COPIES)
def test_step_raises_the_version_of_the_parameters_that_it_wrote(
    made: Callable[[Adam], Adam], device
) -> None:
    optimizer = made(fused_optimizer(device, (2, 3), (3,)))
    written, left_alone = optimizer.param_groups[0]["params"]
    written.grad = torch.ones_like(written)
    before = written._version, left_alone._version
    optimizer.step()
    assert written[0, 0] < 1
    assert written._version > before[0]
    assert left_alone._version == before[1]


@every_device
def test_second_backward_through_a_weight_that_a_step_wrote_raises(device) -> None:
    optimizer = fused_optimizer(device, (3,))
    (weight,) = optimizer.param_groups[0]["params"]
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    assert weight.grad.tolist() == [2, 2, 2]
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_device
@pytest.mark.parametrize("has_gradient", [False, True])
def test_a_weight_that_gets_another_layout_keeps_its_moments(device, has_gradient) -> None:
    fused, plain = new_trainer(device=device, fused=True), new_trainer(device=device)
    batch = torch.randn(BATCH, D_IN, device=device)
    for trainer in (fused, plain):
        trainer.step(batch)
        weight = trainer.sae.W_enc
        if has_gradient:
            weight.grad = 0.1 * weight.detach()
        weight.data = weight.data.contiguous()
        assert weight.stride() != trainer.optimizer.state[weight]["exp_avg"].stride()
        if not has_gradient:
            weight.grad = 0.1 * weight.detach()
        trainer.optimizer.step()
    torch.testing.assert_close(fused.sae.W_enc, plain.sae.W_enc)


@every_device
@pytest.mark.parametrize("block", [sae_lens_flex.accelerate, sae_lens_flex.fused_adam])
def test_memory_between_the_rows_of_a_weight_is_left_alone(device, block) -> None:
    results = []
    for context in (block, contextlib.nullcontext):
        with context():
            trainer = new_trainer("topk", device=device)
            batch = torch.randn(BATCH, D_IN, device=device)
            trainer.step(batch)
            weight = trainer.sae.W_dec
            memory = torch.full((D_SAE, D_IN + 4), 7.0, device=device)
            memory[:, :D_IN] = weight.data
            weight.data = memory[:, :D_IN]
            for _ in range(3):
                trainer.step(batch)
        assert bool((memory[:, D_IN:] == 7).all())
        results.append(weight.detach())
    torch.testing.assert_close(*results)


def test_hooks_of_a_step_run_once() -> None:
    optimizer = fused_optimizer("cpu", (3,))
    Adam([torch.zeros(1)])  # From here on torch runs hooks around Adam's own step, too.
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    optimizer.step()
    assert calls == ["before", "after"]
