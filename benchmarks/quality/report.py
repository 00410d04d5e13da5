"""Tables and the figure of the units' results."""

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .kinds import BATCH_SCHEMES, FAMILIES, SCHEMES

NAMES = {
    "topk": "TopK for each k",
    "even": "even",
    "half_on_k": "half on K",
    "quarter_on_k": "quarter on K",
    "rising": "rising",
    "doubling": "doubling budgets",
    "doubling_sqrt": "doubling, as sqrt(k)",
    "doubling_rising": "doubling, as k",
    "doubling_half_on_k": "doubling, half on K",
    "every_eighth": "every eighth",
    "hierarchical_batch": "over a batch, even",
    "hierarchical_batch_rising": "over a batch, doubling, as k",
    "hierarchical_batch_shared": "over a batch, doubling, as k, levels of the batch",
    "topk_cut": "TopK(K) cut to k",
    "batchtopk": "BatchTopK for each k",
    "matryoshka": "Matryoshka for each k",
}
# A metric, what tables call it, and its number of digits.
METRICS = [
    ("explained_variance", "explained variance", 4),
    ("ce_increase", "increase of the cross-entropy, nats", 4),
    ("kl_div_with_sae", "KL divergence, nats", 4),
    ("l0", "latents active", 2),
    ("f1_score", "F1 of latents as detectors", 4),
    ("mcc", "MCC", 4),
    ("features_found", "true features found", 0),
    ("uniqueness", "uniqueness", 4),
    ("dead_in_training", "latents that died in training", 0),
    ("seconds", "seconds of training", 1),
]
# What is said beside a rival's: the difference to so many digits, or the ratio where that is None.
BESIDE = [
    ("explained_variance", "explained variance", 4),
    ("ce_increase", "ce_increase", None),
    ("kl_div_with_sae", "kl_div_with_sae", None),
    ("f1_score", "F1", 4),
    ("mcc", "MCC", 4),
    ("features_found", "true features found", 0),
    ("uniqueness", "uniqueness", 4),
]
OF_A_RUN = ("date", "machine", "torch", "sae-lens", "sae-lens-flex", "workers")
OF_AN_SAE = ("dead_in_training", "seconds")
# The end of a series' name where the decoder was trained on for each budget.
TUNED = "_tuned"
# The end where one threshold keeps k latents on average.
THRESHOLD = "_threshold"

# Values by series, budget and seed.
Values = dict[str, dict[int, list[float]]]


def rows_of(measured: list[dict[str, Any]]) -> list[tuple[str, int, dict[str, Any]]]:
    """Return series, budget and metrics of everything that was measured."""
    rows = []
    for one in measured:
        family = one["kind"].partition("_")[0]
        longer = f"_x{one['longer']}" if "longer" in one else ""
        for row in one["metrics"]:
            row = row | {name: one[name] for name in OF_AN_SAE}
            tuned = TUNED if row.get("tuned") else ""
            if row.get("threshold") is not None:
                series = family + longer if family in FAMILIES else one["kind"]
                rows.append((series + THRESHOLD, row["mean"], row))
                continue
            if family not in FAMILIES:
                rows.append((one["kind"] + tuned, row["budget"], row))
                continue
            budget = row["budget"] or one["k"]
            is_cut = budget != one["k"] and family == "topk"
            series = "topk_cut" if is_cut else family
            rows.append((series + longer + tuned, budget if is_cut else one["k"], row))
    return rows


def split(series: str) -> tuple[str, int]:
    """Return a series' name without suffixes, and how many times as long it was trained."""
    name, _, longer = series.removesuffix(TUNED).removesuffix(THRESHOLD).partition("_x")
    return name, int(longer or 1)


def label(series: str) -> str:
    name, longer = split(series)
    parts = [NAMES[name]]
    if longer > 1:
        parts.append(f"{longer} times as long")
    if series.endswith(TUNED):
        parts.append("decoder tuned")
    if series.endswith(THRESHOLD):
        parts.append("one threshold")
    return ", ".join(parts)


def values_of(measured: list[dict[str, Any]], metric: str) -> Values:
    values: Values = {}
    for series, budget, row in rows_of(measured):
        if row.get(metric) is not None:
            values.setdefault(series, {}).setdefault(budget, []).append(row[metric])
    order = list(NAMES)
    return dict(sorted(values.items(), key=lambda item: order.index(split(item[0])[0])))


def cell(values: list[float] | None, digits: int) -> str:
    if not values:
        return ""
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ± {stdev(values):.{digits}f}"


