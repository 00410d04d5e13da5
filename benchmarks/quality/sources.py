"""Where activations come from, and how an SAE is measured on them.

A source holds three parts of one stream, which share nothing: activations to train on, others by
which a learning rate is chosen, and a test, whose results are reported.
"""

import json
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
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
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn.functional import embedding_bag, normalize
from tqdm.auto import tqdm

from sae_lens_flex import HierarchicalTopKTrainingSAEConfig
from sae_lens_flex.evals.batches import ModelBatch, ModelRuns, tokens_to_ignore
from sae_lens_flex.evals.metrics import Totals
from sae_lens_flex.evals.reconstruction import reconstruct
from sae_lens_flex.saes.budgets import Budget, RuntimeBudget

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


@dataclass(frozen=True)
class Later:
    """A call for another process: what a CPU takes long to compute, while the GPU trains on."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


class Source(Protocol):
    """
    Attributes:
        metadata: fields of the SAE's metadata.
        validation: activations, [n, d_in].
    """

    metadata: dict[str, Any]
    validation: torch.Tensor

    def collect(self, part: int) -> None:
        """Make a part of the activations to train on. Each of several processes makes one."""
        ...

    def batches(self, size: int, seed: int) -> Iterator[torch.Tensor]:
        """Yield batches [size, d_in] to train on, without end, in the order of a seed.

        All parts must have been made.
        """
        ...

    @property
    def about(self) -> dict[str, Any]:
        """What the activations are, for the result. All parts must have been made."""
        ...

    def measure(self, sae: SAE[Any], budgets: list[Budget | None]) -> list[dict[str, Any]]:
        """Return the metrics of an SAE on the test, at each budget."""
        ...


def _dtype(device: torch.device) -> torch.dtype:
    # A model's precision there is not float32's, and bfloat16 halves the memory.
    return torch.bfloat16 if device.type == "cuda" else torch.float32


class Parts:
    """
    What a source makes in parts, each by another process.

    Args:
        count: the number of parts.
        cache: a directory for the parts, a file each. What is there is not made again. Left out,
            there is one part, which stays in this process.
        device: where tensors are read to.
    """

    def __init__(self, count: int, cache: Path | None, device: str | torch.device):
        if count > 1 and cache is None:
            raise ValueError(f"parts is {count} and cache is None, expected a directory")
        self.count, self.cache, self.device = count, cache, torch.device(device)
        self._made: dict[str, torch.Tensor] = {}

    def share(self, n: int, part: int) -> int:
        """Return how many of n are a part's."""
        return n // self.count + (part < n % self.count)

    def collect(self, part: int, make: Callable[[int], dict[str, torch.Tensor]]) -> None:
        """Make a part, unless it is there."""
        if self.cache is None:
            self._made = make(part)
        elif not (path := self._file(part)).exists():
            self.cache.mkdir(parents=True, exist_ok=True)
            # Under another name first: what exists is whole.
            save_file(make(part), path.with_suffix(".partial"))
            path.with_suffix(".partial").rename(path)

    def _file(self, part: int) -> Path:
        assert self.cache is not None
        return self.cache / f"part_{part}_of_{self.count}.safetensors"

    def joined(self, name: str) -> torch.Tensor:
        """Return the rows of a tensor of all parts."""
        if self.cache is None:
            return self._made[name]
        files = [
            safe_open(self._file(part), "pt", device=str(self.device)) for part in range(self.count)
        ]
        shapes = [file.get_slice(name).get_shape() for file in files]
        sizes = [shape[0] for shape in shapes]
        dtype = files[0].get_slice(name)[:1].dtype
        joined = torch.empty(sum(sizes), *shapes[0][1:], dtype=dtype, device=self.device)
        # One by one: all of them may be half of the GPU's memory.
        for rows, file in zip(joined.split(sizes), files, strict=True):
            rows.copy_(file.get_tensor(name))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # of a part each
        return joined


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


class TokenRows:
    """
    The rows of tokens that `benchmarks.quality.text` wrote, as SAELens iterates over a dataset.

    Args:
        path: the .npy file.
    """

    def __init__(self, path: Path):
        self.rows = np.load(path, mmap_mode="r")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for row in self.rows:
            yield {"input_ids": row.astype(np.int64)}


