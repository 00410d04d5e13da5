"""The batches that a sweep measures on: given activations, or a language model's own."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from sae_lens import SAE, ActivationsStore
from sae_lens.util import (
    extract_stop_at_layer_from_tlens_hook_name,
    get_special_token_ids,
)

# TransformerLens < 3.3 defines the class elsewhere. From here it can be imported in every version.
from transformer_lens.HookedTransformer import HookedRootModule  # pyright: ignore

from ..saes.checks import check_integer, check_real

N_BATCHES = 10  # that are taken of what may have no end

# TransformerLens gives the activations at these hook points a dimension of heads.
HEAD_HOOKS = ("hook_q", "hook_k", "hook_v", "hook_z")


class Batch:
    """
    Given activations, of which every one counts.

    Args:
        x: activations, [tokens, d_in].
    """

    def __init__(self, x: torch.Tensor):
        self.x = x
        self.mask = torch.ones(x.shape[:-1], dtype=torch.bool, device=x.device)

    def activations(self, sae: SAE[Any]) -> torch.Tensor:
        """Return what the SAE reads, on its device."""
        return self.x.to(sae.device)

    def model_metrics(self, sae: SAE[Any], x_hat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the model's metrics with `x_hat` in place of the activations that `sae` reads."""
        raise NotImplementedError


def given_batches(
    saes: dict[str, SAE[Any]], activations: torch.Tensor | Iterable[torch.Tensor], n_batches: int
) -> Iterator[Batch]:
    """Return an iterator over at most `n_batches` batches of the given activations.

    Args:
        saes: the SAEs that read them.
        activations: a tensor [..., d_in], which is cut into `n_batches`, or an iterable of such
            tensors, each of which is a batch.
        n_batches: how many batches to take.

    Raises:
        ValueError, TypeError: if the activations do not fit. For a tensor this call raises; for an
            iterable the iterator does, when it comes to the wrong one.
    """
    if isinstance(activations, torch.Tensor):
        check_shape(activations, saes)
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

    def batches(given: Iterable[torch.Tensor]) -> Iterator[Batch]:
        for x in islice(given, n_batches):
            if not isinstance(x, torch.Tensor):
                raise ValueError(
                    f"activations gave a {type(x).__name__}, expected tensors of [..., d_in]"
                )
            check_shape(x, saes)
            if x.numel() > 0:
                yield Batch(x.flatten(0, -2))

    return batches(activations)


def check_shape(x: torch.Tensor, saes: Mapping[str, SAE[Any]]) -> None:
    """Raise if `x` is not [..., d_in] with the d_in of every SAE, or holds no real numbers."""
    check_real("activations", x)
    for name, sae in saes.items():
        if x.ndim < 2 or x.shape[-1] != sae.cfg.d_in:
            raise ValueError(
                f"activations has shape {list(x.shape)}, expected [n, {sae.cfg.d_in}] or more "
                f"dimensions before the d_in of {name!r}"
            )


def draw_batches(
    saes: dict[str, SAE[Any]],
    activations: ActivationsStore | torch.Tensor | Iterable[torch.Tensor],
    *,
    model: HookedRootModule | None,
    n_batches: int | None,
    batch_size_prompts: int | None,
    exclude_special_tokens: Iterable[int] | bool,
    model_kwargs: Mapping[str, Any] | None,
    with_ce: bool = False,
    with_kl: bool = False,
) -> tuple[Iterator["Batch"], int]:
    """Return an iterator over the batches that SAEs are measured on, and how many there may be.

    Args:
        saes: the SAEs that read them.
        activations, model, n_batches, batch_size_prompts, exclude_special_tokens, model_kwargs: as
            in `sweep_budgets`.
        with_ce, with_kl: which metrics of the model are wanted, of a store alone.
    """
    if n_batches is None:
        n_batches = len(activations) if isinstance(activations, (list, tuple)) else N_BATCHES
    else:
        n_batches = check_integer("n_batches", n_batches)
    if batch_size_prompts is not None:
        batch_size_prompts = check_integer("batch_size_prompts", batch_size_prompts)
    if not isinstance(activations, ActivationsStore):
        of_store = {
            "model": model is not None,
            "batch_size_prompts": batch_size_prompts is not None,
            "exclude_special_tokens": not isinstance(exclude_special_tokens, bool),
            "model_kwargs": model_kwargs is not None,
        }
        for name, is_given in of_store.items():
            if is_given:
                raise ValueError(no_store(name, activations))
        return given_batches(saes, activations, n_batches), n_batches
    store = activations
    model = store.model if model is None else model
    if not hasattr(model, "run_with_cache"):
        raise TypeError(
            f"model is a {type(model).__name__}, expected a language model with hooks, as "
            "SAELens's load_model returns it"
        )
    if not isinstance(model_kwargs, Mapping | None):
        raise TypeError(f"model_kwargs is {model_kwargs!r}, expected a dictionary")
    ignored = tokens_to_ignore(model, exclude_special_tokens)
    runs = ModelRuns(model, ignored, with_ce, with_kl, dict(model_kwargs or {}))
    batches = (
        ModelBatch(store.get_batch_tokens(batch_size_prompts), list(saes.values()), runs)
        for _ in range(n_batches)
    )
    return batches, n_batches


