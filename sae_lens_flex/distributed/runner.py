"""SAELens's training run, in each of several processes that train one SAE together."""

import copy
import hashlib
import json
import signal
from contextlib import closing, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import wandb
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner
from sae_lens.config import HfDataset
from sae_lens.constants import ACTIVATIONS_STORE_STATE_FILENAME, RUNNER_CFG_FILENAME
from sae_lens.llm_sae_training_runner import LLMSaeEvaluator
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig
from sae_lens.training import sae_trainer
from sae_lens.training._interruption import interrupt_callback
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.types import DataProvider
from safetensors.torch import load_file, save_file
from typing_extensions import override

from ..acceleration.prefetch import PrefetchingIterator
from ..saes.checks import check_sizes
from ..saes.registration import TOPK_TRAINING_CLASSES
from ..saes.sharded import shard, unshard
from .processes import Processes, join
from .trainer import ShardedSAETrainer

DATA_POSITIONS = "n_dataset_processed_by_rank"
# Runs of equal configs differ with another version of one of these.
PACKAGES = ("sae-lens", "torch", "transformer-lens", "transformers", "datasets", "triton")


class ShardedTrainingRunner(LanguageModelSAETrainingRunner):
    """
    SAELens's `LanguageModelSAETrainingRunner` in several processes, a GPU each.

        # torchrun --nproc-per-node 2 SCRIPT
        sae = sae_lens_flex.ShardedTrainingRunner(cfg).run()

    Config and files are those of a run of one process. `train_batch_size_tokens` and
    `training_tokens` count the tokens of all processes; `store_batch_size_prompts` and
    `n_batches_in_buffer` are each process's. A process has a language model of its own and its part
    of the text. It holds its part of the SAE's weights, gradients and Adam moments. Rank 0 alone
    writes, logs and shows progress.

    `run` returns the SAE in parts; `sae_lens_flex.unshard` makes it whole. The processes' group is
    torch's default one, which a script ends with `torch.distributed.destroy_process_group()`.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: HfDataset | None = None,
        override_model: Any | None = None,
        override_sae: TrainingSAE[Any] | None = None,
    ) -> None:
        if not isinstance(cfg, LanguageModelSAERunnerConfig):
            raise TypeError(
                f"cfg is a {type(cfg).__name__}, expected a LanguageModelSAERunnerConfig"
            )
        self.processes = processes = join(cfg.device)
        check_settings(cfg, processes, override_dataset)
        with processes.first_error_only(), processes.one_voice():
            cfg = _placed(cfg, processes)
            # The whole need not fit on a GPU. Weights that are drawn need no memory until then.
            is_drawn = override_sae is None and cfg.from_pretrained_path is None
            device, cfg.device = cfg.device, "meta" if is_drawn else "cpu"
            cfg.sae.device = cfg.device
            super().__init__(cfg, override_dataset, override_model, override_sae)
            cfg.sae.device = cfg.device = device
            processes.meet()
            whole: Any = self.sae
            # The SAE of `override_sae` or `from_pretrained_path` has a config of its own.
            _check_normalization(whole.cfg)
            self.sae = shard(whole, processes.mesh).to(device)  # rank 0's weights
            del whole
            self._share_data()
            self.evaluator: Any = EvaluatorOnRank0(self.evaluator, processes)
        if processes.rank > 0:
            # SAELens shuffles activations by torch's generator.
            torch.manual_seed((torch.initial_seed() + processes.rank) % 2**63)

    def _share_data(self) -> None:
        """Leave this process its part of the text and of the batch."""
        store, processes = self.activations_store, self.processes
        store.train_batch_size_tokens = processes.share(self.cfg.train_batch_size_tokens)
        if store.cached_activation_dataset is not None:
            store.cached_activation_dataset = part = _part(
                store.cached_activation_dataset, processes
            )
            rows = len(part)
            if rows < store.store_batch_size_prompts:
                raise ValueError(
                    f"cached_activations_path has {rows} prompts for rank {processes.rank}, "
                    f"expected at least store_batch_size_prompts ({store.store_batch_size_prompts})"
                )
            return
        # The store reads the dataset from here when the first batch is asked for.
        store.dataset = part = _part(store.dataset, processes)
        if next(iter(part), None) is None:
            raise ValueError(
                f"the dataset has no text for rank {processes.rank} of {processes.size} processes"
            )

    @override
    def run(self) -> TrainingSAE[Any]:
        """
        Train the SAE, and save it as the config says.

        Raises:
            SystemExit: another process failed first, which says why.
        """
        with self.processes.first_error_only(), self.processes.one_voice():
            return self._run()

    def _run(self) -> TrainingSAE[Any]:
        # As in SAELens's `run`, which makes its own trainer and writes in every process.
        cfg, store = self.cfg, self.activations_store
        self._set_sae_metadata()
        if cfg.logger.log_to_wandb:
            self._start_wandb()
        provider: DataProvider = store
        if cfg.prefetch_llm_batches:
            provider = PrefetchingIterator(iter(store), prefetch=int(cfg.prefetch_llm_batches))
        with closing(provider) if isinstance(provider, PrefetchingIterator) else nullcontext():
            trainer = ShardedSAETrainer(
                cfg=cfg.to_sae_trainer_config(),
                sae=self.sae,
                data_provider=provider,
                processes=self.processes,
                evaluator=self.evaluator,
                save_checkpoint_fn=self.save_checkpoint,
            )
            if cfg.resume_from_checkpoint is not None:
                check_sizes(self.sae.cfg, cfg.resume_from_checkpoint)
                trainer.load_trainer_state(cfg.resume_from_checkpoint)
                self.sae.load_weights_from_checkpoint(cfg.resume_from_checkpoint)
                self._resume_data(Path(cfg.resume_from_checkpoint))
                self.processes.meet()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, interrupt_callback)
            sae = trainer.fit()
            if cfg.output_path is not None:
                self.save_final_sae(sae, cfg.output_path, trainer.log_feature_sparsity)
            if cfg.logger.log_to_wandb:
                wandb.finish()
            return sae

    def _start_wandb(self) -> None:
        if self.processes.rank > 0:
            wandb.init(mode="disabled")
            return
        logger = self.cfg.logger
        wandb.init(
            project=logger.wandb_project,
            entity=logger.wandb_entity,
            config=self.cfg.to_dict(),
            name=logger.run_name,
            id=logger.wandb_id,
        )

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        """Write the data position of every process, and the config.

        The number of texts in SAELens's file is that of all processes together, from which a run of
        one process goes on.
        """
        if checkpoint_path is None:
            return
        positions = torch.tensor(self.processes.gather(self.activations_store.n_dataset_processed))
        if self.processes.rank > 0:
            return
        save_file(
            {"n_dataset_processed": positions.sum(), DATA_POSITIONS: positions},
            checkpoint_path / ACTIVATIONS_STORE_STATE_FILENAME,
        )
        (checkpoint_path / RUNNER_CFG_FILENAME).write_text(json.dumps(self.cfg.to_dict()))

    def _resume_data(self, checkpoint_path: Path) -> None:
        """Go on in this process's text where the checkpoint was written.

        With another number of processes than then, each skips its part of all the texts that were
        read. These are the same texts where `split_dataset_by_node` deals them out one by one, as
        it does with a stream that cannot be divided by files.
        """
        state = load_file(checkpoint_path / ACTIVATIONS_STORE_STATE_FILENAME)
        positions = state.get(DATA_POSITIONS, state["n_dataset_processed"].reshape(1)).tolist()
        if len(positions) == self.processes.size:
            mine = positions[self.processes.rank]
        else:
            mine = self.processes.share(sum(positions))
        with TemporaryDirectory() as directory:
            file = Path(directory, ACTIVATIONS_STORE_STATE_FILENAME)
            save_file({"n_dataset_processed": torch.tensor(mine)}, file)
            self.activations_store.load(str(file))

    @override
    def save_final_sae(
        self,
        sae: Any,
        output_path: str,
        log_feature_sparsity: torch.Tensor | None = None,
    ) -> None:
        whole = unshard(sae, device="cpu", keep=self.processes.rank == 0)
        if whole is not None:
            super().save_final_sae(whole, output_path, log_feature_sparsity)
        self.processes.meet()


def check_settings(
    cfg: LanguageModelSAERunnerConfig[Any],
    processes: Processes,
    dataset: HfDataset | None = None,
) -> None:
    """Raise ValueError, in every process, if they cannot train together with their configs."""
    processes.check_equal(_settings(cfg, dataset))
    architecture = cfg.sae.architecture()
    if architecture not in TOPK_TRAINING_CLASSES:
        raise ValueError(
            f"architecture is {architecture!r}, expected one of "
            f"{', '.join(TOPK_TRAINING_CLASSES)} to train in several processes"
        )
    if cfg.compile_sae:
        raise ValueError("compile_sae is True, expected False in several processes")
    _check_normalization(cfg.sae)
    if cfg.train_batch_size_tokens < processes.size:
        raise ValueError(
            f"train_batch_size_tokens is {cfg.train_batch_size_tokens}, expected at least "
            f"{processes.size}: it is the batch of all processes, of which each has a part"
        )
    if cfg.device not in DEVICES:
        raise ValueError(
            f"device is {cfg.device!r}, expected 'cpu' or 'cuda': each of several processes takes "
            "a GPU of its own"
        )
    own = ("cpu", *DEVICES[cfg.device])
    for name in ("llm_device", "act_store_device"):
        if getattr(cfg, name) not in own:
            raise ValueError(
                f"{name} is {getattr(cfg, name)!r}, expected one of {own}: each of several "
                "processes has its language model and its SAE on one GPU"
            )


def _check_normalization(cfg: TrainingSAEConfig) -> None:
    if cfg.normalize_activations == "covariance_whitening":
        raise ValueError(
            "normalize_activations is 'covariance_whitening', which several processes cannot train "
            "with: unwhitening mixes the columns of W_dec, which lie in different processes"
        )


# A config for one GPU may name it by its number.
DEVICES = {"cpu": ("cpu",), "cuda": ("cuda", "cuda:0"), "cuda:0": ("cuda", "cuda:0")}


def _placed(
    cfg: LanguageModelSAERunnerConfig[Any], processes: Processes
) -> LanguageModelSAERunnerConfig[Any]:
    """Return the config of this process: on its own device, with the directory of rank 0."""
    cfg = copy.copy(cfg)
    cfg.sae = copy.copy(cfg.sae)
    for name in ("device", "llm_device", "act_store_device"):
        if getattr(cfg, name) != "cpu":
            setattr(cfg, name, processes.device)
    # SAELens puts a name that it draws at the end of this path.
    cfg.checkpoint_path = processes.gather(cfg.checkpoint_path)[0]
    return cfg


def _settings(cfg: LanguageModelSAERunnerConfig[Any], dataset: HfDataset | None) -> dict[str, Any]:
    """Return what has to be the same in all processes."""
    from .. import __version__  # It is set after this module has been imported.

    fields = cfg.to_dict()
    settings: dict[str, Any] = {}
    for part in ("sae", "logger"):
        settings |= {f"{part}.{name}": value for name, value in fields.pop(part).items()}
    del settings["logger.run_name"]  # Rank 0 alone has use for it.
    if cfg.checkpoint_path is not None and cfg.logger.wandb_id is None:
        fields["checkpoint_path"] = str(Path(cfg.checkpoint_path).parent)
    settings |= fields
    settings |= {f"version of {name}": _version(name) for name in PACKAGES}
    settings |= {
        "version of sae-lens-flex": __version__,
        "optimizer": sae_trainer.Adam.__name__,
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "override_dataset": type(dataset).__name__,
    }
    if isinstance(dataset, Dataset):
        settings["override_dataset"] = f"{len(dataset)} rows of {dataset.column_names}"
        # As they are stored: without a transform, and images before they are decoded.
        stored: Any = dataset.with_format("arrow")
        for row in sorted({0, len(dataset) // 2, len(dataset) - 1}) if len(dataset) > 0 else ():
            content = repr(stored[row : row + 1].to_pylist())
            digest = hashlib.sha256(content.encode()).hexdigest()[:8]
            settings[f"a hash of row {row} of override_dataset"] = digest
    if cfg.resume_from_checkpoint is not None:
        files = Path(cfg.resume_from_checkpoint).glob("*")
        settings["resume_from_checkpoint"] = sorted((f.name, f.stat().st_size) for f in files)
    return settings


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _part(dataset: Any, processes: Processes) -> Any:
    """Return this process's part of a dataset."""
    if isinstance(dataset, Dataset) and len(dataset) < processes.size:
        raise ValueError(
            f"the dataset has {len(dataset)} rows, expected at least {processes.size}, one for "
            "each process"
        )
    return split_dataset_by_node(dataset, rank=processes.rank, world_size=processes.size)


class EvaluatorOnRank0:
    """SAELens's evaluator on rank 0, while the others wait. The SAE has to fit there as a whole."""

    def __init__(self, evaluator: LLMSaeEvaluator[Any], processes: Processes) -> None:
        self._evaluator = evaluator
        self._processes = processes

    def __call__(
        self,
        sae: Any,
        data_provider: DataProvider,
        activation_scaler: ActivationScaler,
    ) -> dict[str, Any]:
        whole = unshard(sae, device=sae.device, keep=self._processes.rank == 0)
        metrics = {}
        if whole is not None:
            metrics = self._evaluator(whole, data_provider, activation_scaler)
        self._processes.meet()
        return metrics
