"""The threshold with which an SAE keeps a number of latents on average."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from sae_lens import ActivationsStore
from transformer_lens.HookedTransformer import HookedRootModule  # pyright: ignore

from ..saes.budgets import MeanBudget, RuntimeBudget, largest_budget
from ..saes.checks import check_number, check_weights
from ..saes.normalization import take_output_map
from .batches import activations_of, draw_batches
from .reconstruction import flat_heads

# Share of the vectors that may get more than k latents without a warning.
MOST_BEYOND_K = 0.01
# Activations of latents that are computed at once, in the dense form of `encode`.
MOST_ACTIVATIONS = 2**26


def mean_budget(
    sae: RuntimeBudget,
    activations: ActivationsStore | torch.Tensor | Iterable[torch.Tensor],
    mean: float,
    *,
    model: HookedRootModule | None = None,
    n_batches: int | None = None,
    batch_size_prompts: int | None = None,
    exclude_special_tokens: Iterable[int] | bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
) -> MeanBudget:
    """Return the budget of `mean` latents on average, by one threshold on their activations.

        sae.budget = sae_lens_flex.mean_budget(sae, store, 16)

    Of N activation vectors the int(mean * N) largest activations of latents are kept: BatchTopK's
    rule (Bussmann et al. 2024, arXiv 2412.06410) on all N as one batch. The threshold lies midway
    between the smallest of them and the largest of the others, so that rounding elsewhere keeps the
    same ones. Fewer are kept where several are equal. On other activations the mean is another one:
    take some like those that the SAE is to be used on.

    A vector may get any number of latents, so that SAELens's "jumprelu" can hold the budget. At a
    mean near the SAE's k some vectors get more than k, for which the SAE was not trained. This
    function warns where more than 1 % of them do.

    The N vectors are held in memory, and int(mean * N) + N numbers beside them.

    Args:
        sae: a hierarchical_topk SAE, for inference or in training. It is not changed.
        activations: as in `sweep_budgets`.
        mean: latents to keep per activation vector on average, above 0 and up to the SAE's k.
        model, n_batches, batch_size_prompts, exclude_special_tokens, model_kwargs: as in
            `sweep_budgets`.

    Returns:
        The budget, which `sae.budget`, `at_budget`, `sweep_budgets` and `export_jumprelu` take. Its
        `mean` is that of these N.

    Raises:
        TypeError: for an SAE without a run-time budget.
        ValueError: for other arguments that do not fit, for weights that are not finite, or where
            fewer latents are positive.
    """
    return mean_budgets(
        sae,
        activations,
        [mean],
        model=model,
        n_batches=n_batches,
        batch_size_prompts=batch_size_prompts,
        exclude_special_tokens=exclude_special_tokens,
        model_kwargs=model_kwargs,
    )[0]


@torch.no_grad()
def mean_budgets(
    sae: RuntimeBudget,
    activations: ActivationsStore | torch.Tensor | Iterable[torch.Tensor],
    means: Sequence[float],
    **options: Any,
) -> list[MeanBudget]:
    """Return `mean_budget` of each mean, all of them of the same activations.

    Args:
        sae, activations: as in `mean_budget`.
        means: at least one.
        options: keyword arguments of `mean_budget`.
    """
    if not isinstance(sae, RuntimeBudget):
        raise TypeError(
            f"sae is a {type(sae).__name__}, expected an SAE with a run-time budget "
            "(hierarchical_topk)"
        )
    k = largest_budget(sae)
    means = [check_number("mean", mean, is_positive=True) for mean in means]
    if max(means) > k:
        raise ValueError(f"mean is {max(means)!r}, expected a number up to k ({k})")
    check_weights(sae)
    defaults = dict.fromkeys(("model", "n_batches", "batch_size_prompts", "model_kwargs"))
    options = defaults | {"exclude_special_tokens": True} | options
    batches, _ = draw_batches({"sae": sae}, activations, **options)
    # How many activations are to be kept is known once all vectors are.
    given = [activations_of(batch, "sae", sae)[batch.mask.to(sae.device)] for batch in batches]
    n_vectors = sum(map(len, given))
    if n_vectors == 0:
        raise ValueError("activations gave no token, expected at least one")
    if int(min(means) * n_vectors) == 0:
        raise ValueError(
            f"mean is {min(means)!r} of {n_vectors} activation vectors, expected one latent of all "
            "of them at least"
        )
    n_kept = int(max(means) * n_vectors)
    largest = given[0].new_empty(0, dtype=sae.dtype)  # The n_kept + 1 largest so far, if so many.
    lowest: float | torch.Tensor = 0.0
    beyond_k = []  # of each vector its largest activation after k larger ones
    with flat_heads(sae), sae.at_budget(MeanBudget(mean=k, threshold=0)):
        for x in given:
            for rows in x.split(max(1, MOST_ACTIVATIONS // sae.cfg.d_sae)):
                acts = sae.encode(rows)  # [rows, d_sae]
                if k < sae.cfg.d_sae:
                    beyond_k.append(acts.topk(k + 1).values[..., -1])
                largest = torch.cat((largest, acts[acts > lowest]))
                if len(largest) > n_kept + 1:
                    largest = largest.topk(n_kept + 1, sorted=False).values
                    lowest = largest.amin()
    take_output_map(sae)  # what an `encode` without a `decode` leaves
    descending = largest.sort(descending=True).values
    budgets = []
    for mean in means:  # A comprehension is a frame more for `stacklevel` until Python 3.12.
        budgets.append(_above(descending, mean, n_vectors, beyond_k, k))
    return budgets


def _above(
    descending: torch.Tensor, mean: float, n_vectors: int, beyond_k: list[torch.Tensor], k: int
) -> MeanBudget:
    """Return the budget of a mean.

    Args:
        descending: the largest activations of latents, one more than are to be kept if so many are
            positive.
        mean: latents to keep per activation vector.
        n_vectors: number of activation vectors.
        beyond_k: of each vector its largest activation after k larger ones.
        k: the SAE's.
    """
    n_kept = int(mean * n_vectors)
    largest = descending[: n_kept + 1]
    if len(largest) < n_kept:
        raise ValueError(
            f"mean is {mean!r}, expected at most {len(largest) / n_vectors:.4g}, the number of "
            "latents whose activation is positive"
        )
    highest_dropped = largest.amin() if len(largest) > n_kept else largest.new_zeros(())
    kept = largest[largest > highest_dropped]
    if len(kept) == 0:
        raise ValueError(
            f"mean is {mean!r}, and {len(largest)} activations of latents are equally large: no "
            "threshold keeps some of them"
        )
    threshold = float(highest_dropped)
    if threshold > 0:  # else every positive activation is kept
        # In the SAE's dtype, in which it is compared. Between neighbours nothing is midway.
        midway = float(highest_dropped + (kept.amin() - highest_dropped) / 2)
        threshold = midway if midway < float(kept.amin()) else threshold
    n_beyond = sum(int((each > threshold).sum()) for each in beyond_k)
    if n_beyond > MOST_BEYOND_K * n_vectors:
        warnings.warn(
            f"at a mean of {mean:g} latents {n_beyond / n_vectors:.1%} of the activation vectors "
            f"get more than k ({k}), for which the SAE was not trained: a smaller mean or a fixed "
            "budget may do better",
            stacklevel=5,
        )
    return MeanBudget(mean=len(kept) / n_vectors, threshold=threshold)
