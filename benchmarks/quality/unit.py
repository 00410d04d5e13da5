"""A unit of the comparison: some kinds of SAEs, trained and measured with one seed."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sae_lens import SAE, SAETrainer
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import SAEMetadata, TrainingSAE
from sae_lens.saes.topk_sae import TopKSAE

import sae_lens_flex

from .kinds import Kind
from .sources import Source, budgets_of, settled


@dataclass(frozen=True)
class Training:
    """
    How every SAE of a unit is trained.

    Args:
        d_sae (int): Latents in the dictionary.
        samples (int): Activations to train on; the source's are repeated where it has fewer.
        batch (int): Activations in a batch.
        seed (int): Of the initial weights and the order of the activations.
        device (str): Where it runs.
        autocast (bool): Whether matrix products are in bfloat16.
    """

    d_sae: int
    samples: int
    batch: int
    seed: int
    device: str
    autocast: bool

    def schedule(self) -> dict[str, int]:
        """Return warm-up, decay, and after how many steps without firing a latent is dead."""
        steps = self.samples // self.batch
        return {
            "lr_warm_up_steps": steps // 20,
            "lr_decay_steps": steps // 5,
            "dead_feature_window": max(1, steps // 10),
        }


def batches(x: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield batches of x [n, d_in] in a random order, another one in each epoch."""
    generator = torch.Generator(x.device).manual_seed(seed)
    while True:
        for rows in torch.randperm(len(x), generator=generator, device=x.device).split(size):
            if len(rows) == size:
                yield x[rows].float()


def train(kind: Kind, lr: float, source: Source, training: Training) -> tuple[Any, dict[str, Any]]:
    """Train an SAE by SAELens's trainer. Return it for inference, and what is known of it."""
    torch.manual_seed(training.seed)
    sae = TrainingSAE.from_dict(
        {
            "architecture": kind.architecture,
            "d_in": source.train.shape[1],
            "d_sae": training.d_sae,
            "k": kind.k,
            "device": training.device,
            # One learning rate then means the same for activations of any scale.
            "normalize_activations": "expected_average_only_in",
            **kind.fields,
        }
    )
    sae.cfg.metadata = SAEMetadata(**source.metadata)
    cfg = SAETrainerConfig(
        total_training_samples=training.samples,
        train_batch_size_samples=training.batch,
        lr=lr,
        lr_end=lr / 10,
        device=training.device,
        autocast=training.autocast,
        n_batches_for_norm_estimate=20,
        **training.schedule(),
    )
    is_cuda = training.device.startswith("cuda")
    stream = batches(source.train, training.batch, training.seed)
    with sae_lens_flex.accelerate():
        trainer = SAETrainer(cfg, sae, stream)
        started = time.perf_counter()
        trainer.fit()
        if is_cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
    # For BatchTopK only saving and loading makes the SAE that a user gets.
    with TemporaryDirectory() as path:
        trainer.sae.save_inference_model(path)
        inference = SAE.load_from_disk(path, device=training.device)
    known = {
        "kind": kind.name,
        "seed": training.seed,
        "lr": lr,
        "seconds": round(seconds, 2),
        "dead_in_training": int(trainer.dead_neurons.sum()),
    }
    return inference, known


def validate(sae: Any, kind: Kind, source: Source) -> float:
    """Return the explained variance by which a learning rate is chosen: the budgets' mean."""
    budgets = kind.budgets if kind.architecture == "hierarchical_topk" else None
    rows = sae_lens_flex.sweep_budgets(
        sae, source.validation.split(8192), budgets=budgets, show_progress=False
    ).metrics
    return sum(row.explained_variance for row in rows) / len(rows)


def at_every_budget(sae: Any, kind: Kind) -> Any:
    """Return an SAE that can be measured at all of the kind's budgets."""
    if isinstance(sae, TopKSAE) and len(kind.budgets) > 1 and kind.architecture == "flex_topk":
        return sae_lens_flex.from_topk(sae)
    return sae


def run_unit(
    kinds: list[Kind],
    learning_rates: Callable[[Kind], list[float]],
    source: Source,
    training: Training,
    write: Callable[[dict[str, Any]], None],
    extensions: int = 2,
) -> dict[str, Any]:
    """Train each kind at its learning rates and measure the best of them on the test.

    Where the best learning rate is the grid's smallest or largest, the grid is extended by a factor
    of 2, `extensions` times at most. `write` is called with the results so far after each kind.
    """
    tried: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    for kind in kinds:
        best: tuple[float, Any, dict[str, Any]] | None = None
        grid = sorted(learning_rates(kind))
        rates, extended = list(grid), 0
        while rates:
            for lr in rates:
                sae, known = train(kind, lr, source, training)
                known["validation"] = validate(sae, kind, source)
                tried.append(known)
                if best is None or known["validation"] > best[0]:
                    best = known["validation"], sae, known
            rates = []
            assert best is not None
            lr = best[2]["lr"]
            if len(grid) > 1 and extended < extensions and lr in (grid[0], grid[-1]):
                rates = [lr / 2 if lr == grid[0] else lr * 2]
                grid = sorted(grid + rates)
                extended += 1
        assert best is not None
        sae = at_every_budget(best[1], kind)
        rows = source.measure(sae, budgets_of(sae, kind.budgets))
        measured.append(best[2] | {"k": kind.k, "metrics": rows})
        write({"tried": tried, "measured": settled(measured, waits=False)})
        print(summary(measured[-1]), flush=True)
    result = {"tried": tried, "measured": settled(measured, waits=True)}
    write(result)
    return result


def summary(one: dict[str, Any]) -> str:
    values = " ".join(
        f"{row['budget'] or round(row['l0'], 1)}:{row['explained_variance']:.4f}"
        for row in one["metrics"]
    )
    return f"{one['kind']} lr {one['lr']:g} {one['seconds']:.0f} s  {values}"


def chosen_rates(paths: list[Path]) -> Callable[[Kind], list[float]]:
    """Return the learning rate of each kind that earlier units chose."""
    units = [json.loads(path.read_text()) for path in paths]
    chosen = {one["kind"]: one["lr"] for unit in units for one in unit["measured"]}
    return lambda kind: [chosen[kind.name]]
