"""The metrics of an SAE at a budget: the running sums, the result, and a table of results."""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from textwrap import shorten
from typing import Any

import pandas as pd
import plotly.graph_objects as go
import torch
from sae_lens import SAE
from sae_lens.evals import ExplainedVarianceCalculator

from ..saes.budgets import Budget, MeanBudget
from ..saes.checks import check_integer, check_path
from . import figures
from .reconstruction import Reconstruction


@dataclass(frozen=True)
class BudgetMetrics:
    """
    One SAE at one budget. The metrics are SAELens's, as `run_evals` defines them.

    Args:
        sae (str): Name of the SAE.
        budget (int | None): Latents kept per activation; None for an SAE without a fixed number,
            and for a MeanBudget.
        explained_variance (float): 1 - E|x - x_hat|^2 / E|x - E x|^2.
        mse (float): E|x - x_hat|^2, summed over d_in.
        l0 (float): Mean number of active latents.
        dead_latents (float): Fraction of the dictionary that none of the sweep's `n_tokens`
            activated. More tokens activate more latents, so compare it at equal `n_tokens` only.
        ce_loss_score (float | None): Share of the model's cross-entropy that the SAE keeps. It is 1
            with the model's own activations and 0 with zeros in their place.
        ce_loss_with_sae (float | None): The model's cross-entropy with reconstructions in place.
        ce_loss_without_sae (float | None): The model's cross-entropy without any change.
        ce_loss_with_ablation (float | None): The model's cross-entropy with zeros in place.
        kl_div_score (float | None): Share of `kl_div_with_ablation` that the SAE avoids.
        kl_div_with_sae (float | None): KL(original || with reconstructions).
        kl_div_with_ablation (float | None): KL(original || with zeros).
        threshold (float | None): The threshold of a MeanBudget. `MeanBudget(row.mean,
            row.threshold)` is that budget again.
        mean (float | None): The mean of a MeanBudget, on the tokens that its threshold was chosen
            on. On the sweep's tokens it is `l0`.
    """

    sae: str
    budget: int | None
    explained_variance: float
    mse: float
    l0: float
    dead_latents: float
    ce_loss_score: float | None = None
    ce_loss_with_sae: float | None = None
    ce_loss_without_sae: float | None = None
    ce_loss_with_ablation: float | None = None
    kl_div_score: float | None = None
    kl_div_with_sae: float | None = None
    kl_div_with_ablation: float | None = None
    threshold: float | None = None
    mean: float | None = None


