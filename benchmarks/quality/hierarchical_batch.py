"""A hierarchical loss over a BatchTopK code, as an experiment: an SAE for every mean budget.

A step keeps the k B largest activations of a batch, as `flex_batchtopk` does. A row then has n
latents, in descending order of activation; x_hat_j is the reconstruction from its first j. With
weights c_m of the budgets m, which sum to 1, the loss of a row is a sum of |x_hat_j - x|^2 where

    even     j goes over 1..n, each with weight 1 / n
    ranks    j = min(m, n) for each budget m below k, with weight c_m, and j = n for k
    batch    j is how many of the row's latents are among the m B largest of the batch

A row without latents has x_hat_0 = b_dec alone.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NoReturn, get_args

import torch
from typing_extensions import override

from sae_lens_flex import HierarchicalTopKSAEConfig
from sae_lens_flex.ops.codes import Code
from sae_lens_flex.ops.policy import accumulation_dtype
from sae_lens_flex.saes.budgets import check_level_weights, check_trained_budgets
from sae_lens_flex.saes.flex_batchtopk import (
    FlexBatchTopKTrainingSAE,
    FlexBatchTopKTrainingSAEConfig,
)

ARCHITECTURE = "hierarchical_batch"
Levels = Literal["even", "ranks", "batch"]


@dataclass(frozen=True)
class Ranked:
    """
    Puts a code in the order of its levels and weighs them: `ranked` of a step's spec.

    Args:
        levels (Levels): Which levels the loss has.
        budgets (tuple[int, ...]): m, ascending; not read by "even".
        weights (tuple[float, ...]): c_m, which sum to 1.
    """

    levels: Levels
    budgets: tuple[int, ...]
    weights: tuple[float, ...]

    def __call__(self, code: Code, norms: torch.Tensor | None) -> tuple[Code, torch.Tensor]:
        """Return the code in descending order of h * norms, and the weights [n + B]."""
        compared = code.values if norms is None else code.values * norms.take(code.latents)
        in_batch = compared.argsort(descending=True, stable=True)  # [n]
        # Pairs of no sample have value 0, so they stay behind the last sample's.
        order = in_batch[code.samples()[in_batch].argsort(stable=True)]
        ordered = Code(code.latents[order], code.values[order], code.starts)
        assert code.starts is not None
        dtype = accumulation_dtype(code.values)
        pairs = torch.arange(len(order), device=order.device)
        samples, lengths = ordered.samples(), code.starts.diff()  # [n], [B]
        is_last = pairs + 1 == code.starts[samples + 1]
        if self.levels == "even":
            of_pairs = 1 / lengths[samples].clamp_min(1).to(dtype)
            level_0 = (lengths == 0).to(dtype)
        elif self.levels == "ranks":
            inner, left = _tables(self, order.device, dtype)
            # The level of a pair, from 0 on; all from k on are as the last of the tables.
            level = (pairs - code.starts[samples]).clamp_max(len(inner) - 1)
            of_pairs = left[level].where(is_last, inner[level])
            level_0 = (lengths == 0).to(dtype)
        else:
            bounds, left = _of_batch(self, code.n_samples, order.device, dtype)
            # The weight of all budgets that include a pair, given its number in the batch.
            numbers = torch.empty_like(order).scatter_(0, in_batch, pairs)[order]
            within = left[torch.bucketize(numbers, bounds, right=True)]  # [n]
            following = torch.cat((within[1:], within.new_zeros(1))).masked_fill(is_last, 0)
            of_pairs = within - following
            first = within[code.starts[:-1].clamp_max(len(within) - 1)]
            level_0 = 1 - first.masked_fill(lengths == 0, 0)
        # Pairs of no sample are no level.
        of_pairs = of_pairs.masked_fill(pairs >= code.starts[-1], 0)
        level_weights = of_pairs.new_zeros(len(order) + len(lengths))
        level_weights[pairs + samples + 1] = of_pairs
        rows = torch.arange(len(lengths), device=order.device)
        level_weights[code.starts[:-1] + rows] = level_0
        return ordered, level_weights


# What they return is kept for good: copying waits for the device, and recordings go on reading it.


@cache
def _tables(
    ranked: Ranked, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for levels 1..k the weight inside a row, 0 at k, and that of it and all after it."""
    weights = torch.zeros(ranked.budgets[-1], dtype=torch.float64)
    weights[torch.tensor(ranked.budgets) - 1] = torch.tensor(ranked.weights, dtype=torch.float64)
    left = weights.flip(0).cumsum(0).flip(0)
    weights[-1] = 0
    return weights.to(device, dtype), left.to(device, dtype)


@cache
def _of_batch(
    ranked: Ranked, n_samples: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return m B of each budget m, [M], and the weight of the budgets from each on, [M + 1]."""
    weights = torch.tensor([*ranked.weights, 0.0], dtype=torch.float64)
    left = weights.flip(0).cumsum(0).flip(0)
    bounds = torch.tensor(ranked.budgets, device=device) * n_samples
    return bounds, left.to(device, dtype)


@dataclass
class HierarchicalBatchTrainingSAEConfig(FlexBatchTopKTrainingSAEConfig):
    """
    Configuration class for training a HierarchicalBatchTrainingSAE; others as in
    FlexBatchTopKTrainingSAEConfig.

    Args:
        k (int): The largest mean budget.
        levels (Levels): Which levels the loss has, as the module says.
        budgets (list[int] | None): The budgets m, ascending, the last k. None takes 1..k.
        level_weights (list[float] | None): c_m, which are divided by their sum; None for equal
            ones.
    """

    levels: Levels = "even"
    budgets: list[int] | None = None
    level_weights: list[float] | None = None

    @override
    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels not in get_args(Levels):
            raise ValueError(f"levels is {self.levels!r}, expected one of {get_args(Levels)}")
        self.ranked()

    def ranked(self) -> Ranked:
        """Return what a step's spec gets."""
        k = int(self.k)
        budgets = range(1, k + 1) if self.budgets is None else self.budgets
        budgets = check_trained_budgets(budgets, k)
        given = [1.0] * len(budgets) if self.level_weights is None else self.level_weights
        weights = check_level_weights(given, len(budgets))
        return Ranked(self.levels, tuple(budgets), tuple(w / sum(weights) for w in weights))

    @override
    def get_inference_config_class(self) -> type[HierarchicalTopKSAEConfig]:
        # With a MeanBudget it keeps what is above one threshold, whatever its k.
        return HierarchicalTopKSAEConfig


class HierarchicalBatchTrainingSAE(FlexBatchTopKTrainingSAE):
    """Trains one SAE for every mean budget up to k. It is saved as `hierarchical_topk`."""

    cfg: HierarchicalBatchTrainingSAEConfig  # type: ignore[assignment]
    config_class = HierarchicalBatchTrainingSAEConfig

    @override
    def _ranked(self) -> Ranked:
        return self.cfg.ranked()

    @override
    def _unfused_training_forward_pass(self, step_input: Any) -> NoReturn:
        raise NotImplementedError("hierarchical_batch has no unfused path")

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        del state_dict["threshold"]  # BatchTopK's, for k alone


def new_training_sae(config: dict[str, Any]) -> HierarchicalBatchTrainingSAE:
    """Return an SAE of a config, as `TrainingSAE.from_dict`, which does not know an experiment."""
    fields = {name: value for name, value in config.items() if name != "architecture"}
    return HierarchicalBatchTrainingSAE(HierarchicalBatchTrainingSAEConfig(**fields))
