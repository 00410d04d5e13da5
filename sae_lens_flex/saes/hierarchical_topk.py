"""`hierarchical_topk`: one SAE that reconstructs well from its first 1, 2, ... k latents.

HierarchicalTopK (Balagansky et al. 2025, arXiv 2505.24473) trains on the mean, over the budgets j,
of the squared error of the reconstruction from the j largest latents. The trained SAE then takes
any budget up to k at run time.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput, _disable_hooks
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from typing_extensions import override

from ..ops.codes import Code
from ..ops.losses import differentiable_loss, prefix_residuals
from ..ops.policy import accumulation_dtype
from ..ops.requests import Levels
from ..training.shards import WHOLE, Whole
from .budgets import (
    RuntimeBudget,
    check_level_weights,
    check_trained_budgets,
    doubling_budgets,
)
from .checks import check_config_class, check_integer
from .configs import CheckedTopKSAEConfig, FusedTopKTrainingSAEConfig
from .fused_path import OF_DECODING
from .fused_topk import FusedTopKTrainingSAE
from .normalization import OutputMap, read_output_map


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
        sae.budget = mean_budget(sae, activations, 16)  # 16 on average, by one threshold

    Otherwise as SAELens's TopKSAE.
    """

    cfg: HierarchicalTopKSAEConfig  # type: ignore[assignment]

    @override
    def __init__(self, cfg: Any, *args: Any, **kwargs: Any) -> None:
        check_config_class(self, cfg, TopKSAEConfig)
        super().__init__(cfg, *args, **kwargs)


