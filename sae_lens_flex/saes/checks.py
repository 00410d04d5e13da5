"""Checks of what users give, with errors that name it."""

import json
import math
import operator
import warnings
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_CFG_FILENAME

from ..training.shards import local_part

# What a checkpoint was trained with, and what a run that goes on from it would change.
SETTINGS = (
    "architecture",
    "dtype",
    "k",
    "budgets",
    "level_weights",
    "aux_loss_coefficient",
    "rescale_acts_by_decoder_norm",
    "apply_b_dec_to_input",
    "normalize_activations",
    "reshape_activations",
    "topk_threshold_lr",
    "matryoshka_widths",
    "use_matryoshka_aux_loss",
)


def check_integer(name: str, value: Any, highest: int | None = None, highest_name: str = "") -> int:
    """Return `value` as an int in 1..highest, or raise a ValueError that names it."""
    bound = "at least 1" if highest is None else f"within 1..{highest_name} ({highest})"
    message = f"{name} is {value!r}, expected an integer {bound}"
    if value is None:
        raise ValueError(f"{name} is missing, expected an integer {bound}")
    if isinstance(value, bool):
        raise ValueError(message)
    try:
        number = operator.index(value)
    except TypeError:
        raise ValueError(message) from None
    if number < 1 or (highest is not None and number > highest):
        raise ValueError(message)
    return number


def check_number(name: str, value: Any, *, is_positive: bool = False) -> float:
    """Return `value` as a finite float >= 0 (> 0), or raise a ValueError that names it.

    It may be a number of Python or NumPy, or a tensor or array without dimensions.
    """
    bound = "above 0" if is_positive else "of at least 0"
    message = f"{name} is {value!r}, expected a finite number {bound}"
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(message)
    try:
        number = float(value)
    except OverflowError:
        raise ValueError(message) from None
    if not math.isfinite(number) or number < 0 or (is_positive and number == 0):
        raise ValueError(message)
    return number


def plain(value: Any) -> Any:
    """Return Python's own number for a tensor or array without dimensions, else `value`."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def check_bool(name: str, value: Any) -> None:
    """Raise a ValueError that names `value` where it is no bool."""
    if value is None:
        raise ValueError(f"{name} is missing, expected true or false")
    if not isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}, expected true or false")


def check_config_class(sae: Any, cfg: Any, expected: type) -> None:
    """Raise a TypeError where an SAE is to be made from what is no config of its class."""
    if not isinstance(cfg, expected):
        raise TypeError(
            f"cfg is a {type(cfg).__name__}, expected a {expected.__name__} for a "
            f"{type(sae).__name__}"
        )


def check_real(name: str, x: torch.Tensor) -> None:
    """Raise a TypeError that names activations that are no tensor of real numbers.

    Of complex ones the imaginary part would be lost.
    """
    if not isinstance(x, torch.Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}, expected a torch.Tensor")
    if x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(
            f"{name} has dtype {x.dtype}, expected one of real numbers, such as torch.float32"
        )


def check_path(name: str, path: Any) -> Path:
    """Return a path, or raise a TypeError that names it."""
    try:
        return Path(path)
    except TypeError:
        raise TypeError(f"{name} is {path!r}, expected the path of a file or directory") from None


def not_finite_weights(sae: torch.nn.Module) -> list[str]:
    """Return the names of the parameters that hold NaN or infinity, in this process's part."""
    weights = sae.named_parameters()
    return [name for name, w in weights if not bool(local_part(w).detach().isfinite().all())]


def check_weights(sae: torch.nn.Module) -> None:
    """Raise a ValueError that names the parameters which hold NaN or infinity, if there are any."""
    if names := not_finite_weights(sae):
        raise ValueError(
            f"sae has NaN or infinite values in {', '.join(names)}, expected finite weights: its "
            "training has diverged"
        )


def check_sizes(cfg: Any, checkpoint_path: Path | str) -> dict[str, Any]:
    """Return the config of the SAE in a checkpoint, which is empty where there is none.

    Raises:
        ValueError: where the SAE has another size.
    """
    path = Path(checkpoint_path, SAE_CFG_FILENAME)
    theirs = json.loads(path.read_text()) if path.exists() else {}
    for name in ("d_in", "d_sae"):
        size = getattr(cfg, name)
        if theirs.get(name, size) != size:
            raise ValueError(
                f"{name} is {size}, expected that of the checkpoint, {theirs[name]}: "
                f"{checkpoint_path}"
            )
    return theirs


def warn_of_other_settings(cfg: Any, checkpoint_path: Path | str) -> None:
    """Warn where a run goes on from a checkpoint with other settings than that was trained with.

    Raises:
        ValueError: where the SAE has another size.
    """
    theirs = check_sizes(cfg, checkpoint_path)
    ours = json.loads(json.dumps({name: cfg.to_dict().get(name) for name in SETTINGS}))
    changed = [
        f"{name} is {value!r}, and was {theirs[name]!r}"
        for name, value in ours.items()
        if name in theirs and theirs[name] != value
    ]
    if changed:
        warnings.warn(
            f"training goes on with other settings than the checkpoint's: {'; '.join(changed)}",
            stacklevel=4,
        )
