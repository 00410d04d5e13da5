"""Training on given batches, in one process or in several that share each batch."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens import LoggingConfig, SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.training import sae_trainer

from sae_lens_flex import shard, unshard
from sae_lens_flex.distributed.processes import Processes
from sae_lens_flex.distributed.runner import EvaluatorOnRank0
from sae_lens_flex.distributed.trainer import ShardedSAETrainer

# Nothing divides by 2 and by 3.
D_IN, D_SAE, K = 13, 50, 5
BATCH_SIZE, N_STEPS, N_STATISTICS = 11, 12, 3


def batches(n: int = N_STEPS, seed: int = 1) -> list[torch.Tensor]:
    """Return batches of all processes, [BATCH_SIZE, D_IN] each."""
    generator = torch.Generator().manual_seed(seed)
    return list(3 * torch.randn(n, BATCH_SIZE, D_IN, generator=generator, dtype=torch.float64))


def part(batch: torch.Tensor, processes: Processes | None) -> torch.Tensor:
    """Return the rows of this process."""
    if processes is None:
        return batch
    sizes = processes.gather(processes.share(len(batch)))
    return batch.split(sizes)[processes.rank]


def new_sae(architecture: str, **fields: Any) -> Any:
    """Make an SAE of which a third of the latents never fires."""
    torch.manual_seed(0)
    cfg = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "k": K, "dtype": "float64"}
    sae: Any = TrainingSAE.from_dict(TrainingSAEConfig.from_dict(cfg | fields).to_dict())
    sae.b_enc.data[: D_SAE // 3] = -100.0
    return sae


def new_trainer(
    sae: Any,
    data: list[torch.Tensor],
    processes: Processes | None,
    checkpoint_path: Path | None = None,
) -> SAETrainer[Any, Any]:
    """Make SAELens's trainer, or the one of a process among several."""
    cfg = SAETrainerConfig(
        n_checkpoints=2 if checkpoint_path else 0,
        checkpoint_path=str(checkpoint_path) if checkpoint_path else None,
        save_final_checkpoint=False,
        total_training_samples=N_STEPS * BATCH_SIZE,
        device="cpu",
        autocast=False,
        lr=1e-2,
        lr_end=1e-3,
        lr_scheduler_name="constant",
        lr_warm_up_steps=3,
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=4,
        n_restart_cycles=1,
        train_batch_size_samples=BATCH_SIZE,
        dead_feature_window=2,
        feature_sampling_window=5,
        logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=2, eval_every_n_wandb_logs=2),
        n_batches_for_norm_estimate=N_STATISTICS,
    )
    cfg.logger.log = lambda *args, **kwargs: None  # type: ignore[method-assign]
    provider: Iterator[torch.Tensor] = iter([part(batch, processes) for batch in data])
    if processes is None:
        return SAETrainer(cfg, sae, provider, evaluate)
    return ShardedSAETrainer(
        cfg,
        shard(sae, processes.mesh),
        provider,
        processes,
        EvaluatorOnRank0(evaluate, processes),
    )


@torch.no_grad()
def evaluate(sae: Any, provider: Any, scaler: Any) -> dict[str, Any]:
    """Return the error of the SAE's `forward`, on the same activations every time."""
    x = scaler(torch.cat(batches(2, seed=2)))
    return {"metrics/evaluated": (sae(x) - x).square().mean().item()}


def fit(trainer: SAETrainer[Any, Any]) -> dict[str, Any]:
    """Train; return what was logged, and what a trainer has in the end."""
    logged: list[dict[str, Any]] = []
    wandb = SimpleNamespace(
        log=lambda figures, step: logged.append({"step": step, **figures}), Histogram=torch.tensor
    )
    real_wandb, sae_trainer.wandb = sae_trainer.wandb, wandb  # type: ignore[assignment]
    try:
        sae = trainer.fit()
    finally:
        sae_trainer.wandb = real_wandb
    if isinstance(trainer, ShardedSAETrainer):
        sae = unshard(sae)
    return {
        "logged": logged,
        "weights": {name: weight.clone() for name, weight in sae.state_dict().items()},
        "metadata": (sae.cfg.metadata.l0, sae.cfg.metadata.num_dead_features),
        "samples": trainer.n_training_samples,
        "steps": trainer.n_training_steps,
        "firing": trainer.act_freq_scores,
        "since fired": trainer.n_forward_passes_since_fired,
        "active samples": trainer.n_frac_active_samples,
        "normalization": sae.cfg.normalize_activations,
    }


def assert_close(actual: Any, expected: Any, rtol: float = 1e-9, where: str = "") -> None:
    """Check nested containers of numbers and tensors for equality up to rounding.

    Args:
        rtol: relative error of float64 numbers.
    """
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys(), where
        for name in expected:
            assert_close(actual[name], expected[name], rtol, f"{where}/{name}")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), where
        for index, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            assert_close(ours, theirs, rtol, f"{where}/{index}")
    elif isinstance(expected, (float, torch.Tensor)):
        ours, theirs = torch.as_tensor(actual), torch.as_tensor(expected)
        # SAELens makes some of its figures float32.
        tolerances = {} if theirs.dtype == torch.float32 else {"rtol": rtol, "atol": rtol / 100}
        torch.testing.assert_close(
            ours, theirs.to(ours.dtype), msg=lambda message: f"{where}: {message}", **tolerances
        )
    else:
        assert actual == expected, where
