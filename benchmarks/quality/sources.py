"""Where activations come from, and how an SAE is measured on them.

A source holds three parts of one stream, which share nothing: activations to train on, others by
which a learning rate is chosen, and a test, whose results are reported.
"""

import json
import math
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore, LanguageModelSAERunnerConfig
from sae_lens.load_model import load_model
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from sae_lens.synthetic.evals import (
    ClassificationMetricsCalculator,
    feature_uniqueness,
    mean_correlation_coefficient,
)
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from sae_lens_flex import HierarchicalTopKTrainingSAEConfig
from sae_lens_flex.evals.batches import ModelBatch, ModelRuns, tokens_to_ignore
from sae_lens_flex.evals.metrics import Totals
from sae_lens_flex.evals.reconstruction import reconstruct
from sae_lens_flex.saes.budgets import RuntimeBudget

# Activations whose norm is so many times the median are left out. In SmolLM2 these are BOS and some
# separators; their squared norms would be most of what an SAE is trained on and measured by.
EXTREME = 10

# A true feature counts as found where a decoder row has this cosine with it.
FOUND = 0.9


class Sizes(NamedTuple):
    """How many activations each part has."""

    train: int
    validation: int
    test: int


class Source(Protocol):
    """
    Attributes:
        about: what the activations are, for the result.
        metadata: fields of the SAE's metadata.
        train, validation: activations, [n, d_in].
    """

    about: dict[str, Any]
    metadata: dict[str, Any]
    train: torch.Tensor
    validation: torch.Tensor

    def measure(self, sae: SAE[Any], budgets: list[int | None]) -> list[dict[str, Any]]:
        """Return the metrics of an SAE on the test, at each budget."""
        ...


# --- language models


