"""How good one SAE for every budget is, beside SAEs trained for each budget.

    python examples/smollm2.py output/smollm2
    python -m benchmarks.quality.text output/tokens.npy --model output/smollm2
    python -m benchmarks.quality train lm.json --model output/smollm2 --tokens output/tokens.npy
    python -m benchmarks.quality train synthetic.json --synthetic
    python -m benchmarks.quality train run.json --config output/my_sae/runner_cfg.json
    python -m benchmarks.quality report lm*.json --name smollm2
    python -m benchmarks.quality --quick  # all of it on a tiny model, on a CPU; writes no file

`train` is a unit: some kinds of SAEs (`--kinds`), each trained by SAELens's trainer within
`accelerate()` on the same activations, with one seed. Of a grid of learning rates each kind gets
the one that explains most variance of other activations than those whose results are reported. A
further seed takes the learning rates that another unit chose (`--rates-of`). Units that run at once
on one machine share their activations by `--cache`, and are not to be timed.

`report` merges units. It prints tables and writes them with the results to benchmarks/results, and
the figure to benchmarks/figures.
"""

import argparse
import datetime
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import sae_lens_flex

from ..measuring import machine
from .kinds import FAMILIES, SCHEMES, make_kinds
from .report import report
from .sources import (
    SYNTHETIC,
    LanguageModelSource,
    Sizes,
    Source,
    SyntheticSource,
    model_config,
    saved_config,
    small_synthetic,
    token_dataset,
)
from .unit import Training, chosen_rates, run_unit

ROOT = Path(__file__).parents[2]
TINY_LM = ROOT / "examples" / "tiny_lm"


def train(args: argparse.Namespace) -> None:
    """Train and measure a unit."""
    torch.set_float32_matmul_precision("high")
    sizes = Sizes(args.activations or args.samples, args.validation, args.test)
    autocast = args.device.startswith("cuda")
    if args.synthetic:
        cfg = SYNTHETIC if args.features is None else small_synthetic(args.features)
        source: Source = SyntheticSource(cfg, sizes, args.device)
    elif args.config is not None:
        cfg = saved_config(args.config)
        cfg.device = cfg.act_store_device = args.device
        source = LanguageModelSource(cfg, sizes, cache=args.cache)
    else:
        dataset = token_dataset(args.tokens)
        about = args.tokens.with_suffix(".json")
        cfg = model_config(
            str(args.model), args.hook, args.d_in, args.d_sae, args.k, args.context, args.device
        )
        text = json.loads(about.read_text()) if about.exists() else args.tokens.name
        source = LanguageModelSource(cfg, sizes, dataset, args.cache, text)
    training = Training(args.d_sae, args.samples, args.batch, args.seed, args.device, autocast)
    head = {
        "date": datetime.date.today().isoformat(),
        "machine": machine(args.device),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "sae-lens")},
        "sae-lens-flex": sae_lens_flex.__version__,
        "source": source.about,
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
        args.output.write_text(json.dumps(head | result, indent=1) + "\n")

    kinds = make_kinds(args.kinds, args.k, args.d_sae, args.budgets)
    rates = (lambda kind: args.lr) if args.rates_of is None else chosen_rates(args.rates_of)
    run_unit(kinds, rates, source, training, write, args.extensions)


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
            ("model", f"--config {tiny} --kinds even half_on_k topk_8 --lr 3e-3 6e-3"),
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
    source.add_argument("--synthetic", action="store_true", help="known features")
    unit.add_argument("--features", type=int, help="known ones, four times the width")
    unit.add_argument("--tokens", type=Path, help="what benchmarks.quality.text wrote")
    unit.add_argument("--hook", default="model.layers.15")
    unit.add_argument("--d-in", type=int, default=576)
    unit.add_argument("--context", type=int, default=512)
    unit.add_argument("--cache", type=Path, help="a file for the activations")
    unit.add_argument("--kinds", nargs="+", default=[*SCHEMES, *FAMILIES])
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
    unit.add_argument("--seed", type=int, default=0)
    unit.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    merge = commands.add_parser("report", help="merge units into tables and a figure")
    merge.add_argument("units", type=Path, nargs="+")
    merge.add_argument("--name", required=True, help="of the result")
    args = parser.parse_args(argv)
    if args.command == "train" and (args.model is None) != (args.tokens is None):
        parser.error("--model and --tokens go together")
    if args.command == "train":
        train(args)
    else:
        report(args.units, args.name, ROOT / "benchmarks")


if __name__ == "__main__":
    main(sys.argv[1:])