def table(measured: list[dict[str, Any]], metric: str, digits: int) -> str:
    """Return a metric's table in Markdown, a row for each k."""
    values = values_of(measured, metric)
    if metric in OF_AN_SAE:
        values = {
            name: each
            for name, each in values.items()
            if split(name)[0] != "topk_cut" and not name.endswith((TUNED, THRESHOLD))
        }
    budgets = sorted({budget for series in values.values() for budget in series})
    lines = [
        "| k | " + " | ".join(label(name) for name in values) + " |",
        "|---" * (len(values) + 1) + "|",
    ]
    for budget in budgets:
        cells = [cell(series.get(budget), digits) for series in values.values()]
        lines.append(f"| {budget} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def beside(measured: list[dict[str, Any]], rival: str) -> str:
    """Say at which k each scheme is worse than SAEs trained for that k, and by how much.

    Args:
        measured: the results.
        rival: "topk", or with one threshold "topk_threshold" or "batchtopk_threshold". With one
            threshold the schemes have one, too.
    """
    lines = []
    name = NAMES[split(rival)[0]].split()[0]
    of_all = [(values_of(measured, metric), title, digits) for metric, title, digits in BESIDE]
    for scheme in of_all[0][0]:
        is_compared = split(scheme)[0] in (*SCHEMES, *BATCH_SCHEMES)
        if not is_compared or (rival != "topk" and not scheme.endswith(THRESHOLD)):
            continue
        parts = []
        for values, title, digits in of_all:
            one, other = values.get(scheme, {}), values.get(rival, {})
            pairs = [(k, mean(one[k]), mean(other[k])) for k in sorted(one.keys() & other.keys())]
            if pairs and digits is None:
                each = ", ".join(f"{k}: {a / b:.2f}" for k, a, b in pairs)
                parts.append(f"{title} times {name}'s {each}")
            elif pairs:
                each = ", ".join(f"{k}: {a - b:+.{digits}f}" for k, a, b in pairs)
                parts.append(f"{title} {each}")
        if parts:
            lines.append(f"- {label(scheme)}: " + "; ".join(parts))
    return "\n".join(lines)


def draw(measured: list[dict[str, Any]], drawn: list[str] | None = None) -> go.Figure:
    """Draw explained variance and what the language model loses, or the F1, against k.

    Args:
        measured: the results.
        drawn: the series, such as "even_tuned" or "even_threshold". None draws those without
            such an end.
    """
    panels = [("explained_variance", "explained variance")]
    if values_of(measured, "ce_increase"):
        panels.append(("ce_increase", "increase of the cross-entropy (nats)"))
    else:
        panels.append(("f1_score", "F1 of latents as detectors of true features"))
    figure = make_subplots(cols=2, rows=1, horizontal_spacing=0.1)
    colors = dict(zip(NAMES, _COLORS, strict=True))
    for column, (metric, title) in enumerate(panels, start=1):
        for name, series in values_of(measured, metric).items():
            is_variant = name.endswith((TUNED, THRESHOLD))
            if is_variant if drawn is None else name not in drawn:
                continue
            budgets = sorted(series)
            spread = [stdev(series[k]) if len(series[k]) > 1 else 0 for k in budgets]
            figure.add_scatter(
                x=budgets,
                y=[mean(series[k]) for k in budgets],
                error_y={"array": spread, "visible": any(spread)},
                name=label(name),
                legendgroup=name,
                showlegend=column == 1,
                mode="lines+markers",
                line={"color": colors[split(name)[0]], "dash": _dash(name)},
                marker={"symbol": _symbol(name), "size": 7},
                col=column,
                row=1,
            )
        ticks = sorted({budget for _, budget, _ in rows_of(measured)})
        figure.update_xaxes(
            title="latents kept per activation (k)", type="log", tickvals=ticks, col=column, row=1
        )
        axis = {}
        if metric == "ce_increase":
            decades = [digit * 10**exponent for exponent in (-3, -2, -1, 0) for digit in (1, 2, 5)]
            axis = {"type": "log", "tickvals": decades, "ticktext": [f"{v:g}" for v in decades]}
        figure.update_yaxes(title=title, col=column, row=1, **axis)
    figure.update_layout(
        template="plotly_white", width=1150, height=480, margin={"t": 20, "r": 20, "b": 60}
    )
    return figure


_COLORS = (
    *("black", "#1f77b4", "#d62728", "#f4a6a6", "#2ca02c", "#ff7f0e", "#bcbd22", "#c49c00"),
    *("#9467bd", "#aec7e8", "#6b6ecf", "#393b79", "#17becf", "gray", "#8c564b", "#e377c2"),
)


def _symbol(series: str) -> str:
    if series.endswith(THRESHOLD):
        return "diamond-open"
    return "circle" if split(series)[0] in SCHEMES else "square"


def _dash(series: str) -> str:
    name, longer = split(series)
    if longer > 1:
        return "dash"
    if series.endswith(TUNED):
        return "dashdot"
    if series.endswith(THRESHOLD):
        return "longdash"
    return "solid" if name in SCHEMES else "dot"


def _are_same(one: Any, other: Any) -> bool:
    """Return whether two descriptions are of the same activations or training.

    How many activations there are, and which are extreme, changes by less than 0.1 % with the
    number of processes and the GPU; the share that is left out by less than 0.001.
    """
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_same(one[k], other[k]) for k in one)
    if isinstance(one, (int, float)) and isinstance(other, (int, float)):
        return math.isclose(one, other, rel_tol=1e-3, abs_tol=1e-3)
    return one == other


