"""`run_evals` at several budgets, and what the trainer logs."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from datasets import Dataset
from sae_lens import (
    SAE,
    ActivationsStore,
    HookedSAETransformer,
    LanguageModelSAETrainingRunner,
    LoggingConfig,
    TrainingSAE,
)
from sae_lens.evals import get_eval_everything_config, run_evals
from sae_lens.training.activation_scaler import ActivationScaler

from .flows import (
    ARCHITECTURES,
    K,
    activation_batches,
    make_trainer,
    runner_config,
    training_sae_config,
)

LOGGED_EVERY_STEP = {
    "losses/mse_loss",
    "losses/auxiliary_reconstruction_loss",
    "losses/overall_loss",
    "metrics/l0",
    "metrics/explained_variance",
    "metrics/explained_variance_legacy",
    "sparsity/dead_features",
    "sparsity/mean_passes_since_fired",
    "details/current_learning_rate",
    "details/n_training_samples",
}


def evaluate(sae: SAE[Any], model: HookedSAETransformer, dataset: Dataset) -> Any:
    """Run every eval of SAELens.

    Each call has a new store, so that each sees the same tokens.
    """
    return run_evals(
        sae=sae,
        activation_store=ActivationsStore.from_sae(model, sae, dataset, streaming=False),
        model=model,
        activation_scaler=ActivationScaler(),
        eval_config=get_eval_everything_config(
            n_eval_reconstruction_batches=2, n_eval_sparsity_variance_batches=2
        ),
    )


@pytest.mark.parametrize("source", ["returned by the runner", "loaded for inference"])
def test_run_evals_honours_the_budget(
    source: str,
    trained: dict[str, SimpleNamespace],
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
):
    run = trained["hierarchical_topk"]
    sae = run.sae if source == "returned by the runner" else SAE.load_from_disk(run.output)
    explained_variances, kl_divergences = [], []
    for budget in (1, 2, 4, K):
        with sae.at_budget(budget):
            metrics, feature_metrics = evaluate(sae, language_model, token_dataset)
        assert 0 < metrics["sparsity"]["l0"] <= budget
        assert metrics["model_performance_preservation"].keys() == {
            "ce_loss_score",
            "ce_loss_with_ablation",
            "ce_loss_with_sae",
            "ce_loss_without_sae",
        }
        assert metrics["model_behavior_preservation"].keys() == {
            "kl_div_score",
            "kl_div_with_ablation",
            "kl_div_with_sae",
        }
        density = torch.tensor(feature_metrics["feature_density"])
        assert density.sum().item() == pytest.approx(metrics["sparsity"]["l0"], rel=1e-2)
        explained_variances.append(metrics["reconstruction_quality"]["explained_variance"])
        kl_divergences.append(metrics["model_behavior_preservation"]["kl_div_with_sae"])
    # The tokens are the same at every budget, so with more latents every metric is better.
    assert explained_variances == sorted(explained_variances)
    assert kl_divergences == sorted(kl_divergences, reverse=True)


def test_run_evals_takes_the_flex_sae(
    trained: dict[str, SimpleNamespace],
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
):
    metrics, _ = evaluate(trained["flex_topk"].sae, language_model, token_dataset)
    assert 0 < metrics["sparsity"]["l0"] <= K
    assert metrics["model_performance_preservation"]["ce_loss_score"] > 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_trainer_logs_under_the_names_saelens_uses(architecture: str):
    cfg = training_sae_config(architecture)
    batches = activation_batches(10)
    trainer = make_trainer(TrainingSAE.from_dict(cfg.to_dict()), batches, dead_feature_window=3)
    # Dead latents give an auxiliary loss.
    trainer.sae.b_enc.data[:4] = -10.0
    for batch in batches:
        output = trainer.step(batch)
    log = trainer.build_train_step_log_dict(output, trainer.n_training_samples)
    assert log.keys() >= LOGGED_EVERY_STEP
    assert log["losses/overall_loss"] == pytest.approx(
        log["losses/mse_loss"] + log["losses/auxiliary_reconstruction_loss"]
    )
    assert log["losses/auxiliary_reconstruction_loss"] > 0
    assert 0 < log["metrics/l0"] <= K
    assert log["sparsity/dead_features"] == 4


def test_logged_mse_and_explained_variance_are_those_of_the_reconstruction():
    # With the one budget K, the loss is the squared error of the SAE's forward pass.
    cfg = training_sae_config("hierarchical_topk", budgets=[K])
    (batch,) = activation_batches(1)
    trainer = make_trainer(TrainingSAE.from_dict(cfg.to_dict()), [batch])
    with torch.no_grad():
        error = (trainer.sae(batch) - batch).square().sum(-1).mean().item()
    log = trainer.build_train_step_log_dict(trainer.step(batch), len(batch))
    variance = (batch - batch.mean(0)).square().sum(-1).mean().item()
    assert log["losses/mse_loss"] == pytest.approx(error, rel=1e-5)
    assert log["metrics/explained_variance"] == pytest.approx(1 - error / variance, abs=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_runner_logs_training_and_evals_to_wandb(
    architecture: str,
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
):
    logged: dict[str, list[Any]] = {}

    def log(values: dict[str, Any], **_: Any) -> None:
        for name, value in values.items():
            logged.setdefault(name, []).append(value)

    monkeypatch.setattr(wandb, "log", log)
    for name in ("init", "finish", "log_artifact"):
        monkeypatch.setattr(wandb, name, lambda *_, **__: None)
    cfg = runner_config(
        training_sae_config(architecture),
        logger=LoggingConfig(log_to_wandb=True, wandb_log_frequency=10, eval_every_n_wandb_logs=2),
        eval_batch_size_prompts=4,
    )
    LanguageModelSAETrainingRunner(
        cfg, override_model=language_model, override_dataset=token_dataset
    ).run()
    assert logged.keys() >= LOGGED_EVERY_STEP
    assert len(logged["losses/mse_loss"]) == 4
    assert logged["losses/mse_loss"][-1] < logged["losses/mse_loss"][0]
    assert len(logged["model_performance_preservation"]) == 2
    assert torch.tensor(logged["metrics/explained_variance"]).isfinite().all()
