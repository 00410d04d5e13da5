"""`flex_matryoshka_batchtopk`: SAELens's Matryoshka BatchTopK through the fused kernels."""

from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from typing_extensions import override

from .checks import check_bool, check_integer, check_number
from .configs import WITHOUT_AUXILIARY_LOSS
from .flex_batchtopk import FlexBatchTopKTrainingSAE, FlexBatchTopKTrainingSAEConfig
from .fused_path import METHODS, OF_BATCHES, replaced


@dataclass
class FlexMatryoshkaBatchTopKTrainingSAEConfig(
    FlexBatchTopKTrainingSAEConfig, MatryoshkaBatchTopKTrainingSAEConfig
):
    """
    Configuration class for training a FlexMatryoshkaBatchTopKTrainingSAE.

    Args:
        matryoshka_widths (list[int]): The widths of the nested dictionaries, ascending; d_sae is
            added where it is not the last. Inherited from MatryoshkaBatchTopKTrainingSAEConfig.
        use_matryoshka_aux_loss (bool): Whether the dead latents between two widths are to
            reconstruct what the latents below the greater one left over, not what all latents did.
            Inherited from MatryoshkaBatchTopKTrainingSAEConfig.
        k (float): Average number of latents to keep active, above 0 and up to d_sae: a step keeps
            the int(k * batch) largest activations of the batch, or as many as are positive.
            Inherited from BatchTopKTrainingSAEConfig.
        topk_threshold_lr (float): Learning rate of the threshold that the inference model takes, a
            moving average of the smallest activation kept. Inherited from
            BatchTopKTrainingSAEConfig.
        use_sparse_activations (bool): Whether the `feature_acts` that a training step reports are
            a sparse COO tensor. Inherited from FusedTopKTrainingSAEConfig.
        backend (Literal["auto", "triton", "torch"]): What computes the step. Inherited from
            FusedTopKTrainingSAEConfig.
        aux_loss_coefficient (float): Coefficient of the auxiliary loss on dead latents, 0 to turn
            it off. Inherited from TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Treat the decoder as if it was already normalized.
            Inherited from TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Norm to initialize decoder weights to. None to disable.
            Inherited from TrainingSAEConfig.
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): SAE latent dimension. Inherited from SAEConfig.
        dtype (str): Data type of the SAE's parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether to subtract the decoder bias from the input before
            encoding. Inherited from SAEConfig.
        normalize_activations (Literal): Normalization strategy for input activations, but neither
            "layer_norm" nor "constant_norm_rescale". Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations. Inherited from
            SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE training. Inherited from SAEConfig.
    """

    @override
    @classmethod
    def architecture(cls) -> str:
        return "flex_matryoshka_batchtopk"

    @override
    def __post_init__(self) -> None:
        check_bool("use_matryoshka_aux_loss", self.use_matryoshka_aux_loss)
        if self.normalize_activations in WITHOUT_AUXILIARY_LOSS:
            raise ValueError(
                f"normalize_activations is {self.normalize_activations!r}, expected another one: "
                "SAELens's Matryoshka BatchTopK, too, does not support this normalization"
            )
        if not isinstance(self.matryoshka_widths, (list, tuple)):
            raise ValueError(
                f"matryoshka_widths is {self.matryoshka_widths!r}, expected a list of integers"
            )
        super().__post_init__()
        name = "an element of matryoshka_widths"
        self.matryoshka_widths = [
            check_integer(name, width, self.d_sae, "d_sae") for width in self.matryoshka_widths
        ]


class FlexMatryoshkaBatchTopKTrainingSAE(FlexBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE):
    """
    SAELens's `matryoshka_batchtopk`, trained through the fused kernels.

    From equal weights its losses and gradients, and the threshold that it learns, are those of
    `MatryoshkaBatchTopKTrainingSAE`: beside `mse_loss` there is an `inner_mse_loss_{width}` for
    each width but the last, and `loss` is the sum of all. Each has its gradient: `loss.backward()`
    costs one step, and a backward pass that weighs some of them apart computes the step once more.

    Otherwise as `FlexBatchTopKTrainingSAE`.
    """

    cfg: FlexMatryoshkaBatchTopKTrainingSAEConfig  # type: ignore[assignment]
    config_class = FlexMatryoshkaBatchTopKTrainingSAEConfig

    @override
    def _check_config(self) -> None:
        super()._check_config()
        check_bool("use_matryoshka_aux_loss", self.cfg.use_matryoshka_aux_loss)
        widths, d_sae = self.cfg.matryoshka_widths, len(self.W_dec)
        if (
            not isinstance(widths, (list, tuple))
            or not all(type(width) is int for width in widths)
            or list(widths) != sorted({*widths, d_sae})
            or widths[0] < 1
        ):
            raise ValueError(
                f"matryoshka_widths is {widths!r}, expected ascending integers of at least 1 "
                f"without repeats, the last d_sae ({d_sae})"
            )

    @override
    def _widths(self) -> tuple[int, ...]:
        return (*self.cfg.matryoshka_widths[:-1], len(self.W_dec))

    @override
    def _auxiliary_by_width(self) -> bool:
        return self.cfg.use_matryoshka_aux_loss

    @override
    def calculate_matryoshka_aux_loss(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if check_number("aux_loss_coefficient", self.cfg.aux_loss_coefficient) == 0:
            return self.W_dec.new_zeros(())
        return super().calculate_matryoshka_aux_loss(*args, **kwargs)

    @override
    def _replaced(self) -> list[str]:
        return replaced(self, OWN, OF_BATCHES)


# What a fused step computes instead of calling.
OWN = {
    name: getattr(FlexMatryoshkaBatchTopKTrainingSAE, name)
    for name in (*METHODS, "calculate_matryoshka_aux_loss", "_iterable_decode")
}
