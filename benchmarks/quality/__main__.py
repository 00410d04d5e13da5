"""How good one SAE for every budget is, beside SAEs trained for each budget.

    python examples/smollm2.py output/smollm2
    python -m benchmarks.quality.text output/tokens.npy --model output/smollm2
    python -m benchmarks.quality train lm.json --model output/smollm2 --tokens output/tokens.npy
    python -m benchmarks.quality train synthetic.json --synthetic
    python -m benchmarks.quality train run.json --config output/my_sae/runner_cfg.json
    python -m benchmarks.quality report lm*.json --name smollm2
    python -m benchmarks.quality --quick  # all of it on a tiny model, on a CPU; writes no file

`train` is a unit: SAEs (`--kinds`), each trained by SAELens's trainer within `accelerate()` on the
same activations. Of a grid of learning rates each kind gets the one that explains most variance of
validation activations; the results are those of a test, which has others. Further seeds take it:
`--kinds even topk even@1 topk@1` trains each with the seeds 0 and 1, in this order. `best_1@1` is a
further seed of the best scheme, and `evenx3` is trained three times as long. Where a unit is split,
a part takes the learning rates that another one chose (`--rates-of`), and has the grid for the
kinds that the other one did not train.

`--workers` trains so many SAEs at once, each on the next of the visible GPUs. They share the work
of making the activations, through files in `--cache`. With `--seconds` a unit ends in time: what
does not fit in is left out, and the result names it.

`report` merges units; also a merged result with further units. Of a kind and a seed that several
have it takes the last one's results. It prints tables and writes them with the results to
benchmarks/results, and the figure to benchmarks/figures.
"""

import argparse
import datetime
import json
import math
import platform
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import Any

import torch

import sae_lens_flex

from ..measuring import machine
from .kinds import FAMILIES, SCHEMES, Kind, make_kind, make_plan
from .processes import run_here, run_in_processes
from .report import report
from .sources import SYNTHETIC_TRAINING, chosen_source, model_config
from .unit import Unit, chosen_rates
from .worker import Training, Worker

ROOT = Path(__file__).parents[2]
TINY_LM = ROOT / "examples" / "tiny_lm"


def train(args: argparse.Namespace) -> None:
    """Train and measure a unit."""
    ends = monotonic() + args.seconds
    autocast = args.device.startswith("cuda")
    tuning = max(args.samples // 20, args.batch) if args.tuning is None else args.tuning
    training = Training(args.d_sae, args.samples, args.batch, args.device, autocast, tuning)
    head = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(args.device),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "sae-lens")},
        "sae-lens-flex": sae_lens_flex.__version__,
        "workers": args.workers,
        "training": {
            "d_sae": args.d_sae,
            "k": args.k,
            "samples": args.samples,
            "batch": args.batch,
            "autocast": autocast,
            **training.schedule(),
        },
    }

    def write(result: dict[str, Any]) -> None:
        partial_file = args.output.with_suffix(".partial")
        partial_file.write_text(json.dumps(head | result, indent=1) + "\n")
        partial_file.rename(args.output)

    def kind(name: str, longer: int) -> Kind:
        return make_kind(name, args.k, args.d_sae, args.budgets, longer)

    plan = make_plan(args.kinds, args.budgets)
    rates = chosen_rates(args.rates_of or [], args.lr)
    with TemporaryDirectory() as directory:
        path = Path(directory)
        cache = args.cache or (path / "activations" if args.workers > 1 else None)
        worker = partial(Worker, partial(chosen_source, args, cache), training)
        left = ends - monotonic()
        unit = Unit(plan, kind, rates, args.workers, path, write, args.extensions, left)
        if args.workers == 1:
            run_here(worker, unit.next_job, unit.done)
        else:
            run_in_processes(args.workers, worker, unit.next_job, unit.done)
        unit.end()