def no_store(name: str, activations: Any) -> str:
    """Return the message where `name` is given without a store."""
    return (
        f"{name} is given and activations is a {type(activations).__name__}, expected an "
        "ActivationsStore with it"
    )


def activations_of(batch: Batch, name: str, sae: SAE[Any]) -> torch.Tensor:
    """Return the activations [..., d_in] of a batch that an SAE reads. Raise where they are odd."""
    x = batch.activations(sae)
    check_shape(x, {name: sae})
    if not x[batch.mask.to(x.device)].isfinite().all():
        raise ValueError("activations has NaN or infinite values, expected finite ones")
    return x


@dataclass(frozen=True)
class ModelRuns:
    """
    How a sweep runs the language model, the same for every batch.

    Args:
        model (HookedRootModule): The language model.
        ignored_tokens (list[int]): Tokens that do not count.
        with_ce (bool): Whether to measure cross-entropies.
        with_kl (bool): Whether to measure KL divergences.
        model_kwargs (dict[str, Any]): Passed to the model in every run.
        max_norm (float): Activations of a larger norm do not count, and like those of ignored
            tokens they stay the model's own.
    """

    model: HookedRootModule
    ignored_tokens: list[int]
    with_ce: bool
    with_kl: bool
    model_kwargs: dict[str, Any]
    max_norm: float = math.inf


def tokens_to_ignore(model: HookedRootModule, exclude: Iterable[int] | bool) -> list[int]:
    """Return the tokens to leave out. True stands for the special ones of the model's tokenizer."""
    if exclude is not True:
        return list(exclude or [])
    tokenizer = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise ValueError(
            "exclude_special_tokens is True and the model has no tokenizer, expected False or "
            "the tokens themselves"
        )
    return get_special_token_ids(tokenizer)


