"""A whole step of SAELens's trainer as one function of tensors, which can be recorded.

    mse_loss, its gradients     `training.step.reconstruct`
    auxiliary loss, gradients   `training.dead`, of a fixed number of latents that may be dead
    g                           the sum of the gradients
    W                           Adam's step with g min(1 / (|g| + 1e-6), 1), |g| of all weights
                                together: `ops.kernels.adam`, or PyTorch's
    threshold                   `training.threshold`, of the architectures of a batch
    since_fired[f]              0 where a sample keeps f with a positive activation, else 1 more

It waits for nothing and asks nothing of the device.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.utils import get_total_norm
from torch.optim.adam import adam

from ..ops.kernels.adam import Adam, Updated, adam_, squares
from ..ops.policy import no_autocast
from ..training.dead import KnownDead, padded
from ..training.firing import coordinates, fired
from ..training.matryoshka import padded_of_widths
from ..training.requests import Gradients, Inputs, Spec, WantedGradients, Weights
from ..training.shards import WHOLE, Whole
from ..training.step import Reconstruction, loss_on_dead, reconstruct
from ..training.threshold import Threshold
from .adam import clipping_scale


class Moments(NamedTuple):
    """Adam's state of a weight.

    Attributes:
        exp_avg, exp_avg_sq: in the shape and strides of the weight.
        step: the number of steps, a scalar.
    """

    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: torch.Tensor


class Trained(NamedTuple):
    """The tensors that a step changes in place, and those that say how.

    Attributes:
        weights: float32, each with the strides of its gradient.
        moments: of each weight, or None where it is not trained.
        since_fired: how many steps ago each latent fired, [F].
        learning_rate: float32, a scalar; it is only read.
        threshold: float64, a scalar, or None where there is none.
    """

    weights: Weights
    moments: tuple[Moments | None, ...]
    since_fired: torch.Tensor
    learning_rate: torch.Tensor
    threshold: torch.Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """What else a step depends on.

    Attributes:
        adam: the optimizer's.
        dead_feature_window: a latent is dead after more steps without firing.
        aux_loss_coefficient: of the loss on dead latents.
        aux_loss_by_width: whether each of the spec's `widths` has such a loss of its own.
        threshold_lr: how far the threshold moves.
    """

    adam: Adam
    dead_feature_window: float
    aux_loss_coefficient: float
    aux_loss_by_width: bool = False
    threshold_lr: float = 0.0


class WholeStep(NamedTuple):
    """What a step reports.

    Attributes:
        main: the reconstruction, without its gradients.
        losses: `loss`, `mse_loss`, the auxiliary loss, and that of each width but the last.
        counts: how many samples each latent fired on, [F].
        at: the `coordinates` of the code, [2, B k].
    """

    main: Reconstruction
    losses: torch.Tensor
    counts: torch.Tensor
    at: torch.Tensor


@torch.no_grad()
def whole_step(
    trained: Trained,
    inputs: Inputs,
    spec: Spec,
    wanted: WantedGradients,
    settings: Settings,
    most_dead: int,
    *,
    shards: Whole = WHOLE,
    before_update: Callable[[Reconstruction, torch.Tensor], None] = lambda main, at: None,
) -> WholeStep:
    """Take a step.

    Args:
        trained: what is changed.
        inputs: a batch; their gradient is not wanted.
        spec, wanted: as in `training.step.step`.
        settings: Adam's, and of the auxiliary loss.
        most_dead: at least the number of dead latents, of several processes in the encoder of each;
            0 leaves out the loss on them.
        shards: of which process the tensors are.
        before_update: is called with the reconstruction, while the weights are those that it is of,
            and with the `coordinates` of its code.
    """
    weights, since_fired = trained.weights, trained.since_fired
    with no_autocast(since_fired.device):
        found = known = None
        if most_dead > 0:
            is_dead = since_fired > settings.dead_feature_window
            if settings.aux_loss_by_width:
                found = padded_of_widths(is_dead, spec.widths, most_dead)
            else:
                found = padded(is_dead, most_dead, shards)
                if not shards.is_sharded:
                    # Where more are dead than `found` has room for, no row is left to it.
                    has_all = is_dead.sum() <= most_dead
                    known = KnownDead(is_dead & has_all, found)
        main = reconstruct(weights, inputs, spec, wanted, shards, known=known)
        at = coordinates(main.code)
        before_update(main, at)
        gradients, total = main.gradients, main.mse_loss
        auxiliary = torch.zeros_like(total)
        if found is not None:
            auxiliary, of_dead = loss_on_dead(
                *(main, weights, inputs, spec, wanted, found),
                coefficient=settings.aux_loss_coefficient,
                shards=shards,
            )
            # It writes the rows of dead latents that the reconstruction has left.
            gradients = of_dead.added_to(gradients, weights, inputs.encoder_input, main.is_absent)
            total = main.mse_loss + auxiliary
        _update(trained, gradients, spec, settings.adam, shards)
        counts = fired(main.code.with_values(main.hidden_pre), len(since_fired))
        since_fired.add_(1).masked_fill_(counts.bool(), 0)
        if trained.threshold is not None:
            Threshold(trained.threshold, settings.threshold_lr).move(main.hidden_pre)
        *of_widths, mse = [main.mse_loss] if main.width_losses is None else main.width_losses
        losses = torch.stack((total, mse, auxiliary, *of_widths))
    main = main._replace(gradients=Gradients(), products_of_dead=None)
    return WholeStep(main, losses, counts, at)


def _update(
    trained: Trained, gradients: Gradients, spec: Spec, settings: Adam, shards: Whole
) -> None:
    """Clip the gradients, all together, and apply Adam."""
    updated = [
        Updated(weight, gradient, *moments)
        for weight, gradient, moments in zip(
            trained.weights, gradients[:4], trained.moments, strict=True
        )
        if gradient is not None and moments is not None
    ]
    if spec.use_triton:
        adam_(updated, _squares(gradients, shards), trained.learning_rate, settings)
        return
    weights, grads, exp_avgs, exp_avg_sqs, steps = (
        list(tensors) for tensors in zip(*updated, strict=True)
    )
    adam(
        weights,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        fused=True,
        grad_scale=clipping_scale(_total_norm(gradients, shards)),
        amsgrad=False,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        lr=trained.learning_rate,
        weight_decay=settings.weight_decay,
        eps=settings.eps,
        maximize=settings.maximize,
        decoupled_weight_decay=settings.decoupled_weight_decay,
    )


def _parts_and_whole(gradients: Gradients) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the gradients that are parts in several processes, and those that all have whole."""
    *parts, of_b_dec = gradients[:4]
    return [part for part in parts if part is not None], [] if of_b_dec is None else [of_b_dec]


def _squares(gradients: Gradients, shards: Whole) -> torch.Tensor:
    """Return numbers whose sum is the squared norm of the weights' gradients, all together, [n]."""
    parts, whole = _parts_and_whole(gradients)
    if not shards.is_sharded:
        return squares(parts + whole)
    of_parts = [shards.sum(squares(parts).sum(0, keepdim=True))] if parts else []
    return torch.cat([*of_parts, *([squares(whole)] if whole else [])])


def _total_norm(gradients: Gradients, shards: Whole) -> torch.Tensor:
    """Return the norm of the weights' gradients, all together, a scalar."""
    parts, whole = _parts_and_whole(gradients)
    if not shards.is_sharded:
        return get_total_norm(parts + whole)
    norms = [shards.sum(get_total_norm(parts).square()).sqrt()] if parts else []
    return get_total_norm(norms + whole)
