"""The losses and their gradients on plain tensors. Imports torch and triton only."""

from .losses import triton_hierarchical_sae_loss, triton_topk_sae_loss
from .reference import hierarchical_sae_loss, topk_sae_loss

__all__ = [
    "hierarchical_sae_loss",
    "topk_sae_loss",
    "triton_hierarchical_sae_loss",
    "triton_topk_sae_loss",
]
