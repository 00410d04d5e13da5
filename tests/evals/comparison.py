"""SAEs and sweeps for the tests of this directory, and the metrics that SAELens gives them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from integration import conftest as toy
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_flex import (
    BudgetMetrics,
    BudgetSweep,
    HierarchicalTopKSAE,
    HierarchicalTopKSAEConfig,
    MeanBudget,
    sweep_budgets,
)

D_IN, D_SAE, K = toy.D_IN, 48, 8
HOOK_NAME, CONTEXT_SIZE = toy.HOOK_NAME, toy.CONTEXT_SIZE
N_BATCHES, BATCH_SIZE_PROMPTS = 3, 4
BUDGETS = [1, 3, K]
RECONSTRUCTION_METRICS = ["explained_variance", "mse", "l0"]
CE_METRICS = [
    "ce_loss_score",
    "ce_loss_with_sae",
    "ce_loss_without_sae",
    "ce_loss_with_ablation",
]
KL_METRICS = ["kl_div_score", "kl_div_with_sae", "kl_div_with_ablation"]


def make_sae(
    sae_class: type[Any] = HierarchicalTopKSAE,
    cfg_class: type[Any] = HierarchicalTopKSAEConfig,
    hook_name: str = HOOK_NAME,
    hook_head_index: int | None = None,
    **fields: Any,
) -> Any:
    """Return an SAE with random weights and biases. A metric that left one out would be off."""
    if "TopK" in cfg_class.__name__:
        fields = {"k": K, "rescale_acts_by_decoder_norm": True} | fields
    sae = sae_class(cfg_class(**({"d_in": D_IN, "d_sae": D_SAE} | fields)))
    sae.cfg.metadata.hook_name = hook_name
    sae.cfg.metadata.hook_head_index = hook_head_index
    sae.cfg.metadata.context_size = CONTEXT_SIZE
    sae.cfg.metadata.prepend_bos = True
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        sae.W_enc.copy_(sae.W_dec.T)
    return sae


def saelens_metrics(
    sae: SAE[Any], make_store: Callable[..., ActivationsStore], exclude: Any
) -> dict[str, float]:
    """Return what `run_evals` measures.

    It draws tokens for two passes, one after the other. Here each pass gets a store of its own, so
    that both see the tokens that a sweep sees.
    """
    metrics = {}
    for fields in (
        {"compute_ce_loss": True, "compute_kl": True},
        {"compute_variance_metrics": True, "compute_sparsity_metrics": True},
    ):
        store = make_store(sae)
        groups, _ = run_evals(
            sae,
            store,
            store.model,
            ActivationScaler(),
            EvalConfig(
                n_eval_reconstruction_batches=N_BATCHES,
                n_eval_sparsity_variance_batches=N_BATCHES,
                **fields,
            ),
            exclude_special_tokens=exclude,
        )
        for group in groups.values():
            metrics |= group
    return metrics


def assert_equal_to_run_evals(
    sae: Any,
    make_store: Callable[..., ActivationsStore],
    exclude: Any,
    budgets: Sequence[int | MeanBudget] = BUDGETS,
) -> BudgetSweep:
    sweep = sweep_budgets(
        sae,
        make_store(sae),
        budgets=budgets,
        n_batches=N_BATCHES,
        compute_kl=True,
        exclude_special_tokens=exclude,
        show_progress=False,
    )
    for row, budget in zip(sweep.metrics, budgets, strict=True):
        assert row.budget == (budget if isinstance(budget, int) else None)
        assert row.threshold == (None if isinstance(budget, int) else budget.threshold)
        with sae.at_budget(budget):
            expected = saelens_metrics(sae, make_store, exclude)
        for name in RECONSTRUCTION_METRICS + CE_METRICS + KL_METRICS:
            # A score is a ratio of differences, which SAELens takes of means in float32.
            tolerance = 2e-3 if name.endswith("score") else 1e-5
            expected_value = pytest.approx(expected[name], rel=10 * tolerance, abs=tolerance)
            assert getattr(row, name) == expected_value, name
    return sweep


def row_at(budget: int | None, explained_variance: float, sae: str = "sae", **more: Any):
    return BudgetMetrics(sae, budget, explained_variance, 1.5, 0.9 * (budget or 20), 0.25, **more)
