"""How units of the quality benchmark are merged."""

import json

import plotly.graph_objects as go
import pytest

from benchmarks.quality.report import draw, label, report, rows_of
from benchmarks.quality.unit import chosen_rates

METRICS = {"explained_variance": 0.5, "l0": 2.0, "threshold": None, "budget": None}


def measured(kind, seed, *rows, k=2):
    one = {"kind": kind, "architecture": "", "seed": seed, "lr": 0.1, "k": k}
    rows = [METRICS | row for row in rows]
    return one | {"dead_in_training": 0, "seconds": 1.0, "metrics": rows}


def unit(path, *all_measured, machine="H200", train=1000000, share=0.002, left_out=(), d_sae=64):
    versions = {"torch": "2", "sae-lens": "6", "sae-lens-flex": "0", "workers": 1}
    result = {
        "date": "2026-01-01",
        "machine": machine,
        **versions,
        "source": {"text": {"tokens": 5}, "train": train, "left_out": share},
        "training": {"d_sae": d_sae},
        "tried": [],
        "measured": list(all_measured),
        "failed": [],
        "left_out": list(left_out),
    }
    path.write_text(json.dumps(result))
    return path


@pytest.fixture(autouse=True)
def no_image(monkeypatch):
    # A browser draws it, which takes seconds.
    monkeypatch.setattr(go.Figure, "write_image", lambda *args, **kwargs: None)


def merge(tmp_path, *units):
    report(list(units), "tiny", tmp_path)
    return tmp_path / "results" / "quality_tiny.json"


def test_last_unit_of_a_kind_and_seed_counts(tmp_path):
    even = {"budget": 2, "explained_variance": 0.4}
    one = unit(
        tmp_path / "one.json",
        measured("topk_2", 0, {}),
        measured("topk_2", 1, {}),
        measured("even", 0, even),
        left_out=["batchtopk_2@0", "matryoshka_2@0", "best_1@1"],
    )
    better = {"explained_variance": 0.7}
    two = unit(
        tmp_path / "two.json",
        measured("topk_2", 0, better, {"threshold": 0.1, "mean": 2}),
        measured("batchtopk_2", 0, {}, {"threshold": 0.1, "mean": 2}),
        machine="H100",
        train=1000900,
        share=0.0025,
    )
    first = merge(tmp_path, one)
    result = json.loads(merge(tmp_path, first, two).read_text())
    kinds = {(each["kind"], each["seed"]): each for each in result["measured"]}
    assert len(kinds) == len(result["measured"]) == 4
    assert kinds["topk_2", 0]["metrics"][0]["explained_variance"] == 0.7
    assert [result["runs"][each["run"]]["machine"] for each in kinds.values()] == [
        *("H100", "H200", "H200", "H100")
    ]
    assert result["left_out"] == ["matryoshka_2@0"]
    text = (tmp_path / "results" / "quality_tiny.md").read_text()
    assert "The results are of 2 calls (H100, H200)" in text
    assert "| even | 0.4000 |\n" in text
    assert "| TopK for each k | 0.6000 ± 0.1414 |\n" in text


@pytest.mark.parametrize("other", [{"train": 1100000}, {"share": 0.004}, {"d_sae": 128}])
def test_units_of_other_activations_or_training_are_refused(tmp_path, other):
    units = unit(tmp_path / "one.json"), unit(tmp_path / "two.json", **other)
    with pytest.raises(ValueError, match=r"two.json has another .* than .*one.json"):
        merge(tmp_path, *units)


def test_sae_for_one_k_has_a_series_with_one_threshold():
    of_threshold = {"threshold": 0.1, "mean": 2}
    rows = rows_of(
        [
            measured("batchtopk_2", 0, {}, of_threshold),
            measured("topk_2", 0, {"budget": 2}, of_threshold),
            measured("even_x3", 0, {"budget": 2}, of_threshold, k=8) | {"longer": 3},
        ]
    )
    assert [(label(series), budget) for series, budget, _ in rows] == [
        ("BatchTopK for each k", 2),
        ("BatchTopK for each k, one threshold", 2),
        ("TopK for each k", 2),
        ("TopK for each k, one threshold", 2),
        ("even, 3 times as long", 2),
        ("even, 3 times as long, one threshold", 2),
    ]


def test_figure_has_the_loss_in_multiples_of_topks():
    rows = [
        {"budget": 2, "explained_variance": v, "ce_increase": c}
        for v, c in ((0.9, 0.2), (0.8, 0.3))
    ]
    figure = draw([measured("topk_2", 0, rows[0]), measured("even", 0, rows[1])])
    drawn = [(trace.name, trace.xaxis, trace.y[0]) for trace in figure.data]
    assert drawn == [
        ("TopK for each k", "x", pytest.approx(0.1)),  # what is left over; the axis says 0.9
        ("even", "x", pytest.approx(0.2)),
        ("TopK for each k", "x2", 1.0),
        ("even", "x2", pytest.approx(1.5)),
    ]


def test_kinds_that_no_unit_trained_have_the_grid(tmp_path):
    rates = chosen_rates([unit(tmp_path / "one.json", measured("topk_2", 0, {}))], [1.0, 2.0])
    assert rates("topk_2") == [0.1]
    assert rates("batchtopk_2") == [1.0, 2.0]
