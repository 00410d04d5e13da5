"""What changes in SAELens within `accelerate()` and `fused_adam()`, and nowhere else."""

from .seams import accelerate, fused_adam

__all__ = ["accelerate", "fused_adam"]