def model_config(
    model: str, hook_name: str, d_in: int, d_sae: int, k: int, context: int, device: str
) -> LanguageModelSAERunnerConfig[Any]:
    """Return a run of SAELens on a language model of Hugging Face's."""
    return LanguageModelSAERunnerConfig(
        sae=HierarchicalTopKTrainingSAEConfig(d_in=d_in, d_sae=d_sae, k=k),
        model_name=model,
        model_class_name="AutoModelForCausalLM",
        model_from_pretrained_kwargs={"dtype": "float32"},
        hook_name=hook_name,
        dataset_path="",
        context_size=context,
        store_batch_size_prompts=max(1, 16384 // context),
        train_batch_size_tokens=4096 if device.startswith("cuda") else 1024,
        exclude_special_tokens=True,
        device=device,
        autocast=device.startswith("cuda"),
    )


def token_dataset(path: Path) -> Dataset:
    """Return the rows of tokens that `benchmarks.quality.text` wrote."""
    rows = np.load(path, mmap_mode="r")

    def generate() -> Iterator[dict[str, Any]]:
        for row in rows:
            yield {"input_ids": row.astype(np.int32)}

    return Dataset.from_generator(generate, keep_in_memory=True)  # pyright: ignore


class LanguageModelSource:
    """
    Activations of a language model, as a run of SAELens would train on them.

    Activations of extreme norm are left out of every part. Where the model runs on reconstructions,
    they keep the model's own.

    Args:
        cfg: the run. Its SAE gives d_in only.
        sizes: how many activations each part has; that of the test counts whole prompts.
        dataset: in place of the config's.
        cache: a file for the activations, which is read if it exists and written if not.
        text: what the text is, for the result.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        sizes: Sizes,
        dataset: Dataset | None = None,
        cache: Path | None = None,
        text: Any = None,
    ):
        self.metadata = {"hook_name": cfg.hook_name}
        self.model = load_model(
            cfg.model_class_name,
            cfg.model_name,
            device=cfg.device,
            model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
            hook_names=[cfg.hook_name],
        )
        self.store = ActivationsStore.from_config(self.model, cfg, override_dataset=dataset)
        has_tokenizer = getattr(self.model, "tokenizer", None) is not None
        self.ignored = tokens_to_ignore(self.model, True) if has_tokenizer else []

        def prompts(n: int) -> torch.Tensor:
            return self.store.get_batch_tokens(math.ceil(n / cfg.context_size))

        validation, self.test = prompts(sizes.validation), prompts(sizes.test)
        batch = self.store.store_batch_size_prompts
        acts = [self._activations(tokens) for tokens in validation.split(batch)]
        norms = torch.cat(acts).norm(dim=-1)
        self.max_norm = EXTREME * float(norms.median())
        self.validation = torch.cat(acts)[norms <= self.max_norm]
        if cache is not None and cache.exists():
            saved = load_file(cache, device=str(self.store.device))
            self.train = saved["train"]
            left_out, self.max_norm = saved["left_out_and_max_norm"].tolist()
        else:
            self.train, left_out = self._collect(sizes.train)
            if cache is not None:
                # Under another name first: what exists is whole.
                numbers = torch.tensor([left_out, self.max_norm], dtype=torch.float64)
                saved = {"train": self.train, "left_out_and_max_norm": numbers}
                save_file(saved, cache.with_suffix(".part"))
                cache.with_suffix(".part").rename(cache)
        self.about = {
            "model": Path(cfg.model_name).name if Path(cfg.model_name).exists() else cfg.model_name,
            "hook_name": cfg.hook_name,
            "text": text or cfg.dataset_path,
            "context_size": cfg.context_size,
            "train": len(self.train),
            "validation": len(self.validation),
            "test_tokens": self.test.numel(),
            "max_norm": self.max_norm,
            "left_out": left_out,
        }

    def _activations(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the activations of tokens that are not special, [n, d_in]."""
        acts = self.store.get_activations(tokens).flatten(0, 1)
        tokens = tokens[:, slice(*self.store.seqpos_slice)].flatten()
        ignored = torch.tensor(self.ignored, dtype=tokens.dtype, device=tokens.device)
        return acts[~torch.isin(tokens, ignored).to(acts.device)]

    def _collect(self, n: int) -> tuple[torch.Tensor, float]:
        """Return n activations, or as many as the text has, and the share that is left out."""
        # The model's precision is not float32's: bfloat16 halves the memory.
        dtype = torch.bfloat16 if self.store.device.type == "cuda" else torch.float32
        kept = torch.empty(n, self.store.d_in, dtype=dtype, device=self.store.device)
        filled = seen = n_kept = 0
        bar = tqdm(total=n, desc="Activations")
        while filled < n:
            try:
                tokens = self.store.get_batch_tokens(raise_at_epoch_end=True)
            except StopIteration:
                break
            acts = self._activations(tokens)
            acts = acts[acts.norm(dim=-1) <= self.max_norm]
            seen += tokens.numel()
            new = acts[: n - filled]
            kept[filled : filled + len(new)] = new
            filled += len(new)
            n_kept += len(acts)
            bar.update(len(new))
        bar.close()
        return kept[:filled], round(1 - n_kept / max(seen, 1), 5)

    @torch.no_grad()
    def measure(self, sae: SAE[Any], budgets: list[int | None]) -> list[dict[str, Any]]:
        totals = {budget: Totals(sae) for budget in budgets}
        runs = ModelRuns(self.model, self.ignored, True, True, {}, max_norm=self.max_norm)
        for tokens in self.test.split(max(1, 4096 // self.test.shape[1])):
            batch = ModelBatch(tokens, [sae], runs)
            x = batch.activations(sae)
            for budget, reconstruction in reconstruct(sae, x, budgets):
                totals[budget].add(x, reconstruction, batch.mask)
                metrics = batch.model_metrics(sae, reconstruction.x_hat)
                totals[budget].add_model_metrics(metrics)
        rows = [asdict(total.metrics("", budget)) for budget, total in totals.items()]
        for row in rows:
            row["ce_increase"] = row["ce_loss_with_sae"] - row["ce_loss_without_sae"]
        return rows


# --- known features

# The setting of SynthSAEBench-16k (arXiv 2602.14687), from SAELens's documentation. The released
# model is on a hub; this one is like it, made here by the same code.
SYNTHETIC = SyntheticModelConfig(
    num_features=16384,
    hidden_dim=768,
    firing_probability=ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
    hierarchy=HierarchyConfig(
        total_root_nodes=128,
        branching_factor=4,
        max_depth=3,
        mutually_exclusive_portion=1.0,
        mutually_exclusive_min_depth=0,
        compensate_probabilities=True,
        scale_children_by_parent=True,
    ),
    orthogonalization=OrthogonalizationConfig(num_steps=100, lr=3e-4),
    correlation=LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
    mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
    std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
    bias=0.5,
    seed=42,
)


def small_synthetic(num_features: int) -> SyntheticModelConfig:
    """Return a small model of the kind, whose width is a quarter of its number of features."""
    return replace(
        SYNTHETIC,
        num_features=num_features,
        hidden_dim=num_features // 4,
        hierarchy=replace(SYNTHETIC.hierarchy, total_root_nodes=num_features // 128),
    )


class SyntheticSource:
    """
    Sums of known sparse features.

    Args:
        cfg: of SAELens's synthetic model.
        sizes: how many activations each part has.
        device: where they lie.
    """

    def __init__(self, cfg: SyntheticModelConfig, sizes: Sizes, device: str):
        self.metadata: dict[str, Any] = {}
        self.model = SyntheticModel(cfg, device=device)
        self.n_test = sizes.test
        torch.manual_seed(1)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.train = torch.empty(sizes.train, cfg.hidden_dim, dtype=dtype, device=device)
        for rows in tqdm(self.train.split(8192), desc="Samples"):
            rows.copy_(self.model.sample(len(rows)))
        self.validation = self.model.sample(sizes.validation)
        self.about = {
            "synthetic": {
                "num_features": cfg.num_features,
                "hidden_dim": cfg.hidden_dim,
                "like": "SynthSAEBench-16k" if cfg is SYNTHETIC else None,
            },
            "train": sizes.train,
            "validation": sizes.validation,
            "test_samples": sizes.test,
            "found": f"a decoder row has a cosine of {FOUND} with the feature",
        }
        # At full size the Hungarian algorithm takes a CPU's core 10 to 20 s.
        self.pool: Executor | None = None
        if cfg.num_features > 4096:
            self.pool = ProcessPoolExecutor(4, mp_context=get_context("spawn"))

    @torch.no_grad()
    def measure(self, sae: SAE[Any], budgets: list[int | None]) -> list[dict[str, Any]]:
        features = self.model.feature_dict.feature_vectors.detach()
        decoder = sae.W_dec.detach().float()
        pair = decoder.cpu(), features.cpu()
        if self.pool is None:
            mcc = mean_correlation_coefficient(*pair)
        else:
            mcc = self.pool.submit(mean_correlation_coefficient, *pair)
        cosines = torch.nn.functional.normalize(decoder, dim=-1) @ torch.nn.functional.normalize(
            features, dim=-1
        ).T.to(decoder)
        found = int((cosines.max(0).values >= FOUND).sum())
        uniqueness = feature_uniqueness(decoder, features)
        totals = {budget: Totals(sae) for budget in budgets}
        detectors = {
            budget: ClassificationMetricsCalculator(decoder, features) for budget in budgets
        }
        with torch.random.fork_rng(enabled=True):
            torch.manual_seed(2)
            for start in range(0, self.n_test, 4096):
                n = min(4096, self.n_test - start)
                x, true = self.model.sample_with_features(n)
                true = true.to_dense() if true.is_sparse else true
                every = torch.ones(n, dtype=torch.bool, device=x.device)
                for budget, reconstruction in reconstruct(sae, x, budgets):
                    totals[budget].add(x, reconstruction, every)
                    detectors[budget].add_batch(_dense(sae, reconstruction), true)
        rows = []
        for budget, total in totals.items():
            row = asdict(total.metrics("", budget))
            row |= {
                **asdict(detectors[budget].compute()),
                "uniqueness": uniqueness,
                "features_found": found,
                "mcc": mcc,
            }
            rows.append(row)
        return rows


def _dense(sae: SAE[Any], reconstruction: Any) -> torch.Tensor:
    acts, latents, _ = reconstruction
    if latents is None:
        return acts
    return acts.new_zeros(len(acts), sae.cfg.d_sae).scatter_(-1, latents, acts)


def settled(value: Any, waits: bool) -> Any:
    """Return `value` with the results of futures in their place; None for what is not done."""
    if isinstance(value, Future):
        return value.result() if waits or value.done() else None
    if isinstance(value, dict):
        return {name: settled(each, waits) for name, each in value.items()}
    return [settled(each, waits) for each in value] if isinstance(value, list) else value


def saved_config(path: Path) -> LanguageModelSAERunnerConfig[Any]:
    """Return the config of a run of SAELens from the `runner_cfg.json` that it left."""
    return LanguageModelSAERunnerConfig.from_dict(json.loads(path.read_text()))


def budgets_of(sae: SAE[Any], budgets: list[int]) -> list[int | None]:
    """Return the budgets to measure an SAE at: its own where it takes none at run time."""
    return list(budgets) if isinstance(sae, RuntimeBudget) else [None]
