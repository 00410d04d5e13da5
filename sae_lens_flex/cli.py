"""The command line: `sae-lens-flex` and `python -m sae_lens_flex`."""

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from sae_lens import SAE, ActivationsStore, LanguageModelSAETrainingRunner
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.load_model import load_model

from .budgets import sweep_budgets
from .sharing import export_topk

SUMMARY = """\
Train and use one sparse autoencoder for every sparsity, with SAELens.

commands:
  train    train an SAE on a language model's activations (SAELens's command line)
  sweep    measure a trained SAE at many budgets
  export   save a trained SAE at one budget as an ordinary SAELens TopK SAE

"sae-lens-flex COMMAND --help" explains each.
"""

TRAIN_SUMMARY = """\
usage: sae-lens-flex train --architecture hierarchical_topk --d_in D --d_sae F --k K
           --model_name MODEL --hook_name HOOK --dataset_path DATASET [flags]

Train an SAE with SAELens. The flags are SAELens's own. Those that matter first:

  --architecture    hierarchical_topk: one SAE for every budget up to k
                    flex_topk: a TopK SAE for one k, trained by the same kernels
  --d_in, --d_sae   width of the activations, number of latents
  --k               the largest budget: latents kept per activation
  --budgets         levels in the loss, such as 1 8 64; left out: every one of 1..k
  --model_name, --hook_name, --dataset_path, --is_dataset_tokenized
  --training_tokens, --train_batch_size_tokens, --lr, --device, --autocast
  --output_path     where to save the SAE

"sae-lens-flex train --architecture hierarchical_topk --all-flags" lists every flag of SAELens.
"""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv`, or on the process's arguments; return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help"):
        print(SUMMARY, end="")
        return 0
    commands = {"train": train, "sweep": sweep, "export": export}
    if command not in commands:
        print(
            f"sae-lens-flex: error: {command!r} is no command, expected one of "
            f"{', '.join(commands)} (see sae-lens-flex --help)",
            file=sys.stderr,
        )
        return 2
    try:
        return commands[command](rest)
    except (ValueError, TypeError, KeyError, OSError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, KeyError):
            message = f"{message} is missing"
        print(f"sae-lens-flex {command}: error: {message}", file=sys.stderr)
        return 2


def train(argv: list[str]) -> int:
    """Run SAELens's training command line."""
    if not argv or "-h" in argv or "--help" in argv:
        print(TRAIN_SUMMARY, end="")
        return 0
    LanguageModelSAETrainingRunner(_parse_train_arguments(argv)).run()
    return 0


def _parse_train_arguments(argv: list[str]) -> Any:
    argv = ["--help" if argument == "--all-flags" else argument for argument in argv]
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            return _parse_cfg_args(argv)
    except argparse.ArgumentError as error:
        raise ValueError(str(error)) from None
    except SystemExit as stop:
        if not stop.code:
            raise
        # argparse has printed the usage of some hundred flags before the line that matters
        raise ValueError(
            messages.getvalue().strip().splitlines()[-1].partition("error: ")[2]
        ) from None


def sweep(argv: list[str]) -> int:
    """Print an SAE's metrics at many budgets."""
    parser = OneLineParser(
        prog="sae-lens-flex sweep",
        description="Measure a trained SAE at many budgets, each on the same tokens.",
    )
    _add_sae_arguments(parser)
    parser.add_argument("--budgets", type=int, nargs="+", help="default: 1, 2, 4, ... and k")
    parser.add_argument("--model", help="language model; default: the one that the SAE names")
    parser.add_argument(
        "--model-class", help="SAELens's model class; default: the one that the SAE names"
    )
    parser.add_argument("--dataset", help="text; default: the dataset that the SAE was trained on")
    parser.add_argument("--n-batches", type=int, default=10, help="batches of prompts (10)")
    parser.add_argument("--batch-size-prompts", type=int, default=8, help="prompts a batch (8)")
    parser.add_argument("--no-ce", action="store_true", help="leave the cross-entropy out")
    parser.add_argument("--kl", action="store_true", help="compute KL divergences too")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps (cpu)")
    parser.add_argument("--json", type=Path, help="write the result here")
    parser.add_argument("--figure", type=Path, help="draw explained variance here (.html or .png)")
    args = parser.parse_args(argv)

    sae = _load(args.sae, args.sae_id, args.device)
    metadata = sae.cfg.metadata
    model_name = args.model or metadata.model_name
    dataset = args.dataset or metadata.dataset_path
    if not model_name:
        parser.error("the SAE names no language model: give --model")
    if not dataset:
        parser.error("the SAE names no dataset: give --dataset")
    model = load_model(
        args.model_class or metadata.model_class_name or "HookedTransformer",
        model_name,
        device=args.device,
        model_from_pretrained_kwargs=metadata.model_from_pretrained_kwargs,
        hook_names=[metadata.hook_name],
    )
    store = ActivationsStore.from_sae(model, sae, dataset=dataset, device=args.device)
    result = sweep_budgets(
        sae,
        store,
        budgets=args.budgets,
        n_batches=args.n_batches,
        batch_size_prompts=args.batch_size_prompts,
        compute_ce_loss=not args.no_ce,
        compute_kl=args.kl,
    )
    print(
        result.to_pandas().drop(columns="sae").to_string(index=False, float_format="{:.4f}".format)
    )
    if args.json is not None:
        result.to_json(args.json)
    if args.figure is not None:
        result.plot(args.figure)
    return 0


def export(argv: list[str]) -> int:
    """Save an SAE at one budget as a TopK SAE."""
    parser = OneLineParser(
        prog="sae-lens-flex export",
        description="Save a trained SAE at one budget as an ordinary SAELens TopK SAE, which loads "
        "without this package.",
    )
    _add_sae_arguments(parser)
    parser.add_argument("--budget", type=int, required=True, help="latents to keep, 1..k")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    args = parser.parse_args(argv)
    export_topk(_load(args.sae, args.sae_id, "cpu"), args.output, budget=args.budget)
    print(f"{args.output}: a topk SAE with k={args.budget}")
    return 0


def _add_sae_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "sae", metavar="PATH_OR_REPO", help="a directory, or a repository of the Hugging Face hub"
    )
    parser.add_argument("--sae-id", help="the SAE's folder in the repository")


def _load(path_or_repo: str, sae_id: str | None, device: str) -> Any:
    if Path(path_or_repo).is_dir():
        return SAE.load_from_disk(path_or_repo, device=device)
    if sae_id is None:
        raise ValueError(
            f"{path_or_repo!r} is no directory; to take it as a repository of the Hugging Face "
            "hub, give --sae-id"
        )
    return SAE.from_pretrained(path_or_repo, sae_id, device=device)
