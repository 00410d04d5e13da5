"""`hierarchical_topk`: one SAE that reconstructs well from its first 1, 2, ... k latents.

HierarchicalTopK (Balagansky et al. 2025, arXiv 2505.24473) trains on the mean, over the budgets j,
of the squared error of the reconstruction from the j largest latents. The trained SAE then takes
any budget up to k at run time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from sae_lens.saes.sae import SAE, TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopK, TopKSAE
from typing_extensions import override

from ..ops.encode import Encoded
from ..ops.fused_loss import accumulation_dtype, fused_loss
from ..ops.inverted_index import InvertedIndex
from ..ops.prefixes import prefix_residuals
from .fused_topk import (
    CheckedTopKSAEConfig,
    Decoding,
    FusedTopKTrainingSAE,
    FusedTopKTrainingSAEConfig,
    check_integer,
    check_number,
    sum_of,
)
from .normalization import forget_output_map, read_output_map


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


class RuntimeBudget(SAE[Any]):
    """
    Lets an SAE with a TopK activation function keep fewer than cfg.k latents.

    `encode`, and all that calls it, keeps the `budget` largest latents. The config, and so a saved
    SAE, knows nothing of it.
    """

    activation_fn: TopK

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # SAELens's normalization functions hold the SAE that made them: a copy needs its own.
        self._setup_activation_normalization()

    @property
    def budget(self) -> int:
        """Number of latents that `encode` keeps, 1..cfg.k; cfg.k until it is set."""
        return self.activation_fn.k

    @budget.setter
    def budget(self, budget: int) -> None:
        self.activation_fn.k = check_integer("budget", budget, self.cfg.k, "k")

    @contextmanager
    def at_budget(self, budget: int) -> Iterator[None]:
        """Keep `budget` latents within the `with` block, then what was kept before."""
        previous = self.budget
        self.budget = budget
        try:
            yield
        finally:
            self.budget = previous

    def encode_levels(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode `x` and sort the latents that are kept: a prefix of them is a smaller budget.

        Args:
            x: activations, [..., d_in].

        Returns:
            The activations of the kept latents, descending, and the latents, each [..., budget].

        Raises:
            ValueError: for an `x` of another width.
        """
        width = x.shape[-2:].numel() if self.hook_z_reshaping_mode else x.shape[-1]
        if width != self.cfg.d_in:
            raise ValueError(
                f"x has shape {list(x.shape)}, expected {self.cfg.d_in} values an activation"
            )
        acts, latents = self.encode(x).topk(self.budget)
        return acts, latents

    @torch.no_grad()
    def encode_adaptive(self, x: torch.Tensor, tolerance: float) -> torch.Tensor:
        """Encode each activation with as few latents as its reconstruction needs.

        Keeps the first j latents of an activation, j the smallest with

            |residual at level j|^2 <= tolerance * |x - b_dec|^2,

        or all `budget` of them where no level reaches it. With an output normalization, b_dec is
        taken where the reconstruction is: scaled and shifted like the output.

        Args:
            x: activations, [..., d_in].
            tolerance: the share of the squared norm that may be left over, at least 0.

        Returns:
            Feature activations, [..., d_sae], without gradients.

        Raises:
            ValueError: for an `x` of another width, or an impossible tolerance.
        """
        tolerance = check_number("tolerance", tolerance)
        acts, latents = self.encode_levels(x)
        output_map = read_output_map(self)
        forget_output_map(self)
        target = self.reshape_fn_in(x).to(accumulation_dtype(self.W_dec))
        target = target - output_map.apply(self.b_dec.to(target.dtype))
        vals = self._decode_coefficients(acts, latents)
        if output_map.scale is not None:
            vals = vals * output_map.scale
        k = acts.shape[-1]
        allowed = tolerance * target.square().sum(-1).flatten()
        kept = torch.full_like(allowed, k, dtype=torch.int64)
        residuals = prefix_residuals(
            latents.flatten(0, -2),
            self.W_dec,
            vals.flatten(0, -2),
            target.flatten(0, -2),
            range(1, k + 1),
            self._backend,
        )
        for level, residual in residuals:
            reached = residual.square().sum(-1) <= allowed
            kept = torch.where(reached, kept.clamp(max=level), kept)
        levels = torch.arange(k, device=x.device)
        acts = acts.where(levels < kept.view(*acts.shape[:-1], 1), 0)
        return acts.new_zeros(*acts.shape[:-1], self.cfg.d_sae).scatter_(-1, latents, acts)

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
        """
        k = acts.shape[-1]
        budgets = doubling_budgets(k) if budgets is None else check_budgets("budgets", budgets, k)
        output_map = read_output_map(self)
        forget_output_map(self)
        latents = latents.flatten(0, -2)
        residuals = prefix_residuals(
            latents,
            self.W_dec,
            self._decode_coefficients(acts.flatten(0, -2), latents),
            -self.b_dec.to(accumulation_dtype(self.W_dec)).expand(len(latents), -1),
            budgets,
            self._backend,
        )

        def reconstructions() -> Iterator[tuple[int, torch.Tensor]]:
            for budget, decoded in residuals:
                decoded = self.hook_sae_recons(decoded.to(self.dtype).view(*acts.shape[:-1], -1))
                yield budget, self.reshape_fn_out(output_map.apply(decoded), self.d_head)

        return reconstructions()

    @property
    def _backend(self) -> str:
        return getattr(self.cfg, "backend", "auto")

    def _decode_coefficients(self, acts: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        """Return what the latents' decoder rows are multiplied by."""
        if self.cfg.rescale_acts_by_decoder_norm:
            return acts / self.W_dec.norm(dim=-1)[latents]
        return acts