@dataclass
class HierarchicalTopKTrainingSAEConfig(FusedTopKTrainingSAEConfig):
    """
    Configuration class for training a HierarchicalTopKTrainingSAE.

    Args:
        budgets (list[int] | None): Budgets that the loss averages over: ascending, without repeats,
            within 1..k, the last one k. None takes every budget 1..k, as the paper does.
        level_weights (list[float] | None): How much the loss of each budget counts, one number for
            each of `budgets`, or for each of 1..k where that is None. Numbers of at least 0, one of
            them above 0; the SAE divides them by their sum. None weighs all budgets alike.
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
    level_weights: list[float] | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return "hierarchical_topk"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.budgets is not None:
            self.budgets = check_trained_budgets(self.budgets, self.k)
        if self.level_weights is not None:
            n_budgets = self.k if self.budgets is None else len(self.budgets)
            self.level_weights = check_level_weights(self.level_weights, n_budgets)
        self.add_training_info_to_metadata()  # The metadata holds both as they were given.


class HierarchicalTopKTrainingSAE(RuntimeBudget, FusedTopKTrainingSAE):
    """
    Trains one SAE for every budget 1..k.

    `mse_loss` is the mean, over the config's budgets j, of SAELens's MSE of the reconstruction from
    the j latents with the largest activations: weighted by the config's `level_weights`, where they
    are given. The auxiliary loss is TopK's, at budget k.

    A training step keeps the config's k latents whatever `budget` says; outside it `budget` and
    `at_budget` work as in HierarchicalTopKSAE. Editing `cfg.k`, `cfg.budgets` or
    `cfg.level_weights` acts on the next step, or raises there if they do not fit each other.

    On the unfused path the levels are prefixes of the activations that `encode_with_hidden_pre` and
    a hook on `hook_sae_acts_post` left, and a hook on `hook_sae_recons` sees and edits level k
    alone. See `FusedTopKTrainingSAE` for the paths and for what a training step returns.
    """

    cfg: HierarchicalTopKTrainingSAEConfig  # type: ignore[assignment]
    config_class = HierarchicalTopKTrainingSAEConfig

    @override
    def _check_config(self) -> None:
        super()._check_config()
        cfg = self.cfg
        cfg.k = k = self._step_k(0)
        if cfg.budgets is not None:
            cfg.budgets = check_trained_budgets(cfg.budgets, k)
        if cfg.level_weights is not None:
            n_budgets = k if cfg.budgets is None else len(cfg.budgets)
            cfg.level_weights = check_level_weights(cfg.level_weights, n_budgets)

    @override
    def _step_k(self, n_samples: int) -> int:
        return check_integer("k", self.cfg.k, len(self.W_dec), "d_sae")

    @override
    def _levels(self, k: int, like: torch.Tensor) -> Levels:
        budgets, weights = self.cfg.budgets, self.cfg.level_weights
        if budgets is None and weights is None:
            return "every"
        levels = range(1, k + 1) if budgets is None else budgets
        shares = (1 / len(levels),) * len(levels) if weights is None else _shares(weights)
        return _level_weights(tuple(levels), shares, like.device, like.dtype)

    @override
    def _logging_metrics(
        self, x: torch.Tensor, code: Code, output_map: OutputMap, shards: Whole
    ) -> dict[str, torch.Tensor]:
        """Return explained variance and MSE at budgets 1, 2, 4, ... k, as SAELens defines them.

        `explained_variance_fall` is the most that explained variance loses from one of these
        budgets to a larger one. It is 0 where more latents explain more.
        """
        return self._metrics_of(x, code.with_values(code.values.relu()), output_map, shards)

    @torch.no_grad()
    def _metrics_of(
        self, x: torch.Tensor, code: Code, output_map: OutputMap, shards: Whole = WHOLE
    ) -> dict[str, torch.Tensor]:
        # `code` has decode coefficients.
        weights = self._weights()
        x = shards.by_width(x)  # [B, D_r]
        output_map = OutputMap(*(None if m is None else shards.all_samples(m) for m in output_map))
        b_dec = weights.b_dec[shards.own_width(len(weights.b_dec))]
        vals, target = self._decoding(code.values, x, output_map, b_dec)
        residuals = prefix_residuals(
            code.with_values(vals),
            weights.W_dec,
            target,
            doubling_budgets(code.latents.shape[1]),
            use_triton=self._computes_by_triton(),
        )
        return _metrics(x.to(target.dtype), residuals, shards)

    def _decoding(
        self,
        coefficients: torch.Tensor,
        x: torch.Tensor,
        output_map: OutputMap,
        b_dec: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return vals and target with which vals @ W_dec[latents] is to be target.

        Args:
            coefficients: decode coefficients before an output normalization, [batch, k].
            x: activations, [batch, d_in].
            output_map: the output normalization, of every sample by itself.
            b_dec: [d_in].
        """
        offset = output_map.apply(b_dec.to(accumulation_dtype(self.W_dec, x)))
        vals = coefficients if output_map.scale is None else coefficients * output_map.scale
        # `+ -offset`, not `- offset`: autograd then reduces to [d_in] first and never negates a
        # [batch, d_in] tensor.
        return vals, x.to(offset.dtype) + -offset

    # --- the unfused path

    @override
    def _unfused_training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        x, d_in = step_input.sae_in, self.W_dec.shape[1]
        k = self._step_k(x.shape[:-1].numel())
        with self.at_budget(k):
            feature_acts, hidden_pre = self.encode_with_hidden_pre(x)  # [..., d_sae]
        output_map = read_output_map(self)
        sae_out = self.decode(feature_acts)  # level k, with its hooks

        flat_acts = feature_acts.reshape(-1, feature_acts.shape[-1])
        acts, latents = flat_acts.topk(k)  # [batch, k]
        flat_map = OutputMap(*(None if m is None else m.reshape(-1, 1) for m in output_map))
        coefficients = self._decode_coefficients(acts, latents)
        code = Code(latents, coefficients)
        like = sae_out.new_empty((), dtype=accumulation_dtype(self.W_dec, x))
        levels = self._levels(k, like)
        weighted = isinstance(levels, torch.Tensor)
        level_weights = levels if weighted else like.new_full((k,), 1 / k)
        loss_at_k = self.mse_loss_fn(sae_out, x).sum(dim=-1).mean()
        metrics = {}
        if set(OF_DECODING) & set(self._replaced()):
            outputs = _OutputsByDecode(self, x, feature_acts, latents)
            below_k = level_weights.new_zeros(())
            for level, weight in enumerate(level_weights[:-1].tolist(), start=1):
                if weight != 0:
                    loss = self.mse_loss_fn(outputs.at(level), x).sum(dim=-1).mean()
                    below_k = below_k + weight * loss
            if step_input.is_logging_step:
                metrics = outputs.metrics()
        else:
            flat_x = x.reshape(-1, d_in)
            vals, target = self._decoding(coefficients, flat_x, flat_map, self.b_dec)
            below_k = differentiable_loss(
                *(latents, self.W_dec, vals, None, target),
                levels=torch.cat((level_weights[:-1], level_weights.new_zeros(1))),
                scale=1 / len(target),
                backend=self.cfg.backend,
                name="a training step",
                repeats=True,
            )
            if step_input.is_logging_step:
                metrics = self._metrics_of(flat_x, code, flat_map)
        losses = {"mse_loss": below_k + level_weights[-1] * loss_at_k}
        total = losses["mse_loss"]
        auxiliary: Any = self.calculate_aux_loss(
            step_input=step_input,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            sae_out=sae_out,
        )
        if isinstance(auxiliary, dict):
            losses.update(auxiliary)
        else:  # SAELens allows a tensor, too, which it adds and does not report apart.
            auxiliary = {"": auxiliary}
        for loss in auxiliary.values():
            total = total + loss
        return TrainStepOutput(
            sae_in=x,
            sae_out=sae_out,
            feature_acts=feature_acts,
            hidden_pre=hidden_pre,
            loss=total,
            losses=losses,
            metrics={**metrics},
        )


