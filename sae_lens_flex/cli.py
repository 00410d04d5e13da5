"""The command line: `sae-lens-flex`, or `python -m sae_lens_flex`."""

import argparse
import contextlib
import difflib
import json
import logging
import math
import os
import re
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import datasets
import huggingface_hub
import torch
import torch.distributed as dist
import transformers
from sae_lens import SAE, ActivationsStore, TrainingSAE
from sae_lens import logger as sae_lens_logger
from sae_lens.load_model import load_model
from sae_lens.saes.topk_sae import TopKSAE
from sae_lens.training._interruption import InterruptedException
from sae_lens.util import str_to_dtype

from . import __version__, train_flags
from .acceleration import accelerate
from .acceleration.resumption import check_checkpoint
from .distributed import ShardedTrainingRunner
from .distributed.processes import are_several, is_first_to_fail, is_rank_0, join
from .distributed.runner import check_settings
from .evals import sweep_budgets
from .evals.batches import flat_activations
from .evals.calibration import mean_budgets
from .evals.figures import check_can_write, check_suffix
from .interruption import (
    InterruptibleRunner,
    Stop,
    catching_signals,
    ignore_signals,
    telling_what_is_saved,
)
from .ops.policy import uses_triton
from .saes.budgets import (
    MeanBudget,
    RuntimeBudget,
    check_budgets,
    check_trained_budgets,
    doubling_budgets,
)
from .saes.checks import check_number, not_finite_weights
from .saes.registration import TOPK_TRAINING_CLASSES, TRAINING_CLASSES
from .sharing import (
    SETTLED,
    drop_weights_of_other_budgets,
    export_jumprelu,
    export_topk,
    start_training,
    trained_with,
)

SUMMARY = """\
usage: sae-lens-flex [--version] [--traceback] COMMAND ...

Train and use one sparse autoencoder for every sparsity, with SAELens.

commands:
  train    train an SAE on a language model's activations (SAELens's command line)
  sweep    measure a trained SAE at many budgets
  export   save a trained SAE at one budget as an ordinary SAELens TopK or JumpReLU SAE

"sae-lens-flex COMMAND --help" explains each. What goes wrong is told in one line; --traceback shows
where in the code it arose.
"""

TRAIN_SUMMARY = """\
usage: sae-lens-flex train --architecture hierarchical_topk --d_in D --d_sae F --k K
           --model_name MODEL --hook_name HOOK --dataset_path DATASET [flags]

Train an SAE with SAELens. The flags are SAELens's own. Those that matter first:

  --architecture    hierarchical_topk: one SAE for every budget up to k
                    flex_topk: a TopK SAE for one k, trained by the same kernels
                    flex_batchtopk, flex_matryoshka_batchtopk: SAELens's batchtopk and
                    matryoshka_batchtopk, trained by the same kernels
                    (left out: "standard", as in SAELens)
  --d_in, --d_sae   width of the activations, number of latents
  --k               the largest budget: latents kept per activation
  --matryoshka_widths
                    of flex_matryoshka_batchtopk, such as 1024 4096 24576
  --budgets         levels in the loss, such as 1 8 64; left out: every one of 1..k
  --level_weights   how much each of them counts, such as 1 1 2; left out: all alike
  --model_name, --hook_name, --dataset_path, --is_dataset_tokenized
  --from_pretrained_path
                    a saved SAE to train on. Flags of the SAE that are left out are as it was
                    trained, but with other --budgets --level_weights are even. --d_in, --d_sae,
                    --k and the like must be its own.
  --training_tokens, --train_batch_size_tokens, --lr, --device, --autocast
  --n_batches_in_buffer
                    prompts of --context_size tokens that SAELens shuffles together (left out: 20,
                    or eight times as many as a batch takes, where 20 are less than a batch)
  --output_path     where to save the SAE (left out: "output")
  --log_to_wandb    "false" trains without Weights & Biases

For example, on a language model and a text of the Hugging Face hub:

  sae-lens-flex train --architecture hierarchical_topk --d_in 768 --d_sae 24576 --k 64 \\
    --model_class_name AutoModelForCausalLM --model_name gpt2 --hook_name transformer.h.6 \\
    --model_from_pretrained_kwargs '{"dtype": "bfloat16"}' --exclude_special_tokens true \\
    --dataset_path monology/pile-uncopyrighted --is_dataset_tokenized false \\
    --training_tokens 100000000 --lr 3e-4 --output_path my_sae --log_to_wandb false

"sae-lens-flex train --architecture hierarchical_topk --all-flags" lists every flag of SAELens.
"""

