"""SAELens's run-time normalization of activations, seen from the decoder.

With `normalize_activations` "layer_norm" or "constant_norm_rescale", SAELens's `process_sae_in`
leaves attributes on the SAE with which `decode` undoes the normalization. Undoing it is an affine
map of each sample:

    sae_out = scale * (feature_acts @ W_dec + b_dec) + shift
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import SAE

# The values of `normalize_activations` with which an SAE normalizes each sample.
PER_SAMPLE = ("layer_norm", "constant_norm_rescale")

MAKER = "SAE._setup_activation_normalization."
FUNCTIONS = ("run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out")
ATTRIBUTES = ("ln_mu", "ln_std", "x_norm_coeff")


class OutputMap(NamedTuple):
    """The scale and shift of the output, each [..., 1], or None for 1 and 0."""

    scale: torch.Tensor | None
    shift: torch.Tensor | None

    def apply(self, x: torch.Tensor) -> torch.Tensor:
        """Return scale * x + shift."""
        x = x if self.scale is None else x * self.scale
        return x if self.shift is None else x + self.shift


def read_output_map(sae: Any) -> OutputMap:
    """Return the output map of the activations that `process_sae_in` last saw."""
    if hasattr(sae, "ln_std"):
        # SAELens divides by std + 1e-5 and multiplies by std alone.
        return OutputMap(sae.ln_std, sae.ln_mu)
    if hasattr(sae, "x_norm_coeff"):
        return OutputMap(1 / sae.x_norm_coeff, None)
    return OutputMap(None, None)


def take_output_map(sae: Any) -> OutputMap:
    """Return the output map, and remove what it is made of, as SAELens's `decode` does."""
    # To ask a module for an attribute that it lacks takes long.
    if not any(name in vars(sae) for name in ATTRIBUTES):
        return OutputMap(None, None)
    output_map = read_output_map(sae)
    for name in ATTRIBUTES:
        if hasattr(sae, name):
            delattr(sae, name)
    return output_map


def is_saelens(function: Callable[..., Any], maker: str) -> bool:
    """Return whether a function is one that a method of SAELens's SAE made.

    Args:
        function: of an SAE.
        maker: the method, as qualified names of its inner functions begin.
    """
    return getattr(function, "__module__", None) == SAE.__module__ and getattr(
        function, "__qualname__", ""
    ).startswith(maker)


def is_own_function(sae: Any, name: str, maker: str) -> bool:
    """Return whether a function of an SAE is what a method of SAELens's SAE made for this SAE.

    Args:
        sae: the SAE.
        name: of the function.
        maker: as for `is_saelens`.
    """
    function = getattr(sae, name)
    if not is_saelens(function, maker):
        return False
    # A normalization function keeps its results on the SAE that it was made for.
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    return all(cell is sae for cell in cells if isinstance(cell, torch.nn.Module))


class OwnNormalization(SAE[Any]):
    """Gives a copy of an SAE normalization functions of its own.

    SAELens's functions keep their results on the SAE that made them, and a copy would take these
    functions over. A function that a user set stays, as in a copy of SAELens's own SAEs.
    """

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A user's function may work with the other one, so the two stay together.
        if all(is_saelens(getattr(self, name), MAKER) for name in FUNCTIONS):
            self._setup_activation_normalization()
