"""The one autograd node in front of a training step.

Its outputs are `loss` and each entry of `losses`. A backward pass gets the gradient of every output
on which something depends, so it knows the factor of each loss:

    factor of mse_loss = d/dloss + d/dmse_loss,     of the auxiliary loss = d/dloss + d/dauxiliary.

The gradients of the two losses are held apart and multiplied by their factors on the device, so
nothing waits for it. A pass gives away the gradients that it uses. One that needs them again
computes the step once more from the inputs, which autograd keeps.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..ops.autograd import attach, scale_in_place
from ..ops.policy import is_deterministic
from .dead import Dead, DeadGradients
from .requests import Gradients, Inputs, Spec, WantedGradients, Weights
from .shards import WHOLE, Whole
from .step import StepResult, step

NAME = "a training step"


class Losses(NamedTuple):
    """A step's losses as outputs of the autograd node, scalars.

    Attributes:
        total: their sum, the `loss` of a training step.
        mse: `mse_loss`.
        auxiliary: the loss on dead latents, or None where no latent is dead.
    """

    total: torch.Tensor
    mse: torch.Tensor
    auxiliary: torch.Tensor | None


def attach_step(
    result: StepResult,
    weights: Weights,
    inputs: Inputs,
    spec: Spec,
    *,
    wanted: WantedGradients,
    dead: Dead | None,
    shards: Whole = WHOLE,
) -> Losses:
    """Return a step's losses, differentiable in its weights and inputs.

    Args:
        result: what `step` returned for the other arguments.
        weights, inputs, spec, wanted, dead, shards: as in `step`.
    """
    mse, auxiliary = result.main.mse_loss, result.auxiliary_loss
    if not any(wanted):
        return Losses(mse if auxiliary is None else mse + auxiliary, mse, auxiliary)

    def again(*saved: torch.Tensor) -> StepResult:
        return step(
            Weights(*saved[:4]),
            Inputs(saved[4], saved[5], saved[6], inputs.level_weights),
            replace(spec, deterministic=is_deterministic()),
            wanted=wanted,
            dead=dead,
            shards=shards,
        )

    tensors = (*weights, *inputs[:3])
    give = _Gradients(result, again, weights, inputs).give
    if auxiliary is None:
        (mse,) = attach(NAME, lambda: (result.main.mse_loss,), tensors, give, saves=True)
        return Losses(mse, mse, None)
    outputs = (mse + auxiliary, mse, auxiliary)
    return Losses(*attach(NAME, lambda: outputs, tensors, give, saves=True))


class _Gradients:
    """The gradients that a step computed, held until a backward pass takes them."""

    def __init__(
        self,
        result: StepResult,
        again: Callable[..., StepResult],
        weights: Weights,
        inputs: Inputs,
    ) -> None:
        self.main: Gradients | None = result.main.gradients
        self.auxiliary: DeadGradients | None = result.auxiliary_gradients
        self.again = again
        self.weights, self.inputs = weights, inputs

    def give(
        self,
        grad_outputs: Sequence[torch.Tensor | None],
        saved: Callable[[], Sequence[torch.Tensor | None]],
    ) -> Sequence[torch.Tensor | None]:
        if len(grad_outputs) == 1:  # No latent is dead: `mse_loss` is the total, too.
            of_mse, of_auxiliary = grad_outputs[0], None
        else:
            total, mse, auxiliary = grad_outputs
            of_mse, of_auxiliary = _sum(total, mse), _sum(total, auxiliary)
        is_short_of_main = of_mse is not None and self.main is None
        is_short_of_auxiliary = of_auxiliary is not None and self.auxiliary is None
        if is_short_of_main or is_short_of_auxiliary:
            result = self.again(*saved())
            self.main = self.main or result.main.gradients
            self.auxiliary = self.auxiliary or result.auxiliary_gradients
        gradients = Gradients()
        if of_mse is not None and self.main is not None:
            gradients, self.main = self.main, None
            scale_in_place(gradients, of_mse)
        if of_auxiliary is not None and self.auxiliary is not None:
            scale_in_place(self.auxiliary[2:], of_auxiliary)
            x = self.inputs.encoder_input
            gradients = self.auxiliary.added_to(gradients, self.weights, x)
            self.auxiliary = None
        return gradients


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b