@dataclass
class HierarchicalTopKSAEConfig(CheckedTopKSAEConfig):
    __doc__ = (CheckedTopKSAEConfig.__doc__ or "").replace(
        "Configuration class for TopKSAE inference",
        "Configuration class for HierarchicalTopKSAE inference",
    )

    @override
    @classmethod
    def architecture(cls) -> str:
        return "hierarchical_topk"


class HierarchicalTopKSAE(RuntimeBudget, TopKSAE):
    """
    An inference-only SAE that takes its sparsity at run time.

        sae.budget = 16  # keep 16 latents from now on, 1..cfg.k
        with sae.at_budget(4):
            reconstruction = sae(activations)

    Otherwise as SAELens's TopKSAE.
    """

    cfg: HierarchicalTopKSAEConfig  # type: ignore[assignment]


@dataclass
class HierarchicalTopKTrainingSAEConfig(FusedTopKTrainingSAEConfig):
    """
    Configuration class for training a HierarchicalTopKTrainingSAE.

    Args:
        budgets (list[int] | None): Budgets that the loss averages over: ascending, without repeats,
            within 1..k, the last one k. None takes every budget 1..k, as the paper does.
        k (int): The largest budget: latents kept per activation in training, 1..d_sae. Inherited
            from TopKTrainingSAEConfig.
        use_sparse_activations (bool): Whether the `feature_acts` that a training step reports are
            a sparse COO tensor. Inherited from FusedTopKTrainingSAEConfig.
        backend (Literal["auto", "triton", "torch"]): What computes the decoder loss. Inherited
            from FusedTopKTrainingSAEConfig.
        aux_loss_coefficient (float): Coefficient of the auxiliary loss on dead latents, 0 to turn
            it off. Inherited from TopKTrainingSAEConfig.
        rescale_acts_by_decoder_norm (bool): Treat the decoder as if it was already normalized.
            Inherited from TopKTrainingSAEConfig.
        decoder_init_norm (float | None): Norm to initialize decoder weights to. None to disable.
            Inherited from TrainingSAEConfig.
        d_in (int): Input dimension. Inherited from SAEConfig.
        d_sae (int): SAE latent dimension. Inherited from SAEConfig.
        dtype (str): Data type of the SAE's parameters. Inherited from SAEConfig.
        device (str): Device to place the SAE on. Inherited from SAEConfig.
        apply_b_dec_to_input (bool): Whether to subtract the decoder bias from the input before
            encoding. Inherited from SAEConfig.
        normalize_activations (Literal): Normalization strategy for input activations. "layer_norm"
            and "constant_norm_rescale" need aux_loss_coefficient=0. Inherited from SAEConfig.
        reshape_activations (Literal["none", "hook_z"]): How to reshape activations. Inherited from
            SAEConfig.
        metadata (SAEMetadata): Metadata about the SAE training. Inherited from SAEConfig.
    """

    budgets: list[int] | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "hierarchical_topk"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budgets is None:
            return
        budgets = check_budgets("budgets", self.budgets, self.k)
        if budgets[-1] != self.k:
            raise ValueError(f"budgets is {self.budgets!r}, expected its last to be k ({self.k})")
        self.budgets = budgets
        self.add_training_info_to_metadata()  # which holds the budgets as they came


