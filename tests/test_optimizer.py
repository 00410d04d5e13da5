"""fused_adam, which touches SAELens, and what checkpoints make of it."""

import copy
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


def new_trainer(architecture: str = "flex_topk", device: str = "cpu") -> SAETrainer[Any, Any]:
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
    """By how much equal runs may differ: on a GPU atomic additions come in any order."""
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
    def made(fused: bool) -> SAETrainer[Any, Any]:
        if not fused:
            return new_trainer(device=device)
        with sae_lens_flex.fused_adam():
            return new_trainer(device=device)

    trainer = made(begun_fused)
    take_steps(trainer, 5)
    trainer.save_checkpoint("halfway", base_path=tmp_path)
    resumed = made(resumed_fused)
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
    def made(architecture: str) -> SAETrainer[Any, Any]:
        if not fused:
            return new_trainer(architecture, device)
        with sae_lens_flex.fused_adam():
            return new_trainer(architecture, device)

    trainer = made(begun)
    take_steps(trainer, 5)
    trainer.save_checkpoint("halfway", base_path=tmp_path)
    other = made(resumed)
    other.load_trainer_state(tmp_path / "halfway")
    other.sae.load_weights_from_checkpoint(tmp_path / "halfway")
    for each in (trainer, other):
        take_steps(each, 2, seed=1)
    assert_same_weights(other, trainer)


def test_its_state_is_as_that_of_plain_adam() -> None:
    with sae_lens_flex.fused_adam():
        fused = new_trainer()
    plain = new_trainer()
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
