"""Budgets: how many of its largest latents an SAE keeps, chosen at run time."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from sae_lens.saes.sae import SAE
from sae_lens.saes.topk_sae import TopK, TopKSAE, TopKTrainingSAE
from typing_extensions import override

from ..ops.codes import Code
from ..ops.losses import prefix_residuals
from ..ops.policy import accumulation_dtype, computes_by_triton
from .checks import check_integer, check_number, check_real, check_weights
from .normalization import (
    MAKER,
    PER_SAMPLE,
    OwnNormalization,
    is_own_function,
    read_output_map,
    take_output_map,
)


def doubling_budgets(k: int) -> list[int]:
    """Return 1, 2, 4, ... up to and including k."""
    return [*(2**n for n in range(k.bit_length()) if 2**n < k), k]


def check_budgets(name: str, budgets: Any, k: int) -> list[int]:
    """Return `budgets` as ascending ints within 1..k, or raise a ValueError that names it."""
    expected = f"expected ascending integers within 1..k ({k}) without repeats"
    levels = budgets.tolist() if hasattr(budgets, "tolist") else budgets  # a tensor or array
    if not isinstance(levels, (list, tuple, range)):
        raise ValueError(f"{name} is {budgets!r}, {expected}")
    checked = [check_integer(f"an element of {name}", level, k, "k") for level in levels]
    if not checked or checked != sorted(set(checked)):
        raise ValueError(f"{name} is {budgets!r}, {expected}")
    return checked


def check_trained_budgets(budgets: Any, k: int) -> list[int]:
    """Return the budgets of a loss as `check_budgets` does; the last of them is k."""
    checked = check_budgets("budgets", budgets, k)
    if checked[-1] != k:
        raise ValueError(f"budgets is {budgets!r}, expected its last to be k ({k})")
    return checked


def check_level_weights(weights: Any, n_budgets: int) -> list[float]:
    """Return `weights` as floats, one for each budget, or raise a ValueError that names it."""
    expected = (
        f"expected {n_budgets} numbers of at least 0, one for each budget of the loss, and one of "
        "them above 0"
    )
    numbers = weights.tolist() if hasattr(weights, "tolist") else weights  # a tensor or array
    if not isinstance(numbers, (list, tuple)):
        raise ValueError(f"level_weights is {weights!r}, {expected}")
    checked = list(numbers)
    # Every step checks them. Those of a checked config are checked in one go.
    are_floats = set(map(type, checked)) == {float}
    if not are_floats or not all(map(math.isfinite, checked)) or min(checked) < 0:
        checked = [check_number("an element of level_weights", number) for number in checked]
    if len(checked) != n_budgets:
        raise ValueError(f"level_weights is {weights!r}, of {len(checked)}, {expected}")
    if not any(checked):
        raise ValueError(f"level_weights is {weights!r}, {expected}")
    return checked


@dataclass(frozen=True)
class MeanBudget:
    """
    A budget of a mean number of latents: every activation of a latent above one threshold is kept.

    This is what a BatchTopK SAE does after its training. An activation vector gets as many latents
    as are above the threshold: none, or more than the SAE's k. `mean_budget` chooses the threshold
    for an SAE. For other weights it means nothing.

    Args:
        mean (float): Latents kept per activation vector, on average over those that the threshold
            was chosen on. Above 0.
        threshold (float): Latents whose activation is above it are kept. At least 0.
    """

    mean: float
    threshold: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", check_number("mean", self.mean, is_positive=True))
        object.__setattr__(self, "threshold", check_number("threshold", self.threshold))


Budget = int | MeanBudget


def check_budget(budget: Any, k: int) -> Budget:
    """Return a run-time budget of an SAE, or raise a ValueError that names it."""
    if not isinstance(budget, MeanBudget):
        try:
            return check_integer("budget", budget, k, "k")
        except ValueError:
            expected = f"an integer within 1..k ({k}) or a MeanBudget"
            raise ValueError(f"budget is {budget!r}, expected {expected}") from None
    if budget.mean > k:
        raise ValueError(f"budget is {budget!r}, expected a mean up to k ({k})")
    return budget


def largest_budget(sae: SAE[Any]) -> int:
    """Return the config's k, which may have been edited. Raise a ValueError if it is impossible."""
    return check_integer("k", sae.cfg.k, len(sae.W_dec), "d_sae")