SWEEP_DESCRIPTION = """\
Measure a trained SAE at many budgets (latents kept per activation), each on the same tokens.

It prints for every budget
  explained_variance  share of the activations' variance that the SAE reconstructs
  mse                 squared error of an activation, summed over its d_in components
  l0                  latents active on a token, on average
  not_seen            share of the latents that none of the tokens activated (dead_latents in
                      --json); the more tokens are measured, the smaller it is
  ce_loss_score       share of the model's cross-entropy kept: 1 with its own activations, 0 with
                      zeros in their place; --json has the cross-entropies it is made of, too
"""

EXPORT_DESCRIPTION = """\
Save a trained SAE at one budget as an ordinary SAELens SAE, which loads without this package: at a
number of latents (--budget) as a TopK SAE, at a threshold (--mean, --threshold) as a JumpReLU SAE.
An earlier such export in DIR is replaced; any other SAE there is left alone, and that is an error.
"""

# A longer message is cut. Some of TransformerLens's list every model that it knows.
MESSAGE_WIDTH = 400


# The lowest number that a flag of `train` can mean, where SAELens itself takes lower ones.
LOWEST = {
    "training_tokens": 1,
    "train_batch_size_tokens": 1,
    "store_batch_size_prompts": 1,
    "feature_sampling_window": 1,
    "dead_feature_window": 0,
    "dead_feature_threshold": 0,
    "lr_warm_up_steps": 0,
    "lr_decay_steps": 0,
    "lr_end": 0,
    "n_checkpoints": 0,
    "eval_batch_size_prompts": 1,
    "n_eval_batches": 0,
    "wandb_log_frequency": 1,
    "exclude_special_tokens": 0,  # where it is a number, as the next
    "sequence_separator_token": 0,
}


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line, and which takes whole flags only."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        kind, _, words = message.partition(": ")
        if kind == "unrecognized arguments":
            for flag in re.findall(r"(?:^| )(--[\w-]+)", words):
                near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
                message = f"{flag} is no flag" + (f", did you mean {near[0]}?" if near else "")
                break
        self.exit(2, f"{self.prog}: error: {message}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line on `argv`, or on the process's arguments. Return the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    shows_traceback = argv[:1] == ["--traceback"]
    if shows_traceback:
        del argv[0]
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help"):
        print(SUMMARY, end="")
        return 0
    if command == "--version":
        print(f"sae-lens-flex {__version__}")
        return 0
    commands = {"train": train, "sweep": sweep, "export": export}
    if command not in commands:
        print(
            f"sae-lens-flex: error: {command!r} is no command, expected one of "
            f"{', '.join(commands)} (see sae-lens-flex --help)",
            file=sys.stderr,
        )
        return 2
    stop = Stop()
    with catching_signals(stop):
        try:
            with _warning_in_one_line(command, shows_traceback):
                return commands[command](rest)
        except (KeyboardInterrupt, InterruptedException) as interruption:
            ignore_signals()
            if is_first_to_fail():
                nothing = "interrupted, nothing saved" if command == "train" else "interrupted"
                print(f"sae-lens-flex {command}: {str(interruption) or nothing}", file=sys.stderr)
            return 128 + (stop.number or signal.SIGINT)
        except Exception as error:
            ignore_signals()
            if not is_first_to_fail():
                return 2
            if shows_traceback:
                raise
            print(f"sae-lens-flex {command}: error: {_in_one_line(error)}", file=sys.stderr)
            return 2


@contextlib.contextmanager
def _warning_in_one_line(command: str, shows_place: bool) -> Iterator[None]:
    """Print warnings in the block in one line, as errors: the place tells a user nothing.

    Args:
        command: of the command line.
        shows_place: whether to print the place nevertheless.
    """
    previous = warnings.formatwarning
    if not shows_place:
        warnings.formatwarning = lambda message, *_, **__: (
            f"sae-lens-flex {command}: warning: {' '.join(str(message).split())}\n"
        )
    try:
        yield
    finally:
        warnings.formatwarning = previous


def _in_one_line(error: Exception) -> str:
    message = textwrap.shorten(str(error), MESSAGE_WIDTH, placeholder=" ...")
    if message and isinstance(error, (ValueError, TypeError, OSError)):
        return message
    return f"{type(error).__name__}: {message}"


@contextlib.contextmanager
def _naming(what: str) -> Iterator[None]:
    """Put `what` before the message of an error in the block.

    The libraries' own messages often do not say which model, dataset or SAE could not be read.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {_in_one_line(error)}") from error


@contextlib.contextmanager
def _naming_what_is_made(cfg: Any) -> Iterator[None]:
    """Put before the message of an error in the block what SAELens's runner was making.

    It makes the language model, the text and the SAE in one function. The message of an error of
    anything else stays as it is.
    """
    try:
        yield
    except Exception as error:
        codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
        model = f"model {cfg.model_name}"
        is_here = Path(cfg.model_name).is_dir()
        if cfg.model_class_name == "AutoModelForCausalLM" and not is_here:
            model += " (not a directory here)"
        elif cfg.model_class_name == "HookedTransformer" and is_here:
            model += " (a directory, which --model_class_name AutoModelForCausalLM takes)"
        text = f"dataset {cfg.dataset_path}"
        if cfg.use_cached_activations:
            text = f"cached activations {cfg.cached_activations_path}"
        makers: dict[str, Any] = {
            f"the SAE in {cfg.from_pretrained_path}": TrainingSAE.load_from_disk.__func__,
            model: load_model,
            text: ActivationsStore.from_config.__func__,
            f"an SAE with d_in {cfg.sae.d_in} and d_sae {cfg.sae.d_sae} on {cfg.sae.device}": (
                TrainingSAE.from_dict.__func__
            ),
        }
        for what, function in makers.items():
            if function.__code__ in codes:
                raise ValueError(f"{what}: {_in_one_line(error)}") from error
        raise


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Silence what libraries log and warn while they load something.

    If loading fails, the line that says why would be lost among it. If it succeeds, the warnings
    are given afterwards.
    """
    transformers.utils.logging.disable_progress_bar()
    huggingface_hub.utils.logging.set_verbosity_error()
    datasets.logging.set_verbosity(logging.CRITICAL)
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def train(argv: list[str]) -> int:
    """Run SAELens's training command line."""
    if "-h" in argv or "--help" in argv:
        print(TRAIN_SUMMARY, end="")
        return 0
    if not argv:
        raise ValueError("no flags given (see sae-lens-flex train --help)")
    pretrained, flags = _pretrained(argv)
    cfg = train_flags.parse([*flags, *argv])
    _fit_buffer(cfg, argv)
    _check_numbers(cfg)
    if cfg.resume_from_checkpoint is not None:
        check_checkpoint(cfg.resume_from_checkpoint)
    sae = None if pretrained is None else _start(pretrained, cfg)
    is_ours = cfg.sae.architecture() in TRAINING_CLASSES
    if is_ours and sae is None and cfg.from_pretrained_path is not None:
        _check_as_saved(cfg)
    del pretrained  # Its weights would take as much memory as the new SAE's.
    _make_paths_absolute(cfg)
    runner_class: Any = InterruptibleRunner
    processes = None
    if are_several():
        runner_class = ShardedTrainingRunner
        processes = join(cfg.device)  # From here on "cuda" is this process's GPU.
        check_settings(cfg, processes)
    str_to_dtype(cfg.dtype)  # It may raise, as do the next ones.
    uses_triton(getattr(cfg.sae, "backend", "auto"), _device(cfg.device))
    if processes is None:  # Those of several have been checked, and each holds its own GPU alone.
        _device(cfg.llm_device, "llm_device")
        _device(cfg.act_store_device, "act_store_device")
    with _quietly(), accelerate():
        text = None if cfg.use_cached_activations else _local_dataset(cfg)
        with _offering_hook_names(cfg), _naming_what_is_made(cfg), _dataset_is_the_configs():
            runner = runner_class(cfg, override_dataset=text, override_sae=sae)
        _check_activations(runner)
    if cfg.output_path is not None and is_rank_0():
        Path(cfg.output_path).mkdir(parents=True, exist_ok=True)
    with accelerate(), telling_what_is_saved(cfg):
        trained: Any = runner.run()
    not_finite = not_finite_weights(trained)
    if processes is not None:  # Each holds a part of the SAE.
        processes.meet()  # Rank 0 may upload for long.
        not_finite = sorted(set(chain(*processes.gather(not_finite))))
        dist.destroy_process_group()
    if not is_rank_0():
        return 0
    if not_finite:
        warnings.warn(
            f"the SAE has NaN or infinite values in {', '.join(not_finite)}: its training has "
            "diverged, try a lower --lr",
            stacklevel=1,
        )
    where = "not saved" if cfg.output_path is None else cfg.output_path
    k = f", k={trained.cfg.k}" if hasattr(trained.cfg, "k") else ""
    saved_as = trained.cfg.get_inference_config_class().architecture()
    if saved_as == "jumprelu" and k:
        k = f", trained for {trained.cfg.k:g} latents on average"
    print(f"{where}: a {saved_as} SAE{k}")
    return 0


def _pretrained(argv: list[str]) -> tuple[Any, list[str]]:
    """Load the SAE that --from_pretrained_path names, if this package is to train it.

    SAELens would train it with its saved config, and ignore flags such as --budgets.

    Returns:
        The SAE, and flags that describe it. The user's flags have to follow them, because the last
        of two equal flags counts. None and no flags if no SAE is named, or SAELens is to load it.
    """
    parser = OneLineParser("sae-lens-flex train", add_help=False)
    parser.add_argument("--from_pretrained_path", nargs="?")
    parser.add_argument("--architecture", "--sae", nargs="?")
    for name in ("budgets", "level_weights"):
        parser.add_argument(f"--{name}", nargs="*")
    for name in ("d_in", "d_sae", "k", "normalize_activations"):
        parser.add_argument(f"--{name}", *(["-k"] if name == "k" else []), nargs="?")
    given = vars(parser.parse_known_args(argv)[0])
    path, architecture = given.pop("from_pretrained_path"), given.pop("architecture")
    budgets, level_weights = given.pop("budgets"), given.pop("level_weights")
    if path is None:
        return None, []
    if not Path(path, "cfg.json").is_file():
        raise ValueError(
            f"from_pretrained_path is {path!r}, expected the directory of an SAE: there is no "
            "cfg.json in it"
        )
    with _naming(path):
        saved = json.loads(Path(path, "cfg.json").read_text())
        saved_as = saved.get("architecture")
        is_flex = saved.get("metadata", {}).get("training_architecture") == "flex_topk"
    if architecture is None:
        # A flex_topk SAE is saved as "topk" for inference.
        architecture = "flex_topk" if saved_as == "topk" and is_flex else saved_as
    if architecture not in TOPK_TRAINING_CLASSES:
        if not {architecture, saved_as} & TRAINING_CLASSES.keys():
            return None, []
        if architecture != saved_as:
            raise ValueError(
                f"architecture is {architecture!r}, expected {saved_as!r} as the SAE in {path!r}"
            )
        return None, ["--architecture", architecture, *_as_flags(_own_fields(saved))]
    with _naming(path), _quietly():
        sae = SAE.load_from_disk(path)
        if not isinstance(sae, TopKSAE):
            raise ValueError(f"it holds a {type(sae).__name__}, expected a TopKSAE")
        known = trained_with(sae, TOPK_TRAINING_CLASSES[architecture][1])
    known |= {name: getattr(sae.cfg, name) for name in SETTLED}
    # These flags come first. With a wrong one of them, the error might name another flag.
    for name, text in given.items():
        if text is not None and text != str(known[name]):
            raise ValueError(
                f"{name} is {text}, expected {known[name]} as the SAE in {path!r} has it"
            )
    if budgets is not None and level_weights is None:
        budgets = [int(level) if level.isdecimal() else level for level in budgets]
        # Others, and the budgets of another architecture, are refused by the parser.
        if "budgets" in known and all(isinstance(level, int) for level in budgets):
            check_trained_budgets(budgets, known["k"])
        drop_weights_of_other_budgets(known, budgets, stacklevel=1)
    return sae, ["--architecture", architecture, *_as_flags(known)]


def _own_fields(saved: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a saved training config, but for those that the run decides."""
    _, config = TRAINING_CLASSES[saved["architecture"]]
    names = {field.name for field in fields(config)} - {"device", "metadata"}
    return {name: value for name, value in saved.items() if name in names}


def _check_as_saved(cfg: Any) -> None:
    """Raise a ValueError for a flag that SAELens would ignore for what the saved SAE has."""
    path = cfg.from_pretrained_path
    for name, value in _own_fields(json.loads(Path(path, "cfg.json").read_text())).items():
        given = getattr(cfg.sae, name)
        if given != value and value != "constant_norm_rescale":  # It has no flag.
            raise ValueError(f"{name} is {given}, expected {value} as the SAE in {path!r} has it")


def _as_flags(sae_fields: dict[str, Any]) -> Iterator[str]:
    """Return the flags that give an SAE's config these fields."""
    for name, value in sae_fields.items():
        if name == "normalize_activations" and value == "constant_norm_rescale":
            continue  # SAELens's flag does not take this value. `_start` sets it.
        if name in ("budgets", "level_weights") and value is None:
            continue  # The flag alone would mean an empty list. Other flags alone mean None.
        # --dtype is the run's.
        yield "--sae.dtype" if name == "dtype" else f"--{name}"
        if isinstance(value, list):
            yield from map(str, value)
        elif value is not None:
            yield str(value)


def _start(pretrained: Any, cfg: Any) -> Any:
    """Make the SAE that the flags describe, with the weights of `pretrained`."""
    # Not every normalization has a flag.
    normalization = pretrained.cfg.normalize_activations
    cfg.sae = replace(cfg.sae, normalize_activations=normalization)
    with _naming(cfg.from_pretrained_path):
        return start_training(pretrained, cfg.sae)


def _check_numbers(cfg: Any) -> None:
    """Raise a ValueError for a number that SAELens takes and does something else with, or nothing.

    Some of them end its run much later.
    """
    if not 0 < cfg.lr < math.inf:
        raise ValueError(f"--lr is {cfg.lr}, expected a finite number above 0")
    given = vars(cfg.logger) | vars(cfg)
    lowest_of = dict(LOWEST)
    if cfg.lr_scheduler_name == "cosineannealingwarmrestarts":
        lowest_of["n_restart_cycles"] = 1
    if cfg.sae.normalize_activations == "expected_average_only_in":
        lowest_of["n_batches_for_norm_estimate"] = 1
    if cfg.logger.log_to_wandb:
        lowest_of |= {"eval_every_n_wandb_logs": 1, "n_eval_batches": 1}
    for name, lowest in lowest_of.items():
        number = given[name]
        if isinstance(number, (int, float)) and not lowest <= number < math.inf:
            kind = "a finite number of " if isinstance(number, float) else ""
            raise ValueError(f"--{name} is {number}, expected {kind}at least {lowest}")


def _fit_buffer(cfg: Any, argv: list[str]) -> None:
    """Let the buffer hold a training batch, without which SAELens cannot start.

    SAELens's own defaults do not fit together: 20 prompts of 128 tokens, and batches of 4096.
    """
    parser = OneLineParser("sae-lens-flex train", add_help=False)
    parser.add_argument("--n_batches_in_buffer", nargs="?")
    is_given = parser.parse_known_args(argv)[0].n_batches_in_buffer is not None
    tokens_per_prompt = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    n_processes = int(os.environ["WORLD_SIZE"]) if are_several() else 1
    batch_size = math.ceil(cfg.train_batch_size_tokens / n_processes)
    prompts_per_batch = math.ceil(batch_size / tokens_per_prompt)
    if cfg.n_batches_in_buffer >= prompts_per_batch:
        return
    if is_given:
        part = "a process's part of " if n_processes > 1 else ""
        raise ValueError(
            f"--n_batches_in_buffer is {cfg.n_batches_in_buffer}, expected at least "
            f"{prompts_per_batch}: that many prompts of {tokens_per_prompt} tokens "
            f"(--context_size) make {part}a batch of --train_batch_size_tokens "
            f"({cfg.train_batch_size_tokens})"
        )
    # SAELens keeps half of the buffer back for shuffling, and serves the rest.
    cfg.n_batches_in_buffer = 8 * prompts_per_batch


def _make_paths_absolute(cfg: Any) -> None:
    """Replace paths of local directories in the config by absolute ones.

    The SAE records them, and a sweep from another working directory has to find them.
    """
    names = ["dataset_path"]
    # Models of other classes have names, not directories.
    if cfg.model_class_name == "AutoModelForCausalLM":
        names.append("model_name")
    for name in names:
        path = getattr(cfg, name)
        if path and Path(path).is_dir():
            setattr(cfg, name, str(Path(path).absolute()))


def _local_dataset(cfg: Any) -> Any:
    """Return the dataset of a config, or None where it lies in no local directory.

    SAELens asks the hub for the tokenizer of tokens under a path, and fails for a directory.
    """
    path = cfg.dataset_path
    if not path or not Path(path).is_dir():
        return None
    with _naming(f"dataset {path}"):
        return datasets.load_dataset(
            path,
            split="train",
            streaming=cfg.streaming,
            trust_remote_code=cfg.dataset_trust_remote_code,
        )


@contextlib.contextmanager
def _dataset_is_the_configs() -> Iterator[None]:
    """Silence what SAELens says of a dataset that is handed over and not the config's."""

    def is_true(record: logging.LogRecord) -> bool:
        return "You just passed in a dataset" not in record.getMessage()

    sae_lens_logger.addFilter(is_true)
    # It compares rows with tokens.
    warnings.filterwarnings("ignore", "The training dataset contains fewer samples")
    try:
        yield
    finally:
        sae_lens_logger.removeFilter(is_true)


@contextlib.contextmanager
def _offering_hook_names(cfg: Any) -> Iterator[None]:
    """Name modules of Hugging Face's model where SAELens says that `hook_name` is none of them."""
    try:
        yield
    except ValueError as error:
        if "hook_names not found" not in str(error):
            raise
        # The model is gone with the error. One without weights has the same modules.
        try:
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(
                    transformers.AutoConfig.from_pretrained(cfg.model_name)
                )
        except Exception:
            raise error from None
        raise ValueError(_wrong_hook_name(cfg.hook_name, _called_modules(model))) from error


def _called_modules(model: torch.nn.Module) -> list[str]:
    """Return the names of a model's modules, but for lists of layers, which no model calls."""
    lists = torch.nn.ModuleList, torch.nn.ModuleDict
    return [name for name, module in model.named_modules() if not isinstance(module, lists)]


def _wrong_hook_name(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=4)
    if not near:
        # The names of whole layers, or of what TransformerLens has after each.
        near = [other for other in known if re.search(r"\.\d+$|hook_resid_post$", other)]
    if len(near) > 4:
        near = [*near[:3], "...", near[-1]]
    such_as = f", such as {', '.join(near)}" if near else ""
    return f"hook_name is {name!r}, expected a hook point of the model{such_as}"


def _check_activations(runner: Any) -> None:
    """Raise if the model does not give the activations that the SAE is to read.

    The model runs on one prompt for this. Without the check the first step of training would fail,
    with a message that names neither the hook point nor `d_in`.
    """
    cfg, model = runner.cfg, runner.model
    if runner.activations_store.cached_activations_path is not None:
        return
    with _naming(f"{cfg.model_name} on context_size {cfg.context_size} tokens"), torch.no_grad():
        tokens = torch.zeros(1, cfg.context_size, dtype=torch.int64, device=cfg.llm_device)
        _, cache = model.run_with_cache(
            tokens, names_filter=[cfg.hook_name], **runner.activations_store.model_kwargs
        )
    if cfg.hook_name not in cache:
        # Of Hugging Face's model, which `model.model` is, SAELens hooks the one module alone.
        known = _called_modules(model.model) if hasattr(model, "model") else model.hook_dict
        raise ValueError(_wrong_hook_name(cfg.hook_name, known))
    width = flat_activations(cache[cfg.hook_name], cfg.hook_name, cfg.hook_head_index).shape[-1]
    if width != cfg.sae.d_in:
        raise ValueError(
            f"d_in is {cfg.sae.d_in}, expected {width}, the width of {cfg.hook_name!r}"
        )


def sweep(argv: list[str]) -> int:
    """Print an SAE's metrics at many budgets."""
    parser = _parser("sweep", "[flags]", SWEEP_DESCRIPTION, "my_sae --figure sweep.html")
    parser.add_argument(
        "--budgets",
        type=_budget,
        nargs="+",
        metavar="K",
        help="such as 1 8 64; default: 1, 2, 4, ... and k",
    )
    parser.add_argument(
        "--mean-budgets",
        type=_mean,
        nargs="+",
        default=[],
        metavar="MEAN",
        help="such as 8 12.5: latents kept on average, by one threshold; all are chosen on as many "
        "batches as are measured, which come before those",
    )
    parser.add_argument("--model", help="language model; default: the one that the SAE names")
    parser.add_argument(
        "--model-class",
        metavar="CLASS",
        help="SAELens's model class; default: the one that the SAE names",
    )
    parser.add_argument(
        "--dataset", help="text, on the hub or in a directory; default: what the SAE was trained on"
    )
    parser.add_argument(
        "--split", default="train", help="split of the text; default: train, as in training"
    )
    parser.add_argument(
        "--n-batches", type=_count, default=10, metavar="N", help="batches of prompts; default: 10"
    )
    parser.add_argument(
        "--batch-size-prompts",
        type=_count,
        default=8,
        metavar="N",
        help="prompts a batch; default: 8",
    )
    parser.add_argument(
        "--no-ce", action="store_true", help="leave out the cross-entropy, the slowest to measure"
    )
    parser.add_argument("--kl", action="store_true", help="measure KL divergences too")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps; default: cpu")
    parser.add_argument("--json", type=_path, metavar="FILE", help="write the result here")
    parser.add_argument(
        "--figure",
        type=_path,
        metavar="FILE",
        help="draw explained variance here: .html, or with the package kaleido and a Chrome .png, "
        ".svg, .pdf",
    )
    args = parser.parse_args(argv)

    if args.figure is not None:
        check_suffix("--figure", args.figure)
    _device(args.device)
    sae = _load(args.sae, args.sae_id, args.device)
    for flag, given in (("--budgets", args.budgets), ("--mean-budgets", args.mean_budgets)):
        if given and not isinstance(sae, RuntimeBudget):
            parser.error(
                f"argument {flag}: a {type(sae).__name__} takes no budget at run time; leave "
                "the flag out to measure it as it is"
            )
    if args.budgets is not None:
        args.budgets = check_budgets("--budgets", args.budgets, sae.cfg.k)
    for mean in args.mean_budgets:
        if mean > sae.cfg.k:
            parser.error(f"argument --mean-budgets: {mean:g}, expected up to k ({sae.cfg.k})")
    metadata = sae.cfg.metadata
    model_name = args.model or metadata.model_name
    dataset = args.dataset or metadata.dataset_path
    for field in ("hook_name", "context_size", "prepend_bos"):
        if metadata[field] is None:
            parser.error(f"the SAE's metadata has no {field}, which a sweep needs")
    if not model_name:
        parser.error("the SAE names no language model: give --model")
    if not dataset:
        parser.error("the SAE names no dataset: give --dataset")
    for flag, path in (("--json", args.json), ("--figure", args.figure)):
        if path is not None:
            with _naming(f"argument {flag}"), _quietly():
                _check_can_be_written(path)
                if path is args.figure:
                    check_can_write(path)
    with _quietly():
        with _naming(f"model {model_name}{_missing_directory(model_name, '--model')}"):
            model = load_model(
                args.model_class or metadata.model_class_name or "HookedTransformer",
                model_name,
                device=args.device,
                model_from_pretrained_kwargs=metadata.model_from_pretrained_kwargs,
                hook_names=[metadata.hook_name],
            )
        with _naming(
            f"dataset {dataset}, split {args.split}{_missing_directory(dataset, '--dataset')}"
        ):
            # Of a name SAELens takes the split train, and checks the tokenizer of its tokens.
            text = dataset
            if args.split != "train" or Path(dataset).is_dir():
                text = datasets.load_dataset(dataset, split=args.split, streaming=True)
            store = ActivationsStore.from_sae(
                model,
                sae,
                dataset=text,
                device=args.device,
                # The prompts are made of the text as in training.
                disable_concat_sequences=bool(metadata.disable_concat_sequences),
                sequence_separator_token=metadata.get("sequence_separator_token", "bos"),
            )
    first_pass = store.iterable_sequences
    batches = {"n_batches": args.n_batches, "batch_size_prompts": args.batch_size_prompts}
    means = mean_budgets(sae, store, args.mean_budgets, **batches) if args.mean_budgets else []
    if means:
        args.budgets = [*(args.budgets or doubling_budgets(sae.cfg.k)), *means]
    result = sweep_budgets(
        sae,
        store,
        budgets=args.budgets,
        **batches,
        compute_ce_loss=not args.no_ce,
        compute_kl=args.kl,
    )
    print(result)
    if (dataset, args.split) == (metadata.dataset_path, "train"):
        origin = "the text that the SAE was trained on, from its beginning"
    else:
        origin = "from its beginning"
    if means:
        origin += f", after {args.n_batches} batches that chose the thresholds"
    print(f"text: {dataset}, split {args.split}, {origin}")
    if store.iterable_sequences is not first_pass:
        print("The text ended and began again, so some of its tokens count more than once.")
    for what, path, write in (
        ("json", args.json, result.to_json),
        ("figure", args.figure, result.plot),
    ):
        if path is not None:
            write(path)
            print(f"{what}: {path}")
    return 0


def export(argv: list[str]) -> int:
    """Save an SAE at one budget as a TopK SAE."""
    parser = _parser(
        "export",
        "(--budget K | --mean M --threshold T) --output DIR",
        EXPORT_DESCRIPTION,
        "my_sae --budget 16 --output my_topk_sae",
    )
    parser.add_argument(
        "--budget",
        type=int,
        metavar="K",
        help="latents kept per activation: 1..k, the k that the SAE was trained with",
    )
    parser.add_argument(
        "--mean",
        type=_mean,
        metavar="M",
        help='latents kept on average, up to k: "mean" in what "sweep --mean-budgets" writes to '
        "--json",
    )
    parser.add_argument(
        "--threshold",
        type=_threshold,
        metavar="T",
        help='latents whose activation is above it are kept: "threshold" beside that "mean"',
    )
    parser.add_argument("--output", type=_path, metavar="DIR", help="directory to write")
    args = parser.parse_args(argv)
    has_mean, has_threshold = args.mean is not None, args.threshold is not None
    if has_mean != has_threshold or has_mean == (args.budget is not None):
        parser.error("expected either --budget, or both --mean and --threshold")
    if args.output is None:
        parser.error("--output is missing, expected a directory to write")
    sae = _load(args.sae, args.sae_id, "cpu")
    if not has_mean:
        with _by_flags(path="--output", budget="--budget"):
            export_topk(sae, args.output, budget=args.budget)
        print(f"{args.output}: a topk SAE with k={args.budget}")
        return 0
    with _by_flags(path="--output", budget="--mean"):
        budget = MeanBudget(mean=args.mean, threshold=args.threshold)
        export_jumprelu(sae, args.output, budget=budget)
    given = f"threshold {args.threshold:g}, given for {args.mean:g} latents on average"
    print(f"{args.output}: a jumprelu SAE with {given}")
    return 0


@contextlib.contextmanager
def _by_flags(**flags: str) -> Iterator[None]:
    """Let an error in the block that begins with an argument's name begin with its flag's."""
    try:
        yield
    except (ValueError, OSError) as error:
        name, _, rest = str(error).partition(" ")
        if name not in flags:
            raise
        raise type(error)(f"{flags[name]} {rest}") from error


def _check_can_be_written(path: Path) -> None:
    """Raise an OSError if there can be no file of this name. Make its directory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("a"):
        pass
    if is_new:
        path.unlink()


def _missing_directory(name: str, flag: str) -> str:
    """Return what may be wrong with the name of a model or a dataset, for an error's message.

    Args:
        name: from the SAE's metadata or the flag.
        flag: the flag that names another.

    Returns:
        A remark in parentheses if the name looks like a path of no directory, else "".
    """
    if Path(name).exists() or not {"/", os.sep} & set(name):
        return ""
    if Path(name).is_absolute():
        return f" (no such directory here; {flag} names another)"
    return (
        f" (not found in this directory; if the SAE was trained with a relative path, give its "
        f"directory with {flag})"
    )


def _parser(command: str, flags: str, description: str, example: str) -> OneLineParser:
    """Return a command's parser, with the two arguments that name an SAE."""
    prog = f"sae-lens-flex {command}"
    parser = OneLineParser(
        prog=prog,
        usage=f"{prog} PATH_OR_REPO {flags}",
        description=description,
        epilog=f"for example:\n  {prog} {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "sae",
        metavar="PATH_OR_REPO",
        type=_not_empty,
        help="a directory that an SAE was saved in, or a repository of the Hugging Face hub",
    )
    parser.add_argument(
        "--sae-id", metavar="FOLDER", help="the SAE's folder in the repository or directory"
    )
    return parser


def _not_empty(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("it is empty")
    return text


def _path(text: str) -> Path:
    return Path(_not_empty(text))


def _budget(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise _no_number(text, "whole number") from None


def _mean(text: str) -> float:
    try:
        return check_number("mean", float(text), is_positive=True)
    except ValueError:
        raise _no_number(text, "number above 0") from None


def _threshold(text: str) -> float:
    try:
        return check_number("threshold", float(text))
    except ValueError:
        raise _no_number(text, "number of at least 0") from None


def _no_number(text: str, kind: str) -> argparse.ArgumentTypeError:
    several = " (give several with spaces between them, without quotes)"
    hint = several if len(re.findall(r"[\d.]+", text)) > 1 else ""
    return argparse.ArgumentTypeError(f"{text!r} is no {kind}{hint}")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _device(name: str, argument: str = "device") -> torch.device:
    with _naming(f"{argument} {name}"):
        return torch.empty(0, device=name).device


def _load(path_or_repo: str, sae_id: str | None, device: str) -> Any:
    if Path(path_or_repo).is_dir():
        path = Path(path_or_repo, sae_id or "")
        if not (path / "cfg.json").is_file():
            raise ValueError(f"{str(path)!r} holds no SAE: there is no cfg.json in it")
        with _naming(str(path)), _quietly():
            if "dtype" not in json.loads((path / "cfg.json").read_text()):
                raise ValueError(
                    "cfg.json names no dtype, expected an SAE of SAELens (sparsify's is none)"
                )
            return SAE.load_from_disk(path, device=device)
    if sae_id is None:
        raise ValueError(
            f"{path_or_repo!r} is no directory; to take it as a repository of the Hugging Face "
            "hub, give --sae-id"
        )
    with _naming(f"{path_or_repo} {sae_id}"), _quietly():
        return SAE.from_pretrained(path_or_repo, sae_id, device=device)