class LanguageModelSource:
    """
    Activations of a language model, as a run of SAELens would train on them.

    Activations of extreme norm are left out of every part. Where the model runs on reconstructions,
    they keep the model's own.

    Args:
        cfg: the run. Its SAE gives d_in only.
        sizes: how many activations each part has; that of the test counts whole prompts.
        dataset: in place of the config's.
        parts: in how many parts the activations to train on are made.
        cache: as in Parts.
        text: what the text is, for the result.
    """

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        sizes: Sizes,
        dataset: TokenRows | None = None,
        parts: int = 1,
        cache: Path | None = None,
        text: Any = None,
    ):
        self.cfg, self.sizes, self.dataset, self.text = cfg, sizes, dataset, text
        self.parts = Parts(parts, cache, cfg.device)
        self.metadata = {"hook_name": cfg.hook_name}
        self.model = load_model(
            cfg.model_class_name,
            cfg.model_name,
            device=cfg.device,
            model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
            hook_names=[cfg.hook_name],
        )
        self.store = self._new_store()
        has_tokenizer = getattr(self.model, "tokenizer", None) is not None
        self.ignored = tokens_to_ignore(self.model, True) if has_tokenizer else []
        validation, self.test = self._held_out(self.store)
        batch = self.store.store_batch_size_prompts
        acts = [self._activations(tokens) for tokens in validation.split(batch)]
        norms = torch.cat(acts).norm(dim=-1)
        self.max_norm = EXTREME * float(norms.median())
        self.validation = torch.cat(acts)[norms <= self.max_norm]

    def _new_store(self) -> ActivationsStore:
        dataset: Any = self.dataset  # SAELens only iterates over it.
        return ActivationsStore.from_config(self.model, self.cfg, override_dataset=dataset)

    def _held_out(self, store: ActivationsStore) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the prompts of validation and test, with which the store begins."""

        def prompts(n: int) -> torch.Tensor:
            return store.get_batch_tokens(math.ceil(n / self.cfg.context_size))

        return prompts(self.sizes.validation), prompts(self.sizes.test)

    def collect(self, part: int) -> None:
        self.parts.collect(part, self._collect)

    @cached_property
    def train(self) -> torch.Tensor:
        """Activations, [n, d_in]. All parts must have been made."""
        return self.parts.joined("train")

    def batches(self, size: int, seed: int) -> Iterator[torch.Tensor]:
        x = self.train
        generator = torch.Generator(x.device).manual_seed(seed)
        while True:
            for rows in torch.randperm(len(x), generator=generator, device=x.device).split(size):
                if len(rows) == size:
                    yield x[rows].float()

    @property
    def about(self) -> dict[str, Any]:
        cfg = self.cfg
        kept, seen = self.parts.joined("counts").sum(0).tolist()
        return {
            "model": Path(cfg.model_name).name if Path(cfg.model_name).exists() else cfg.model_name,
            "hook_name": cfg.hook_name,
            "text": self.text or cfg.dataset_path,
            "context_size": cfg.context_size,
            "train": len(self.train),
            "validation": len(self.validation),
            "test_tokens": self.test.numel(),
            "max_norm": self.max_norm,
            "left_out": round(1 - kept / max(seen, 1), 5),
        }

    def _activations(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the activations of tokens that are not special, [n, d_in]."""
        acts = self.store.get_activations(tokens).flatten(0, 1)
        tokens = tokens[:, slice(*self.store.seqpos_slice)].flatten()
        ignored = torch.tensor(self.ignored, dtype=tokens.dtype, device=tokens.device)
        return acts[~torch.isin(tokens, ignored).to(acts.device)]

    def _collect(self, part: int) -> dict[str, torch.Tensor]:
        """Return a part of the activations, and how many tokens were kept and seen.

        Every process goes through all tokens, and runs the model on its share of the batches.
        """
        n = self.parts.share(self.sizes.train, part)
        store = self._new_store()
        self._held_out(store)
        made = torch.empty(n, store.d_in, dtype=_dtype(store.device), device=store.device)
        filled = seen = kept = 0
        bar = tqdm(total=n, desc=f"Activations, part {part + 1} of {self.parts.count}")
        for number in count():
            if filled == n:
                break
            try:
                tokens = store.get_batch_tokens(raise_at_epoch_end=True)
            except StopIteration:
                break
            if number % self.parts.count != part:
                continue
            acts = self._activations(tokens)
            acts = acts[acts.norm(dim=-1) <= self.max_norm]
            seen += tokens.numel()
            new = acts[: n - filled]
            made[filled : filled + len(new)] = new
            filled += len(new)
            kept += len(acts)
            bar.update(len(new))
        bar.close()
        return {"train": made[:filled], "counts": torch.tensor([[kept, seen]])}

    @torch.no_grad()
    def measure(self, sae: SAE[Any], budgets: list[Budget | None]) -> list[dict[str, Any]]:
        totals = {budget: Totals(sae) for budget in budgets}
        runs = ModelRuns(self.model, self.ignored, True, True, {}, max_norm=self.max_norm)
        for tokens in self.test.split(max(1, 16384 // self.test.shape[1])):
            batch = ModelBatch(tokens, [sae], runs)
            x = batch.activations(sae)
            for budget, reconstruction in reconstruct(sae, x, budgets):
                totals[budget].add(x, reconstruction, batch.mask)
                totals[budget].add_model_metrics(batch.model_metrics(sae, reconstruction.x_hat))
        rows = []
        for budget, total in totals.items():
            row = asdict(total.metrics("", budget))
            row["ce_increase"] = row["ce_loss_with_sae"] - row["ce_loss_without_sae"]
            rows.append(row)
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


# What that benchmark trains: its width, its batch, its learning rate in the middle of the grid. Of
# its L0s, 15 to 45, these are the ends, and the mean number of the 4096 most frequent features that
# fire. Its SAEs see 200 million samples.
SYNTHETIC_TRAINING: dict[str, Any] = {
    "d_sae": 4096,
    "k": 45,
    "budgets": [15, 25, 45],
    "batch": 1024,
    "samples": 50_000_896,
    "test": 524_288,
    "lr": [1.5e-4, 3e-4, 6e-4],
}

# Seeds of the generator.
VALIDATION, TEST, FIRST_PART = 1, 2, 3


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


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
    Sums of known sparse features, which SAELens's generator draws.

    What is kept of an activation are its features and how strongly they fire, some 34 in the
    standard setting: 50 million take 10 GB, and would take 77 as activations in bfloat16.

    Args:
        cfg: of SAELens's synthetic model.
        sizes: how many activations each part has.
        device: where they lie.
        parts: in how many parts the activations to train on are made.
        cache: as in Parts.
    """

    def __init__(
        self,
        cfg: SyntheticModelConfig,
        sizes: Sizes,
        device: str,
        parts: int = 1,
        cache: Path | None = None,
    ):
        if cfg.num_features > 2**15:
            raise ValueError(f"num_features is {cfg.num_features}, expected up to {2**15}")
        self.metadata: dict[str, Any] = {}
        self.model, self.sizes = SyntheticModel(cfg, device=device), sizes
        self.parts = Parts(parts, cache, device)
        with _seeded(VALIDATION):
            self.validation = self.model.sample(sizes.validation)

    def collect(self, part: int) -> None:
        self.parts.collect(part, self._collect)

    def _collect(self, part: int) -> dict[str, torch.Tensor]:
        """Return a part of the activations, as the rows of a sparse matrix.

        `values` and `features` are of all that fires, one activation after the other; `counts` says
        how many fire in each.
        """
        n = self.parts.share(self.sizes.train, part)
        made: dict[str, list[torch.Tensor]] = {"values": [], "features": [], "counts": []}
        with _seeded(FIRST_PART + part):
            bar = tqdm(total=n, desc=f"Samples, part {part + 1} of {self.parts.count}")
            for start in range(0, n, 8192):
                acts = self.model.activation_generator.sample(min(8192, n - start))
                rows = acts.to_sparse_csr()
                made["values"].append(rows.values())
                made["features"].append(rows.col_indices().short())
                made["counts"].append(rows.crow_indices().diff().short())
                bar.update(len(acts))
            bar.close()
        return {name: torch.cat(tensors) for name, tensors in made.items()}

    @cached_property
    def _train(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Values, features, and where each activation begins in them, [n + 1]."""
        counts = self.parts.joined("counts")
        ends = counts.cumsum(0, dtype=torch.long)
        starts = torch.cat([ends.new_zeros(1), ends])
        return self.parts.joined("values"), self.parts.joined("features"), starts

    def batches(self, size: int, seed: int) -> Iterator[torch.Tensor]:
        """Yield the batches in a random order, another one in each epoch.

        Samples are independent, so a batch is of successive ones.
        """
        values, features, starts = self._train
        bounds = starts[::size].tolist()
        vectors = self.model.feature_dict.feature_vectors.detach()
        bias = self.model.feature_dict.bias.detach()
        generator = torch.Generator().manual_seed(seed)
        while True:
            for number in torch.randperm(len(bounds) - 1, generator=generator).tolist():
                start, stop = bounds[number], bounds[number + 1]
                yield bias + embedding_bag(
                    features[start:stop].int(),
                    vectors,
                    (starts[number * size : (number + 1) * size] - start).int(),
                    mode="sum",
                    per_sample_weights=values[start:stop],
                )

    @property
    def about(self) -> dict[str, Any]:
        cfg = self.model.cfg
        return {
            "synthetic": {
                "num_features": cfg.num_features,
                "hidden_dim": cfg.hidden_dim,
                "like": "SynthSAEBench-16k" if cfg == SYNTHETIC else None,
            },
            "train": self.sizes.train,
            "mean_firing": round(len(self._train[0]) / self.sizes.train, 2),
            "validation": self.sizes.validation,
            "test_samples": self.sizes.test,
            "found": f"a decoder row has a cosine of {FOUND} with the feature",
        }

    @torch.no_grad()
    def measure(self, sae: SAE[Any], budgets: list[Budget | None]) -> list[dict[str, Any]]:
        features = self.model.feature_dict.feature_vectors.detach()
        decoder = sae.W_dec.detach().float()
        # At full size the Hungarian algorithm takes a CPU's core 10 to 20 s.
        mcc = Later(mean_correlation_coefficient, (decoder.cpu(), features.cpu()))
        cosines = normalize(decoder, dim=-1) @ normalize(features, dim=-1).T
        found = int((cosines.max(0).values >= FOUND).sum())
        uniqueness = feature_uniqueness(decoder, features)
        totals = {budget: Totals(sae) for budget in budgets}
        detectors = {
            budget: ClassificationMetricsCalculator(decoder, features) for budget in budgets
        }
        with _seeded(TEST):
            for start in range(0, self.sizes.test, 4096):
                n = min(4096, self.sizes.test - start)
                x, true = self.model.sample_with_features(n)
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


def saved_config(path: Path) -> LanguageModelSAERunnerConfig[Any]:
    """Return the config of a run of SAELens from the `runner_cfg.json` that it left."""
    return LanguageModelSAERunnerConfig.from_dict(json.loads(path.read_text()))


def budgets_of(sae: SAE[Any], budgets: list[int]) -> list[Budget | None]:
    """Return the budgets to measure an SAE at: its own where it takes none at run time."""
    return list(budgets) if isinstance(sae, RuntimeBudget) else [None]


# --- which one


def chosen_source(args: Namespace, cache: Path | None) -> Source:
    """Return the source that the arguments of `train` choose."""
    sizes = Sizes(args.activations or args.samples, args.validation, args.test)
    if args.synthetic:
        cfg = SYNTHETIC if args.features is None else small_synthetic(args.features)
        return SyntheticSource(cfg, sizes, args.device, args.workers, cache)
    if args.config is not None:
        cfg = saved_config(args.config)
        cfg.device = cfg.act_store_device = args.device
        return LanguageModelSource(cfg, sizes, None, args.workers, cache)
    about = args.tokens.with_suffix(".json")
    cfg = model_config(
        str(args.model), args.hook, args.d_in, args.d_sae, args.k, args.context, args.device
    )
    text = json.loads(about.read_text()) if about.exists() else args.tokens.name
    return LanguageModelSource(cfg, sizes, TokenRows(args.tokens), args.workers, cache, text)
