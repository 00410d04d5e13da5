"""How well SAEs reconstruct at each budget, and which budget to choose."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import islice
from numbers import Real
from pathlib import Path
from typing import Any, cast

import pandas as pd
import plotly.graph_objects as go
import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.util import (
    extract_stop_at_layer_from_tlens_hook_name,
    get_special_token_ids,
)
from tqdm.auto import tqdm
from transformer_lens.HookedTransformer import HookedRootModule

from .saes.budgets import RuntimeBudget, check_budgets, doubling_budgets
from .saes.checks import check_integer

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
        rows = [asdict(row) for row in self.metrics]
        frame = pd.DataFrame(rows).astype({"budget": "Int64"})
        missing = [name for name in frame.columns if all(row[name] is None for row in rows)]
        return frame.drop(columns=[name for name in missing if name != "budget"])

    def __str__(self) -> str:
        """Return a table: a row per SAE and budget, without what the model's scores are made of."""
        frame = self.to_pandas()
        frame["budget"] = ["-" if row.budget is None else row.budget for row in self.metrics]
        parts = ("ce_loss_with", "kl_div_with")
        names = [name for name in frame.columns if not name.startswith(parts)]
        if len({row.sae for row in self.metrics}) == 1:
            names.remove("sae")
        return frame[names].to_string(index=False, na_rep="-", float_format="%.4f")

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
        """Draw a metric against the budget: a line per SAE with several, a named point per other.

        SAEs without a fixed number of latents stand at their mean L0.

        Args:
            path: where to write the figure: HTML that needs no network, or with another suffix
                (.png, .svg, .pdf) an image, for which plotly needs the package kaleido.
            metric: a field of BudgetMetrics.
        """
        names = [field.name for field in fields(BudgetMetrics)][2:]
        if metric not in names:
            raise ValueError(f"metric is {metric!r}, expected one of {', '.join(names)}")
        if all(getattr(row, metric) is None for row in self.metrics):
            raise ValueError(f"metric is {metric!r}, expected one that the sweep computed")
        figure = go.Figure()
        for name in dict.fromkeys(row.sae for row in self.metrics):
            rows = [row for row in self.metrics if row.sae == name]
            is_line = len(rows) > 1
            figure.add_scatter(
                x=[row.l0 if row.budget is None else row.budget for row in rows],
                y=[getattr(row, metric) for row in rows],
                name=name,
                showlegend=is_line,
                mode="lines+markers" if is_line else "markers+text",
                text=None if is_line else [name],
                textposition="bottom right",
                marker_color=None if is_line else "dimgray",
                cliponaxis=False,
            )
        figure.update_layout(
            template="plotly_white",
            margin={"t": 50, "r": 80},
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"},
        )
        figure.update_xaxes(
            title="latents kept per activation (k)", type="log", dtick=math.log10(2)
        )
        figure.update_yaxes(title=metric.replace("_", " "))
        if path is not None and Path(path).suffix in ("", ".html"):
            figure.write_html(path, include_plotlyjs=True)
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
        ValueError: if no budget reaches it; the message says how far the best one gets. Also for
            arguments that do not fit the sweep, and for a sweep without numbers to choose by.
    """
    names = list(dict.fromkeys(row.sae for row in sweep.metrics))
    if sae is None and len(names) > 1:
        raise ValueError(f"sae is None, expected one of the sweep's SAEs: {', '.join(names)}")
    if sae is not None and sae not in names:
        raise ValueError(f"sae is {sae!r}, expected one of the sweep's SAEs: {', '.join(names)}")
    if not isinstance(explained_variance, Real):
        raise ValueError(f"explained_variance is {explained_variance!r}, expected a number")
    rows = [row for row in sweep.metrics if sae in (None, row.sae) and row.budget is not None]
    if not rows:
        raise ValueError(f"sae is {sae!r}, expected one that was measured at budgets")
    unknown = [str(row.budget) for row in rows if math.isnan(row.explained_variance)]
    if unknown:
        raise ValueError(
            f"sweep has explained variance NaN at budgets {', '.join(unknown)}, expected numbers"
        )
    reached = [row.budget for row in rows if row.explained_variance >= explained_variance]
    if not reached:
        best = max(row.explained_variance for row in rows)
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
            activations themselves: a tensor [..., d_in] or an iterable of such, a batch each.
        model: the language model. None with a store takes the store's.
        budgets: ascending, within 1 and the SAEs' largest k. None takes 1, 2, 4, ... and k, for
            each SAE. Those above an SAE's own k are left out for it.
        n_batches: batches to take; of an iterable, at most.
        batch_size_prompts: prompts in a batch. None takes the store's.
        compute_ce_loss: whether to run the model once per budget for the cross-entropy recovered.
            None: where there is a model.
        compute_kl: whether to compute KL divergences, from the same runs of the model.
        exclude_special_tokens: tokens to leave out, as in `run_evals`.
        model_kwargs: passed to the model.
        show_progress: whether to show a progress bar.

    Raises:
        ValueError, TypeError: for arguments that do not fit; the message names the first.
    """
    named = dict(saes) if isinstance(saes, Mapping) else {"sae": saes}
    if not named:
        raise ValueError("saes is empty, expected at least one SAE")
    for sae in named.values():
        if not isinstance(sae, SAE):
            raise TypeError(f"saes has a {type(sae).__name__}, expected SAELens's SAEs")
    n_batches = check_integer("n_batches", n_batches)
    if batch_size_prompts is not None:
        batch_size_prompts = check_integer("batch_size_prompts", batch_size_prompts)
    budgets_of = _choose_budgets(named, budgets)
    if isinstance(activations, ActivationsStore):
        with_ce, with_kl = compute_ce_loss is not False, compute_kl
        batches = _model_batches(
            named,
            activations,
            activations.model if model is None else model,
            n_batches,
            batch_size_prompts,
            exclude_special_tokens,
            with_ce,
            with_kl,
            dict(model_kwargs or {}),
        )
    else:
        for name, is_given in (
            ("model", model is not None),
            ("compute_ce_loss", compute_ce_loss),
            ("compute_kl", compute_kl),
        ):
            if is_given:
                raise ValueError(
                    f"{name} is given and activations is a {type(activations).__name__}, expected "
                    "an ActivationsStore with it"
                )
        with_ce = with_kl = False
        batches = _plain_batches(named, activations, n_batches)

    totals = {
        (name, budget): _Totals(sae) for name, sae in named.items() for budget in budgets_of[name]
    }
    n_tokens = 0
    for batch in tqdm(batches, total=n_batches, desc="Sweeping budgets", disable=not show_progress):
        n_tokens += int(batch.mask.sum())
        for name, sae in named.items():
            x = batch.activations(sae)
            _check_shape(x, {name: sae})
            if not x[batch.mask.to(x.device)].isfinite().all():
                raise ValueError("activations has NaN or infinite values, expected finite ones")
            for budget, latents, acts, reconstruction in _reconstruct(sae, x, budgets_of[name]):
                total = totals[name, budget]
                total.add(x, reconstruction, latents, acts, batch.mask)
                if with_ce or with_kl:
                    total.add_model_metrics(batch.model_metrics(sae, reconstruction))
    if n_tokens == 0:
        raise ValueError("activations gave no token, expected at least one")
    return BudgetSweep(
        [total.metrics(name, budget) for (name, budget), total in totals.items()], n_tokens
    )


