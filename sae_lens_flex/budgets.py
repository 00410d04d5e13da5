"""How well SAEs reconstruct at each budget, and which budget to choose."""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pandas as pd
import plotly.graph_objects as go
import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.util import get_special_token_ids
from tqdm.auto import tqdm
from transformer_lens.HookedRootModule import HookedRootModule

from .saes.hierarchical_topk import RuntimeBudget, check_budgets, doubling_budgets

# TransformerLens gives these activations a head dimension.
HEAD_HOOKS = ("hook_q", "hook_k", "hook_v", "hook_z")


@dataclass(frozen=True)
class BudgetMetrics:
    """
    One SAE at one budget. The metrics are SAELens's, as `run_evals` defines them.

    Args:
        sae (str): Name of the SAE.
        budget (int | None): Latents kept per activation; None for an SAE without a fixed number.
        explained_variance (float): 1 - E|x - x_hat|^2 / E|x - E x|^2.
        mse (float): E|x - x_hat|^2, summed over d_in.
        l0 (float): Mean number of active latents.
        dead_latents (float): Fraction of the dictionary that no token activated.
        ce_loss_score (float | None): Cross-entropy recovered: 1 with the model's own activations, 0
            with zeros in their place.
        ce_loss_with_sae (float | None): The model's cross-entropy with reconstructions in place.
        ce_loss_without_sae (float | None): Its cross-entropy as it is.
        ce_loss_with_ablation (float | None): Its cross-entropy with zeros in place.
        kl_div_score (float | None): The share of the KL divergence at ablation that is recovered.
        kl_div_with_sae (float | None): KL(original || with reconstructions).
        kl_div_with_ablation (float | None): KL(original || with zeros).
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


@dataclass(frozen=True)
class BudgetSweep:
    """
    The result of `sweep_budgets`.

    Args:
        metrics (list[BudgetMetrics]): One entry per SAE and budget, in the order given, budgets
            ascending.
        n_tokens (int): Number of activations that each entry rests on.
    """

    metrics: list[BudgetMetrics]
    n_tokens: int

    def to_pandas(self) -> pd.DataFrame:
        """Return one row per SAE and budget; metrics that were not computed have no column."""
        frame = pd.DataFrame([asdict(row) for row in self.metrics])
        return frame.dropna(axis="columns", how="all")

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the sweep as JSON, and write it to `path` if one is given."""
        text = json.dumps(asdict(self), indent=2)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    @classmethod
    def from_json(cls, text: str) -> "BudgetSweep":
        """Read what `to_json` returned."""
        data = json.loads(text)
        return cls([BudgetMetrics(**row) for row in data["metrics"]], data["n_tokens"])

    def plot(self, path: str | Path | None = None, metric: str = "explained_variance") -> go.Figure:
        """Draw a metric against the budget: a line per SAE that was swept, a point per other SAE.

        SAEs without a fixed number of latents stand at their mean L0.

        Args:
            path: where to write the figure: HTML, or with another suffix (.png, .svg, .pdf) an
                image, for which plotly needs the package kaleido.
            metric: a field of BudgetMetrics.
        """
        names = [field.name for field in fields(BudgetMetrics)][2:]
        if metric not in names:
            raise ValueError(f"metric is {metric!r}, expected one of {', '.join(names)}")
        figure = go.Figure()
        for name in dict.fromkeys(row.sae for row in self.metrics):
            rows = [row for row in self.metrics if row.sae == name]
            figure.add_scatter(
                x=[row.l0 if row.budget is None else row.budget for row in rows],
                y=[getattr(row, metric) for row in rows],
                name=name,
                mode="lines+markers" if len(rows) > 1 else "markers",
            )
        figure.update_xaxes(
            title="latents kept per activation (k)", type="log", dtick=math.log10(2)
        )
        figure.update_yaxes(title=metric.replace("_", " "))
        if path is not None and Path(path).suffix in ("", ".html"):
            figure.write_html(path, include_plotlyjs="cdn")
        elif path is not None:
            figure.write_image(path, scale=2)
        return figure


