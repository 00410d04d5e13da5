"""Configs, whose fields are checked when they are made."""

from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import torch
from sae_lens.saes.topk_sae import TopKSAEConfig, TopKTrainingSAEConfig
from sae_lens.util import dtype_to_str, str_to_dtype
from typing_extensions import override

from ..ops.policy import BACKENDS
from .checks import check_bool, check_integer, check_number
from .normalization import PER_SAMPLE

# With these normalizations SAELens's auxiliary loss raises as soon as a latent is dead.
WITHOUT_AUXILIARY_LOSS = PER_SAMPLE

# Fields that are true or false.
SWITCHES = ("rescale_acts_by_decoder_norm", "apply_b_dec_to_input", "use_sparse_activations")


def check_auxiliary_loss(cfg: TopKTrainingSAEConfig) -> None:
    """Raise a ValueError where a config has an auxiliary loss that its normalization rules out."""
    if cfg.normalize_activations in WITHOUT_AUXILIARY_LOSS and cfg.aux_loss_coefficient != 0:
        raise ValueError(
            f"normalize_activations is {cfg.normalize_activations!r} and aux_loss_coefficient "
            f"is {cfg.aux_loss_coefficient!r}, expected aux_loss_coefficient=0 with this "
            "normalization: SAELens's auxiliary loss does not support it and would end the run "
            "as soon as a latent is dead"
        )


@dataclass
class CheckedTopKSAEConfig(TopKSAEConfig):
    """
    Configuration class for TopKSAE inference, as it is read from what this package has saved.

    `k` and `rescale_acts_by_decoder_norm` have no default: a wrong guess would give a wrong SAE.

    Args:
        k (int): Number of latents to keep active, 1..d_sae; with a run-time budget, the largest.
        rescale_acts_by_decoder_norm (bool): Whether latents are chosen and reported as if the
            decoder was normalized. Must be as the SAE was trained.
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): SAE latent dimension. Inherited from SAEConfig.
        dtype (str): Data type of the SAE's parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether to subtract the decoder bias from the input before
            encoding. Inherited from SAEConfig.
        normalize_activations (Literal): Normalization strategy for input activations. Inherited
            from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations. Inherited from
            SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE. Inherited from SAEConfig.
    """

    k: int = cast(int, None)
    rescale_acts_by_decoder_norm: bool = cast(bool, None)

    @override
    def __post_init__(self) -> None:
        self.d_in = check_integer("d_in", self.d_in)
        self.d_sae = check_integer("d_sae", self.d_sae)
        self.k = check_integer("k", self.k, self.d_sae, "d_sae")
        check_bool("rescale_acts_by_decoder_norm", self.rescale_acts_by_decoder_norm)
        check_bool("apply_b_dec_to_input", self.apply_b_dec_to_input)
        super().__post_init__()


@dataclass
class FusedTopKTrainingSAEConfig(TopKTrainingSAEConfig):
    """
    Configuration shared by the architectures that train through fused kernels.

    Args:
        use_sparse_activations (bool): Whether the `feature_acts` that a training step reports are
            a sparse COO tensor, which the trainer counts faster. Devices without sparse COO tensors
            get a dense one. `encode()` returns a dense tensor either way.
        backend (Literal["auto", "triton", "torch"]): What computes the decoder loss. "auto" takes
            the Triton kernels on a CUDA device that has them, PyTorch elsewhere.
        k (int): Number of latents to keep active, 1..d_sae. Inherited from TopKTrainingSAEConfig.
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

    use_sparse_activations: bool = True
    backend: Literal["auto", "triton", "torch"] = "auto"

    @override
    def __post_init__(self) -> None:
        self.d_in = check_integer("d_in", self.d_in)
        self.d_sae = check_integer("d_sae", self.d_sae)
        self._check_k()
        for name in SWITCHES:
            check_bool(name, getattr(self, name))
        if not isinstance(self.dtype, (str, torch.dtype)):
            raise ValueError(f"dtype is {self.dtype!r}, expected the name of one")
        self.dtype = dtype_to_str(str_to_dtype(self.dtype))  # raises on an unknown one
        if self.backend not in BACKENDS:
            raise ValueError(f"backend is {self.backend!r}, expected one of {', '.join(BACKENDS)}")
        self.aux_loss_coefficient = check_number("aux_loss_coefficient", self.aux_loss_coefficient)
        if self.decoder_init_norm is not None:
            self.decoder_init_norm = check_number(
                "decoder_init_norm", self.decoder_init_norm, is_positive=True
            )
        check_auxiliary_loss(self)
        super().__post_init__()

    def _check_k(self) -> None:
        self.k = check_integer("k", self.k, self.d_sae, "d_sae")

    @override
    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> Self:
        """
        Make a config from a dictionary, that of a saved SAE for instance.

        The config of an SAE saved for inference has no fields of training. SAELens keeps them in
        its metadata. They are taken from there if this architecture has trained the SAE.

        Raises:
            ValueError: if a saved config lacks what must not be guessed, or a value is impossible.
        """
        if "metadata" in config_dict:  # the SAE was saved, so a default would be a guess
            for name in ("k", "rescale_acts_by_decoder_norm"):
                if name not in config_dict:
                    raise ValueError(f"{name} is missing from the saved config")
            metadata = config_dict["metadata"]
            architecture = config_dict.get("architecture", cls.architecture())
            if metadata.get("training_architecture") == architecture:
                details = metadata.get("training_architecture_details", {})
                if not isinstance(details, dict):
                    raise ValueError(
                        f"training_architecture_details is {details!r} in the saved config's "
                        "metadata, expected a dictionary"
                    )
                config_dict = {**details, **config_dict}
        return super().from_dict(config_dict)