def _choose_budgets(
    saes: dict[str, SAE[Any]], budgets: Sequence[int] | None
) -> dict[str, list[int | None]]:
    """Return the budgets of each SAE: one, perhaps None, for an SAE without a run-time budget."""
    k_of = {name: sae.cfg.k for name, sae in saes.items() if isinstance(sae, RuntimeBudget)}
    if budgets is not None:
        if not k_of:
            raise ValueError(
                f"budgets is {budgets!r}, expected None: no SAE of saes takes a budget at run time"
            )
        budgets = check_budgets("budgets", budgets, max(k_of.values()))
    chosen: dict[str, list[int | None]] = {}
    for name, sae in saes.items():
        if name not in k_of:
            k = getattr(sae.cfg, "k", None)
            chosen[name] = [k if isinstance(k, int) else None]
            continue
        within = doubling_budgets(k_of[name]) if budgets is None else budgets
        chosen[name] = [budget for budget in within if budget <= k_of[name]]
        if not chosen[name]:
            raise ValueError(
                f"budgets is {budgets!r}, expected one within {name!r}'s k ({k_of[name]})"
            )
    return chosen


def _reconstruct(
    sae: SAE[Any], x: torch.Tensor, budgets: list[int | None]
) -> Iterator[tuple[int | None, torch.Tensor | None, torch.Tensor, torch.Tensor]]:
    """Yield, per budget: budget, latents (None for a dense `acts`), acts, reconstruction."""
    with _flat_heads(sae):
        if not isinstance(sae, RuntimeBudget):
            acts = sae.encode(x)
            reconstruction = sae.decode(acts)
            yield budgets[0], None, acts.to_dense() if acts.is_sparse else acts, reconstruction
            return
        ascending = cast(list[int], budgets)
        with sae.at_budget(ascending[-1]):
            acts, latents = sae.encode_levels(x)
        for budget, reconstruction in sae.decode_levels(acts, latents, ascending):
            yield budget, latents[..., :budget], acts[..., :budget], reconstruction


