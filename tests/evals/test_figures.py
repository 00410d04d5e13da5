"""The figure of a sweep."""

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from sae_lens_flex import BudgetSweep

from .comparison import row_at


def test_plot_draws_a_line_for_a_swept_sae_and_points_for_the_others(sweep) -> None:
    figure = sweep.plot()
    assert isinstance(figure, go.Figure)
    traces: dict[str, Any] = {trace["name"]: trace for trace in figure.data}
    assert {name: trace.mode for name, trace in traces.items()} == {
        "hierarchical": "lines+markers",
        "k=2": "markers",
        "k=8": "markers",
        "jumprelu": "markers",
    }
    assert all(trace.showlegend for trace in traces.values())
    assert list(traces["hierarchical"].x) == [1, 2, 4, 8]
    assert list(traces["hierarchical"].y) == [0.3, 0.5, 0.8, 0.9]
    assert list(traces["jumprelu"].x) == [18.0]  # its L0
    layout: Any = figure.layout
    assert "latents" in layout.xaxis.title.text
    assert layout.yaxis.title.text == "explained variance"
    assert layout.title.text == "Explained variance on 1,000 tokens"
    assert sweep.plot(metric="mse").layout.yaxis.title.text == "mse"
    not_seen: Any = sweep.plot(metric="dead_latents").layout
    assert (not_seen.yaxis.title.text, not_seen.title.text) == (
        "latents not seen",
        "Latents not seen on 1,000 tokens",
    )


def looks(figure: go.Figure) -> list[tuple[str, str]]:
    traces: Any = figure.data
    return [(trace.marker.color, trace.marker.symbol) for trace in traces]


def test_saes_of_one_point_look_different_and_the_legend_names_them_all() -> None:
    names = [f"k={k}, lr {lr}" for lr in (1e-3, 6e-3) for k in (1, 2, 4, 8, 16, 32, 64, 128)]
    rows = [row_at(int(name[2:].partition(",")[0]), 0.5, name) for name in names]
    lines = [row_at(k, 0.5, line) for line in ("a", "b") for k in (1, 2)]
    eight, many = BudgetSweep(rows[:8], 10).plot(), BudgetSweep(lines + rows, 10).plot()
    for figure, n_saes in ((eight, 8), (many, 18)):
        traces: Any = figure.data
        assert len(set(looks(figure))) == n_saes
        assert len({trace.name for trace in traces if trace.showlegend}) == n_saes
        assert not any(trace.text for trace in traces)
    # The height of an image is plotly's own for few SAEs, and grows with the legend.
    heights = [BudgetSweep(rows[:n], 10).plot().layout["height"] for n in (8, 16)]
    assert heights == [None, None]
    assert many.layout["height"] == 540


def test_plot_makes_the_directory(sweep, tmp_path: Path) -> None:
    sweep.plot(tmp_path / "new" / "far" / "figure.html")
    assert "plotly" in (tmp_path / "new" / "far" / "figure.html").read_text()


def test_plot_writes_html(sweep, tmp_path: Path) -> None:
    sweep.plot(tmp_path / "figure.html")
    text = (tmp_path / "figure.html").read_text()
    assert "plotly" in text
    assert 'src="http' not in text  # plotly.js is in it
    assert "latents kept per activation" in text
    assert "hierarchical" in text


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_plot_leaves_images_to_plotly(suffix, sweep, tmp_path: Path, monkeypatch) -> None:
    written = []
    monkeypatch.setattr(go.Figure, "write_image", lambda self, path, **_: written.append(path))
    sweep.plot(tmp_path / f"figure{suffix}")
    assert written == [tmp_path / f"figure{suffix}"]
    assert list(tmp_path.iterdir()) == []


def test_plot_refuses_a_suffix_of_no_figure(sweep, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^path is '.*figure.xyz', expected a name in \.html or"):
        sweep.plot(tmp_path / "new" / "figure.xyz")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("metric", ["explained_varianc", "sae", "budget", "kl_div_score"])
def test_plot_refuses_a_metric_that_is_not_there(metric, sweep) -> None:
    with pytest.raises(ValueError, match="metric is"):
        sweep.plot(metric=metric)
