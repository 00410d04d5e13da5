"""What a training step takes, and the gradients that it returns.

B samples of width D, a dictionary of F latents, k of them kept for each sample.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch


class Weights(NamedTuple):
    """An SAE's parameters.

    Attributes:
        W_enc: [D, F]; fastest where each latent's column is contiguous, as its gradient's is.
        b_enc: [F].
        W_dec: [F, D].
        b_dec: [D].
    """

    W_enc: torch.Tensor
    b_enc: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor


class Inputs(NamedTuple):
    """What else a step depends on.

    Attributes:
        encoder_input: x, [B, D], normalized, before b_dec is subtracted.
        target: what is to be reconstructed, less the shift of the output, [B, D], float32 or
            float64.
        output_scale: by which the output is multiplied, [B, 1], or None for 1.
        level_weights: c_j, [k], not differentiated. None for the weights that the spec names. With
            the spec's `widths` the weight of each width, [n]; None for 1.
    """

    encoder_input: torch.Tensor
    target: torch.Tensor
    output_scale: torch.Tensor | None = None
    level_weights: torch.Tensor | None = None


@dataclass(frozen=True)
class Spec:
    """All else that a step reads: settings, which are compared to know whether a step is the same.

    Attributes:
        k: latents to keep of each sample; of all samples together with `over_batch`.
        levels: "every" weighs each level 1 / k, "last" level k alone. Level weights among the
            inputs take their place.
        n_samples: B of the batch that the losses average over.
        rescale_acts_by_decoder_norm: whether latents are compared by h * norms.
        apply_b_dec_to_input: whether b_dec is subtracted from the input.
        product_dtype: dtype of the dense products, autocast's where it is on.
        use_triton: whether the kernels compute.
        deterministic: whether results must be the same from run to run.
        matmul_precision: `torch.get_float32_matmul_precision()`.
        over_batch: whether the largest positive pre-activations of the whole batch are kept. The
            rows of the code then have different lengths.
        widths: with `over_batch`, the widths over which the loss is a sum, ascending, the last F;
            empty for no such sum. See `matryoshka`.
    """

    k: int
    levels: Literal["every", "last"]
    n_samples: int
    rescale_acts_by_decoder_norm: bool
    apply_b_dec_to_input: bool
    product_dtype: torch.dtype
    use_triton: bool
    deterministic: bool
    matmul_precision: str
    over_batch: bool = False
    widths: tuple[int, ...] = ()


class WantedGradients(NamedTuple):
    """Of which tensors the gradient is wanted."""

    W_enc: bool
    b_enc: bool
    W_dec: bool
    b_dec: bool
    encoder_input: bool
    target: bool
    output_scale: bool

    def any_of_encoder(self, spec: Spec) -> bool:
        """Return whether a gradient is wanted that comes through the encoder."""
        through_b_dec = self.b_dec and spec.apply_b_dec_to_input
        return self.W_enc or self.b_enc or self.encoder_input or through_b_dec


class Gradients(NamedTuple):
    """The gradient of each tensor, in its shape and `gradient_dtype`; None where not wanted."""

    W_enc: torch.Tensor | None = None
    b_enc: torch.Tensor | None = None
    W_dec: torch.Tensor | None = None
    b_dec: torch.Tensor | None = None
    encoder_input: torch.Tensor | None = None
    target: torch.Tensor | None = None
    output_scale: torch.Tensor | None = None
