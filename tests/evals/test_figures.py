"""The figure of a sweep."""

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest


def test_plot_draws_a_line_for_a_swept_sae_and_points_for_the_others(sweep) -> None:
    figure = sweep.plot()
    assert isinstance(figure, go.Figure)
    traces: dict[str, Any] = {trace["name"]: trace for trace in figure.data}
    assert {name: trace.mode for name, trace in traces.items()} == {
        "hierarchical": "lines+markers",
        "k=2": "markers+text",
        "k=8": "markers+text",
        "jumprelu": "markers+text",
    }
    assert [traces[name].text for name in ("k=2", "k=8", "jumprelu")] == [
        ("k=2",),
        ("k=8",),
        ("jumprelu",),
    ]
    assert list(traces["hierarchical"].x) == [1, 2, 4, 8]
    assert list(traces["hierarchical"].y) == [0.3, 0.5, 0.8, 0.9]
    assert list(traces["jumprelu"].x) == [18.0]  # its L0
    layout: Any = figure.layout
    assert "latents" in layout.xaxis.title.text
    assert layout.yaxis.title.text == "explained variance"
    assert sweep.plot(metric="mse").layout.yaxis.title.text == "mse"


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


@pytest.mark.parametrize("metric", ["explained_varianc", "sae", "budget", "kl_div_score"])
def test_plot_refuses_a_metric_that_is_not_there(metric, sweep) -> None:
    with pytest.raises(ValueError, match="metric is"):
        sweep.plot(metric=metric)