class WithoutBudget:
    """Refuses a run-time budget, where SAELens's SAEs would take the attribute and ignore it."""

    @property
    def budget(self) -> NoReturn:
        raise AttributeError(self._no_budget())  # so that `hasattr` says that there is none

    @budget.setter
    def budget(self, budget: Any) -> NoReturn:
        raise AttributeError(self._no_budget())

    def _no_budget(self) -> str:
        return (
            f"a {type(self).__name__} takes no budget at run time: it keeps as many latents as it "
            "was trained for (a hierarchical_topk SAE takes any budget)"
        )


class RuntimeTopK(TopK):
    """SAELens's TopK, whose k is a budget that was set, or the config's k."""

    def __init__(self, sae: SAE[Any]) -> None:
        self._budget: Budget | None = None
        # In a list, because a module would become a submodule, and this one is the SAE's own.
        self._sae = [sae]
        super().__init__(sae.cfg.k)
        self._budget = None

    @property
    def budget(self) -> Budget:
        """What is kept.

        Raises:
            ValueError: where the config's k was set below the budget, or to an impossible number.
        """
        highest = largest_budget(self._sae[0])
        return highest if self._budget is None else check_budget(self._budget, highest)

    @property
    def k(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The number of latents to keep.

        Raises:
            ValueError: where the config's k was set below the budget, or the budget is a mean.
        """
        return whole_budget("activation_fn.k", self.budget)

    @k.setter
    def k(self, k: Budget) -> None:
        self._budget = k

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        budget = self.budget
        if not isinstance(budget, MeanBudget):
            return super().forward(x)
        # In one dimension and the SAE's dtype, as the threshold of SAELens's "jumprelu": they are
        # then compared alike under autocast, too.
        threshold = torch.full(
            (1,), budget.threshold, dtype=self._sae[0].W_dec.dtype, device=x.device
        )
        return x.relu() * (x > threshold)


def whole_budget(name: str, budget: Budget) -> int:
    """Return a budget that is a number of latents. Raise a ValueError of `name` for a mean."""
    if isinstance(budget, MeanBudget):
        raise ValueError(
            f"{name} needs a number of latents, and sae.budget is {budget!r}: set another, or use "
            "`with sae.at_budget(...)`"
        )
    return budget


class RuntimeBudget(OwnNormalization):
    """
    Lets an SAE with a TopK activation function keep another number of latents than cfg.k.

    `encode`, and all that calls it, keeps the `budget` largest latents, or with a MeanBudget those
    above its threshold. The config, and so a saved SAE, knows nothing of it.
    """

    activation_fn: TopK

    @override
    def get_activation_fn(self) -> TopK:
        return RuntimeTopK(self)

    @property
    def budget(self) -> Budget:
        """What `encode` keeps: a number of latents, 1..cfg.k, or a MeanBudget.

        It is cfg.k until it is set.
        """
        activation_fn = self._budgeted()
        return activation_fn.budget if isinstance(activation_fn, RuntimeTopK) else activation_fn.k

    @budget.setter
    def budget(self, budget: Budget) -> None:
        budget = check_budget(budget, largest_budget(self))
        activation_fn = self._budgeted()
        if isinstance(budget, MeanBudget) and not isinstance(activation_fn, RuntimeTopK):
            raise ValueError(
                f"budget is {budget!r}, expected a number of latents: activation_fn was replaced "
                f"by a {type(activation_fn).__name__}, which has no threshold"
            )
        activation_fn.k = budget  # pyright: ignore[reportAttributeAccessIssue]

    @contextmanager
    def at_budget(self, budget: Budget) -> Iterator[None]:
        """Keep what `budget` says within the `with` block, then what was kept before."""
        activation_fn = self._budgeted()
        name = "_budget" if isinstance(activation_fn, RuntimeTopK) else "k"
        previous = getattr(activation_fn, name)
        self.budget = budget
        try:
            yield
        finally:
            setattr(activation_fn, name, previous)

    def _budgeted(self) -> TopK:
        """Return the activation function. Raise a ValueError where it takes no budget."""
        activation_fn = self.activation_fn
        # The k of a RuntimeTopK raises while its budget is a mean.
        if not isinstance(activation_fn, RuntimeTopK) and not hasattr(activation_fn, "k"):
            raise ValueError(
                f"activation_fn was replaced by a {type(activation_fn).__name__}, expected one "
                "with a k, the number of latents that it keeps: a hierarchical_topk SAE sets it"
            )
        return activation_fn

    def encode_levels(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode `x` and sort the latents that are kept: a prefix of them is a smaller budget.

        Args:
            x: activations, [..., d_in].

        Returns:
            The activations of the kept latents, descending, and the latents, each [..., budget].

        Raises:
            ValueError: for an `x` of another width, or where `budget` is a MeanBudget, which has no
                number of levels.
            TypeError: for a complex `x`, or one of bools.
        """
        budget = whole_budget("encode_levels", self.budget)
        check_real("x", x)
        width = x.shape[-2:].numel() if self.hook_z_reshaping_mode else x.shape[-1]
        d_in = self.W_dec.shape[1]
        if width != d_in:
            raise ValueError(f"x has shape {list(x.shape)}, expected {d_in} values an activation")
        take_output_map(self)  # what an `encode` without a `decode` may have left
        acts, latents = self.encode(x).topk(budget)
        return acts, latents

    @torch.no_grad()
    def encode_adaptive(self, x: torch.Tensor, tolerance: float) -> torch.Tensor:
        """Encode each activation with as few latents as leave a given error.

        This bounds the error of each activation. It costs explained variance: at the same mean
        number of latents a fixed budget explains more, and a MeanBudget more still, because those
        that are hard to reconstruct take most of the latents here.

        Keeps the first j latents of an activation, j >= 1 the smallest with

            |residual at level j|^2 <= tolerance * |x - b_dec|^2,

        or all `budget` of them where no level reaches it. With an output normalization, b_dec is
        taken where the reconstruction is: scaled and shifted like the output.

        Args:
            x: activations, [..., d_in].
            tolerance: the share of the squared norm that may be left over, at least 0.

        Returns:
            Feature activations, [..., d_sae], without gradients.

        Raises:
            ValueError: for an `x` of another width, or an impossible tolerance, or where `budget`
                is a MeanBudget, or where weights or `x` are not finite and so an error is not.
            NotImplementedError: where `decode` is not SAELens's own.
        """
        self._check_decode("encode_adaptive")
        whole_budget("encode_adaptive", self.budget)
        tolerance = check_number("tolerance", tolerance)
        acts, latents = self.encode_levels(x)  # [..., k]
        k = acts.shape[-1]
        output_map = read_output_map(self)  # A `decode` after this needs it, as after `encode`.
        target = self.reshape_fn_in(x).to(accumulation_dtype(self.W_dec))
        target = target - output_map.apply(self.b_dec.to(target.dtype))  # [..., d_in]
        vals = self._decode_coefficients(acts, latents)
        if output_map.scale is not None:
            vals = vals * output_map.scale
        target = target.reshape(-1, self.W_dec.shape[1])
        allowed = tolerance * target.square().sum(-1)
        kept = torch.full_like(allowed, k, dtype=torch.int64)
        error = allowed
        for level, residual in prefix_residuals(
            Code(latents.reshape(-1, k), vals.reshape(-1, k)),
            self.W_dec,
            target,
            range(1, k + 1),
            use_triton=self._computes_by_triton(),
        ):
            error = residual.square().sum(-1)
            kept = torch.where(error <= allowed, kept.clamp(max=level), kept)
        # The weights are only read where something went wrong: this may be called for every batch.
        if not bool(error.isfinite().all()):
            check_weights(self)
            if not bool(x.isfinite().all()):
                raise ValueError("x has NaN or infinite values, expected finite ones")
        levels = torch.arange(k, device=x.device)
        acts = acts.where(levels < kept.view(*acts.shape[:-1], 1), 0)
        return acts.new_zeros(*acts.shape[:-1], len(self.W_dec)).scatter_(-1, latents, acts)

    @torch.no_grad()
    def decode_levels(
        self, acts: torch.Tensor, latents: torch.Tensor, budgets: Sequence[int] | None = None
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Reconstruct at several budgets what `encode_levels` has just encoded.

        All of them together cost what the largest alone does.

        Args:
            acts, latents: the result of `encode_levels`, [..., budget].
            budgets: ascending, within 1..budget. None takes 1, 2, 4, ... and the last.

        Returns:
            An iterator over each budget and its reconstruction, [..., d_in], without gradients.

        Raises:
            TypeError, ValueError: for `acts` and `latents` that are not of one shape.
            ValueError: for impossible budgets. Also for a second call after one `encode_levels`
                where activations are normalized one by one: the first has used up, as SAELens's
                `decode` does, what undoes the normalization.
            NotImplementedError: where `decode` is not SAELens's own.
        """
        self._check_decode("decode_levels")
        check_real("acts", acts)
        is_tensor = isinstance(latents, torch.Tensor) and latents.dtype != torch.bool
        if not is_tensor or latents.is_floating_point() or latents.is_complex():
            what = getattr(latents, "dtype", type(latents).__name__)
            raise TypeError(f"latents is of {what}, expected a tensor of integers")
        if acts.ndim == 0 or latents.shape != acts.shape:
            raise ValueError(
                f"latents has shape {list(latents.shape)} and acts {list(acts.shape)}, expected "
                "one shape, [..., budget]"
            )
        latents = latents.long()  # As an index uint8 is a mask, and others are none.
        shape, k = acts.shape[:-1], acts.shape[-1]
        budgets = doubling_budgets(k) if budgets is None else check_budgets("budgets", budgets, k)
        output_map = take_output_map(self)
        if output_map.scale is None and self.cfg.normalize_activations in PER_SAMPLE:
            raise ValueError(
                "decode_levels undoes the normalization of the activations encoded last, and they "
                "have been decoded: call encode_levels before each decode_levels "
                f"(normalize_activations is {self.cfg.normalize_activations!r})"
            )
        latents, acts = latents.reshape(-1, k), acts.reshape(-1, k)
        b_dec = self.b_dec.to(accumulation_dtype(self.W_dec))
        residuals = prefix_residuals(
            Code(latents, self._decode_coefficients(acts, latents)),
            self.W_dec,
            -b_dec.expand(len(latents), -1),
            budgets,
            use_triton=self._computes_by_triton(),
        )

        @torch.no_grad()
        def reconstructions() -> Iterator[tuple[int, torch.Tensor]]:
            for budget, decoded in residuals:
                decoded = decoded.to(self.dtype).view(*shape, self.W_dec.shape[1])
                decoded = output_map.apply(self.hook_sae_recons(decoded))
                yield budget, self.reshape_fn_out(decoded, self.d_head)

        return reconstructions()

    def replaced_decoding(self) -> list[str]:
        """Return the names of what decodes and is not SAELens's own any more."""
        own = (TopKSAE.decode, TopKTrainingSAE.decode)
        is_own = type(self).decode in own and "decode" not in vars(self)
        names = [] if is_own else ["decode"]
        name = "run_time_activation_norm_fn_out"
        return names if is_own_function(self, name, MAKER) else [*names, name]

    def _check_decode(self, caller: str) -> None:
        if names := self.replaced_decoding():
            raise NotImplementedError(
                f"{caller} computes what SAELens's decode does, but {' and '.join(names)} is not "
                "SAELens's own; encode and decode at each budget, within at_budget"
            )

    def _computes_by_triton(self) -> bool:
        return computes_by_triton(getattr(self.cfg, "backend", "auto"), self.W_dec)

    def _decode_coefficients(self, acts: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return what the latents' decoder rows are multiplied by."""
        if self.cfg.rescale_acts_by_decoder_norm:
            return acts / self.W_dec.norm(dim=-1)[latents]
        return acts
