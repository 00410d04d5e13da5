"""Enters the architectures in SAELens's registry."""

from typing import Any

from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.topk_sae import TopKSAE

from .configs import CheckedTopKSAEConfig
from .flex_batchtopk import FlexBatchTopKTrainingSAE, FlexBatchTopKTrainingSAEConfig
from .flex_matryoshka_batchtopk import (
    FlexMatryoshkaBatchTopKTrainingSAE,
    FlexMatryoshkaBatchTopKTrainingSAEConfig,
)
from .flex_topk import FlexTopKTrainingSAE, FlexTopKTrainingSAEConfig
from .hierarchical_topk import (
    HierarchicalTopKSAE,
    HierarchicalTopKSAEConfig,
    HierarchicalTopKTrainingSAE,
    HierarchicalTopKTrainingSAEConfig,
)

INFERENCE_CLASSES: dict[str, tuple[type, type]] = {
    "hierarchical_topk": (HierarchicalTopKSAE, HierarchicalTopKSAEConfig),
    "flex_topk": (
        TopKSAE,
        CheckedTopKSAEConfig,
    ),  # so that SAE.load_from_disk takes its checkpoints
}
# Those that keep k latents of each sample.
TOPK_TRAINING_CLASSES: dict[str, tuple[type, type]] = {
    "hierarchical_topk": (HierarchicalTopKTrainingSAE, HierarchicalTopKTrainingSAEConfig),
    "flex_topk": (FlexTopKTrainingSAE, FlexTopKTrainingSAEConfig),
}
TRAINING_CLASSES: dict[str, tuple[type, type]] = {
    **TOPK_TRAINING_CLASSES,
    "flex_batchtopk": (FlexBatchTopKTrainingSAE, FlexBatchTopKTrainingSAEConfig),
    "flex_matryoshka_batchtopk": (
        FlexMatryoshkaBatchTopKTrainingSAE,
        FlexMatryoshkaBatchTopKTrainingSAEConfig,
    ),
}


def register_architectures() -> None:
    """Register every architecture; harmless where it has been done.

    Raises:
        ValueError: if another package has taken one of the names. Nothing is registered then.
    """
    registries: tuple[tuple[dict[str, Any], dict[str, tuple[type, type]]], ...] = (
        (SAE_CLASS_REGISTRY, INFERENCE_CLASSES),
        (SAE_TRAINING_CLASS_REGISTRY, TRAINING_CLASSES),
    )
    for registry, classes in registries:
        for architecture, (sae_class, _) in classes.items():
            registered, _ = registry.get(architecture, (sae_class, None))
            if _full_name(registered) != _full_name(sae_class):
                raise ValueError(
                    f"the architecture {architecture!r} is already registered in SAELens by "
                    f"{_full_name(registered)}, so sae_lens_flex cannot register its own: import "
                    "only one of the two packages in a process"
                )
    for registry, classes in registries:
        registry.update(classes)


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
