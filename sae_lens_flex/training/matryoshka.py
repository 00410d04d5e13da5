"""Matryoshka: the auxiliary loss of each of nested dictionaries.

Their reconstruction loss is a decoder loss with widths (`ops.requests`):

    loss = sum over the widths m of weight_m * 1 / B sum_b |x_hat_m[b] - target[b]|^2,
    x_hat_m[b] = sum of v_i W_dec[latents_i] over the latents below m, + b_dec

What x_hat_m leaves over is the target of the dead latents that the width m adds.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from ..ops.codes import Code
from ..ops.products import gather
from .dead import DeadGradients, auxiliary_loss, padded
from .requests import Inputs, Spec, WantedGradients, Weights


@cache
def widths_on(widths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return widths as a tensor, [n].

    Kept for good: copying them waits for the device, and recordings go on reading them.
    """
    return torch.tensor(widths, device=device)


class DeadOfWidth(NamedTuple):
    """The dead latents that a width adds to the one before.

    Attributes:
        width: below which they are.
        latents: [n], n > 0.
        is_dead: which of them are dead, [n]; None where all are.
    """

    width: int
    latents: torch.Tensor
    is_dead: torch.Tensor | None = None


def dead_of_widths(
    latents: torch.Tensor, below: Sequence[int], widths: tuple[int, ...]
) -> list[DeadOfWidth]:
    """Return the dead latents of each width that adds some.

    Args:
        latents: of all widths, [n], ascending.
        below: how many of them are below each width.
        widths: ascending.
    """
    parts = zip(widths, (0, *below[:-1]), below, strict=True)
    return [DeadOfWidth(width, latents[i:j]) for width, i, j in parts if j > i]


def padded_of_widths(
    mask: torch.Tensor, widths: tuple[int, ...], capacity: int
) -> list[DeadOfWidth]:
    """Return where `mask`, [F], is set, of each width, without waiting for the device.

    Args:
        mask: set at most `capacity` times.
        widths: ascending; the last is F.
        capacity: of each width, unless it adds fewer latents.
    """
    parts = []
    for first, width in zip((0, *widths[:-1]), widths, strict=True):
        found = padded(mask[first:width], min(capacity, width - first))
        parts.append(DeadOfWidth(width, found.latents + first, found.is_dead))
    return parts


def auxiliary_loss_by_width(
    weights: Weights,
    rows: torch.Tensor,
    code: Code,
    inputs: Inputs,
    parts: Sequence[DeadOfWidth],
    *,
    coefficient: float,
    norms: torch.Tensor | None,
    spec: Spec,
    wanted: WantedGradients,
) -> tuple[torch.Tensor, DeadGradients]:
    """Return SAELens's `calculate_matryoshka_aux_loss` and its gradients.

    The dead latents between two widths are to reconstruct what the latents below the greater of
    them left over.

    Args:
        weights, inputs, spec, wanted: of the step.
        rows: what is multiplied with W_enc, [B, D].
        code: kept latents and their pre-activations.
        parts: the dead latents of each width, of one at least.
        coefficient: multiplies the loss.
        norms: by which latents are compared, [F], or None for 1.
    """
    target = inputs.target - weights.b_dec.to(inputs.target.dtype)
    results = []
    for width, latents, is_dead in parts:
        acts = code.values.relu().where(code.latents < width, 0)
        residual = gather(
            code.with_values(acts), weights.W_dec, use_triton=spec.use_triton, target=target
        )
        results.append(
            auxiliary_loss(
                weights,
                rows,
                residual,
                latents=latents,
                is_dead=is_dead,
                norms=norms,
                coefficient=coefficient,
                spec=spec,
                wanted=wanted,
            )
        )
    losses, gradients = zip(*results, strict=True)
    return torch.stack(losses).sum(), _joined(gradients)


def _joined(parts: Sequence[DeadGradients]) -> DeadGradients:
    """Return the gradients of a sum of losses, each on latents of its own.

    Of all parts the latents are dead, or all parts say which of them are.
    """

    def cat(name: str) -> torch.Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    def add(name: str) -> torch.Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.stack(tensors).sum(0)

    latents, is_dead = torch.cat([part.latents for part in parts]), cat("is_dead")
    of_latents = {name: cat(name) for name in ("W_enc", "b_enc", "W_dec")}
    return DeadGradients(
        *(latents, latents, is_dead, is_dead, parts[0].use_triton),
        **of_latents,
        b_dec=add("b_dec"),
        encoder_input=add("encoder_input"),
    )
