"""Measuring SAEs at a list of budgets, every one on the same tokens."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from sae_lens import SAE, ActivationsStore
from tqdm.auto import tqdm
from transformer_lens.HookedTransformer import HookedRootModule  # pyright: ignore

from ..saes.budgets import RuntimeBudget, check_budgets, doubling_budgets
from ..saes.checks import check_integer
from .batches import ModelBatch, ModelRuns, check_shape, given_batches, tokens_to_ignore
from .metrics import BudgetSweep, Totals
from .reconstruction import reconstruct

N_BATCHES = 10  # that are taken of what may have no end


@torch.no_grad()
def sweep_budgets(
    saes: SAE[Any] | Mapping[str, SAE[Any]],
    activations: ActivationsStore | torch.Tensor | Iterable[torch.Tensor],
    *,
    model: HookedRootModule | None = None,
    budgets: Sequence[int] | None = None,
    n_batches: int | None = None,
    batch_size_prompts: int | None = None,
    compute_ce_loss: bool | None = None,
    compute_kl: bool = False,
    exclude_special_tokens: Iterable[int] | bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> BudgetSweep:
    """Measure SAEs at a list of budgets, every one on the same tokens.

    An SAE with a run-time budget (`hierarchical_topk`) is encoded once a batch and measured at
    every budget. Any other SAE is measured once, as it is.

    Args:
        saes: an SAE, or several by name.
        activations: SAELens's ActivationsStore, from which tokens are drawn for the model. Or the
            activations themselves: a tensor [..., d_in], or an iterable of such, one a batch.
        model: the language model. None takes the store's. Only a store goes with a model.
        budgets: ascending, from 1 to the largest k of the SAEs. None takes 1, 2, 4, ... and k of
            each SAE. Budgets above an SAE's own k are left out for it.
        n_batches: number of batches to take. None takes all of a tensor, list or tuple, and 10 of
            a store or another iterable, which may have fewer.
        batch_size_prompts: prompts in a batch. None takes the store's.
        compute_ce_loss: whether to measure the cross-entropy, for which the model runs once per
            budget. None measures it with a store, and does not without.
        compute_kl: whether to measure KL divergences, in the same runs of the model.
        exclude_special_tokens: tokens to leave out, as in `run_evals`.
        model_kwargs: passed to the model.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError, TypeError: for arguments that do not fit. The message names the first.
    """
    named = dict(saes) if isinstance(saes, Mapping) else {"sae": saes}
    if not named:
        raise ValueError("saes is empty, expected at least one SAE")
    for sae in named.values():
        if not isinstance(sae, SAE):
            raise TypeError(f"saes has a {type(sae).__name__}, expected SAELens's SAEs")
    if n_batches is None:
        n_batches = len(activations) if isinstance(activations, (list, tuple)) else N_BATCHES
    else:
        n_batches = check_integer("n_batches", n_batches)
    if batch_size_prompts is not None:
        batch_size_prompts = check_integer("batch_size_prompts", batch_size_prompts)
    budgets_of = _choose_budgets(named, budgets)
    with_ce = with_kl = False
    if isinstance(activations, ActivationsStore):
        store = activations
        model = store.model if model is None else model
        with_ce, with_kl = compute_ce_loss is not False, compute_kl
        ignored = tokens_to_ignore(model, exclude_special_tokens)
        runs = ModelRuns(model, ignored, with_ce, with_kl, dict(model_kwargs or {}))
        batches = (
            ModelBatch(store.get_batch_tokens(batch_size_prompts), list(named.values()), runs)
            for _ in range(n_batches)
        )
    else:
        for name, is_given in (
            ("model", model is not None),
            ("compute_ce_loss", compute_ce_loss),
            ("compute_kl", compute_kl),
        ):
            if is_given:
                raise ValueError(
                    f"{name} is given and activations is a {type(activations).__name__}, expected "
                    "an ActivationsStore with it"
                )
        batches = given_batches(named, activations, n_batches)

    totals = {
        (name, budget): Totals(sae) for name, sae in named.items() for budget in budgets_of[name]
    }
    n_tokens = 0
    for batch in tqdm(batches, total=n_batches, desc="Sweeping budgets", disable=not show_progress):
        n_tokens += int(batch.mask.sum())
        for name, sae in named.items():
            x = batch.activations(sae)  # [..., d_in]
            check_shape(x, {name: sae})
            if not x[batch.mask.to(x.device)].isfinite().all():
                raise ValueError("activations has NaN or infinite values, expected finite ones")
            for budget, reconstruction in reconstruct(sae, x, budgets_of[name]):
                total = totals[name, budget]
                total.add(x, reconstruction, batch.mask)
                if with_ce or with_kl:
                    total.add_model_metrics(batch.model_metrics(sae, reconstruction.x_hat))
    if n_tokens == 0:
        raise ValueError("activations gave no token, expected at least one")
    return BudgetSweep(
        [total.metrics(name, budget) for (name, budget), total in totals.items()], n_tokens
    )


def _choose_budgets(
    saes: dict[str, SAE[Any]], budgets: Sequence[int] | None
) -> dict[str, list[int | None]]:
    """Return the budgets of each SAE.

    An SAE without a run-time budget gets one entry: its k, or None if it has none.
    """
    k_of = {name: sae.cfg.k for name, sae in saes.items() if isinstance(sae, RuntimeBudget)}
    if budgets is not None:
        if not k_of:
            raise ValueError(
                f"budgets is {budgets!r}, expected None: no SAE of saes takes a budget at run time"
            )
        budgets = check_budgets("budgets", budgets, max(k_of.values()))
    chosen: dict[str, list[int | None]] = {}
    for name, sae in saes.items():
        if name not in k_of:
            k = getattr(sae.cfg, "k", None)
            chosen[name] = [k if isinstance(k, int) else None]
            continue
        within = doubling_budgets(k_of[name]) if budgets is None else budgets
        chosen[name] = [budget for budget in within if budget <= k_of[name]]
        if not chosen[name]:
            raise ValueError(
                f"budgets is {budgets!r}, expected one within {name!r}'s k ({k_of[name]})"
            )
    return chosen