def smallest_budget(
    sweep: BudgetSweep, *, explained_variance: float, sae: str | None = None
) -> int:
    """Return the smallest budget of a sweep that explains at least that share of the variance.

    Args:
        sweep: the result of `sweep_budgets`.
        explained_variance: the share asked for, at most 1.
        sae: whose budgets to look at; may be None where the sweep has one SAE.

    Raises:
        ValueError: if no budget reaches it; the message says how far the best one gets.
    """
    names = list(dict.fromkeys(row.sae for row in sweep.metrics))
    if sae is None and len(names) > 1:
        raise ValueError(f"sae is None, expected one of the sweep's SAEs: {', '.join(names)}")
    if sae is not None and sae not in names:
        raise ValueError(f"sae is {sae!r}, expected one of the sweep's SAEs: {', '.join(names)}")
    rows = [row for row in sweep.metrics if sae in (None, row.sae) and row.budget is not None]
    reached = [row.budget for row in rows if row.explained_variance >= explained_variance]
    if not reached:
        best = max((row.explained_variance for row in rows), default=math.nan)
        raise ValueError(
            f"explained_variance is {explained_variance}, expected at most {best:.4f}, the best of "
            "the sweep's budgets"
        )
    return min(cast(list[int], reached))


@torch.no_grad()
def sweep_budgets(
    saes: SAE[Any] | Mapping[str, SAE[Any]],
    activations: ActivationsStore | torch.Tensor | Iterable[torch.Tensor],
    *,
    model: HookedRootModule | None = None,
    budgets: Sequence[int] | None = None,
    n_batches: int = 10,
    batch_size_prompts: int | None = None,
    compute_ce_loss: bool | None = None,
    compute_kl: bool = False,
    exclude_special_tokens: Iterable[int] | bool = True,
    model_kwargs: Mapping[str, Any] | None = None,
    show_progress: bool = True,
) -> BudgetSweep:
    """Measure SAEs at a list of budgets, every one on the same tokens.

    SAEs with a run-time budget (`hierarchical_topk`) are measured at every budget, from one encode
    a batch; any other SAE is measured once, as it is.

    Args:
        saes: an SAE, or several by name.
        activations: SAELens's ActivationsStore, from which tokens are drawn for the model; or
            activations themselves: a tensor [n_tokens, d_in] or an iterable of such.
        model: the language model. None with a store takes the store's.
        budgets: ascending. None takes 1, 2, 4, ... and k, for each SAE. Those above an SAE's k are
            left out for it.
        n_batches: batches to take; of an iterable, at most.
        batch_size_prompts: prompts in a batch. None takes the store's.
        compute_ce_loss: whether to run the model once per budget for the cross-entropy recovered.
            None: where there is a model.
        compute_kl: whether to compute KL divergences, from the same runs of the model.
        exclude_special_tokens: tokens to leave out, as in `run_evals`.
        model_kwargs: passed to the model.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError: for arguments that do not fit each other; the message names the first.
    """
    named = dict(saes) if isinstance(saes, Mapping) else {"sae": saes}
    if not named:
        raise ValueError("saes is empty, expected at least one SAE")
    if n_batches < 1:
        raise ValueError(f"n_batches is {n_batches}, expected at least 1")
    budgets_of = {name: _budgets_of(sae, budgets) for name, sae in named.items()}
    if isinstance(activations, ActivationsStore):
        batches = _model_batches(
            named,
            activations,
            activations.model if model is None else model,
            n_batches,
            batch_size_prompts,
            exclude_special_tokens,
            compute_ce_loss is not False or compute_kl,
            dict(model_kwargs or {}),
        )
        with_ce, with_kl = compute_ce_loss is not False, compute_kl
    else:
        if compute_ce_loss or compute_kl:
            raise ValueError(
                "activations is no ActivationsStore, expected one for compute_ce_loss and "
                "compute_kl"
            )
        batches = _plain_batches(activations, n_batches)
        with_ce = with_kl = False

    totals = {
        (name, budget): _Totals(sae) for name, sae in named.items() for budget in budgets_of[name]
    }
    n_tokens = 0
    for batch in tqdm(batches, total=n_batches, desc="Sweeping budgets", disable=not show_progress):
        n_tokens += int(batch.mask.sum())
        for name, sae in named.items():
            x = batch.activations(sae)
            for budget, latents, acts, reconstruction in _reconstruct(sae, x, budgets_of[name]):
                total = totals[name, budget]
                total.add(x, reconstruction, latents, acts, batch.mask)
                if with_ce or with_kl:
                    total.add_model_run(batch.run_model(sae, reconstruction), with_kl)
    if n_tokens == 0:
        raise ValueError("activations gave no token, expected at least one")
    return BudgetSweep(
        [total.metrics(name, budget, with_ce, with_kl) for (name, budget), total in totals.items()],
        n_tokens,
    )


