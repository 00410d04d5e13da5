"""Tables and the figure of the units' results."""

import json
import math
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from .kinds import FAMILIES, SCHEMES

NAMES = {
    "topk": "TopK for each k",
    "even": "even",
    "half_on_k": "half on K",
    "quarter_on_k": "quarter on K",
    "rising": "every k, in proportion to k",
    "doubling": "1, 2, 4, ... K, even",
    "doubling_sqrt": "in proportion to sqrt(k)",
    "doubling_rising": "in proportion to k",
    "doubling_half_on_k": "1, 2, 4, ... K, half on K",
    "every_eighth": "8, 16, ... K, even",
    "topk_cut": "TopK for K, cut to k",
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
    """Return a metric's table in Markdown, a column for each k."""
    values = values_of(measured, metric)
    if metric in OF_AN_SAE:
        values = {
            name: each
            for name, each in values.items()
            if split(name)[0] != "topk_cut" and not name.endswith((TUNED, THRESHOLD))
        }
    budgets = sorted({budget for series in values.values() for budget in series})
    lines = [
        "| | " + " | ".join(str(budget) for budget in budgets) + " |",
        "|---" * (len(budgets) + 1) + "|",
    ]
    for name, series in values.items():
        cells = [cell(series.get(budget), digits) for budget in budgets]
        lines.append(f"| {label(name)} | " + " | ".join(cells) + " |")
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
        is_compared = split(scheme)[0] in SCHEMES
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

    The language model's loss is drawn in multiples of TopK's, if that was measured.

    Args:
        measured: the results.
        drawn: the series, such as "even_tuned" or "even_threshold". None draws those without
            such an end.
    """
    panels = [("explained_variance", "explained variance")]
    losses = values_of(measured, "ce_increase")
    of_topk = {k: mean(values) for k, values in losses.get("topk", {}).items()}
    if of_topk:
        panels.append(("ce_increase", "increase of the cross-entropy, in multiples of TopK's"))
    elif losses:
        panels.append(("ce_increase", "increase of the cross-entropy (nats)"))
    else:
        panels.append(("f1_score", "F1 of latents as detectors of true features"))
    figure = make_subplots(cols=2, rows=1, horizontal_spacing=0.1)
    colors = dict(zip(NAMES, _COLORS, strict=True))
    longest = sorted({split(series)[1] for series, _, _ in rows_of(measured)})
    for column, (metric, title) in enumerate(panels, start=1):
        for name, series in values_of(measured, metric).items():
            is_variant = name.endswith((TUNED, THRESHOLD))
            if is_variant if drawn is None else name not in drawn:
                continue
            units = of_topk if metric == "ce_increase" and of_topk else dict.fromkeys(series, 1.0)
            budgets = sorted(series.keys() & units.keys())
            values = [mean(series[k]) / units[k] for k in budgets]
            if metric == "explained_variance":
                values = [1 - value for value in values]
            spread = [stdev(series[k]) / units[k] if len(series[k]) > 1 else 0 for k in budgets]
            figure.add_scatter(
                x=budgets,
                y=values,
                error_y={"array": spread, "visible": any(spread)},
                name=label(name),
                legendgroup=name,
                showlegend=column == 1,
                mode="lines+markers",
                line={
                    "color": colors[split(name)[0]],
                    "dash": _dash(name, longest.index(split(name)[1])),
                },
                marker={"symbol": _symbol(name), "size": 7},
                col=column,
                row=1,
            )
        ticks = sorted({budget for _, budget, _ in rows_of(measured)})
        figure.update_xaxes(
            title="latents kept per activation (k)", type="log", tickvals=ticks, col=column, row=1
        )
        axis = {}
        if metric == "explained_variance":
            # By what is left over, on which small differences near 1 can be seen.
            left = [0.05, 0.06, 0.08, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7, 1]
            labels = [f"{1 - v:.2g}" for v in left]
            axis = {"type": "log", "autorange": "reversed", "tickvals": left, "ticktext": labels}
        elif metric == "ce_increase":
            decades = [digit * 10**exponent for exponent in (-3, -2, -1, 0) for digit in (1, 2, 5)]
            shown = (
                [0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.5, 2, 3, 4, 6] if of_topk else decades
            )
            axis = {"type": "log", "tickvals": shown, "ticktext": [f"{v:g}" for v in shown]}
        figure.update_yaxes(title=title, col=column, row=1, **axis)
    n_drawn = len({trace.name for trace in figure.data})
    figure.update_layout(
        template="plotly_white",
        width=1200,
        height=max(480, 110 + 20 * n_drawn),
        margin={"t": 20, "r": 20, "b": 60},
    )
    return figure


_COLORS = (
    *("black", "#1f77b4", "#d62728", "#f4a6a6", "#2ca02c", "#ff7f0e", "#bcbd22", "#c49c00"),
    *("#9467bd", "#17becf", "gray", "#8c564b", "#e377c2"),
)


def _symbol(series: str) -> str:
    if series.endswith(THRESHOLD):
        return "diamond-open"
    if series.endswith(TUNED):
        return "x"
    return "circle" if split(series)[0] in SCHEMES else "square"


def _dash(series: str, length: int) -> str:
    """Return a line's dashes, given how many trainings are shorter than that of the series."""
    if split(series)[0] not in SCHEMES:
        return "dot"
    return ("solid", "dash", "dashdot", "longdashdot")[min(length, 3)]


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
            # "best_1@1" names no SAE: there was none, or it was not known when the time ended.
            if one not in {f"{kind}@{seed}" for kind, seed in of_seeds}
            and not one.startswith("best_")
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
    if len(runs) > 1:
        machines = ", ".join(sorted({run["machine"] for run in runs}))
        parts.append(
            f"The results are of {len(runs)} calls ({machines}). Their seconds differ with the "
            "host and with how many processes were at work."
        )
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
