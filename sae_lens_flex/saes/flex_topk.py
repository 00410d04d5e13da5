"""`flex_topk`: SAELens's TopK, with the same losses, trained through the fused kernels."""

from dataclasses import dataclass
from typing import Any

from typing_extensions import override

from .budgets import WithoutBudget
from .checks import check_integer
from .configs import FusedTopKTrainingSAEConfig
from .fused_topk import FusedTopKTrainingSAE


@dataclass
class FlexTopKTrainingSAEConfig(FusedTopKTrainingSAEConfig):
    __doc__ = (FusedTopKTrainingSAEConfig.__doc__ or "").replace(
        "Configuration shared by the architectures that train through fused kernels.",
        "Configuration class for training a FlexTopKTrainingSAE.",
    )

    @override
    @classmethod
    def architecture(cls) -> str:
        return "flex_topk"


class FlexTopKTrainingSAE(WithoutBudget, FusedTopKTrainingSAE):
    """
    SAELens's `topk`, trained through the fused kernels.

    From equal weights its losses and gradients are those of `TopKTrainingSAE`. As there, a step and
    `encode` keep `activation_fn.k` latents, which is the config's k until it is changed. The
    inference model that it saves is an ordinary `"topk"` SAE, which loads without this package. See
    `FusedTopKTrainingSAE` for what a training step returns.
    """

    config_class = FlexTopKTrainingSAEConfig

    @override
    def _step_k(self, n_samples: int) -> int:
        activation_fn: Any = self.activation_fn
        return check_integer("activation_fn.k", activation_fn.k, len(self.W_dec), "d_sae")
