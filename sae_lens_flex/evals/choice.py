"""The choice of a budget from what a sweep measured."""

import math
from numbers import Real
from typing import cast

from ..saes.checks import plain
from .metrics import BudgetSweep


def smallest_budget(
    sweep: BudgetSweep, *, explained_variance: float, sae: str | None = None
) -> int:
    """Return the smallest budget of a sweep that explains at least that share of the variance.

    It chooses among numbers of latents. The sweep's MeanBudgets are passed over.

    Args:
        sweep: the result of `sweep_budgets`.
        explained_variance: the share asked for, at most 1.
        sae: the SAE to choose for. It may be None if the sweep has one SAE.

    Raises:
        ValueError: if no budget reaches the share. The message says how far the best one gets.
        ValueError: if `sae` is not in the sweep, or was measured at no number of latents.
        TypeError: if `sweep` is no BudgetSweep.
        ValueError: if `explained_variance` is no number, or the sweep's are NaN.
    """
    if not isinstance(sweep, BudgetSweep):
        raise TypeError(
            f"sweep is a {type(sweep).__name__}, expected a BudgetSweep, as `sweep_budgets` "
            "returns it"
        )
    names = list(dict.fromkeys(row.sae for row in sweep.metrics))
    if sae is None and len(names) > 1:
        raise ValueError(f"sae is None, expected one of the sweep's SAEs: {', '.join(names)}")
    if sae is not None and (not isinstance(sae, str) or sae not in names):
        raise ValueError(f"sae is {sae!r}, expected one of the sweep's SAEs: {', '.join(names)}")
    explained_variance = plain(explained_variance)
    if not isinstance(explained_variance, Real):
        raise ValueError(f"explained_variance is {explained_variance!r}, expected a number")
    rows = [row for row in sweep.metrics if sae in (None, row.sae) and row.budget is not None]
    if not rows:
        alone = any(row.threshold is not None and sae in (None, row.sae) for row in sweep.metrics)
        raise ValueError(
            f"sweep has {sae or names[0]!r} at {'thresholds alone' if alone else 'no budget'}, "
            "expected it at numbers of latents, among which this function chooses"
        )
    unknown = [str(row.budget) for row in rows if math.isnan(row.explained_variance)]
    if unknown:
        raise ValueError(
            f"sweep has explained variance NaN at budgets {', '.join(unknown)}, expected numbers"
        )
    reached = [row.budget for row in rows if row.explained_variance >= explained_variance]
    if not reached:
        best = max(row.explained_variance for row in rows)
        raise ValueError(
            f"explained_variance is {explained_variance}, expected at most {best:.4f}, the best of "
            "the sweep's budgets"
        )
    return min(cast(list[int], reached))