def _budgets_of(sae: SAE[Any], budgets: Sequence[int] | None) -> list[int | None]:
    if not isinstance(sae, RuntimeBudget):
        k = getattr(sae.cfg, "k", None)
        return [k if isinstance(k, int) else None]
    k = sae.cfg.k
    if budgets is None:
        return list(doubling_budgets(k))
    fitting = [budget for budget in budgets if not isinstance(budget, int) or budget <= k]
    return list(check_budgets("budgets", fitting, k))


def _reconstruct(
    sae: SAE[Any], x: torch.Tensor, budgets: list[int | None]
) -> Iterator[tuple[int | None, torch.Tensor | None, torch.Tensor, torch.Tensor]]:
    """Yield, per budget: budget, latents (None for a dense `acts`), acts, reconstruction."""
    if not isinstance(sae, RuntimeBudget):
        acts = sae.encode(x)
        yield budgets[0], None, acts, sae.decode(acts)
        return
    ascending = cast(list[int], budgets)
    with sae.at_budget(ascending[-1]):
        acts, latents = sae.encode_levels(x)
    for budget, reconstruction in sae.decode_levels(acts, latents, ascending):
        yield budget, latents[..., :budget], acts[..., :budget], reconstruction


class _Batch:
    """Activations and the mask of those that count."""

    def __init__(self, x: torch.Tensor):
        self.x = x
        self.mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)

    def activations(self, sae: SAE[Any]) -> torch.Tensor:
        return self.x.to(sae.device)

    def run_model(self, sae: SAE[Any], reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError


def _plain_batches(
    activations: torch.Tensor | Iterable[torch.Tensor], n_batches: int
) -> Iterator[_Batch]:
    if isinstance(activations, torch.Tensor):
        activations = activations.chunk(n_batches)
    for x in islice(activations, n_batches):
        if not isinstance(x, torch.Tensor) or x.ndim != 2:
            given = list(x.shape) if isinstance(x, torch.Tensor) else type(x).__name__
            raise ValueError(f"activations gave {given}, expected tensors of [n_tokens, d_in]")
        yield _Batch(x)


class _ModelBatch(_Batch):
    """A batch of tokens with the model's own activations at every SAE's hook point."""

    def __init__(
        self,
        tokens: torch.Tensor,
        model: HookedRootModule,
        hook_names: list[str],
        ignored_tokens: list[int],
        runs_model: bool,
        model_kwargs: dict[str, Any],
    ):
        self.tokens = tokens
        self.model = model
        self.model_kwargs = model_kwargs
        self.mask = ~torch.isin(tokens, torch.tensor(ignored_tokens, device=tokens.device))
        output, cache = model.run_with_cache(
            tokens,
            return_type="both",
            loss_per_token=True,
            names_filter=hook_names,
            **model_kwargs,
        )
        self.cache = {name: cache[name] for name in hook_names}
        if runs_model:
            self.logits, self.loss = output
            self.ablated = {name: self._run(name, torch.zeros_like) for name in hook_names}

    def activations(self, sae: SAE[Any]) -> torch.Tensor:
        name, head = _hook_name(sae), sae.cfg.metadata.hook_head_index
        x = self.cache[name]
        if head is not None:
            x = x[:, :, head]
        elif any(hook in name for hook in HEAD_HOOKS):
            x = x.flatten(-2, -1)
        return x.to(sae.device)

    def run_model(self, sae: SAE[Any], reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
        name, head = _hook_name(sae), sae.cfg.metadata.hook_head_index

        def replace(x: torch.Tensor) -> torch.Tensor:
            mask = self.mask.to(x.device)[..., None]
            new = reconstruction.to(x.device, x.dtype)
            if head is not None:
                x = x.clone()
                x[:, :, head] = torch.where(mask, new, x[:, :, head])
                return x
            if x.ndim > new.ndim:
                return torch.where(mask[..., None], new.view_as(x), x)
            return torch.where(mask, new, x)

        logits, loss = self._run(name, replace)
        ablated_logits, ablated_loss = self.ablated[name]
        return {
            "logits": self.logits,
            "logits_with_sae": logits,
            "logits_with_ablation": ablated_logits,
            "ce_loss_without_sae": self._masked(self.loss),
            "ce_loss_with_sae": self._masked(loss),
            "ce_loss_with_ablation": self._masked(ablated_loss),
            "mask": self.mask,
        }

    def _run(self, hook_name: str, replace: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.run_with_hooks(
            self.tokens,
            return_type="both",
            loss_per_token=True,
            fwd_hooks=[(hook_name, lambda x, hook: replace(x))],
            **self.model_kwargs,
        )

    def _masked(self, loss: torch.Tensor) -> torch.Tensor:
        # A token's cross-entropy counts with the token that predicts it; the last predicts nothing.
        return loss[self.mask[:, : loss.shape[1]].to(loss.device)]


def _model_batches(
    saes: dict[str, SAE[Any]],
    store: ActivationsStore,
    model: HookedRootModule,
    n_batches: int,
    batch_size_prompts: int | None,
    exclude_special_tokens: Iterable[int] | bool,
    runs_model: bool,
    model_kwargs: dict[str, Any],
) -> Iterator[_Batch]:
    if exclude_special_tokens is True:
        ignored = get_special_token_ids(cast(Any, model).tokenizer)
    else:
        ignored = list(exclude_special_tokens or [])
    hook_names = list(dict.fromkeys(_hook_name(sae) for sae in saes.values()))
    for _ in range(n_batches):
        tokens = store.get_batch_tokens(batch_size_prompts)
        yield _ModelBatch(tokens, model, hook_names, ignored, runs_model, model_kwargs)


def _hook_name(sae: SAE[Any]) -> str:
    if sae.cfg.metadata.hook_name is None:
        raise ValueError(
            "saes has an SAE whose cfg.metadata.hook_name is missing, expected the name of the "
            "model's hook point that it reads"
        )
    return sae.cfg.metadata.hook_name


class _Totals:
    """Sums over the batches of one SAE at one budget."""

    def __init__(self, sae: SAE[Any]):
        self.variance = ExplainedVarianceCalculator()
        self.n_active = 0
        self.n_tokens = 0
        self.fired = torch.zeros(sae.cfg.d_sae, dtype=torch.bool, device=sae.device)
        self.sums: dict[str, float] = {}
        self.counts: dict[str, int] = {}

    def add(
        self,
        x: torch.Tensor,
        reconstruction: torch.Tensor,
        latents: torch.Tensor | None,
        acts: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        mask = mask.to(x.device)
        self.variance.add_batch(reconstruction[mask], x[mask])
        is_active = acts[mask] != 0
        self.n_active += int(is_active.sum())
        self.n_tokens += len(is_active)
        if latents is None:
            self.fired |= is_active.any(0)
        else:
            self.fired[latents[mask][is_active]] = True

    def add_model_run(self, run: dict[str, torch.Tensor], with_kl: bool) -> None:
        values = {name: value for name, value in run.items() if name.startswith("ce_loss")}
        if with_kl:
            for name in ("kl_div_with_sae", "kl_div_with_ablation"):
                log_p = run["logits"].log_softmax(-1)
                log_q = run[name.replace("kl_div", "logits")].log_softmax(-1)
                kl = (log_p.exp() * (log_p - log_q)).sum(-1)
                values[name] = kl[run["mask"].to(kl.device)]
        for name, value in values.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.double().sum())
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def metrics(self, sae: str, budget: int | None, with_ce: bool, with_kl: bool) -> BudgetMetrics:
        means: dict[str, float] = {name: self.sums[name] / self.counts[name] for name in self.sums}
        if not with_ce:
            means = {name: mean for name, mean in means.items() if name.startswith("kl")}
        else:
            means["ce_loss_score"] = (
                means["ce_loss_with_ablation"] - means["ce_loss_with_sae"]
            ) / (means["ce_loss_with_ablation"] - means["ce_loss_without_sae"])
        if with_kl:
            means["kl_div_score"] = (
                means["kl_div_with_ablation"] - means["kl_div_with_sae"]
            ) / means["kl_div_with_ablation"]
        return BudgetMetrics(
            sae=sae,
            budget=budget,
            explained_variance=self.variance.compute(),
            mse=self.variance.sum_squared_residual / self.n_tokens,
            l0=self.n_active / self.n_tokens,
            dead_latents=1 - float(self.fired.float().mean()),
            **means,
        )
