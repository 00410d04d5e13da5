"""Matryoshka: the losses of nested dictionaries as levels of one code.

    loss = sum over the widths m of weight_m * 1 / B sum_b |x_hat_m[b] - target[b]|^2,
    x_hat_m[b] = sum of v_i W_dec[latents_i] over the latents below m, + b_dec

The latents of a sample are in ascending order. So those below m are a prefix, and x_hat_m is one of
the sample's levels: level 0 where it has no latent below m. The weight of a level is the sum of the
weights of the widths that it belongs to.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch

from ..ops.codes import Code
from ..ops.products import gather
from .dead import DeadGradients, auxiliary_loss, padded
from .requests import Inputs, Spec, WantedGradients, Weights


class WidthLevels(NamedTuple):
    """To which widths the levels of a code belong.

    Level e of the code, in the order of level weights of each sample (`ops.requests.Levels`),
    belongs to the widths number first[e] to last[e] - 1, of n. Most levels belong to none.

    Attributes:
        first: [n_levels].
        last: [n_levels].
    """

    first: torch.Tensor
    last: torch.Tensor

    def weights(self, of_widths: torch.Tensor) -> torch.Tensor:
        """Return the weight of each level, [n_levels], given that of each width, [n]."""
        width = torch.arange(len(of_widths), device=of_widths.device)
        is_below = width < torch.arange(len(of_widths) + 1, device=width.device).unsqueeze(-1)
        # The sum of the weights of the first 0, 1, ... n widths; `cumsum` varies on a GPU.
        sums = of_widths.where(is_below, 0).sum(-1)
        return sums[self.last] - sums[self.first]

    def sums(self, of_levels: torch.Tensor, n_widths: int) -> torch.Tensor:
        """Return the sum over the levels of each width, [n], of numbers for each level."""
        width = torch.arange(n_widths, device=of_levels.device)
        belongs = (self.first.unsqueeze(-1) <= width) & (width < self.last.unsqueeze(-1))
        return of_levels.unsqueeze(-1).where(belongs, 0).sum(0)


@cache
def widths_on(widths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Return widths as a tensor, [n].

    Kept for good: copying them waits for the device, and recordings go on reading them.
    """
    return torch.tensor(widths, device=device)


def levels_of_widths(code: Code, widths: tuple[int, ...]) -> WidthLevels:
    """Return to which widths the levels belong.

    Args:
        code: in rows of different length, the latents of a row ascending.
        widths: ascending; the last is F.
    """
    assert code.starts is not None
    n_samples, device = code.n_samples, code.latents.device
    n_levels = code.latents.numel() + n_samples
    below = torch.bucketize(code.latents, widths_on(widths, device), right=True)  # widths <= latent
    pairs = torch.arange(code.latents.numel(), device=device)
    first = torch.zeros(n_levels, dtype=torch.int64, device=device)  # at level 0 there is no latent
    first[pairs + code.samples() + 1] = below
    # A level goes up to the next latent, that of a sample's last latent up to F.
    last = torch.cat((first[1:], first.new_zeros(1)))
    ends = code.starts[1:] + torch.arange(n_samples, device=device)
    last.index_fill_(0, ends, len(widths))
    return WidthLevels(first, last)


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
                -residual,
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
    """Return the gradients of a sum of losses on latents of their own."""

    def cat(name: str) -> torch.Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    def add(name: str) -> torch.Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        return None if tensors[0] is None else torch.stack(tensors).sum(0)

    latents = torch.cat([part.latents for part in parts])
    of_latents = {name: cat(name) for name in ("W_enc", "b_enc", "W_dec")}
    return DeadGradients(
        latents, latents, **of_latents, b_dec=add("b_dec"), encoder_input=add("encoder_input")
    )
