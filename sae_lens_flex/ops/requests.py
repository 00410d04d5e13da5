"""What is asked of a decoder loss, and what it returns.

With r_j the residual of level j, c_j the level's weight and

    r_j = bias + sum_{i <= j} values[b, i] weight[latents[b, i]] - target,
    L = scale * sum_b sum_j c_j |r_j|^2,      g_j = 2 scale c_j r_j,      S_t = sum_{j >= t} g_j,

the gradients are

    dL/dweight[f] = sum over the pairs (b, t) that chose f of values[b, t] S_t,
    dL/dvalues[b, t] = weight[latents[b, t]] . S_t,
    dL/dtarget[b] = -S_1,      dL/dbias = sum_b S_1[b].

A level 0 may count, too, with r_0 = bias - target and g_0 = 2 scale c_0 r_0. Then

    dL/dtarget[b] = -(g_0 + S_1),      dL/dbias = sum_b (g_0 + S_1)[b].

Of nested dictionaries level m has the latents below width m. Let m(f) be the first width above f.
The formulas then hold with S_m(f) in place of S_t for every pair that chose f.

L is a scalar, so all of them are known in the forward pass, up to the factor that arrives in the
backward pass.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from .codes import Code, InvertedIndex

Levels = torch.Tensor | Literal["every", "last"]
"""The level weights c_j: [K]; or "every" for 1 / K each; or "last" for 1 at level K alone. Or those
of each sample, from level 0 on: [B, K + 1]; for rows of different length [n + B], sample after
sample. The weight of the level that pair p of sample b ends is then at p + b + 1. Of nested
dictionaries those of each width: [M]."""


def are_of_samples(levels: Levels, code: Code) -> bool:
    """Return whether level weights are those of each sample."""
    return isinstance(levels, torch.Tensor) and (code.starts is not None or levels.ndim == 2)


def weighted_sum(errors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the sum of errors times weights, [M] each. What weighs 0 may be infinite."""
    weights = weights.to(errors.dtype)
    return (errors * weights).masked_fill(weights == 0, 0).sum()


class Wanted(NamedTuple):
    """Which outputs of a decoder loss to compute; of a gradient the dtype, or None for not."""

    residual: bool = False
    weight: torch.dtype | None = None
    values: torch.dtype | None = None
    bias: torch.dtype | None = None
    target: torch.dtype | None = None


@dataclass(slots=True)  # Nobody changes one, but a frozen one takes a microsecond more to make.
class DecoderLoss:
    """The request: a loss and which of its gradients to compute.

    Attributes:
        code: latents and decode coefficients, in the order of the levels. Of rows of different
            length the levels are "last", or have weights of each sample.
        weight: what is read of the decoder, [F, D]: itself, or a copy in a lower precision, since
            reading is most of what a loss does.
        bias: [D], or None for no bias.
        target: [B, D].
        levels: the level weights.
        scale: multiplies the loss. It is given, not taken from B, because B may be a share of the
            batch over which the loss averages.
        wanted: which outputs to compute.
        index: the inverted index of the code, where it is at hand.
        deterministic: whether the results must be the same from run to run.
        widths: of nested dictionaries, [M], int64, ascending: the levels are then the latents below
            each width, and `levels` are the widths' weights, [M]. The latents of a row, of a code
            with `starts`, ascend.
    """

    code: Code
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    levels: Levels
    scale: float
    wanted: Wanted
    index: InvertedIndex | None = None
    deterministic: bool = False
    widths: torch.Tensor | None = None


class LossAndGradients(NamedTuple):
    """The result; None for what was not wanted.

    Attributes:
        loss: scalar, float32 (float64 for float64 inputs).
        residual: r_K, [B, D], in the loss's dtype.
        weight: the gradient of weight, [F, D]; values: of the coefficients, [B, K] or [n]; bias:
            [D]; target: [B, D].
        width_errors: with widths the sum of |r_m[b]|^2 over the samples, [M], whatever the width's
            weight; None without.
    """

    loss: torch.Tensor
    residual: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    values: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    target: torch.Tensor | None = None
    width_errors: torch.Tensor | None = None

    @property
    def gradients(self) -> tuple[torch.Tensor | None, ...]:
        """Those of weight, values, bias and target."""
        return self.weight, self.values, self.bias, self.target


Times = Callable[[torch.Tensor], tuple[torch.Tensor | None, ...]]
"""Returns the gradients of weight, values, bias and target, times a scalar tensor of the loss's
dtype. It is called once."""


class UnfinishedLoss(NamedTuple):
    """A loss, and what makes its gradients once their factor arrives in the backward pass.

    Attributes:
        loss: scalar, float32 (float64 for float64 inputs).
        gradients: makes them. It does not hold the loss, whose node holds it.
    """

    loss: torch.Tensor
    gradients: Times
