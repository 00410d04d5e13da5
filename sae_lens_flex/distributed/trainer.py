"""SAELens's trainer, in each of several processes that train one SAE together."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAE, TrainStepOutput
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import Evaluator, SAETrainer, SaveCheckpointFn
from sae_lens.training.types import DataProvider
from typing_extensions import override

from ..saes.sharded import unshard
from ..training.shards import Split
from .checkpoints import taking_shares, whole_state, written_aside
from .processes import Processes


class ShardedSAETrainer(SAETrainer[Any, Any]):
    """
    SAELens's trainer for an SAE whose weights lie in parts in several processes.

    Each process has its own activations and calls `step` with them. The SAE's losses and
    `feature_acts` are those of all activations, and torch's Adam and gradient clipping know parts
    of weights. So the training loop and the firing statistics are SAELens's. Its methods are
    overridden where they would take one process's activations, weights or moments for all.
    """

    sae: Any

    def __init__(
        self,
        cfg: SAETrainerConfig,
        sae: Any,
        data_provider: DataProvider,
        processes: Processes,
        evaluator: Evaluator[Any] | None = None,
        save_checkpoint_fn: SaveCheckpointFn | None = None,
    ) -> None:
        super().__init__(cfg, sae, data_provider, evaluator, save_checkpoint_fn)
        self.processes = processes
        self.activation_scaler = _ScalerOfAll(processes, cfg.train_batch_size_samples)

    @override
    def step(self, batch: torch.Tensor) -> TrainStepOutput:
        output = super().step(batch)
        # SAELens has counted this process's activations, [batch, d_in].
        self.n_training_samples += output.feature_acts.shape[0] - batch.shape[0]
        return output

    @override
    def build_train_step_log_dict(
        self, output: TrainStepOutput, n_training_samples: int
    ) -> dict[str, Any]:
        # Explained variance is a ratio of means over all activations.
        whole = replace(
            output, sae_in=self._of_all(output.sae_in), sae_out=self._of_all(output.sae_out)
        )
        return super().build_train_step_log_dict(whole, n_training_samples)

    def _of_all(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all processes, [n, d], in the order of the ranks."""
        samples = Split(tuple(self.processes.gather(len(rows))))
        return replace(self.sae._shards, samples=samples).all_samples(rows)

    @override
    def save_checkpoint(
        self,
        checkpoint_name: str,
        base_path: Path | str | None = None,
        wandb_aliases: list[str] | None = None,
    ) -> None:
        base = self.cfg.checkpoint_path if base_path is None else base_path
        if base is None and not self.cfg.logger.log_to_wandb:
            return
        is_rank_0 = self.processes.rank == 0
        sae = unshard(self.sae, device="cpu", keep=is_rank_0)
        state = whole_state(self.optimizer, keep=is_rank_0)
        if base is None:
            if is_rank_0:
                with self._as_one_process(sae, state):
                    super().save_checkpoint(checkpoint_name, None, wandb_aliases)
            self.processes.meet()
            return
        path = Path(base, checkpoint_name)
        with written_aside(path) if is_rank_0 else nullcontext(path) as directory:
            if is_rank_0:
                with self._as_one_process(sae, state):
                    super().save_checkpoint(directory.name, directory.parent, wandb_aliases)
            self.processes.meet()
            if self.save_checkpoint_fn is not None:
                self.save_checkpoint_fn(checkpoint_path=directory)

    @contextmanager
    def _as_one_process(
        self, sae: TrainingSAE[Any], optimizer_state: dict[str, Any]
    ) -> Iterator[None]:
        """Show SAELens's methods in the block what a run of one process would have."""
        mine = self.sae, self.optimizer, self.save_checkpoint_fn
        optimizer: Any = SimpleNamespace(state_dict=lambda: optimizer_state)
        self.sae, self.optimizer, self.save_checkpoint_fn = sae, optimizer, None
        try:
            yield
        finally:
            self.sae, self.optimizer, self.save_checkpoint_fn = mine

    @override
    def load_trainer_state(self, checkpoint_path: Path | str) -> None:
        device = self.cfg.device
        # SAELens would read the optimizer's whole state into the memory of the GPU.
        self.cfg.device = "cpu"
        try:
            with taking_shares(self.optimizer):
                super().load_trainer_state(checkpoint_path)
        finally:
            self.cfg.device = device
        self.act_freq_scores = self.act_freq_scores.to(device)
        self.n_forward_passes_since_fired = self.n_forward_passes_since_fired.to(device)


class _ScalerOfAll(ActivationScaler):
    """SAELens's ActivationScaler, with the mean norm of all processes' activations."""

    def __init__(self, processes: Processes, n_samples: int) -> None:
        super().__init__()
        self._processes = processes
        self._n_samples = n_samples

    @override
    def estimate_scaling_factor(
        self,
        d_in: int,
        data_provider: DataProvider,
        n_batches_for_norm_estimate: int = 1000,
    ) -> None:
        super().estimate_scaling_factor(d_in, data_provider, n_batches_for_norm_estimate)
        assert self.scaling_factor is not None
        norm = d_in**0.5 / self.scaling_factor
        weight = self._processes.share(self._n_samples)
        everyones = self._processes.gather((norm, weight))
        mean_norm = sum(norm * weight for norm, weight in everyones) / self._n_samples
        self.scaling_factor = d_in**0.5 / mean_norm
