"""What a process does for a unit: it makes activations, and trains and measures SAEs on them."""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from sae_lens import SAE, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE
from sae_lens.saes.sae import SAEMetadata, TrainingSAE

import sae_lens_flex
from sae_lens_flex import (
    FlexTopKTrainingSAE,
    FlexTopKTrainingSAEConfig,
    HierarchicalTopKSAE,
    HierarchicalTopKSAEConfig,
    MeanBudget,
)

from .kinds import Kind
from .sources import Source, budgets_of


@dataclass(frozen=True)
class Training:
    """
    How every SAE of a unit is trained.

    Args:
        d_sae (int): Latents in the dictionary.
        samples (int): Activations to train on; the source's are repeated where it has fewer.
        batch (int): Activations in a batch.
        device (str): Where it runs.
        autocast (bool): Whether matrix products are in bfloat16.
        tuning (int): Activations on which a decoder is trained on for each budget, 0 for none.
    """

    d_sae: int
    samples: int
    batch: int
    device: str
    autocast: bool
    tuning: int

    def schedule(self, longer: int = 1) -> dict[str, int]:
        """Return warm-up, decay, and after how many steps without firing a latent is dead."""
        steps = longer * self.samples // self.batch
        return {
            "lr_warm_up_steps": steps // 20,
            "lr_decay_steps": steps // 5,
            "dead_feature_window": max(1, steps // longer // 10),
        }


def topk_with_free_decoder(sae: SAE[Any], k: int) -> FlexTopKTrainingSAE:
    """Return a TopK SAE that reconstructs as this one does with k latents; its encoder is frozen.

    Neither the decoder's norms nor b_dec have a part in its encoder. So what it encodes stays the
    same whatever its decoder becomes. The decoder's rows begin with norm 1 where norms were folded.

    Args:
        sae: a TopK SAE, or one of `hierarchical_topk`.
        k: latents to keep.
    """
    weights = {name: each.detach().clone() for name, each in sae.state_dict().items()}
    if sae.cfg.rescale_acts_by_decoder_norm:
        norms = weights["W_dec"].norm(dim=-1)
        weights["W_enc"] *= norms
        weights["b_enc"] *= norms
        weights["W_dec"] /= norms[:, None]
    if sae.cfg.apply_b_dec_to_input:
        weights["b_enc"] -= weights["b_dec"] @ weights["W_enc"]
    topk = FlexTopKTrainingSAE(
        FlexTopKTrainingSAEConfig(
            d_in=sae.cfg.d_in,
            d_sae=sae.cfg.d_sae,
            k=k,
            device=sae.cfg.device,
            apply_b_dec_to_input=False,
            rescale_acts_by_decoder_norm=False,
            aux_loss_coefficient=0,  # it would revive latents through their encoder
            metadata=sae.cfg.metadata,
        )
    )
    topk.load_state_dict(weights)
    topk.W_enc.requires_grad_(False)
    topk.b_enc.requires_grad_(False)
    return topk


class Worker:
    """
    Args:
        make_source: makes the source of the activations.
        training: how every SAE is trained.
    """

    def __init__(self, make_source: Callable[[], Source], training: Training):
        torch.set_float32_matmul_precision("high")
        self.source, self.training = make_source(), training

    def collect(self, part: int) -> None:
        self.source.collect(part)

    def about(self) -> dict[str, Any]:
        return self.source.about

    def train(self, kind: Kind, lr: float, seed: int, path: Path) -> dict[str, Any]:
        """Train an SAE by SAELens's trainer, save it for inference, and say how it went."""
        # Trainers are in reference cycles, and their recorded steps hold the GPU's memory.
        gc.collect()
        training = self.training
        torch.manual_seed(seed)
        sae: Any = TrainingSAE.from_dict(
            {
                "architecture": kind.architecture,
                "d_in": self.source.validation.shape[1],
                "d_sae": training.d_sae,
                "k": kind.k,
                "device": training.device,
                # One learning rate then means the same for activations of any scale.
                "normalize_activations": "expected_average_only_in",
                **kind.fields,
            }
        )
        sae.cfg.metadata = SAEMetadata(**self.source.metadata)
        samples, schedule = kind.longer * training.samples, training.schedule(kind.longer)
        trainer, seconds = self._fit(sae, samples, lr, seed, schedule)
        # For BatchTopK only saving and loading makes the SAE that a user gets.
        trainer.sae.save_inference_model(path)
        variances = self._validate(self._load(path), kind)
        return {
            "kind": kind.name,
            "architecture": kind.architecture,
            "seed": seed,
            "lr": lr,
            "seconds": round(seconds, 2),
            "dead_in_training": int(trainer.dead_neurons.sum()),
            "validation": sum(variances) / len(variances),
            "validation_at_budgets": variances,
        }

    def _fit(
        self, sae: TrainingSAE[Any], samples: int, lr: float, seed: int, schedule: dict[str, int]
    ) -> tuple[SAETrainer[Any, Any], float]:
        """Train an SAE by SAELens's trainer. Return the trainer and how many seconds it took."""
        training = self.training
        cfg = SAETrainerConfig(
            total_training_samples=samples,
            train_batch_size_samples=training.batch,
            lr=lr,
            lr_end=lr / 10,
            device=training.device,
            autocast=training.autocast,
            n_batches_for_norm_estimate=20,
            **schedule,
        )
        with sae_lens_flex.accelerate():
            trainer = SAETrainer(cfg, sae, self.source.batches(training.batch, seed))
            started = perf_counter()
            trainer.fit()
            if training.device.startswith("cuda"):
                torch.cuda.synchronize()
            return trainer, perf_counter() - started

    def _tuned(
        self, sae: SAE[Any], budget: int, known: dict[str, Any], path: Path
    ) -> tuple[SAE[Any], float]:
        """Return a TopK SAE with the encoder of this one, and its decoder trained on for a budget.

        The learning rate is returned, too: that of the SAE or a quarter of it, whichever explains
        more of the validation activations.

        Args:
            sae: of `hierarchical_topk`.
            budget: latents that the TopK SAE keeps.
            known: what `train` returned of the SAE.
            path: a directory for the TopK SAEs.
        """
        steps = self.training.tuning // self.training.batch
        schedule = {
            "lr_warm_up_steps": steps // 20,
            "lr_decay_steps": steps - steps // 20,
            "dead_feature_window": steps + 1,
        }
        tried = []
        for lr in (known["lr"], known["lr"] / 4):
            gc.collect()
            topk = topk_with_free_decoder(sae, budget)
            # Another seed than its own: else the batches that it saw first would come again.
            self._fit(topk, self.training.tuning, lr, known["seed"] + 1000, schedule)
            topk.save_inference_model(path / f"{lr:g}")
            tuned = self._load(path / f"{lr:g}")
            tried.append((self._explained_variances(tuned, None)[0], tuned, lr))
        _, tuned, lr = max(tried, key=lambda each: each[0])
        return tuned, lr

    def measure(self, kind: Kind, known: dict[str, Any], path: Path) -> list[dict[str, Any]]:
        """Return the metrics on the test at every budget, and at thresholds of the same means.

        Of one SAE for all budgets also those with a decoder that is trained on for each of them.

        Args:
            kind: of the SAE.
            known: what `train` returned.
            path: where it lies.
        """
        sae = self._load(path)
        if kind.architecture == "flex_topk":
            sae = sae_lens_flex.from_topk(sae)
        with_thresholds = as_hierarchical(sae) if isinstance(sae, JumpReLUSAE) else sae
        budgets = budgets_of(sae, kind.budgets)
        means, thresholds = [], []
        for k in thresholded(kind):
            try:
                budget = sae_lens_flex.mean_budget(with_thresholds, self.source.validation, k)
            except ValueError as error:  # as where fewer latents are positive
                print(f"{kind.name} has no threshold for {k}: {error}", flush=True)
                continue
            means.append(k)
            thresholds.append(budget)
        if with_thresholds is sae:
            rows = self.source.measure(sae, [*budgets, *thresholds])
        else:
            rows = self.source.measure(sae, budgets)
            rows += self.source.measure(with_thresholds, thresholds)
        of_thresholds = [row for row in rows if row["threshold"] is not None]
        for row, k in zip(of_thresholds, means, strict=True):
            row["mean"] = k
        if kind.architecture == "hierarchical_topk" and self.training.tuning:
            for k in kind.budgets:
                tuned, lr = self._tuned(sae, k, known, path / f"tuned_{k}")
                (row,) = self.source.measure(tuned, [None])
                rows.append(row | {"budget": k, "tuned": self.training.tuning, "tuning_lr": lr})
        return rows

    def _load(self, path: Path) -> Any:
        return SAE.load_from_disk(path, device=self.training.device)

    def _validate(self, sae: Any, kind: Kind) -> list[float]:
        """Return the explained variance at each budget, whose mean decides a learning rate.

        What is trained for a mean number of latents is compared at equal means.
        """
        if not isinstance(sae, JumpReLUSAE):
            is_of_all = kind.architecture == "hierarchical_topk"
            return self._explained_variances(sae, kind.budgets if is_of_all else None)
        sae = as_hierarchical(sae)
        try:
            budget = sae_lens_flex.mean_budget(sae, self.source.validation, kind.k)
        except ValueError:  # Fewer latents are positive, so all of them count.
            budget = MeanBudget(mean=kind.k, threshold=0)
        return self._explained_variances(sae, [budget])

    def _explained_variances(self, sae: Any, budgets: Any) -> list[float]:
        """Return what an SAE explains of the validation activations at each budget."""
        rows = sae_lens_flex.sweep_budgets(
            sae, self.source.validation.split(8192), budgets=budgets, show_progress=False
        ).metrics
        return [row.explained_variance for row in rows]


def thresholded(kind: Kind) -> list[int]:
    """Return the mean budgets that a kind is measured at: of an SAE for one k that alone."""
    return kind.budgets if kind.architecture == "hierarchical_topk" else [kind.k]


def as_hierarchical(sae: JumpReLUSAE) -> HierarchicalTopKSAE:
    """Return an SAE that takes any threshold in place of the one that BatchTopK learned."""
    names = ("d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input", "normalize_activations")
    own = {name: getattr(sae.cfg, name) for name in (*names, "metadata")}
    cfg = HierarchicalTopKSAEConfig(k=sae.cfg.d_sae, rescale_acts_by_decoder_norm=False, **own)
    weights = sae.state_dict()
    del weights["threshold"]
    hierarchical = HierarchicalTopKSAE(cfg)
    hierarchical.load_state_dict(weights)
    return hierarchical
