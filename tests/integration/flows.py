"""SAELens's flows at toy size, for the tests of this directory."""

from typing import Any

import torch
from sae_lens import (
    SAE,
    LanguageModelSAERunnerConfig,
    LoggingConfig,
    SAETrainer,
    TrainingSAE,
)
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainingSAEConfig

ARCHITECTURES = ("hierarchical_topk", "flex_topk")
D_IN, D_SAE, K = 16, 64, 8
CONTEXT_SIZE = 16
BATCH_SIZE = 64
HOOK_NAME = "blocks.0.hook_resid_post"


def training_sae_config(architecture: str, **fields: Any) -> TrainingSAEConfig:
    """Make the config of a toy SAE, as `TrainingSAEConfig.from_dict` does."""
    toy = {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "k": K}
    return TrainingSAEConfig.from_dict(toy | fields)


def runner_config(sae: TrainingSAEConfig, **fields: Any) -> LanguageModelSAERunnerConfig[Any]:
    """Make the config of a runner that takes 40 steps and writes nothing."""
    return LanguageModelSAERunnerConfig(sae=sae, **(runner_fields() | fields))


def runner_fields() -> dict[str, Any]:
    """Return the fields that a run on the toy language model needs, whatever the SAE is."""
    return {
        "model_name": "random-weights",
        "hook_name": HOOK_NAME,
        "context_size": CONTEXT_SIZE,
        "store_batch_size_prompts": 8,
        "n_batches_in_buffer": 4,
        "train_batch_size_tokens": BATCH_SIZE,
        "training_tokens": 40 * BATCH_SIZE,
        "lr": 3e-3,
        "n_eval_batches": 1,
        "n_batches_for_norm_estimate": 8,
        "checkpoint_path": None,
        "output_path": None,
        "verbose": False,
        "logger": LoggingConfig(log_to_wandb=False),
    }


def make_trainer(
    sae: TrainingSAE[Any], batches: list[torch.Tensor], **fields: Any
) -> SAETrainer[Any, Any]:
    """Make a trainer that takes one step on each of the batches."""
    cfg = SAETrainerConfig(
        **{
            "total_training_samples": sum(len(batch) for batch in batches),
            "train_batch_size_samples": len(batches[0]),
            "lr": 3e-3,
            "lr_end": 3e-4,
        }
        | fields
    )
    return SAETrainer(cfg=cfg, sae=sae, data_provider=iter(batches))


def activation_batches(n_batches: int, seed: int = 0) -> list[torch.Tensor]:
    """Draw batches of sparse sums of fixed directions, which a toy SAE can learn."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(D_SAE, D_IN, generator=generator)
    is_active = torch.rand(n_batches, BATCH_SIZE, D_SAE, generator=generator) < 4 / D_SAE
    return list(is_active.float() @ directions)


def reconstruct(sae: SAE[Any], x: torch.Tensor, budget: int) -> torch.Tensor:
    """Reconstruct x from the `budget` largest latents, by the formula, without the SAE's code."""
    sae_in = x - sae.b_dec if sae.cfg.apply_b_dec_to_input else x
    acts = sae_in @ sae.W_enc + sae.b_enc
    norm = sae.W_dec.norm(dim=-1)
    if sae.cfg.rescale_acts_by_decoder_norm:
        acts = acts * norm
    top = acts.topk(budget, dim=-1)
    kept = torch.zeros_like(acts).scatter(-1, top.indices, top.values.relu())
    if sae.cfg.rescale_acts_by_decoder_norm:
        kept = kept / norm
    return kept @ sae.W_dec + sae.b_dec


def explained_variance(sae: SAE[Any], x: torch.Tensor, budget: int) -> float:
    """Return 1 - squared error over variance, for activations of shape [..., d_in]."""
    with torch.no_grad():
        x = x.flatten(0, -2)
        if sae.cfg.normalize_activations == "none":
            error = reconstruct(sae, x, budget) - x
        else:
            assert budget == sae.cfg.k
            error = sae(x) - x
        return 1 - (error.square().sum() / (x - x.mean(0)).square().sum()).item()


def assert_losses_fall(losses: list[float]) -> None:
    """Check that all losses are finite and that the last ones are well below the first ones."""
    assert all(torch.tensor(losses).isfinite())
    assert len(losses) >= 20
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
