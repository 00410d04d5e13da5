"""Figures that show a metric against the number of latents kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go

HTML_SUFFIXES = ("", ".html")


@dataclass(frozen=True)
class Curve:
    """
    What one SAE adds to a figure.

    Args:
        name (str): Name of the SAE.
        latents (list[float]): Latents kept per activation, one number a point.
        values (list[float | None]): The metric at each point; None leaves a gap.
    """

    name: str
    latents: list[float]
    values: list[float | None]


def draw(curves: Sequence[Curve], label: str) -> go.Figure:
    """Draw the curves over a logarithmic axis of k.

    A curve of several points becomes a line, which the legend names. A single point has its name
    written beside it.

    Args:
        curves: what to draw.
        label: title of the vertical axis.
    """
    figure = go.Figure()
    for curve in curves:
        is_line = len(curve.latents) > 1
        figure.add_scatter(
            x=curve.latents,
            y=curve.values,
            name=curve.name,
            showlegend=is_line,
            mode="lines+markers" if is_line else "markers+text",
            text=None if is_line else [curve.name],
            textposition="bottom right",
            marker_color=None if is_line else "dimgray",
            cliponaxis=False,
        )
    figure.update_layout(
        template="plotly_white",
        margin={"t": 50, "r": 80},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
    )
    figure.update_xaxes(title="latents kept per activation (k)", type="log", dtick=math.log10(2))
    figure.update_yaxes(title=label)
    return figure


def write(figure: go.Figure, path: str | Path) -> None:
    """Write a figure as HTML (suffix .html or none), or as an image (any other suffix).

    Directories that are missing are made. The HTML holds plotly.js, so it needs no network. For an
    image plotly needs the package kaleido and a Chrome.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix in HTML_SUFFIXES:
        figure.write_html(path, include_plotlyjs=True)
    else:
        figure.write_image(path, scale=2)


def check_can_write(path: str | Path) -> None:
    """Raise a ValueError if a figure of this name could not be drawn here.

    An image is drawn for this, which takes seconds: a Chrome that is there may still not start.
    """
    suffix = Path(path).suffix
    if suffix in HTML_SUFFIXES:
        return
    try:
        go.Figure().to_image(format=suffix[1:], width=50, height=50)
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} cannot be drawn: images need the package kaleido and a Chrome; a name "
            f"in .html needs neither ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
