"""`flex_batchtopk`: SAELens's BatchTopK, same losses, trained through the fused kernels."""

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from sae_lens.saes.batchtopk_sae import (
    BatchTopK,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from typing_extensions import override

from ..training.node import Losses
from ..training.threshold import Threshold
from .budgets import WithoutBudget
from .checks import check_number
from .configs import FusedTopKTrainingSAEConfig
from .fused_path import METHODS, OF_BATCHES, replaced
from .fused_topk import FusedTopKTrainingSAE


@dataclass
class FlexBatchTopKTrainingSAEConfig(FusedTopKTrainingSAEConfig, BatchTopKTrainingSAEConfig):
    """
    Configuration class for training a FlexBatchTopKTrainingSAE.

    Args:
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
        normalize_activations (Literal): Normalization strategy for input activations. "layer_norm"
            and "constant_norm_rescale" need aux_loss_coefficient=0. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations. Inherited from
            SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE training. Inherited from SAEConfig.
    """

    k: float = 100  # type: ignore[assignment]

    @override
    @classmethod
    def architecture(cls) -> str:
        return "flex_batchtopk"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        self.topk_threshold_lr = check_number("topk_threshold_lr", self.topk_threshold_lr)

    @override
    def _check_k(self) -> None:
        self.k = check_mean_k("k", self.k, self.d_sae)


def check_mean_k(name: str, k: Any, n_latents: int) -> float:
    """Return a mean number of latents, an int as an int, or raise a ValueError that names it."""
    number = check_number(name, k, is_positive=True)
    if number > n_latents:
        raise ValueError(f"{name} is {k!r}, expected a number up to d_sae ({n_latents})")
    return int(k) if isinstance(k, Integral) else number


class FlexBatchTopKTrainingSAE(WithoutBudget, FusedTopKTrainingSAE, BatchTopKTrainingSAE):
    """
    SAELens's `batchtopk`, trained through the fused kernels.

    From equal weights its losses and gradients, and the threshold that it learns, are those of
    `BatchTopKTrainingSAE`. As there, a step keeps the int(activation_fn.k * batch) largest
    activations of the batch. Of equal ones it keeps those of the first samples, and of a sample
    those of the smallest latents; SAELens's choice among them is not defined. The inference model
    that it saves is an ordinary `"jumprelu"` SAE, which loads without this package.

    See `FusedTopKTrainingSAE` for what a training step returns; `hidden_pre` holds the
    pre-activations of the kept latents, [n], sample after sample. It trains in one process.
    """

    cfg: FlexBatchTopKTrainingSAEConfig  # type: ignore[assignment]
    config_class = FlexBatchTopKTrainingSAEConfig

    _over_batch = True

    @override
    def get_activation_fn(self) -> Callable[[torch.Tensor], torch.Tensor]:  # type: ignore[override]
        return BatchTopK(self.cfg.k)

    @override
    def _output(self, reported: dict[str, Any], losses: Losses) -> TrainStepOutput:
        return self._with_threshold(super()._output(reported, losses))

    @override
    def _unfused_training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        return self._with_threshold(super()._unfused_training_forward_pass(step_input))

    def _with_threshold(self, output: TrainStepOutput) -> TrainStepOutput:
        # A copy, because the next step changes the buffer.
        output.metrics["topk_threshold"] = self.topk_threshold.clone()
        return output

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: torch.Tensor) -> None:
        """Move the threshold towards the smallest positive activation, in place.

        Nothing waits for the device.

        Args:
            acts_topk: activations, [..., d_sae]; also a sparse COO tensor.
        """
        self._threshold().move(acts_topk._values() if acts_topk.is_sparse else acts_topk)

    @override
    def _check_config(self) -> None:
        super()._check_config()
        rate = check_number("topk_threshold_lr", self.cfg.topk_threshold_lr)
        self.cfg.topk_threshold_lr = rate

    @override
    def _threshold(self) -> Threshold:
        return Threshold(self.topk_threshold, self.cfg.topk_threshold_lr)

    @override
    def _learn(self, feature_acts: torch.Tensor) -> None:
        is_own = self._learns_as_it_was_written()
        # One of a user's gets them as SAELens would hand them over.
        self.update_topk_threshold(feature_acts if is_own else feature_acts.to_dense())

    @override
    def _learns_as_it_was_written(self) -> bool:
        is_of_class = type(self).update_topk_threshold is OWN_UPDATE
        return is_of_class and "update_topk_threshold" not in vars(self)

    @override
    def _step_k(self, n_samples: int) -> int:
        activation_fn: Any = self.activation_fn
        k = check_mean_k("activation_fn.k", activation_fn.k, len(self.W_dec))
        return int(k * n_samples)

    @override
    def _replaced(self) -> list[str]:
        return replaced(self, OWN, OF_BATCHES)


OWN = {name: getattr(FlexBatchTopKTrainingSAE, name) for name in METHODS}
OWN_UPDATE = FlexBatchTopKTrainingSAE.update_topk_threshold