class HierarchicalTopKTrainingSAE(RuntimeBudget, FusedTopKTrainingSAE):
    """
    Trains one SAE for every budget 1..k.

    `mse_loss` is the mean, over the config's budgets j, of SAELens's MSE of the reconstruction from
    the j latents with the largest activations. The auxiliary loss is TopK's, at budget k.

    A training step keeps k latents whatever `budget` says; outside it `budget` and `at_budget` work
    as in HierarchicalTopKSAE. Where a hook on `hook_sae_acts_post` edits the activations of a step,
    its levels are prefixes of what the hook returned; a hook on `hook_sae_recons` sees level k. See
    `FusedTopKTrainingSAE` for what a training step returns.
    """

    cfg: HierarchicalTopKTrainingSAEConfig  # type: ignore[assignment]

    _last_level_weights: torch.Tensor | None = None

    @override
    def _decoder_loss(
        self,
        kept: Encoded,
        decoder: torch.Tensor,
        low_decoder: torch.Tensor | None,
        decoding: Decoding,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        level_weights = self._level_weights(decoding.target)
        return self._levels_loss(
            kept.indices, decoder, decoding, level_weights, low_decoder, kept.inverted
        )

    @override
    def _logging_metrics(
        self,
        indices: torch.Tensor,
        decoding: Decoding,
        x: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return explained variance and MSE at budgets 1, 2, 4, ... k, as SAELens defines them."""
        target = decoding.without_bias()
        x = x.to(target.dtype)
        variance = (x - x.mean(0)).square().sum(-1).mean()
        metrics = {}
        for budget, residual in prefix_residuals(
            *(indices, self.W_dec, decoding.vals, target),
            doubling_budgets(self.cfg.k),
            self.cfg.backend,
        ):
            mse = residual.square().sum(-1).mean()
            metrics[f"explained_variance_at_{budget}"] = 1 - mse / variance
            metrics[f"mse_at_{budget}"] = mse
        return metrics

    @override
    def _unfused_training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        # Level k is the output of `decode`, with its hooks; the levels below are prefixes of the
        # activations that `hook_sae_acts_post` returned.
        x = step_input.sae_in
        k = self.cfg.k
        with self.at_budget(k):
            feature_acts, hidden_pre = self.encode_with_hidden_pre(x)
        vals, indices = feature_acts.flatten(0, -2).topk(k)
        vals = self._decode_coefficients(vals, indices)
        vals, bias, target = self._decoding(
            vals.view(*x.shape[:-1], k), x, self.b_dec, read_output_map(self)
        )
        decoding = Decoding(vals.flatten(0, -2), bias, target.flatten(0, -2))
        sae_out = self.decode(feature_acts)

        metrics = {}
        if step_input.is_logging_step:
            metrics = self._logging_metrics(indices, decoding, x.flatten(0, -2))

        level_weights = self._level_weights(target)
        if level_weights is None:
            level_weights = target.new_full((k,), 1 / k)
        below_k = torch.cat((level_weights[:-1], level_weights.new_zeros(1)))
        loss_below_k, _ = self._levels_loss(indices, self.W_dec, decoding, below_k)
        loss_at_k = self.mse_loss_fn(sae_out, x).sum(dim=-1).mean()
        losses = {
            "mse_loss": loss_below_k + level_weights[-1] * loss_at_k,
            **self.calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out),
        }
        return TrainStepOutput(
            sae_in=x,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=sum_of(losses),
            losses=losses,
            metrics={**metrics},
        )

    def _levels_loss(
        self,
        indices: torch.Tensor,
        decoder: torch.Tensor,
        decoding: Decoding,
        level_weights: torch.Tensor | None,
        low_decoder: torch.Tensor | None = None,
        index: InvertedIndex | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return fused_loss(
            "hierarchical_loss",
            indices,
            decoder,
            *decoding,
            level_weights=level_weights,
            low_weight=low_decoder,
            index=index,
            factor=self.cfg.d_in,  # SAELens sums over d_in, where the operator averages
            backend=self.cfg.backend,
            needs_residual=True,
        )

    def _level_weights(self, target: torch.Tensor) -> torch.Tensor | None:
        """Return the loss's weight of each level 1..k, or None for equal ones."""
        budgets = self.cfg.budgets
        if budgets is None:
            return None
        weights = self._last_level_weights
        if weights is None or (weights.device, weights.dtype) != (target.device, target.dtype):
            weights = torch.zeros(self.cfg.k, dtype=target.dtype)
            weights[torch.tensor(budgets) - 1] = 1 / len(budgets)
            self._last_level_weights = weights = weights.to(target.device)
        return weights
