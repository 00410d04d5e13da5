"""SAELens's run-time normalization of activations, seen from the decoder.

With `normalize_activations` "layer_norm" or "constant_norm_rescale" SAELens's `process_sae_in`
leaves attributes on the SAE that undo the normalization of the output, an affine map per sample:

    sae_out = scale * (feature_acts @ W_dec + b_dec) + shift
"""

from typing import Any, NamedTuple

import torch


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
    mode = sae.cfg.normalize_activations
    if mode == "layer_norm":
        # SAELens divides by std + 1e-5 and multiplies by std alone.
        return OutputMap(sae.ln_std, sae.ln_mu)
    if mode == "constant_norm_rescale":
        return OutputMap(1 / sae.x_norm_coeff, None)
    return OutputMap(None, None)


def forget_output_map(sae: Any) -> None:
    """Remove what `process_sae_in` left on the SAE, as SAELens's `decode` does."""
    for name in ("ln_mu", "ln_std", "x_norm_coeff"):
        if hasattr(sae, name):
            delattr(sae, name)
