"""Time whole runs of SAELens's runners: language model, activations' buffer, trainer.

    python -m benchmarks.run                        # every case, on a GPU
    python -m benchmarks.run --cases gpt2           # some; the other results are kept
    python -m benchmarks.run --memory               # GPU memory over 10,000 steps
    python -m benchmarks.run --quick                # small, on a CPU; writes no file
    python -m benchmarks.run --plot                 # draw the figure from the results

The results go to benchmarks/results/run_<device>.json, one after the other, and the figure to
benchmarks/figures beside it.

A run is `LanguageModelSAETrainingRunner(cfg).run()`, or `MultiSAETrainingRunner`'s. `ms` is what it
takes for the tokens of a step, 4096: the median over refills of the activations' buffer, each of
which is the language model once on 32 prompts, SAELens's default, and the steps that use what it
made. Compilation and the recording of CUDA graphs come before. `device_ms` is how long the device
works meanwhile; for the rest of `ms` it waits for the host. By themselves are timed the making of
the activations (the store's iterator, without training), and the trainer's steps on batches of it.
In a run they overlap: the device computes the one while the host launches the other.

The language models have random weights, and the text is random tokens, tokenized before, on a local
disk; everything else is as SAELens leaves it, but for what a setting changes:

- default: TransformerLens's model in float32, no autocast.
- autocast: the same with `autocast` and `autocast_lm`, SAELens's first advice for speed.
- hf: Hugging Face's model in bfloat16, and `autocast`.
- compiled: the same with `compile_llm`.
- compiled both: the same with `compile_sae` too.
- prefetch: compiled, with `prefetch_llm_batches`.
- all: compiled both, with `prefetch_llm_batches`.
- hf local, local, local prefetch, all local: hf, compiled, prefetch and all with `streaming=False`.
- sparse: default, with `use_sparse_activations`, SAELens's advice for float32.

SAELens documents all of them, and stock `topk` runs in all: the fastest is its best. The modes of
`torch.compile` that try kernels out are left out, because they compile for minutes, and
`compile_llm` with TransformerLens's model, because it fails with torch 2.11: the hook's activations
are missing. Ours runs in SAELens's default way, and in README's, "local" within
`accelerate()`.
"""

import argparse
import gc
import json
import logging
import statistics
import tempfile
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TrainingSAEConfig,
)
from sae_lens.training._interruption import InterruptedException

import sae_lens_flex

from .language_models import (
    HUGGING_FACE,
    MODELS,
    TRANSFORMER_LENS,
    LanguageModel,
    write_prompts,
)
from .measuring import (
    DeviceProfile,
    Marks,
    describe_host,
    description,
    device_ms,
    kind,
    median_ms,
    peak_memory,
    synchronize,
)

HERE = Path(__file__).parent
STOCK, HIERARCHICAL, FLEX = "topk", "hierarchical_topk", "flex_topk"


@dataclass(frozen=True)
class Setting:
    """How a run is set up, in SAELens's words."""

    model_class_name: str
    run: dict[str, Any] = field(default_factory=dict)
    sae: dict[str, Any] = field(default_factory=dict)


COMPILED = {"autocast": True, "compile_llm": True}
PREFETCH = {"prefetch_llm_batches": True}
AHEAD = {"prefetch_llm_batches": 8}  # batches, which is a refill of the buffer in the GPU cases
LOCAL = {"streaming": False}
SETTINGS = {
    "default": Setting(TRANSFORMER_LENS),
    "autocast": Setting(TRANSFORMER_LENS, {"autocast": True, "autocast_lm": True}),
    "hf": Setting(HUGGING_FACE, {"autocast": True}),
    "compiled": Setting(HUGGING_FACE, COMPILED),
    "compiled both": Setting(HUGGING_FACE, COMPILED | {"compile_sae": True}),
    "prefetch": Setting(HUGGING_FACE, COMPILED | PREFETCH),
    "all": Setting(HUGGING_FACE, COMPILED | PREFETCH | {"compile_sae": True}),
    "all ahead": Setting(HUGGING_FACE, COMPILED | AHEAD | {"compile_sae": True}),
    "hf local": Setting(HUGGING_FACE, {"autocast": True} | LOCAL),
    "local": Setting(HUGGING_FACE, COMPILED | LOCAL),
    "local prefetch": Setting(HUGGING_FACE, COMPILED | PREFETCH | LOCAL),
    "local ahead": Setting(HUGGING_FACE, COMPILED | AHEAD | LOCAL),
    "all local": Setting(HUGGING_FACE, COMPILED | PREFETCH | LOCAL | {"compile_sae": True}),
    "sparse": Setting(TRANSFORMER_LENS, sae={"use_sparse_activations": True}),
}


