"""The choice of a budget."""

from dataclasses import replace

import pytest
import torch

from sae_lens_flex import BudgetSweep, smallest_budget, sweep_budgets

from .comparison import D_IN, make_sae


@pytest.mark.parametrize(
    ("explained_variance", "budget"), [(0.8, 4), (0.81, 8), (0.9, 8), (0, 1), (-1.0, 1), (0.4, 2)]
)
def test_smallest_budget_is_the_first_that_reaches_the_share(
    explained_variance, budget, sweep
) -> None:
    chosen = smallest_budget(sweep, explained_variance=explained_variance, sae="hierarchical")
    assert chosen == budget
    share = torch.tensor(explained_variance, dtype=torch.float64)
    assert smallest_budget(sweep, explained_variance=share, sae="hierarchical") == budget
    alone = BudgetSweep(sweep.metrics[:4], 1000)
    assert smallest_budget(alone, explained_variance=explained_variance) == budget


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("explained_variance", {"explained_variance": 0.91, "sae": "hierarchical"}),
        ("explained_variance", {"explained_variance": float("nan"), "sae": "hierarchical"}),
        ("explained_variance", {"explained_variance": "0.8", "sae": "hierarchical"}),
        ("sae", {"explained_variance": 0.8}),
        ("sae", {"explained_variance": 0.8, "sae": "k=4"}),
    ],
)
def test_smallest_budget_raises_and_names_the_argument(name, arguments, sweep) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is"):
        smallest_budget(sweep, **arguments)


def test_smallest_budget_among_no_numbers_says_what_the_sweep_has(sweep) -> None:
    with pytest.raises(ValueError, match=r"^sweep has 'jumprelu' at no budget, expected"):
        smallest_budget(sweep, explained_variance=0.8, sae="jumprelu")
    rows = [replace(sweep.metrics[0], budget=None, threshold=0.5, mean=2.0)]
    for sae in (None, "hierarchical"):
        with pytest.raises(ValueError, match=r"^sweep has 'hierarchical' at thresholds alone"):
            smallest_budget(BudgetSweep(rows, 10), explained_variance=0.8, sae=sae)


def test_unreachable_share_says_how_far_the_best_budget_gets(sweep) -> None:
    with pytest.raises(ValueError, match=r"at most 0\.9000"):
        smallest_budget(sweep, explained_variance=0.99, sae="hierarchical")


def test_smallest_budget_of_a_sweep_without_numbers_raises() -> None:
    sweep = sweep_budgets(make_sae(), torch.ones(10, D_IN), budgets=[1, 3], show_progress=False)
    nan = BudgetSweep([replace(row, explained_variance=float("nan")) for row in sweep.metrics], 10)
    with pytest.raises(ValueError, match=r"^sweep has explained variance NaN at budgets 1, 3"):
        smallest_budget(nan, explained_variance=0.5)


@pytest.mark.parametrize("wrong", [None, "sweep", [], {"metrics": []}, 3], ids=repr)
def test_what_is_no_sweep_is_refused(wrong) -> None:
    with pytest.raises(TypeError, match=rf"^sweep is a {type(wrong).__name__}, expected a Budget"):
        smallest_budget(wrong, explained_variance=0.5)


@pytest.mark.parametrize("wrong", [0, True, ["hierarchical"], torch.zeros(2)], ids=repr)
def test_an_sae_that_is_no_name_is_refused(wrong, sweep) -> None:
    with pytest.raises(ValueError, match=r"^sae is .*, expected one of the sweep's SAEs"):
        smallest_budget(sweep, explained_variance=0.5, sae=wrong)
