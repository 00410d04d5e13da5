"""Whole steps within `accelerate()` of several processes are ordinary steps of one."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAEConfig

import sae_lens_flex
from sae_lens_flex.acceleration import recorded_steps

from .ranks import Ranks

D_IN, D_SAE, K, BATCH_SIZE, N_STEPS = 24, 150, 6, 24, 24


def new_trainer(device: str, several: bool, **fields: Any) -> SAETrainer[Any, Any]:
    torch.manual_seed(0)
    cfg = {"architecture": "hierarchical_topk", "d_in": D_IN, "d_sae": D_SAE, "k": K}
    sae: Any = TrainingSAE.from_dict(TrainingSAEConfig.from_dict(cfg).to_dict())
    sae = sae.to(device)
    trainer_cfg = SAETrainerConfig(
        total_training_samples=10**6,
        train_batch_size_samples=BATCH_SIZE,
        device=device,
        lr=1e-2,
        lr_end=1e-3,
        lr_warm_up_steps=5,
        **fields,
    )
    return SAETrainer(trainer_cfg, sae_lens_flex.shard(sae) if several else sae, iter(()))


def train(device: str, several: bool, **fields: Any) -> dict[str, Any]:
    """Train within `accelerate()`; return the losses, the end, and how steps were taken."""
    generator = torch.Generator().manual_seed(1)
    batches = 3 * torch.randn(N_STEPS, BATCH_SIZE, D_IN, generator=generator).to(device)
    whole_step, n_whole, n_replays = recorded_steps.whole_step, 0, 0
    replay = torch.cuda.CUDAGraph.replay

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal n_whole
        n_whole += 1
        return whole_step(*arguments, **options)

    def counted_replay(graph: Any) -> None:
        nonlocal n_replays
        n_replays += 1
        replay(graph)

    with pytest.MonkeyPatch.context() as patch, sae_lens_flex.accelerate():
        patch.setattr(recorded_steps, "whole_step", counted)
        patch.setattr(recorded_steps, "LEAST_CAPACITY", 1)
        patch.setattr(torch.cuda.CUDAGraph, "replay", counted_replay)
        trainer = new_trainer(device, several, **fields)
        losses, n_dead = [], []
        for batch in batches:
            share = batch.tensor_split(dist.get_world_size())[dist.get_rank()] if several else batch
            n_dead.append(int(trainer.dead_neurons.sum()))
            losses.append(trainer.step(share).loss.detach())
            trainer.n_training_steps += 1
    sae = sae_lens_flex.unshard(trainer.sae) if several else trainer.sae
    return {
        "losses": torch.stack(losses).cpu(),
        "weights": {name: weight.detach().cpu() for name, weight in sae.named_parameters()},
        "since fired": trainer.n_forward_passes_since_fired.cpu(),
        "firing": trainer.act_freq_scores.cpu(),
        "dead": n_dead,
        "whole": n_whole,
        "replays": n_replays,
    }


def compare(found: list[dict[str, Any]], one: dict[str, Any]) -> None:
    for each in found:
        for name in ("since fired", "firing"):
            assert torch.equal(each[name], one[name]), name
        assert each["dead"] == one["dead"]
        torch.testing.assert_close(each["losses"], one["losses"], rtol=1e-5, atol=0)
        for name, weight in one["weights"].items():
            error = (each["weights"][name] - weight).norm() / weight.norm()
            assert error < 1e-5, name


def on_rank(device: str, window: int) -> dict[str, Any]:
    return train(device, True, dead_feature_window=window)


# Steps after which a latent is dead. None is; at first fewer are than the auxiliary loss takes for
# a sample, and later more.
WINDOWS = [1000, 9]


@pytest.mark.parametrize("window", WINDOWS)
def test_whole_steps_are_those_of_one_process(ranks: Ranks, window: int) -> None:
    found = ranks.call(on_rank, "cpu", window)
    # The first step makes Adam's state.
    assert [each["whole"] for each in found] == [N_STEPS - 1] * ranks.size
    one = train("cpu", False, dead_feature_window=window)
    compare(found, one)
    if window == 9:
        assert {0 < n_dead <= D_IN // 2 for n_dead in one["dead"] if n_dead > 0} == {True, False}


@pytest.mark.gpu
@pytest.mark.parametrize("window", WINDOWS)
def test_recorded_steps_on_gpus_are_those_of_one_process(gpu_ranks: Ranks, window: int) -> None:
    found = gpu_ranks.call(on_rank, "cuda", window)
    for each in found:
        # All but the first step are whole. Three of each form are launched piece by piece, and one
        # is recorded, which calls the function once more.
        assert each["replays"] + each["whole"] >= N_STEPS
        if window == 1000:
            assert each["replays"] == N_STEPS - 4
    compare(found, train("cuda", False, dead_feature_window=window))


def with_hook_on_one_rank() -> str:
    with sae_lens_flex.accelerate():
        trainer = new_trainer("cpu", True, dead_feature_window=1000)
        batch = torch.randn(5, D_IN)
        trainer.step(batch)
        if dist.get_rank() == 1:
            trainer.sae.W_dec.register_post_accumulate_grad_hook(lambda weight: None)
        try:
            trainer.step(batch)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return "no error"


def test_a_hook_on_one_rank_alone_is_refused(two_ranks: Ranks) -> None:
    for error in two_ranks.call(with_hook_on_one_rank):
        assert error.startswith("ValueError: ranks differ")
        assert (
            "dead latents of a whole step, see accelerate is 0 on rank 0, None on rank 1" in error
        )