class ModelBatch(Batch):
    """
    A batch of tokens, and the model's own activations of them where the SAEs read.

    The model runs once on the tokens. With metrics of the model it also runs once per hook point
    with zeros there, and then once in every call of `model_metrics`.

    Args:
        tokens: [prompts, context].
        saes: the SAEs to measure.
        runs: how to run the model.
    """

    def __init__(self, tokens: torch.Tensor, saes: list[SAE[Any]], runs: ModelRuns):
        self.tokens = tokens
        self.runs = runs
        ignored = torch.tensor(runs.ignored_tokens, dtype=tokens.dtype, device=tokens.device)
        self.mask = ~torch.isin(tokens, ignored)  # [prompts, context]
        hook_names = list(dict.fromkeys(_hook_name(sae) for sae in saes))
        if not (runs.with_ce or runs.with_kl):
            layers = [extract_stop_at_layer_from_tlens_hook_name(name) for name in hook_names]
            layers = [layer for layer in layers if layer is not None]
            stop = max(layers) if len(layers) == len(hook_names) else None
            _, self.cache = runs.model.run_with_cache(
                tokens, names_filter=hook_names, stop_at_layer=stop, **runs.model_kwargs
            )
            self._leave_out_extreme(saes)
            return
        (self.logits, loss), self.cache = runs.model.run_with_cache(
            tokens,
            return_type="both",
            loss_per_token=True,
            names_filter=hook_names,
            **runs.model_kwargs,
        )
        self._leave_out_extreme(saes)
        self.without_sae = {"ce_loss_without_sae": self._masked(loss)} if runs.with_ce else {}
        self.with_ablation = {
            (name, head): self._metrics_with("ablation", (name, head), torch.zeros_like)
            for name, head in {(_hook_name(sae), _head(sae)) for sae in saes}
        }

    def _leave_out_extreme(self, saes: list[SAE[Any]]) -> None:
        if self.runs.max_norm == math.inf:
            return
        for sae in saes:
            norms = self.activations(sae).norm(dim=-1)
            self.mask = self.mask & (norms <= self.runs.max_norm).to(self.mask.device)

    def activations(self, sae: SAE[Any]) -> torch.Tensor:
        """Return what the SAE reads, on its device: [prompts, context, d_in]."""
        name = _hook_name(sae)
        return flat_activations(self.cache[name], name, _head(sae)).to(sae.device)

    def model_metrics(self, sae: SAE[Any], x_hat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the model's metrics of every token that counts, [tokens] each.

        Tokens that do not count keep their own activations in the model's run.

        Args:
            sae: the SAE.
            x_hat: its reconstruction of the batch, [prompts, context, d_in].
        """

        def replace(x: torch.Tensor) -> torch.Tensor:
            new = x_hat.to(x.device, x.dtype).view_as(x)
            mask = self.mask.to(x.device).view(*self.mask.shape, *[1] * (x.ndim - 2))
            return torch.where(mask, new, x)

        place = (_hook_name(sae), _head(sae))
        return (
            self.without_sae | self.with_ablation[place] | self._metrics_with("sae", place, replace)
        )

    def _metrics_with(
        self,
        what: str,
        place: tuple[str, int | None],
        replace: Callable[[torch.Tensor], torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        """Run the model with replaced activations and return its metrics, [tokens] each.

        Args:
            what: what the activations are replaced by, for the metrics' names.
            place: hook point, and the head there that is replaced (None: all).
            replace: maps activations to those that take their place.
        """
        hook_name, head = place

        def hook_function(x: torch.Tensor, hook: Any) -> torch.Tensor:
            if head is None:
                return replace(x)
            x = x.clone()
            x[:, :, head] = replace(x[:, :, head])
            return x

        logits, loss = self.runs.model.run_with_hooks(
            self.tokens,
            return_type="both",
            loss_per_token=True,
            fwd_hooks=[(hook_name, hook_function)],
            **self.runs.model_kwargs,
        )
        metrics = {}
        if self.runs.with_ce:
            metrics[f"ce_loss_with_{what}"] = self._masked(loss)
        if self.runs.with_kl:
            kl = torch.nn.functional.kl_div(
                logits.log_softmax(-1), self.logits.softmax(-1), reduction="none"
            )
            metrics[f"kl_div_with_{what}"] = self._masked(kl.sum(-1))
        return metrics

    def _masked(self, values: torch.Tensor) -> torch.Tensor:
        """Return the values, [prompts, context or context - 1], of the tokens that count."""
        # A cross-entropy is that of the next token, but counts with the token that predicts it.
        # The last token predicts nothing, so there is one value less.
        return values[self.mask[:, : values.shape[1]].to(values.device)]


def flat_activations(x: torch.Tensor, hook_name: str, head: int | None) -> torch.Tensor:
    """Return what an SAE reads of a hook point, [..., d_in].

    Args:
        x: activations there, [..., d] or [batch, context, heads, d_head].
        hook_name: name of the hook point.
        head: the head to take; None concatenates the heads, if there are any.
    """
    if head is not None:
        return x[:, :, head]
    return x.flatten(-2, -1) if any(hook in hook_name for hook in HEAD_HOOKS) else x


def _hook_name(sae: SAE[Any]) -> str:
    if sae.cfg.metadata.hook_name is None:
        raise ValueError(
            "saes has an SAE whose cfg.metadata.hook_name is missing, expected the name of the "
            "model's hook point that it reads"
        )
    return sae.cfg.metadata.hook_name


def _head(sae: SAE[Any]) -> int | None:
    return sae.cfg.metadata.hook_head_index
