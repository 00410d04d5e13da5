"""Training on several GPUs, in processes that `torchrun` starts."""

from .runner import ShardedTrainingRunner

__all__ = ["ShardedTrainingRunner"]
