"""SAELens's trainer at toy size, made and run with and without accelerate()."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE
from sae_lens.config import SAETrainerConfig

import sae_lens_flex

D_IN, D_SAE, K, BATCH = 16, 48, 8, 24
TOPK = {"k": K}
SAES = {  # fields of the SAEs' configs
    "flex_topk": {"architecture": "flex_topk", **TOPK},
    "hierarchical_topk": {"architecture": "hierarchical_topk", **TOPK},
    "dense flex_topk": {"architecture": "flex_topk", "use_sparse_activations": False, **TOPK},
    "flex_batchtopk": {"architecture": "flex_batchtopk", **TOPK},
    "flex_matryoshka_batchtopk": {
        "architecture": "flex_matryoshka_batchtopk",
        "matryoshka_widths": [3, 12, D_SAE],
        **TOPK,
    },
    "topk": {"architecture": "topk", **TOPK},
    "sparse topk": {"architecture": "topk", **TOPK},
    "standard": {"architecture": "standard", "l1_coefficient": 0.1, "l1_warm_up_steps": 5},
    "jumprelu": {"architecture": "jumprelu", "l0_coefficient": 0.1, "l0_warm_up_steps": 5},
    "matryoshka_batchtopk": {
        "architecture": "matryoshka_batchtopk",
        "matryoshka_widths": [8, D_SAE],
        **TOPK,
    },
}


def new_trainer(
    sae: str = "flex_topk",
    *,
    accelerated: bool = False,
    trainer_class: type[SAETrainer[Any, Any]] = SAETrainer,
    dtype: str = "float32",
    device: str = "cpu",
    sae_fields: dict[str, Any] | None = None,
    **fields: Any,
) -> SAETrainer[Any, Any]:
    torch.manual_seed(0)
    sizes = {"d_in": D_IN, "d_sae": D_SAE, "dtype": dtype, "device": device}
    cfg = SAETrainerConfig(
        **{
            "total_training_samples": 1000 * BATCH,
            "train_batch_size_samples": BATCH,
            "lr": 1e-3,
            "lr_end": 1e-4,
            "lr_warm_up_steps": 3,
            "lr_decay_steps": 500,
            "dead_feature_window": 2,
            "feature_sampling_window": 4,
            "device": device,
        }
        | fields
    )
    made = TrainingSAE.from_dict(sizes | SAES[sae] | (sae_fields or {}))
    if sae == "sparse topk":
        with_sparse_acts(made)
    with sae_lens_flex.accelerate() if accelerated else contextlib.nullcontext():
        return trainer_class(cfg=cfg, sae=made, data_provider=iter(()))


def with_sparse_acts(sae: TrainingSAE[Any]) -> None:
    """Let `feature_acts` of a step be an ordinary sparse tensor.

    SAELens's own, by `use_sparse_activations`, raise in the backward pass.
    """
    forward = sae.training_forward_pass

    def sparse_forward(step_input: Any) -> Any:
        output = forward(step_input=step_input)
        return replace(output, feature_acts=output.feature_acts.detach().to_sparse())

    sae.training_forward_pass = sparse_forward  # type: ignore[method-assign]


def take_steps(
    trainer: SAETrainer[Any, Any],
    n: int,
    *,
    accelerated: bool = False,
    seed: int = 0,
    after: Callable[[], None] = lambda: None,
) -> list[float]:
    """Take steps as `fit` does, on activations of which every other batch is small.

    The gradients of large ones are clipped. Returns the losses.
    """
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with sae_lens_flex.accelerate() if accelerated else contextlib.nullcontext():
        for step in range(n):
            trainer.maybe_reset_sparsity()
            batch = torch.randn(BATCH, D_IN, generator=generator) * (3 if step % 2 else 0.03)
            losses.append(trainer.step(batch).loss.item())
            trainer.n_training_steps += 1
            after()
    return losses