@dataclass(frozen=True)
class BudgetSweep:
    """
    The result of `sweep_budgets`.

    Args:
        metrics (list[BudgetMetrics]): One entry per SAE and budget. SAEs stand in the order given,
            budgets ascend.
        n_tokens (int): Number of activations that each entry was measured on.
    """

    metrics: list[BudgetMetrics]
    n_tokens: int

    def __post_init__(self) -> None:
        if not isinstance(self.metrics, (list, tuple)):
            raise TypeError(f"metrics is {self.metrics!r:.60}, expected a list of BudgetMetrics")
        for row in self.metrics:
            if not isinstance(row, BudgetMetrics):
                raise TypeError(f"metrics has a {type(row).__name__}, expected BudgetMetrics alone")

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per SAE and budget. A metric that was not computed has no column."""
        rows = [asdict(row) for row in self.metrics]
        frame = pd.DataFrame(rows).astype({"budget": "Int64"})
        missing = [name for name in frame.columns if all(row[name] is None for row in rows)]
        return frame.drop(columns=[name for name in missing if name != "budget"])

    def __str__(self) -> str:
        """Return a table with one row per SAE and budget, and the number of tokens.

        It has the model's scores, but not the cross-entropies and divergences behind them. The
        table then fits a terminal of 80 columns. `dead_latents` is called `not_seen` in it, and a
        MeanBudget stands there as "mean 16".
        """
        frame = self.to_pandas().rename(columns={"dead_latents": "not_seen"})
        frame["budget"] = [_budget_cell(row) for row in self.metrics]
        parts = ("ce_loss_with", "kl_div_with", "threshold", "mean")
        names = [name for name in frame.columns if not name.startswith(parts)]
        if len({row.sae for row in self.metrics}) == 1:
            names.remove("sae")
        table = frame[names].to_string(index=False, na_rep="-", float_format="%.4f")
        return (
            f"{table}\n(of {self.n_tokens} tokens; not_seen: share of the latents that none "
            "of them activated)"
        )

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the sweep as JSON. Also write it to `path`, whose missing directories are made."""
        text = json.dumps(asdict(self), indent=2)
        if path is not None:
            path = check_path("path", path)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return text

    @classmethod
    def from_json(cls, text: str) -> "BudgetSweep":
        """Read what `to_json` returned.

        Raises:
            TypeError: for something else than a string or bytes.
            ValueError: for another string. The message says what is wrong with it.
        """
        expected = "expected the JSON that `to_json` returned"
        if not isinstance(text, (str, bytes, bytearray)):
            raise TypeError(f"text is a {type(text).__name__}, {expected}")
        try:
            data = json.loads(text)
            n_tokens = check_integer("n_tokens", data["n_tokens"])
            return cls([BudgetMetrics(**row) for row in data["metrics"]], n_tokens)
        except (KeyError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise ValueError(f"text is {shorten(str(text), 60)!r}, {expected} ({why})") from error

    def plot(self, path: str | Path | None = None, metric: str = "explained_variance") -> go.Figure:
        """Draw a metric against the budget.

        An SAE with several budgets becomes a line, any other a point. The legend names each. An SAE
        without a fixed number of latents stands at its mean L0. So do the MeanBudgets of an SAE,
        which are a line or a point of their own.

        Args:
            path: where to write the figure. Directories that are missing are made. With the suffix
                .html, or none, it becomes HTML that needs no network. With .png, .svg, .pdf, .jpg
                or .webp it becomes an image, for which plotly needs the package kaleido and a
                Chrome.
            metric: a field of BudgetMetrics.

        Raises:
            ValueError: if there is no such metric, or the sweep did not compute it, or for a path
                with another suffix.
        """
        no_metrics = ("sae", "budget", "threshold", "mean")
        names = [field.name for field in fields(BudgetMetrics) if field.name not in no_metrics]
        if not isinstance(metric, str) or metric not in names:
            raise ValueError(f"metric is {metric!r}, expected one of {', '.join(names)}")
        if all(getattr(row, metric) is None for row in self.metrics):
            raise ValueError(f"metric is {metric!r}, expected one that the sweep computed")
        curves: dict[tuple[str, bool], list[BudgetMetrics]] = {}
        for row in self.metrics:
            curves.setdefault((row.sae, row.threshold is not None), []).append(row)
        label = "latents not seen" if metric == "dead_latents" else metric.replace("_", " ")
        figure = figures.draw(
            [
                figures.Curve(
                    f"{name}, one threshold" if is_mean else name,
                    [row.l0 if row.budget is None else row.budget for row in rows],
                    [getattr(row, metric) for row in rows],
                )
                for (name, is_mean), rows in curves.items()
            ],
            label,
            title=f"{label[0].upper()}{label[1:]} on {self.n_tokens:,} tokens",
        )
        if path is not None:
            figures.write(figure, path)
        return figure


# Of the mean squared norm. SAELens sums a batch in float32, so a smaller variance is rounding.
LEAST_VARIANCE = 1e-6


class Totals:
    """Sums over the batches, for one SAE at one budget."""

    def __init__(self, sae: SAE[Any]):
        self.variance = ExplainedVarianceCalculator()
        self.n_active = 0
        self.n_tokens = 0
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(self, x: torch.Tensor, reconstruction: Reconstruction, mask: torch.Tensor) -> None:
        """Count a batch.

        Args:
            x: activations, [..., d_in].
            reconstruction: what the SAE made of them.
            mask: which tokens count, [...].
        """
        mask = mask.to(x.device)
        self.variance.add_batch(reconstruction.x_hat[mask], x[mask])
        is_active = reconstruction.acts[mask] != 0  # [tokens, k or d_sae]
        self.n_active += int(is_active.sum())
        self.n_tokens += len(is_active)
        if reconstruction.latents is None:
            self.fired |= is_active.any(0)
        else:
            self.fired[reconstruction.latents[mask][is_active]] = True

    def add_model_metrics(self, metrics: dict[str, torch.Tensor]) -> None:
        """Count a batch's metrics of the model.

        Args:
            metrics: values by field of BudgetMetrics, [tokens] each.
        """
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.double().sum())
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def lacks_variance(self) -> bool:
        """Return whether the activations are equal up to the rounding of their sums."""
        n, sum_x = self.variance.num_samples, self.variance.sum_x
        assert sum_x is not None
        mean_squared_norm = self.variance.sum_squared_norm / n
        variance = mean_squared_norm - float((sum_x / n).square().sum())
        return variance <= LEAST_VARIANCE * mean_squared_norm

    def metrics(self, sae: str, budget: Budget | None) -> BudgetMetrics:
        """Return the means over all tokens counted. At least one must have been."""
        means = {name: _ratio(self.sums[name], self.counts[name]) for name in self.sums}
        if "ce_loss_with_sae" in means:
            means["ce_loss_score"] = _ratio(
                means["ce_loss_with_ablation"] - means["ce_loss_with_sae"],
                means["ce_loss_with_ablation"] - means["ce_loss_without_sae"],
            )
        if "kl_div_with_sae" in means:
            means["kl_div_score"] = _ratio(
                means["kl_div_with_ablation"] - means["kl_div_with_sae"],
                means["kl_div_with_ablation"],
            )
        is_mean = isinstance(budget, MeanBudget)
        return BudgetMetrics(
            sae=sae,
            budget=None if is_mean else budget,
            explained_variance=self.variance.compute(),
            mse=self.variance.sum_squared_residual / self.n_tokens,
            l0=self.n_active / self.n_tokens,
            dead_latents=1 - float(self.fired.float().mean()),
            threshold=budget.threshold if is_mean else None,
            mean=budget.mean if is_mean else None,
            **means,
        )


def _budget_cell(row: BudgetMetrics) -> int | str:
    if row.mean is not None:
        return f"mean {row.mean:.4g}"
    if row.threshold is not None:  # of a JSON file without means, as earlier versions wrote it
        return f"> {row.threshold:.4g}"
    return "-" if row.budget is None else row.budget


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