@contextmanager
def _flat_heads(sae: SAE[Any]) -> Iterator[None]:
    """Take activations whose heads are concatenated already, as `run_evals` does."""
    if not sae.hook_z_reshaping_mode:
        yield
        return
    sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        sae.turn_on_forward_pass_hook_z_reshaping()


class _Batch:
    """Activations and the mask of those that count."""

    def __init__(self, x: torch.Tensor):
        self.x = x
        self.mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)

    def activations(self, sae: SAE[Any]) -> torch.Tensor:
        return self.x.to(sae.device)

    def model_metrics(self, sae: SAE[Any], reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
        raise NotImplementedError


def _plain_batches(
    saes: dict[str, SAE[Any]], activations: torch.Tensor | Iterable[torch.Tensor], n_batches: int
) -> Iterator[_Batch]:
    if isinstance(activations, torch.Tensor):
        _check_shape(activations, saes)
        if activations.numel() == 0:
            raise ValueError(
                f"activations has shape {list(activations.shape)}, expected at least one token"
            )
        activations = activations.flatten(0, -2).chunk(n_batches)
    elif not isinstance(activations, Iterable):
        raise TypeError(
            f"activations is a {type(activations).__name__}, expected an ActivationsStore or "
            "tensors of [..., d_in]"
        )

    def batches(given: Iterable[torch.Tensor]) -> Iterator[_Batch]:
        for x in islice(given, n_batches):
            if not isinstance(x, torch.Tensor):
                raise ValueError(
                    f"activations gave a {type(x).__name__}, expected tensors of [..., d_in]"
                )
            _check_shape(x, saes)
            if x.numel() > 0:
                yield _Batch(x.flatten(0, -2))

    return batches(activations)


def _check_shape(x: torch.Tensor, saes: Mapping[str, SAE[Any]]) -> None:
    for name, sae in saes.items():
        if x.ndim < 2 or x.shape[-1] != sae.cfg.d_in:
            raise ValueError(
                f"activations has shape {list(x.shape)}, expected [..., {sae.cfg.d_in}], tokens by "
                f"the d_in of {name!r}"
            )


class _ModelBatch(_Batch):
    """A batch of tokens with the model's own activations at every SAE's hook point."""

    def __init__(
        self,
        tokens: torch.Tensor,
        model: HookedRootModule,
        saes: list[SAE[Any]],
        ignored_tokens: list[int],
        with_ce: bool,
        with_kl: bool,
        model_kwargs: dict[str, Any],
    ):
        self.tokens = tokens
        self.model = model
        self.with_ce = with_ce
        self.with_kl = with_kl
        self.model_kwargs = model_kwargs
        ignored = torch.tensor(ignored_tokens, dtype=tokens.dtype, device=tokens.device)
        self.mask = ~torch.isin(tokens, ignored)
        hook_names = list(dict.fromkeys(_hook_name(sae) for sae in saes))
        if not (with_ce or with_kl):
            layers = [extract_stop_at_layer_from_tlens_hook_name(name) for name in hook_names]
            layers = [layer for layer in layers if layer is not None]
            stop = max(layers) if len(layers) == len(hook_names) else None
            _, self.cache = model.run_with_cache(
                tokens, names_filter=hook_names, stop_at_layer=stop, **model_kwargs
            )
            return
        (self.logits, loss), self.cache = model.run_with_cache(
            tokens,
            return_type="both",
            loss_per_token=True,
            names_filter=hook_names,
            **model_kwargs,
        )
        self.without_sae = {"ce_loss_without_sae": self._masked(loss)} if with_ce else {}
        self.with_ablation = {
            (name, head): self._metrics_with("ablation", name, head, torch.zeros_like)
            for name, head in {(_hook_name(sae), _head(sae)) for sae in saes}
        }

    def activations(self, sae: SAE[Any]) -> torch.Tensor:
        name = _hook_name(sae)
        return flat_activations(self.cache[name], name, _head(sae)).to(sae.device)

    def model_metrics(self, sae: SAE[Any], reconstruction: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the model's metrics of every token that counts.

        Tokens that do not count keep their own activations.
        """

        def replace(x: torch.Tensor) -> torch.Tensor:
            new = reconstruction.to(x.device, x.dtype).view_as(x)
            mask = self.mask.to(x.device).view(*self.mask.shape, *[1] * (x.ndim - 2))
            return torch.where(mask, new, x)

        name, head = _hook_name(sae), _head(sae)
        return (
            self.without_sae
            | self.with_ablation[name, head]
            | self._metrics_with("sae", name, head, replace)
        )

    def _metrics_with(
        self,
        what: str,
        hook_name: str,
        head: int | None,
        replace: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        def hook_function(x: torch.Tensor, hook: Any) -> torch.Tensor:
            if head is None:
                return replace(x)
            x = x.clone()
            x[:, :, head] = replace(x[:, :, head])
            return x

        logits, loss = self.model.run_with_hooks(
            self.tokens,
            return_type="both",
            loss_per_token=True,
            fwd_hooks=[(hook_name, hook_function)],
            **self.model_kwargs,
        )
        metrics = {}
        if self.with_ce:
            metrics[f"ce_loss_with_{what}"] = self._masked(loss)
        if self.with_kl:
            kl = torch.nn.functional.kl_div(
                logits.log_softmax(-1), self.logits.softmax(-1), reduction="none"
            )
            metrics[f"kl_div_with_{what}"] = self._masked(kl.sum(-1))
        return metrics

    def _masked(self, values: torch.Tensor) -> torch.Tensor:
        # A token's cross-entropy counts with the token that predicts it; the last predicts nothing.
        return values[self.mask[:, : values.shape[1]].to(values.device)]


def _model_batches(
    saes: dict[str, SAE[Any]],
    store: ActivationsStore,
    model: HookedRootModule,
    n_batches: int,
    batch_size_prompts: int | None,
    exclude_special_tokens: Iterable[int] | bool,
    with_ce: bool,
    with_kl: bool,
    model_kwargs: dict[str, Any],
) -> Iterator[_Batch]:
    if exclude_special_tokens is True:
        tokenizer = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise ValueError(
                "exclude_special_tokens is True and the model has no tokenizer, expected False or "
                "the tokens themselves"
            )
        ignored = get_special_token_ids(tokenizer)
    else:
        ignored = list(exclude_special_tokens or [])
    for _ in range(n_batches):
        tokens = store.get_batch_tokens(batch_size_prompts)
        yield _ModelBatch(
            tokens, model, list(saes.values()), ignored, with_ce, with_kl, model_kwargs
        )


def _hook_name(sae: SAE[Any]) -> str:
    if sae.cfg.metadata.hook_name is None:
        raise ValueError(
            "saes has an SAE whose cfg.metadata.hook_name is missing, expected the name of the "
            "model's hook point that it reads"
        )
    return sae.cfg.metadata.hook_name


def _head(sae: SAE[Any]) -> int | None:
    return sae.cfg.metadata.hook_head_index


def flat_activations(x: torch.Tensor, hook_name: str, head: int | None) -> torch.Tensor:
    """Return what an SAE reads of a hook point: one head, or all of them in one dimension."""
    if head is not None:
        return x[:, :, head]
    return x.flatten(-2, -1) if any(hook in hook_name for hook in HEAD_HOOKS) else x


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

    def add_model_metrics(self, metrics: dict[str, torch.Tensor]) -> None:
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(value.double().sum())
            self.counts[name] = self.counts.get(name, 0) + value.numel()

    def metrics(self, sae: str, budget: int | None) -> BudgetMetrics:
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
        return BudgetMetrics(
            sae=sae,
            budget=budget,
            explained_variance=self.variance.compute(),
            mse=self.variance.sum_squared_residual / self.n_tokens,
            l0=self.n_active / self.n_tokens,
            dead_latents=1 - float(self.fired.float().mean()),
            **means,
        )


def _ratio(numerator: float, denominator: float) -> float:
    return numerator / denominator if denominator else math.nan
