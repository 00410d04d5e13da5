"""The table of a sweep: as a frame, as text, as JSON."""

import json
from pathlib import Path

import pandas as pd
import pytest

from sae_lens_flex import BudgetSweep

from .comparison import row_at


def test_to_pandas_has_a_row_a_budget_and_only_what_was_computed(sweep) -> None:
    frame = sweep.to_pandas()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame.columns) == [
        *("sae", "budget", "explained_variance", "mse", "l0", "dead_latents")
    ]
    assert len(frame) == 7
    assert frame["budget"].dropna().tolist() == [1, 2, 4, 8, 2, 8]
    assert str(frame["budget"].dtype) == "Int64"
    only_jumprelu = BudgetSweep([row_at(None, 0.9)], 10).to_pandas()
    assert only_jumprelu["budget"].isna().all()
    with_ce = BudgetSweep([row_at(1, 0.9, ce_loss_score=0.8)], 10).to_pandas()
    assert with_ce["ce_loss_score"].tolist() == [0.8]


def test_text_is_a_table_that_fits_a_terminal(sweep) -> None:
    header, *rows, n_tokens = str(sweep).splitlines()
    assert n_tokens.startswith(f"(of {sweep.n_tokens} tokens; not_seen: ")
    assert header.split() == ["sae", "budget", "explained_variance", "mse", "l0", "not_seen"]
    assert [row.split()[0] for row in rows] == [*4 * ["hierarchical"], "k=2", "k=8", "jumprelu"]
    assert rows[-1].split()[1] == "-"
    more = {"ce_loss_score": 0.8, "ce_loss_with_sae": 3.0, "ce_loss_without_sae": 2.0}
    one = BudgetSweep([row_at(k, 0.9, **more) for k in (1, 128)], 10)
    header, *rows, _ = str(one).splitlines()
    assert header.split() == [
        *("budget", "explained_variance", "mse", "l0", "not_seen", "ce_loss_score")
    ]
    assert [row.split()[0] for row in rows] == ["1", "128"]
    assert max(map(len, str(one).splitlines())) <= 80


def test_json_keeps_every_value(sweep, tmp_path: Path) -> None:
    text = sweep.to_json()
    assert BudgetSweep.from_json(text) == sweep
    assert len(json.loads(text)["metrics"]) == 7
    path = tmp_path / "new" / "far" / "sweep.json"
    assert sweep.to_json(path) == text
    assert BudgetSweep.from_json(path.read_text()) == sweep


@pytest.mark.parametrize(
    "text",
    [
        *("", "sweep.json", "{}", "[]", "3", "null", '{"metrics": []}', b"{}"),
        *('{"metrics": [], "n_tokens": 0}', '{"metrics": 3, "n_tokens": 3}'),
        *('{"metrics": [{}], "n_tokens": 3}', '{"metrics": [3], "n_tokens": 3}'),
        '{"metrics": [{"sae": "sae", "unknown": 1}], "n_tokens": 3}',
    ],
)
def test_json_of_no_sweep_is_refused(text) -> None:
    with pytest.raises(ValueError, match=r"^text is .*, expected the JSON that `to_json` ret"):
        BudgetSweep.from_json(text)


def test_json_with_an_impossible_number_of_tokens_is_refused(sweep) -> None:
    text = sweep.to_json().replace('"n_tokens": 1000', '"n_tokens": null')
    with pytest.raises(ValueError, match=r"^text is .* \(ValueError: n_tokens is missing"):
        BudgetSweep.from_json(text)


@pytest.mark.parametrize("wrong", [None, 3, {}, Path("sweep.json")], ids=repr)
def test_what_is_no_json_is_refused(wrong) -> None:
    with pytest.raises(TypeError, match=rf"^text is a {type(wrong).__name__}, expected the JSON"):
        BudgetSweep.from_json(wrong)


@pytest.mark.parametrize("wrong", [None, "rows", {}, [3], [{"sae": "sae"}]], ids=repr)
def test_metrics_that_are_none_are_refused(wrong) -> None:
    with pytest.raises(TypeError, match=r"^metrics (is|has) .*, expected (a list of )?BudgetMetr"):
        BudgetSweep(wrong, 3)


@pytest.mark.parametrize("wrong", [3, b"sweep", ["sweep"]], ids=repr)
@pytest.mark.parametrize("method", ["to_json", "plot"])
def test_what_is_no_path_is_refused(method, wrong, sweep) -> None:
    with pytest.raises(TypeError, match=r"^path is .*, expected the path of a file"):
        getattr(sweep, method)(wrong)
