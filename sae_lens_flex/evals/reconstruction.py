"""An SAE's reconstructions of a batch, one per budget, from one encode."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from sae_lens import SAE

from ..saes.budgets import MeanBudget, RuntimeBudget
from ..saes.fused_path import keeps_prefixes


class Reconstruction(NamedTuple):
    """
    What an SAE made of activations [..., d_in] at one budget.

    Args:
        acts (torch.Tensor): Activations of the latents. [..., k] where `latents` says which ones
            they are, [..., d_sae] otherwise.
        latents (torch.Tensor | None): The latents that were kept, [..., k].
        x_hat (torch.Tensor): The reconstruction, [..., d_in].
    """

    acts: torch.Tensor
    latents: torch.Tensor | None
    x_hat: torch.Tensor


def reconstruct(
    sae: SAE[Any], x: torch.Tensor, budgets: Sequence[int | MeanBudget | None]
) -> Iterator[tuple[int | MeanBudget | None, Reconstruction]]:
    """Yield each budget and its reconstruction.

    Args:
        sae: the SAE.
        x: activations, [..., d_in]. Attention heads are concatenated already.
        budgets: of an SAE with a run-time budget: numbers of latents, ascending, then MeanBudgets.
            Any other SAE has one entry, which is yielded as it came.
    """
    with flat_heads(sae):
        if not isinstance(sae, RuntimeBudget):
            yield budgets[0], _reconstruct_once(sae, x)
            return
        ascending = [budget for budget in budgets if isinstance(budget, int)]
        apart: list[int | MeanBudget] = [b for b in budgets if isinstance(b, MeanBudget)]
        if sae.replaced_decoding() or not keeps_prefixes(sae):
            apart, ascending = [*ascending, *apart], []
        if ascending:
            with sae.at_budget(ascending[-1]):
                acts, latents = sae.encode_levels(x)
            for budget, x_hat in sae.decode_levels(acts, latents, ascending):
                yield budget, Reconstruction(acts[..., :budget], latents[..., :budget], x_hat)
        for budget in apart:
            with sae.at_budget(budget):
                yield budget, _reconstruct_once(sae, x)


def _reconstruct_once(sae: SAE[Any], x: torch.Tensor) -> Reconstruction:
    acts = sae.encode(x)
    x_hat = sae.decode(acts)
    return Reconstruction(acts.to_dense() if acts.is_sparse else acts, None, x_hat)


@contextmanager
def flat_heads(sae: SAE[Any]) -> Iterator[None]:
    """Make the SAE take activations with concatenated heads, as `run_evals` does."""
    if not sae.hook_z_reshaping_mode:
        yield
        return
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        sae.turn_on_forward_pass_hook_z_reshaping()
