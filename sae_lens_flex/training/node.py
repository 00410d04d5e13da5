"""The one autograd node in front of a training step.

Its outputs are `loss` and each entry of `losses`. A backward pass gets the gradient of every output
on which something depends, so it knows the factor of each loss:

    factor of mse_loss = d/dloss + d/dmse_loss,     of the auxiliary loss = d/dloss + d/dauxiliary.

With the spec's `widths` the loss of each width is an output of its own. Their gradients are held
together, for one factor. A pass with another factor for each computes the step once more, with the
factors as weights of the widths.

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
        mse: `mse_loss`; of the last width alone where there are widths.
        auxiliary: the loss on dead latents, or None where no latent is dead.
        of_widths: that of each width but the last.
    """

    total: torch.Tensor
    mse: torch.Tensor
    auxiliary: torch.Tensor | None
    of_widths: tuple[torch.Tensor, ...] = ()


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
    total, auxiliary = result.main.mse_loss, result.auxiliary_loss
    widths = result.main.width_losses
    losses = [total] if widths is None else [loss.clone() for loss in widths.unbind()]
    if auxiliary is not None:
        losses.append(auxiliary)
        total = total + auxiliary
    elif widths is None:
        total = total.clone()  # A user may change it in place, as by `loss /= n`.

    def again(*saved: torch.Tensor, width_weights: torch.Tensor | None = None) -> StepResult:
        level_weights = inputs.level_weights if width_weights is None else width_weights
        return step(
            Weights(*saved[:4]),
            Inputs(saved[4], saved[5], saved[6], level_weights),
            replace(spec, deterministic=is_deterministic()),
            wanted=wanted,
            dead=dead if width_weights is None else None,
            shards=shards,
        )

    if any(wanted):
        give = _Gradients(result, again, weights, inputs).give
        outputs = (total, *losses)
        tensors = (*weights, *inputs[:3])
        total, *losses = attach(NAME, lambda: outputs, tensors, give, saves=True)
    if auxiliary is not None:
        auxiliary = losses.pop()
    *of_widths, mse = losses
    return Losses(total, mse, auxiliary, tuple(of_widths))


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
        self.has_auxiliary = result.auxiliary_loss is not None
        widths = result.main.width_losses
        self.n_widths = 0 if widths is None else len(widths)
        self.again = again
        self.weights, self.inputs = weights, inputs

    def give(
        self,
        grad_outputs: Sequence[torch.Tensor | None],
        saved: Callable[[], Sequence[torch.Tensor | None]],
    ) -> Sequence[torch.Tensor | None]:
        total, *others = grad_outputs
        of_auxiliary = _sum(total, others.pop()) if self.has_auxiliary else None
        of_mse, of_widths = total, None
        if self.n_widths > 0 and any(other is not None for other in others):
            of_mse, of_widths = None, [_sum(total, other) for other in others]
        elif self.n_widths == 0 and others:
            of_mse = _sum(total, others[0])
        is_short_of_main = of_mse is not None and self.main is None
        is_short_of_auxiliary = of_auxiliary is not None and self.auxiliary is None
        if is_short_of_main or is_short_of_auxiliary:
            result = self.again(*saved())
            self.main = self.main or result.main.gradients
            self.auxiliary = self.auxiliary or result.auxiliary_gradients
        gradients = Gradients()
        if of_widths is not None:
            zero = next(factor for factor in of_widths if factor is not None).new_zeros(())
            factors = torch.stack([zero if f is None else f for f in of_widths])
            gradients = self.again(*saved(), width_weights=factors).main.gradients
        if of_mse is not None and self.main is not None:
            gradients, self.main = self.main, None
            scale_in_place(gradients, of_mse)
        if of_auxiliary is not None and self.auxiliary is not None:
            scale_in_place(self.auxiliary.tensors(), of_auxiliary)
            x = self.inputs.encoder_input
            gradients = self.auxiliary.added_to(gradients, self.weights, x)
            self.auxiliary = None
        return gradients


def _sum(a: torch.Tensor | None, b: torch.Tensor | None) -> torch.Tensor | None:
    return b if a is None else a if b is None else a + b
