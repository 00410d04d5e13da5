"""The flags of `sae-lens-flex train`: SAELens's parser, with errors that say what to write."""

import argparse
import contextlib
import difflib
import io
import re
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from .saes.registration import TRAINING_CLASSES

DEFAULT_ARCHITECTURE = "standard"  # SAELens's
RUN_CONFIGS = (LanguageModelSAERunnerConfig, LoggingConfig)
# SAELens has a default for each, and would train something else than the user means: on another
# language model or text, or an SAE of another size.
NEEDED = ("--model_name", "--hook_name", "--dataset_path", "--d_in", "--d_sae", "--k")


def parse(argv: Sequence[str]) -> Any:
    """Return the LanguageModelSAERunnerConfig that the flags describe.

    Raises:
        ValueError: if SAELens's parser refuses them, or one is missing. The message names the flag.
    """
    argv = ["--help" if argument == "--all-flags" else argument for argument in argv]
    messages = io.StringIO()
    try:
        with contextlib.redirect_stderr(messages):
            cfg = _parsed(argv)
    except ValueError:  # of the config, perhaps of a default that does not fit
        _check_whole(argv)
        _check_needed(argv)
        raise
    except argparse.ArgumentError as error:
        message = str(error)
    except SystemExit as stop:
        if not stop.code:
            raise
        # argparse has printed the usage of some hundred flags, and then the error as the last line.
        message = messages.getvalue().strip().splitlines()[-1].partition("error: ")[2]
    else:
        _check_whole(argv)
        _check_needed(argv)
        return cfg
    raise ValueError(_explained(message, argv))


def _parsed(argv: Sequence[str]) -> Any:
    try:
        return _parse_cfg_args(argv)
    except ZeroDivisionError:
        # A config that prints its sizes divides by them. The command refuses them by name.
        return _parse_cfg_args([*argv, "--verbose", "false"])


def _check_whole(argv: Sequence[str]) -> None:
    """Raise a ValueError for the beginning of a flag, which SAELens's parser takes for the flag."""
    architecture = _given(argv, "--architecture", "--sae", nargs="?")
    known = _flags(architecture)
    for flag in _flags_among(argv):
        if flag not in {*known, "--sae"} and any(name.startswith(flag) for name in known):
            raise ValueError(_unknown_flags([flag], architecture))


def _check_needed(argv: Sequence[str]) -> None:
    """Raise a ValueError that names the flags without which a run is not the one that is meant."""
    flags = _flags(_given(argv, "--architecture", "--sae", nargs="?"))
    names = {flag: [flag, "-k"] if flag == "--k" else [flag] for flag in NEEDED if flag in flags}
    missing = [flag for flag, each in names.items() if _given(argv, *each, nargs="*") is None]
    if missing:
        are = "is" if len(missing) == 1 else "are"
        raise ValueError(
            f"{', '.join(missing)} {are} missing, expected with every run: which language model, "
            "point and text, and the size of the SAE"
        )


def _explained(message: str, argv: Sequence[str]) -> str:
    """Return a message of argparse in words that say what to write instead."""
    kind, _, rest = message.partition(": ")
    flag = kind.removeprefix("argument ").split("/")[-1]
    architecture = _given(argv, "--architecture", "--sae", nargs="?")
    if flag == "--architecture":
        near = difflib.get_close_matches(architecture or "", SAE_TRAINING_CLASS_REGISTRY)
        return f"{message}; did you mean {near[0]}?" if near else message
    if kind == "unrecognized arguments":
        return _unknown_flags(rest.split(), architecture) or message
    if kind == "ambiguous option":  # the beginning of several flags
        return _unknown_flags(rest.split()[:1], architecture) or message
    if rest.startswith("invalid") and flag in _flags(architecture, of_lists=True):
        # Of "[1, 4, 8]" the message has "[1," alone.
        given = " ".join(_given(argv, flag, nargs="*"))
        numbers = re.split(r"[\s,;\[\]()]+", given.strip("[]() "))
        if all(re.fullmatch(r"[\d.eE+-]+", number) for number in numbers):
            return (
                f"{flag} is {given!r}, expected numbers with spaces between them, without quotes: "
                f"{flag} {' '.join(numbers)}"
            )
    return message


def _unknown_flags(words: list[str], architecture: str | None) -> str | None:
    """Return what is wrong with the words that argparse did not recognize, if one is a flag.

    A misspelt flag comes before one of another architecture: it may be --architecture.
    """
    known = _flags(architecture)
    owners: dict[str, list[str]] = {}  # the architectures that have a flag, ours first
    for name in dict.fromkeys([*TRAINING_CLASSES, *SAE_TRAINING_CLASS_REGISTRY]):
        for flag in _flags(name) - known:
            owners.setdefault(flag, []).append(name)
    given = _flags_among(words)
    for flag in given:
        near = difflib.get_close_matches(flag, [*known, *owners], n=1, cutoff=0.75)
        if flag not in owners and near:
            return f"{flag} is no flag, did you mean {near[0]}?"
    for flag in given:
        if flag not in owners:
            return f"{flag} is no flag (--all-flags lists them)"
        of = f"{flag} is a flag of {', '.join(owners[flag])}"
        if architecture is None:
            return f"--architecture is missing: {of}, not of SAELens's {DEFAULT_ARCHITECTURE}"
        return f"{of}, not of --architecture {architecture}"
    return None


def _flags_among(words: Sequence[str]) -> list[str]:
    """Return the words that are flags. The flag of k has two names: one is returned."""
    given = [word.partition("=")[0] for word in words if re.match(r"--\w|-k$", word)]
    return ["--k" if word == "-k" else word for word in given]


def _given(argv: Sequence[str], *names: str, nargs: str) -> Any:
    """Return what follows a flag of these names, or None."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(*names, nargs=nargs, dest="given")
    return parser.parse_known_args(argv)[0].given


def _flags(architecture: str | None, of_lists: bool = False) -> set[str]:
    """Return the names of the flags that a run with this architecture has, or those of lists."""
    _, config = SAE_TRAINING_CLASS_REGISTRY[architecture or DEFAULT_ARCHITECTURE]
    return {
        f"--{field.name}"
        for config_class in (*RUN_CONFIGS, config)
        for field in fields(config_class)
        if not of_lists or "list[" in str(field.type)
    } | (set() if of_lists else {"--architecture"})