def quick() -> None:
    """Train two kinds on each source, in small, and report them."""
    with TemporaryDirectory() as directory:
        path = Path(directory)
        tiny = path / "runner_cfg.json"
        cfg = model_config(str(TINY_LM), "transformer.h.1", 192, 256, 8, 128, "cpu")
        cfg.dataset_path = str(TINY_LM / "wordnet_glosses")
        cfg.is_dataset_tokenized = False
        tiny.write_text(json.dumps(cfg.to_dict()))
        shared = "--d-sae 256 --k 8 --budgets 2 8 --samples 4096 --batch 256 --validation 512"
        shared += " --test 512 --device cpu --extensions 1"
        for name, source in (
            (
                "model",
                f"--config {tiny} --workers 2 --lr 3e-3 6e-3 "
                "--kinds even half_on_k topk_8 best_1@1",
            ),
            (
                "synthetic",
                "--synthetic --features 512 --lr 3e-3 "
                "--kinds doubling topk_8 batchtopk_2 matryoshka_2",
            ),
        ):
            output = path / f"{name}.json"
            main(["train", str(output), *source.split(), *shared.split()])
            report([output], name, path)


def main(argv: list[str]) -> None:
    if argv[:1] == ["--quick"]:
        quick()
        return
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    unit = commands.add_parser("train", help="train and measure a unit")
    unit.add_argument("output", type=Path, help="the JSON file to write")
    source = unit.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="a language model's directory; with --tokens")
    source.add_argument("--config", type=Path, help="the runner_cfg.json of a run of SAELens")
    source.add_argument(
        "--synthetic", action="store_true", help="known features, by SynthSAEBench's settings"
    )
    unit.add_argument("--features", type=int, help="known ones, four times the width")
    unit.add_argument("--tokens", type=Path, help="what benchmarks.quality.text wrote")
    unit.add_argument("--hook", default="model.layers.15")
    unit.add_argument("--d-in", type=int, default=576)
    unit.add_argument("--context", type=int, default=512)
    unit.add_argument("--cache", type=Path, help="a directory for the activations")
    unit.add_argument("--kinds", nargs="+", default=[*SCHEMES, *FAMILIES])
    unit.add_argument("--workers", type=int, default=1, help="processes, each with a GPU")
    unit.add_argument("--seconds", type=float, default=math.inf, help="in which training is to end")
    unit.add_argument("--d-sae", type=int, default=16384)
    unit.add_argument("--k", type=int, default=64)
    unit.add_argument("--budgets", type=int, nargs="+", default=[2, 4, 8, 16, 32, 64])
    unit.add_argument("--samples", type=int, default=16_000_000, help="to train each SAE on")
    unit.add_argument("--activations", type=int, help="that are different; left out: --samples")
    unit.add_argument("--validation", type=int, default=65536)
    unit.add_argument("--test", type=int, default=131072)
    unit.add_argument("--batch", type=int, default=4096)
    unit.add_argument("--lr", type=float, nargs="+", default=[1e-3, 2e-3, 4e-3])
    unit.add_argument("--extensions", type=int, default=2, help="of the grid, where its edge wins")
    unit.add_argument("--rates-of", type=Path, nargs="+", help="units that chose them")
    unit.add_argument("--tuning", type=int, help="samples; of --samples 5 %% if left out, 0: none")
    unit.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    merge = commands.add_parser("report", help="merge units into tables and a figure")
    merge.add_argument("units", type=Path, nargs="+")
    merge.add_argument("--name", required=True, help="of the result")
    merge.add_argument("--draw", nargs="+", help="series for the figure, such as even_tuned")
    args = parser.parse_args(argv)
    if args.command == "train" and args.synthetic:
        unit.set_defaults(**SYNTHETIC_TRAINING)
        args = parser.parse_args(argv)
    if args.command == "train" and (args.model is None) != (args.tokens is None):
        parser.error("--model and --tokens go together")
    if args.command == "train" and args.workers < 1:
        parser.error(f"--workers is {args.workers}, expected 1 or more")
    if args.command == "train" and (args.activations or args.samples) < args.batch:
        parser.error(f"--batch is {args.batch}, expected no more than there are activations")
    if args.command == "train" and args.tuning and args.tuning < args.batch:
        parser.error(f"--tuning is {args.tuning}, expected 0 or --batch ({args.batch}) at least")
    if args.command == "train":
        train(args)
    else:
        report(args.units, args.name, ROOT / "benchmarks", args.draw)


if __name__ == "__main__":
    main(sys.argv[1:])
