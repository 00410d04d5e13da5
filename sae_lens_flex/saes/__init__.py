"""The architectures as SAELens classes."""

from .budgets import MeanBudget
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

__all__ = [
    "FlexBatchTopKTrainingSAE",
    "FlexBatchTopKTrainingSAEConfig",
    "FlexMatryoshkaBatchTopKTrainingSAE",
    "FlexMatryoshkaBatchTopKTrainingSAEConfig",
    "FlexTopKTrainingSAE",
    "FlexTopKTrainingSAEConfig",
    "HierarchicalTopKSAE",
    "HierarchicalTopKSAEConfig",
    "HierarchicalTopKTrainingSAE",
    "HierarchicalTopKTrainingSAEConfig",
    "MeanBudget",
]
