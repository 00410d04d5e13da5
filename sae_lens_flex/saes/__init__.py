"""The architectures as SAELens classes."""

from .flex_topk import FlexTopKTrainingSAE, FlexTopKTrainingSAEConfig
from .hierarchical_topk import (
    HierarchicalTopKSAE,
    HierarchicalTopKSAEConfig,
    HierarchicalTopKTrainingSAE,
    HierarchicalTopKTrainingSAEConfig,
)

__all__ = [
    "FlexTopKTrainingSAE",
    "FlexTopKTrainingSAEConfig",
    "HierarchicalTopKSAE",
    "HierarchicalTopKSAEConfig",
    "HierarchicalTopKTrainingSAE",
    "HierarchicalTopKTrainingSAEConfig",
]
