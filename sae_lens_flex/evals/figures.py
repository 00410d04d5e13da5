"""Figures that show a metric against the number of latents kept."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import plotly.graph_objects as go
from plotly.colors import DEFAULT_PLOTLY_COLORS

from ..saes.checks import check_path

HTML_SUFFIXES = ("", ".html")
IMAGE_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")  # those that plotly draws

# Points differ in symbol and in colour. The numbers of symbols and of plotly's colours, 9 and 10,
# have no common factor, so 90 points in a row all look different.
SYMBOLS = (
    *("circle", "square", "diamond", "triangle-up", "x", "star", "cross", "triangle-down"),
    "pentagon",
)

# In pixels. The legend of more curves than MANY_CURVES would be cut off in an image of plotly's own
# height.
MANY_CURVES, DEFAULT_HEIGHT, LEGEND_LINE = 16, 500, 20


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


def draw(curves: Sequence[Curve], label: str, title: str) -> go.Figure:
    """Draw the curves over a logarithmic axis of k. The legend names each.

    A curve of several points becomes a line with dots. A single point gets a symbol of its own.

    Args:
        curves: what to draw.
        label: title of the vertical axis.
        title: title of the figure.
    """
    figure = go.Figure()
    n_points = 0
    for i, curve in enumerate(curves):
        is_line = len(curve.latents) > 1
        n_points += not is_line
        figure.add_scatter(
            x=curve.latents,
            y=curve.values,
            name=curve.name,
            showlegend=True,
            mode="lines+markers" if is_line else "markers",
            marker={
                "color": DEFAULT_PLOTLY_COLORS[i % len(DEFAULT_PLOTLY_COLORS)],
                # Hollow, so that points that lie on each other are all seen.
                "symbol": "circle" if is_line else f"{SYMBOLS[n_points % len(SYMBOLS)]}-open",
                "size": 6 if is_line else 11,
                "line_width": 0 if is_line else 2,
            },
            cliponaxis=False,
        )
    figure.update_layout(template="plotly_white", title=title, margin={"t": 70, "b": 60})
    if len(curves) > MANY_CURVES:
        figure.update_layout(height=DEFAULT_HEIGHT + LEGEND_LINE * (len(curves) - MANY_CURVES))
    figure.update_xaxes(title="latents kept per activation (k)", type="log", dtick=math.log10(2))
    figure.update_yaxes(title=label)
    return figure


def write(figure: go.Figure, path: str | Path) -> None:
    """Write a figure as HTML (suffix .html or none), or as an image (one of IMAGE_SUFFIXES).

    Directories that are missing are made. The HTML holds plotly.js, so it needs no network. For an
    image plotly needs the package kaleido and a Chrome.

    Raises:
        ValueError: for another suffix.
    """
    check_suffix("path", path)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    if Path(path).suffix.lower() in HTML_SUFFIXES:
        figure.write_html(path, include_plotlyjs=True)
    else:
        figure.write_image(path, scale=2)


def check_suffix(name: str, path: str | Path) -> None:
    """Raise a ValueError, in which a path has that name, if no figure can have its suffix."""
    if check_path(name, path).suffix.lower() not in HTML_SUFFIXES + IMAGE_SUFFIXES:
        raise ValueError(
            f"{name} is {str(path)!r}, expected a name in .html or, for an image, in one of "
            f"{', '.join(IMAGE_SUFFIXES)}"
        )


def check_can_write(path: str | Path) -> None:
    """Raise a ValueError if a figure of this name could not be drawn here.

    An image is drawn for this, which takes seconds: a Chrome that is there may still not start.
    """
    suffix = Path(path).suffix.lower()
    if suffix in HTML_SUFFIXES:
        return
    try:
        go.Figure().to_image(format=suffix[1:], width=50, height=50)
    except Exception as error:
        raise ValueError(
            f"{str(path)!r} cannot be drawn: images need the package kaleido and a Chrome; a name "
            f"in .html needs neither ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error