@dataclass(frozen=True)
class Competitor:
    architecture: str
    setting: str
    accelerate: bool = False

    def __str__(self) -> str:
        within = " within accelerate()" if self.accelerate else ""
        return f"{self.architecture}, {self.setting}{within}"


@dataclass(frozen=True)
class Case:
    """A language model, SAEs on it, and what is compared.

    Args:
        model: a name in `MODELS`.
        n_saes: with more than one, `MultiSAETrainingRunner` trains them.
        n_refills: of the buffer that are timed, with two before, in which models are compiled and
            steps recorded. TransformerLens's model is slow, and gets half as many.
    """

    name: str
    model: str
    d_sae: int
    k: int
    competitors: tuple[Competitor, ...]
    n_saes: int = 1
    context_size: int = 1024
    batch: int = 4096
    prompts_at_once: int = 32
    n_refills: int = 8
    dtype: str = "bfloat16"
    device: str = "cuda"

    @property
    def steps_in_refill(self) -> int:
        return self.prompts_at_once * self.context_size // self.batch

    def refills(self, competitor: Competitor) -> tuple[int, int]:
        """Return how many refills come before those that are timed, and how many these are."""
        is_slow = SETTINGS[competitor.setting].model_class_name == TRANSFORMER_LENS
        return (1, -(-self.n_refills // 2)) if is_slow else (2, self.n_refills)


def of(architecture: str, *settings: str) -> tuple[Competitor, ...]:
    return tuple(Competitor(architecture, setting) for setting in settings)


README = tuple(Competitor(each, "local", accelerate=True) for each in (HIERARCHICAL, FLEX))
GPU_CASES = [
    Case(
        "gpt2",
        "gpt2",
        d_sae=24576,
        k=64,
        competitors=(
            *of(STOCK, "default", "sparse", "autocast", "hf", "compiled", "compiled both"),
            *of(STOCK, "prefetch", "all", "all ahead", "all local"),
            *of(HIERARCHICAL, "default", "autocast", "hf", "compiled"),
            *of(FLEX, "default"),
            *README,
            *(Competitor(HIERARCHICAL, each, accelerate=True) for each in ("hf", "compiled")),
            *(
                Competitor(each, setting, accelerate=True)
                for setting in ("local prefetch", "local ahead")
                for each in (HIERARCHICAL, FLEX)
            ),
        ),
    ),
    Case(
        "gemma",
        "gemma2",
        d_sae=65536,
        k=128,
        competitors=(
            *of(STOCK, "default", "autocast", "hf", "compiled", "compiled both", "all"),
            *of(HIERARCHICAL, "default", "compiled"),
            *README,
        ),
        n_refills=2,
    ),
    Case(
        "smollm2",
        "smollm2",
        d_sae=16384,
        k=64,
        competitors=(
            *of(STOCK, "default", "autocast", "hf", "compiled", "compiled both"),
            *of(HIERARCHICAL, "autocast"),
            *README,
        ),
    ),
    Case(
        "four",
        "smollm2",
        d_sae=16384,
        k=64,
        n_saes=4,
        competitors=(*of(STOCK, "default", "autocast", "hf", "compiled", "prefetch"), *README),
    ),
]
QUICK: dict[str, Any] = {
    "model": "tiny",
    "d_sae": 256,
    "k": 8,
    "context_size": 128,
    "batch": 256,
    "prompts_at_once": 4,
    "n_refills": 2,
    "dtype": "float32",
    "device": "cpu",
}
QUICK_STOCK = of(STOCK, "default", "hf")
QUICK_OURS = (
    Competitor(HIERARCHICAL, "hf", accelerate=True),
    *(Competitor(each, "hf local", accelerate=True) for each in (HIERARCHICAL, FLEX)),
    Competitor(HIERARCHICAL, "local", accelerate=True),
)
QUICK_CASES = [
    Case("quick", competitors=QUICK_STOCK + QUICK_OURS, **QUICK),
    Case("quick_two", competitors=QUICK_STOCK[1:] + QUICK_OURS[:1], n_saes=2, **QUICK),
]
MEMORY = Case(
    "memory",
    "tiny",
    d_sae=4096,
    k=32,
    competitors=(Competitor(HIERARCHICAL, "hf", accelerate=True),),
    context_size=128,
    batch=1024,
    prompts_at_once=8,
)
MEMORY_STEPS, MEMORY_INTERVAL = 10_000, 500


class Watch(Iterator[Any]):
    """The batches of a data provider, counted and timed as the trainer takes them.

    Args:
        provider: SAELens's.
        at: what to do when so many batches were taken, before the next one is.
        n_kept: of the last batches, which stay in `last`.
    """

    def __init__(self, provider: Iterator[Any], at: Callable[[int], None], n_kept: int = 0) -> None:
        self._provider = provider
        self._at = at
        self._n_taken = 0
        self.last: deque[Any] = deque(maxlen=n_kept)

    def __next__(self) -> Any:
        self._at(self._n_taken)
        self._n_taken += 1
        batch = next(self._provider)
        self.last.append(batch)
        return batch


class _OneSAE(LanguageModelSAETrainingRunner):
    """SAELens's runner, whose trainer goes through `watch`."""

    watch: Callable[[Any], None]

    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        self.watch(trainer)
        return super().run_trainer_with_interruption_handling(trainer)

    def activations(self) -> Iterator[Any]:
        return self.activations_store


class _SeveralSAEs(MultiSAETrainingRunner):
    """The same of several SAEs."""

    watch: Callable[[Any], None]

    def _run_with_interruption_handling(self, trainer: Any) -> Any:
        self.watch(trainer)
        return super()._run_with_interruption_handling(trainer)

    def activations(self) -> Iterator[Any]:
        return self.activations_store.get_multi_hook_data_loader()


def sae_config(case: Case, competitor: Competitor, d_in: int) -> TrainingSAEConfig:
    return TrainingSAEConfig.from_dict(
        {
            "architecture": competitor.architecture,
            "d_in": d_in,
            "d_sae": case.d_sae,
            "k": case.k,
            "device": case.device,
            **SETTINGS[competitor.setting].sae,
        }
    )


def new_runner(
    case: Case, competitor: Competitor, model: LanguageModel, dataset: Path, n_steps: int
) -> _OneSAE | _SeveralSAEs:
    setting = SETTINGS[competitor.setting]
    sae = sae_config(case, competitor, model.architecture.config.hidden_size)
    options: dict[str, Any] = {
        "model_name": case.model,
        "model_class_name": setting.model_class_name,
        "dataset_path": str(dataset),
        "context_size": case.context_size,
        # So many prompts are mixed: as many as the language model reads at once.
        "n_batches_in_buffer": case.prompts_at_once,
        "store_batch_size_prompts": case.prompts_at_once,
        # README's way. The prompts' first token is special, and no other.
        "exclude_special_tokens": [0],
        "training_tokens": n_steps * case.batch,
        "train_batch_size_tokens": case.batch,
        "device": case.device,
        "logger": LoggingConfig(log_to_wandb=False),
        "checkpoint_path": None,
        "output_path": None,
        **setting.run,
    }
    if case.device == "cpu":
        options["autocast"] = False  # README: bfloat16 can be many times slower there
    hook = model.architecture.hook_name(setting.model_class_name)
    loaded = model.not_compiled(setting.model_class_name)
    torch.manual_seed(0)
    if case.n_saes == 1:
        cfg = LanguageModelSAERunnerConfig(sae=sae, hook_name=hook, verbose=False, **options)
        return _OneSAE(cfg, override_model=loaded)
    saes = {f"sae {i}": sae for i in range(case.n_saes)}
    multi_cfg = MultiSAETrainingRunnerConfig(saes=saes, hook_names=hook, **options)
    return _SeveralSAEs(multi_cfg, override_model=loaded)


def measure(
    case: Case, competitor: Competitor, model: LanguageModel, dataset: Path
) -> dict[str, Any]:
    """Return what a run takes, whole and in parts, for the tokens of a step."""
    n_in_refill = case.steps_in_refill
    n_warm_up, n_refills = case.refills(competitor)
    n_before = n_in_refill * n_warm_up
    n_timed = n_before + n_in_refill * n_refills
    n_profiled = n_timed + n_in_refill
    marks = Marks(case.device)
    found: dict[str, Any] = {}

    def at(n_taken: int) -> None:
        if n_before <= n_taken <= n_timed and (n_taken - n_before) % n_in_refill == 0:
            marks.set()
        if case.device != "cuda":
            return
        if n_taken == n_timed:
            found["profile"] = DeviceProfile()
        if n_taken == n_profiled:
            found["device_ms"] = found.pop("profile").stop_ms()

    runner = new_runner(case, competitor, model, dataset, n_steps=n_profiled + 1)

    def watch(trainer: Any) -> None:
        found["trainer"] = trainer
        trainer.data_provider = found["watch"] = Watch(trainer.data_provider, at, n_kept=4)

    runner.watch = watch
    runner.run()
    refills = [each / n_in_refill for each in marks.distances_ms()]
    ms = statistics.median(refills)
    total = found.get("device_ms")
    batches = list(found["watch"].last)
    return {
        "ms": ms,
        "refills_ms": [min(refills), max(refills)],
        "device_ms": total and total / (n_profiled - n_timed),
        "tokens_per_s": round(1e3 * case.batch / ms),
        "activations": measure_activations(case, runner.activations(), -(-n_refills // 2)),
        "steps": measure_steps(case, found["trainer"], batches),
    }


def measure_activations(case: Case, activations: Iterator[Any], n_refills: int) -> dict[str, Any]:
    """Return what the store's iterator takes for a step's batch, without training."""

    def refill() -> None:
        for _ in range(case.steps_in_refill):
            next(activations)

    ms = median_ms(refill, case.device, n_warm_up=1, n=n_refills)
    device = device_ms(refill, n=1) if case.device == "cuda" else None
    return {
        "ms": ms / case.steps_in_refill,
        "device_ms": device and device / case.steps_in_refill,
    }


def measure_steps(case: Case, trainer: Any, batches: list[Any]) -> dict[str, Any]:
    """Return what the trainer takes for a step, on batches of the run."""
    trainers = getattr(trainer, "trainers", {"": trainer})
    hooks = getattr(trainer, "hook_names", {})

    def step() -> None:
        batch = batches[trainer.n_training_steps % len(batches)]
        for name, each in trainers.items():
            each.step(batch[hooks[name]] if hooks else batch)
            each.n_training_steps += 1
        if trainer not in trainers.values():
            trainer.n_training_steps += 1

    ms = median_ms(step, case.device, n_warm_up=4, n=2 * case.steps_in_refill)
    return {"ms": ms, "device_ms": device_ms(step) if case.device == "cuda" else None}


def measure_competitor(
    case: Case, competitor: Competitor, model: LanguageModel, dataset: Path
) -> dict[str, Any]:
    result: dict[str, Any] = asdict(competitor)
    block = sae_lens_flex.accelerate if competitor.accelerate else nullcontext
    try:
        with peak_memory(case.device) as peaks, block():
            result |= measure(case, competitor, model, dataset)
            result |= peaks()
    except InterruptedException:
        raise
    except Exception as error:
        # Some of SAELens's settings fail with stock, here or there, in several ways.
        if competitor.architecture != STOCK:
            raise
        result["error"] = f"{type(error).__name__}: {error}".split(".")[0]
    gc.collect()
    return result


def measure_case(case: Case, directory: Path) -> Iterator[dict[str, Any]]:
    """Yield what was measured, after every competitor."""
    dtype = getattr(torch, case.dtype)
    model = LanguageModel(MODELS[case.model](), case.device, dtype)
    # Enough for a run and what comes after it.
    n_prompts = case.prompts_at_once * (3 * case.n_refills + 16)
    dataset = directory / f"{case.model}_{case.context_size}"
    write_prompts(dataset, model.vocabulary, n_prompts, case.context_size)
    results = []
    for competitor in case.competitors:
        results.append(measure_competitor(case, competitor, model, dataset))
        add_speedups(results)
        print_result(case, results[-1])
        yield described(case, model) | {"results": results}
    print_speedups(case, results)


def described(case: Case, model: LanguageModel) -> dict[str, Any]:
    fields = asdict(case) | {"language_model": model.description()}
    del fields["competitors"]
    return fields


def add_speedups(results: list[dict[str, Any]]) -> None:
    """Add to ours how many times faster than stock they are, in its settings that worked.

    "best" is the fastest of these.
    """
    stock = {
        each["setting"]: each["ms"]
        for each in results
        if each["architecture"] == STOCK and "ms" in each
    }
    for each in results:
        if stock and each["architecture"] != STOCK:
            each["speedup"] = {"best": min(stock.values()) / each["ms"]} | {
                setting: ms / each["ms"] for setting, ms in stock.items()
            }


def measure_memory(case: Case, directory: Path, n_steps: int, interval: int) -> dict[str, Any]:
    """Return the GPU memory of runs within `accelerate()`, with and without CUDA graphs."""
    model = LanguageModel(MODELS[case.model](), case.device, getattr(torch, case.dtype))
    n_prompts = 512 * case.prompts_at_once
    dataset = directory / f"{case.model}_{case.context_size}"
    write_prompts(dataset, model.vocabulary, n_prompts, case.context_size)
    rows = []
    (competitor,) = case.competitors
    for use_cuda_graph in (True, False):
        samples: list[dict[str, float]] = []

        def at(n_taken: int, samples: list[dict[str, float]] = samples) -> None:
            if n_taken and n_taken % interval == 0:
                synchronize(case.device)
                samples.append(
                    {
                        "step": n_taken,
                        "allocated_gib": torch.cuda.memory_allocated() / 2**30,
                        "reserved_gib": torch.cuda.memory_reserved() / 2**30,
                    }
                )

        with peak_memory(case.device), sae_lens_flex.accelerate():
            runner: Any = new_runner(case, competitor, model, dataset, n_steps + 1)
            runner.sae.use_cuda_graph = use_cuda_graph

            def watch(trainer: Any, at: Callable[[int], None] = at) -> None:
                trainer.data_provider = Watch(trainer.data_provider, at)

            runner.watch = watch
            runner.run()
        # Latents are dead from `dead_feature_window` on, after which steps keep a little more.
        settled = [each for each in samples if each["step"] > 2 * runner.cfg.dead_feature_window]
        growth = {
            name: settled[-1][name] - settled[0][name] for name in ("allocated_gib", "reserved_gib")
        }
        rows.append({"use_cuda_graph": use_cuda_graph, "growth": growth, "samples": samples})
        print(
            f"{case.name:10} CUDA graphs {use_cuda_graph!s:5}  after {settled[0]['step']} steps "
            f"{settled[0]['allocated_gib']:.3f} GiB allocated, {settled[0]['reserved_gib']:.3f} "
            f"reserved; after {settled[-1]['step']} {growth['allocated_gib']:+.3f} and "
            f"{growth['reserved_gib']:+.3f}",
            flush=True,
        )
        del runner
        gc.collect()
    return described(case, model) | asdict(competitor) | {"results": rows}


def print_result(case: Case, result: dict[str, Any]) -> None:
    name = str(Competitor(*(result[each] for each in ("architecture", "setting", "accelerate"))))
    if "error" in result:
        print(f"{case.name:10} {name:46} {result['error']}", flush=True)
        return

    def times(of: dict[str, Any]) -> str:
        device = "" if of["device_ms"] is None else f" ({of['device_ms']:7.2f})"
        return f"{of['ms']:8.2f}{device}"

    peak = "" if result["peak_gib"] is None else f"  {result['peak_gib']:6.2f} GiB"
    print(
        f"{case.name:10} {name:46} {times(result)} ms {result['tokens_per_s']:9,d} tokens/s"
        f"  activations {times(result['activations'])}  steps {times(result['steps'])}{peak}",
        flush=True,
    )


def print_speedups(case: Case, results: list[dict[str, Any]]) -> None:
    for result in results:
        if result["accelerate"]:
            against = "  ".join(f"{name} {x:.2f}x" for name, x in result["speedup"].items())
            name = f"{result['architecture']}, {result['setting']}"
            print(f"{case.name:10} {name:30} against stock: {against}", flush=True)


def run(cases: list[Case], path: Path | None, with_memory: bool) -> None:
    device = (cases or [MEMORY])[0].device
    now = description(device, "transformer-lens", "transformers")
    print(f"{now['machine']}, {describe_host(now['host_ms'])}", flush=True)
    print("ms for the tokens of a step; the device's share in brackets", flush=True)
    record = json.loads(path.read_text()) if path is not None and path.exists() else {"cases": {}}
    record |= now | {"settings": {name: asdict(setting) for name, setting in SETTINGS.items()}}
    when = {"date": now["date"], "commit": now["commit"], "host_ms": now["host_ms"]}
    with tempfile.TemporaryDirectory() as directory:
        for case in cases:
            for measured in measure_case(case, Path(directory)):
                record["cases"][case.name] = when | measured
                write(record, path)
        if with_memory:
            measured = measure_memory(MEMORY, Path(directory), MEMORY_STEPS, MEMORY_INTERVAL)
            record["memory"] = when | measured
            write(record, path)


def write(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")


def plot(path: Path, figure_path: Path) -> None:
    """Draw how long 100 million tokens take: stock by default and at its best, and ours."""
    from plotly.subplots import make_subplots

    record = json.loads(path.read_text())
    cases = list(record["cases"].values())
    parts = {"language model and buffer, alone": "#636efa", "what training adds": "#ef553b"}
    figure = make_subplots(1, len(cases), subplot_titles=[title(case) for case in cases])
    for column, case in enumerate(cases, 1):
        minutes = 1e8 / case["batch"] / 6e4  # of a millisecond for every batch
        labels, results = zip(*shown(case["results"]), strict=True)
        totals = [result["ms"] * minutes for result in results]
        alone = [min(result["activations"]["ms"], result["ms"]) * minutes for result in results]
        added = [total - part for total, part in zip(totals, alone, strict=True)]
        for (part, color), y in zip(parts.items(), (alone, added), strict=True):
            figure.add_bar(
                x=labels,
                y=y,
                name=part,
                marker_color=color,
                showlegend=column == 1,
                text=[f"{total:.1f}" for total in totals] if y is added else None,
                textposition="outside",
                row=1,
                col=column,
            )
        figure.update_yaxes(range=[0, 1.1 * max(totals)], row=1, col=column)
    figure.update_yaxes(title_text="minutes", row=1, col=1)
    figure.update_layout(
        title=f"A run over 100 million tokens, {record['machine']}",
        barmode="stack",
        template="plotly_white",
        legend={"orientation": "h", "y": 1.25, "x": 1, "xanchor": "right"},
    )
    figure_path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_image(figure_path, width=1100, height=450, scale=2)


def title(case: dict[str, Any]) -> str:
    n_saes = "" if case["n_saes"] == 1 else f"{case['n_saes']} of "
    return f"{case['model']}, {n_saes}{case['d_sae']:,} latents"


def shown(results: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what the figure shows of a case: a label, and the result."""
    stock = [each for each in results if each["architecture"] == STOCK and "ms" in each]
    for setting in ("default", "autocast"):
        yield from ((f"topk, {setting}", each) for each in stock if each["setting"] == setting)
    yield "topk at its best", min(stock, key=lambda each: each["ms"])
    for architecture in (HIERARCHICAL, FLEX):
        ours = [
            each for each in results if each["accelerate"] and each["architecture"] == architecture
        ]
        yield architecture, min(ours, key=lambda each: each["ms"])


def be_quiet() -> None:
    """Leave out what SAELens and others say of every run: that the model was handed over."""
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # TransformerLens, of itself
    logging.getLogger("sae_lens").setLevel(logging.ERROR)
    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small, on a CPU")
    parser.add_argument(
        "--cases",
        nargs="+",
        metavar="NAME",
        choices=[case.name for case in GPU_CASES],
        help="by default all: " + ", ".join(case.name for case in GPU_CASES),
    )
    parser.add_argument(
        "--memory", action="store_true", help="GPU memory over 10,000 steps, and no times"
    )
    parser.add_argument("--results", type=Path, help="JSON file to write, or to draw")
    parser.add_argument(
        "--plot", action="store_true", help="draw the figure, by kaleido; measures nothing"
    )
    arguments = parser.parse_args()
    is_gpu = torch.cuda.is_available()
    name = f"run_{kind('cuda' if is_gpu else 'cpu')}.json"
    path = arguments.results or HERE / "results" / name
    be_quiet()
    if arguments.quick:
        run(QUICK_CASES, arguments.results, with_memory=False)
    elif arguments.plot:
        if find_spec("kaleido") is None:
            parser.error("the figure needs the package kaleido: pip install kaleido")
        plot(path, HERE / "figures" / path.with_suffix(".png").name)
    elif not is_gpu:
        parser.error("this needs a CUDA device, --quick does not")
    else:
        named = arguments.cases
        cases = [case for case in GPU_CASES if named is None or case.name in named]
        run([] if arguments.memory and not named else cases, path, arguments.memory)


if __name__ == "__main__":
    main()
