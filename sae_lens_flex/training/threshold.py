"""The threshold that BatchTopK's inference model takes: an average of the smallest kept value.

    lowest = the smallest positive activation of a step,
    threshold <- (1 - lr) threshold + lr lowest,      or as it is where none is positive

Nothing waits for the device.
"""

from typing import NamedTuple

import torch


class Threshold(NamedTuple):
    """What a step moves beside the weights.

    Attributes:
        value: a scalar; float64, because its changes are small.
        lr: how far it moves.
    """

    value: torch.Tensor
    lr: float

    def move(self, acts: torch.Tensor) -> None:
        """Move towards the smallest positive one of `acts`, of any shape, in place."""
        if acts.numel() == 0:
            return
        is_positive = acts > 0
        lowest = acts.where(is_positive, torch.inf).amin().to(self.value.dtype)
        moved = (1 - self.lr) * self.value + self.lr * lowest
        self.value.copy_(moved.where(is_positive.any(), self.value))