def report(units: list[Path], name: str, directory: Path, drawn: list[str] | None = None) -> None:
    """Merge units; print tables, and write them, the data and the figure into `directory`.

    Of a kind and a seed that several units trained the last unit's results are taken.

    Args:
        units: their files.
        name: of the result.
        directory: with the folders for results and figures.
        drawn: as in `draw`.

    Raises:
        ValueError: for units of other activations or another training.
    """
    results = [json.loads(path.read_text()) for path in units]
    for path, result in zip(units, results, strict=True):
        for part in ("source", "training"):
            if not _are_same(result[part], results[0][part]):
                raise ValueError(
                    f"{path} has another {part} than {units[0]}: {result[part]}, expected "
                    f"{results[0][part]}"
                )
    runs: list[dict[str, Any]] = []
    of_seeds = {}
    for result in results:
        for one in result["measured"]:
            one["run"] = len(runs) + one.get("run", 0)
            of_seeds[one["kind"], one["seed"]] = one
        runs += result.get("runs", [{name: result[name] for name in OF_A_RUN}])
    measured = list(of_seeds.values())
    seeds = sorted({one["seed"] for one in measured})
    merged = results[0] | {
        "runs": runs,
        "seeds": seeds,
        "tried": [one for result in results for one in result["tried"]],
        "measured": measured,
        "failed": [one for result in results for one in result.get("failed", [])],
        "left_out": [
            one
            for one in dict.fromkeys(each for result in results for each in result["left_out"])
            if one not in {f"{kind}@{seed}" for kind, seed in of_seeds}
        ],
    }
    spread = "one seed"
    if len(seeds) > 1:
        spread = f"mean ± standard deviation of up to {len(seeds)} seeds; without ±: one seed"
    parts = [f"# {name}: {spread}"]
    for metric, title, digits in METRICS:
        if values_of(measured, metric):
            parts += [f"## {title}", table(measured, metric, digits)]
    for rival in ("topk", "topk" + THRESHOLD, "batchtopk" + THRESHOLD):
        if text := beside(measured, rival):
            parts += [f"## Beside {label(rival)}", text]
    if len(machines := {run["machine"] for run in runs}) > 1:
        parts.append(f"Seconds are of several machines: {', '.join(sorted(machines))}.")
    rates = {}
    for one in measured:
        is_cut = " (of a grid that was cut short)" if one.get("grid_is_cut") else ""
        rates.setdefault(one["kind"], set()).add(f"{one['lr']:g}{is_cut}")
    chosen = ", ".join(f"{kind} {' '.join(sorted(lrs))}" for kind, lrs in rates.items())
    parts += ["## Learning rates", chosen]
    for part in ("failed", "left_out"):
        if merged[part]:
            names = [str(one) for one in merged[part]]
            parts += [f"## {part.replace('_', ' ').capitalize()}", ", ".join(names)]
    text = "\n\n".join(part for part in parts if part)
    print(text)
    (directory / "results").mkdir(exist_ok=True)
    (directory / "figures").mkdir(exist_ok=True)
    stem = directory / "results" / f"quality_{name}"
    stem.with_suffix(".json").write_text(json.dumps(merged, indent=1) + "\n")
    stem.with_suffix(".md").write_text(text + "\n")
    figure = draw(measured, drawn)
    try:
        figure.write_image(directory / "figures" / f"quality_{name}.png", scale=2)
    except (ValueError, RuntimeError, ImportError) as error:
        print(f"no figure, which needs kaleido and a Chrome: {error}")
