"""One sparse autoencoder for every sparsity, trained with SAELens.

Importing this package registers the architectures "hierarchical_topk", "flex_topk",
"flex_batchtopk" and "flex_matryoshka_batchtopk" in SAELens.
"""

from .acceleration import accelerate, fused_adam
from .distributed import ShardedTrainingRunner
from .evals import BudgetMetrics, BudgetSweep, mean_budget, smallest_budget, sweep_budgets
from .ops import (
    hierarchical_sae_loss,
    topk_sae_loss,
    triton_hierarchical_sae_loss,
    triton_topk_sae_loss,
)
from .saes import (
    FlexBatchTopKTrainingSAE,
    FlexBatchTopKTrainingSAEConfig,
    FlexMatryoshkaBatchTopKTrainingSAE,
    FlexMatryoshkaBatchTopKTrainingSAEConfig,
    FlexTopKTrainingSAE,
    FlexTopKTrainingSAEConfig,
    HierarchicalTopKSAE,
    HierarchicalTopKSAEConfig,
    HierarchicalTopKTrainingSAE,
    HierarchicalTopKTrainingSAEConfig,
    MeanBudget,
)
from .saes.registration import register_architectures
from .saes.sharded import shard, unshard
from .sharing import export_jumprelu, export_sparsify, export_topk, from_topk, upload

__version__ = "0.2.0"

__all__ = [
    "BudgetMetrics",
    "BudgetSweep",
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
    "ShardedTrainingRunner",
    "accelerate",
    "export_jumprelu",
    "export_sparsify",
    "export_topk",
    "from_topk",
    "fused_adam",
    "hierarchical_sae_loss",
    "mean_budget",
    "shard",
    "smallest_budget",
    "sweep_budgets",
    "topk_sae_loss",
    "triton_hierarchical_sae_loss",
    "triton_topk_sae_loss",
    "unshard",
    "upload",
]

register_architectures()
