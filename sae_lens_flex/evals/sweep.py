"""Measuring SAEs at a list of budgets, every one on the same tokens."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.saes.topk_sae import TopK
from sae_lens.saes.transcoder import Transcoder
from tqdm.auto import tqdm
from transformer_lens.HookedTransformer import HookedRootModule  # pyright: ignore

from ..saes.budgets import (
    Budget,
    MeanBudget,
    RuntimeBudget,
    check_budget,
    check_budgets,
    doubling_budgets,
    largest_budget,
)
from ..saes.checks import not_finite_weights, plain
from .batches import activations_of, draw_batches, no_store
from .metrics import BudgetMetrics, BudgetSweep, Totals
from .reconstruction import reconstruct

# Explained variance that may be lost from one budget to a larger one without a warning.
LARGEST_FALL = 0.005
# By what factor the mean L0 at a threshold may differ from its mean without a warning, and by what
# factor it may be above it where it is above k. On like text a mean of k is a little above k, too.
LARGEST_DRIFT, LARGEST_DRIFT_BEYOND_K = 2.0, 1.1


@torch.no_grad()
def sweep_budgets(
    saes: SAE[Any] | Mapping[str, SAE[Any]],
    activations: ActivationsStore | torch.Tensor | Iterable[torch.Tensor],
    *,
    model: HookedRootModule | None = None,
    budgets: Sequence[Budget] | None = None,
    n_batches: int | None = None,
    batch_size_prompts: int | None = None,
    compute_ce_loss: bool | None = None,
    compute_kl: bool = False,
    exclude_special_tokens: Iterable[int] | bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> BudgetSweep:
    """Measure SAEs at a list of budgets, every one on the same tokens.

    It warns of an SAE that explains less of the variance with more latents, of one whose weights
    or reconstructions are not finite, of activations that have no variance, and of a threshold
    that keeps many more or fewer latents here than on the activations that it was chosen on.

    An SAE with a run-time budget (`hierarchical_topk`) is encoded once a batch and measured at
    every budget. It is encoded once for each budget where you replaced what encodes or decodes, or
    hung hooks on `hook_sae_acts_post`. Any other SAE is measured once, as it is.

    Args:
        saes: an SAE, or several by name.
        activations: SAELens's ActivationsStore, from which tokens are drawn for the model. Or the
            activations themselves: a tensor [..., d_in], or an iterable of such, one a batch.
        model: the language model. None takes the store's. Only a store goes with a model.
        budgets: numbers of latents, ascending, from 1 to the largest k of the SAEs, and any number
            of MeanBudgets, where one of the SAEs has a run-time budget. None takes 1, 2, 4, ... and
            k of each SAE. Budgets above an SAE's own k are left out for it.
        n_batches: number of batches to take. None takes all of a tensor, list or tuple, and 10 of
            a store or another iterable, which may have fewer.
        batch_size_prompts: prompts in a batch. None takes the store's.
        compute_ce_loss: whether to measure the cross-entropy, for which the model runs once per
            budget. None measures it with a store, and does not without.
        compute_kl: whether to measure KL divergences, in the same runs of the model.
        exclude_special_tokens: tokens to leave out, as in `run_evals`. Only a store has tokens.
        model_kwargs: passed to the model.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError, TypeError: for arguments that do not fit. The message names the first.
    """
    named = dict(saes) if isinstance(saes, Mapping) else {"sae": saes}
    if not named:
        raise ValueError("saes is empty, expected at least one SAE")
    for name, sae in named.items():
        if not isinstance(name, str):
            raise TypeError(f"saes has the name {name!r}, expected a string for each SAE")
        if not isinstance(sae, SAE):
            raise TypeError(f"saes has a {type(sae).__name__}, expected SAELens's SAEs")
        if isinstance(sae, Transcoder):
            raise TypeError(
                f"saes has a {type(sae).__name__}, expected SAEs that reconstruct what they read"
            )
    budgets_of = _choose_budgets(named, budgets)
    for name, value in (
        ("compute_ce_loss", compute_ce_loss),
        ("compute_kl", compute_kl),
        ("show_progress", show_progress),
    ):
        if not isinstance(plain(value), int | None):  # "no" would count as true
            raise ValueError(f"{name} is {value!r}, expected true or false")
    is_store = isinstance(activations, ActivationsStore)
    for name, is_given in (("compute_ce_loss", compute_ce_loss), ("compute_kl", compute_kl)):
        if is_given and not is_store:
            raise ValueError(no_store(name, activations))
    with_ce, with_kl = is_store and compute_ce_loss is not False, compute_kl
    batches, n_batches = draw_batches(
        named,
        activations,
        model=model,
        n_batches=n_batches,
        batch_size_prompts=batch_size_prompts,
        exclude_special_tokens=exclude_special_tokens,
        model_kwargs=model_kwargs,
        with_ce=with_ce,
        with_kl=with_kl,
    )
    totals = {
        (name, budget): Totals(sae) for name, sae in named.items() for budget in budgets_of[name]
    }
    n_tokens = 0
    for batch in tqdm(batches, total=n_batches, desc="Sweeping budgets", disable=not show_progress):
        n_tokens += int(batch.mask.sum())
        for name, sae in named.items():
            x = activations_of(batch, name, sae)  # [..., d_in]
            for budget, reconstruction in reconstruct(sae, x, budgets_of[name]):
                total = totals[name, budget]
                total.add(x, reconstruction, batch.mask)
                if with_ce or with_kl:
                    total.add_model_metrics(batch.model_metrics(sae, reconstruction.x_hat))
    if n_tokens == 0:
        raise ValueError("activations gave no token, expected at least one")
    rows = [total.metrics(name, budget) for (name, budget), total in totals.items()]
    for name, sae in named.items():
        of_sae = [row for row in rows if row.sae == name]
        weights = not_finite_weights(sae)
        if weights or not all(math.isfinite(row.mse) for row in of_sae):
            what = f"weights of {name!r} ({', '.join(weights)})"
            warnings.warn(
                f"the {what if weights else f'reconstructions of {name!r}'} hold NaN or infinity, "
                "so its metrics mean nothing. A run with too high a learning rate ends so",
                stacklevel=3,
            )
        elif any(total.lacks_variance() for (of, _), total in totals.items() if of == name):
            warnings.warn(
                f"the activations of {name!r} have no variance, so its explained_variance means "
                f"nothing: all {n_tokens} are equal",
                stacklevel=3,
            )
        else:
            _warn_of_drift(of_sae, sae)
            _warn_of_fall([row for row in of_sae if row.budget is not None])
    return BudgetSweep(rows, n_tokens)


def _warn_of_drift(rows: list[BudgetMetrics], sae: SAE[Any]) -> None:
    """Warn where a threshold was chosen on activations unlike these."""
    for row in rows:
        if row.mean is None:
            continue
        k = largest_budget(sae)
        is_beyond_k = row.l0 > max(k, LARGEST_DRIFT_BEYOND_K * row.mean)
        if is_beyond_k or not 1 / LARGEST_DRIFT <= row.l0 / row.mean <= LARGEST_DRIFT:
            beyond_k = f", and more than its k ({k}), for which it was not trained"
            warnings.warn(
                f"the threshold of {row.sae!r} for a mean of {row.mean:.4g} latents keeps "
                f"{row.l0:.4g} here{beyond_k if is_beyond_k else ''}: it was chosen on other "
                "activations. Choose it with `mean_budget` on activations like these",
                stacklevel=4,
            )


def _warn_of_fall(rows: list[BudgetMetrics]) -> None:
    """Warn where an SAE explains less with more latents."""
    best = rows[0] if rows else None
    for row in rows:
        if best is None or row.explained_variance > best.explained_variance:
            best = row
        elif best.explained_variance - row.explained_variance > LARGEST_FALL:
            warnings.warn(
                f"explained variance of {row.sae!r} falls as the budget grows: "
                f"{best.explained_variance:.3f} at {best.budget}, {row.explained_variance:.3f} at "
                f"{row.budget}. A run with too high a learning rate ends so: try a lower one",
                stacklevel=4,
            )
            return


def _choose_budgets(
    saes: dict[str, SAE[Any]], budgets: Sequence[Budget] | None
) -> dict[str, list[Budget | None]]:
    """Return the budgets of each SAE: numbers of latents, ascending, and then MeanBudgets.

    An SAE without a run-time budget gets one entry: its k, or None if it keeps no fixed number.
    """
    k_of = {
        name: largest_budget(sae) for name, sae in saes.items() if isinstance(sae, RuntimeBudget)
    }
    means: list[MeanBudget] = []
    if budgets is not None:
        if not k_of:
            raise ValueError(
                f"budgets is {budgets!r}, expected None: no SAE of saes takes a budget at run time"
            )
        if isinstance(budgets, (list, tuple)):
            means = [budget for budget in budgets if isinstance(budget, MeanBudget)]
            budgets = [budget for budget in budgets if not isinstance(budget, MeanBudget)]
        if not means or len(budgets) > 0:
            budgets = check_budgets("budgets", budgets, max(k_of.values()))
        if means and len(k_of) > 1:
            raise ValueError(
                f"budgets has {means[0]!r}, whose threshold is that of one SAE, and saes has "
                f"{len(k_of)} with budgets ({', '.join(k_of)}), expected one"
            )
        if len(set(means)) < len(means):
            raise ValueError(f"budgets has {means!r}, expected no MeanBudget twice")
    chosen: dict[str, list[Budget | None]] = {}
    for name, sae in saes.items():
        if name not in k_of:
            activation_fn: Any = sae.activation_fn
            chosen[name] = [activation_fn.k if isinstance(activation_fn, TopK) else None]
            continue
        within = doubling_budgets(k_of[name]) if budgets is None else budgets
        chosen[name] = [
            *(budget for budget in within if isinstance(budget, int) and budget <= k_of[name]),
            *(check_budget(budget, k_of[name]) for budget in means),
        ]
        if not chosen[name]:
            raise ValueError(
                f"budgets is {budgets!r}, expected one within {name!r}'s k ({k_of[name]})"
            )
    return chosen