class _OutputsByDecode(NamedTuple):
    """The outputs at any level, each from `decode`: for decoding that a user replaced.

    Fields:
        sae: the SAE.
        x: activations, [..., d_in].
        feature_acts: [..., d_sae].
        latents: the kept ones in the order of the levels, [batch, k].
    """

    sae: HierarchicalTopKTrainingSAE
    x: torch.Tensor
    feature_acts: torch.Tensor
    latents: torch.Tensor

    def at(self, level: int) -> torch.Tensor:
        """Return the output that `decode` makes of the first `level` latents, [..., d_in]."""
        acts = self.feature_acts.reshape(-1, self.feature_acts.shape[-1])
        is_kept = torch.zeros_like(acts).scatter_(-1, self.latents[:, :level], 1)
        with _disable_hooks(self.sae):
            # `decode` undoes the normalization of the `process_sae_in` before it, and forgets it.
            self.sae.process_sae_in(self.x)
            return self.sae.decode((acts * is_kept).view_as(self.feature_acts))

    @torch.no_grad()
    def metrics(self) -> dict[str, torch.Tensor]:
        """Return what a logging step reports."""
        residuals = (
            (budget, (self.at(budget) - self.x).flatten(0, -2))
            for budget in doubling_budgets(self.latents.shape[1])
        )
        return _metrics(self.x.flatten(0, -2), residuals)


def _metrics(
    x: torch.Tensor, residuals: Iterable[tuple[int, torch.Tensor]], shards: Whole = WHOLE
) -> dict[str, torch.Tensor]:
    """Return explained variance and MSE at each budget, and the fall of the former.

    Args:
        x: this process's part of the width of all activations, [batch, D_r].
        residuals: each budget with its residuals, [batch, D_r].
        shards: which process that is.
    """
    variance = shards.sum((x - x.mean(0)).square().sum(-1).mean())
    metrics, explained = {}, []
    for budget, residual in residuals:
        mse = shards.sum(residual.square().sum(-1).mean())
        explained.append(1 - mse / variance)
        metrics[f"explained_variance_at_{budget}"] = explained[-1]
        metrics[f"mse_at_{budget}"] = mse
    curve = torch.stack(explained)
    metrics["explained_variance_fall"] = (curve.cummax(0).values - curve).amax()
    return metrics


def _shares(weights: list[float]) -> tuple[float, ...]:
    """Return the weights divided by their sum."""
    largest = max(weights)  # The sum of the weights themselves may be infinite.
    total = sum(weight / largest for weight in weights)
    return tuple(weight / largest / total for weight in weights)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # Autograd could not save them in a later step.
def _level_weights(
    budgets: tuple[int, ...], shares: tuple[float, ...], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Return the budgets' shares as weights of all levels, [k].

    They are kept, because copying them waits for the device.
    """
    weights = torch.zeros(budgets[-1], dtype=dtype)
    weights[torch.tensor(budgets) - 1] = torch.tensor(shares, dtype=dtype)
    return weights.to(device)
