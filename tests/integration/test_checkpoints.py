"""What SAELens saves and loads: training checkpoints, final outputs, resumed runs."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from fresh_process import run_python
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    SAETrainer,
    TopKSAE,
    TrainingSAE,
)
from sae_lens.saes.sae import TrainStepInput
from safetensors.torch import load_file, save_file

import sae_lens_flex
from sae_lens_flex import (
    FlexTopKTrainingSAE,
    HierarchicalTopKSAE,
    HierarchicalTopKTrainingSAE,
)

from .flows import (
    ARCHITECTURES,
    BATCH_SIZE,
    D_IN,
    D_SAE,
    HOOK_NAME,
    K,
    activation_batches,
    make_trainer,
    reconstruct,
    runner_config,
    runner_fields,
    training_sae_config,
)

TRAINING_CLASSES = {
    "hierarchical_topk": HierarchicalTopKTrainingSAE,
    "flex_topk": FlexTopKTrainingSAE,
}
INFERENCE_CLASSES = {"hierarchical_topk": HierarchicalTopKSAE, "flex_topk": TopKSAE}
N_STEPS, N_STEPS_BEFORE = 30, 12


def new_trainer(architecture: str, normalization: str) -> SAETrainer[Any, Any]:
    """Make a trainer with dead latents, a schedule and, on request, an activation scaler."""
    torch.manual_seed(0)
    cfg = training_sae_config(architecture, normalize_activations=normalization)
    trainer = make_trainer(
        TrainingSAE.from_dict(cfg.to_dict()),
        activation_batches(N_STEPS),
        dead_feature_window=3,
        lr_warm_up_steps=5,
        lr_decay_steps=10,
    )
    trainer.sae.b_enc.data[: D_SAE // 4] = -10.0
    return trainer


def estimate_normalization(trainer: SAETrainer[Any, Any]) -> None:
    batches = activation_batches(8, seed=1)
    if trainer.sae.cfg.normalize_activations == "expected_average_only_in":
        trainer.activation_scaler.estimate_scaling_factor(D_IN, iter(batches), len(batches))
    elif trainer.sae.cfg.normalize_activations == "covariance_whitening":
        trainer.activation_scaler.estimate_whitening(D_IN, iter(batches), len(batches))


def take_steps(trainer: SAETrainer[Any, Any], batches: list[torch.Tensor]) -> list[float]:
    losses = []
    for batch in batches:
        losses.append(trainer.step(batch).loss.item())
        trainer.n_training_steps += 1
    return losses


def state(trainer: SAETrainer[Any, Any]) -> dict[str, Any]:
    """Return all that a trainer needs to go on."""
    scaler = trainer.activation_scaler
    return {
        "weights": trainer.sae.state_dict(),
        "adam": trainer.optimizer.state_dict(),
        "schedule": trainer.lr_scheduler.state_dict(),
        "samples": trainer.n_training_samples,
        "steps": trainer.n_training_steps,
        "firing": trainer.act_freq_scores,
        "since_fired": trainer.n_forward_passes_since_fired,
        "active_samples": trainer.n_frac_active_samples,
        "scaling_factor": scaler.scaling_factor,
        "whitening": None if scaler.whitening is None else vars(scaler.whitening),
    }


def assert_same(actual: Any, expected: Any) -> None:
    """Check nested containers for equality, tensors bit by bit."""
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same(actual[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected)
        for item, expected_item in zip(actual, expected, strict=True):
            assert_same(item, expected_item)
    elif not callable(expected):
        assert actual == expected


@pytest.mark.parametrize(
    "normalization", ["none", "expected_average_only_in", "covariance_whitening"]
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_resumed_training_equals_uninterrupted_training_bit_by_bit(
    architecture: str, normalization: str, tmp_path: Path
):
    batches = activation_batches(N_STEPS)
    uninterrupted = new_trainer(architecture, normalization)
    estimate_normalization(uninterrupted)
    take_steps(uninterrupted, batches[:N_STEPS_BEFORE])
    assert uninterrupted.dead_neurons.any()
    uninterrupted.save_checkpoint("halfway", base_path=tmp_path)
    saved = copy.deepcopy(state(uninterrupted))
    losses = take_steps(uninterrupted, batches[N_STEPS_BEFORE:])

    resumed = new_trainer(architecture, normalization)
    resumed.load_trainer_state(tmp_path / "halfway")
    resumed.sae.load_weights_from_checkpoint(tmp_path / "halfway")
    assert_same(state(resumed), saved)

    assert take_steps(resumed, batches[N_STEPS_BEFORE:]) == losses
    assert_same(state(resumed), state(uninterrupted))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_runner_resumes_where_its_checkpoint_was_taken(
    architecture: str,
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: dict[str, list[float]],
    tmp_path: Path,
):
    def run(**fields: Any) -> Any:
        cfg = runner_config(training_sae_config(architecture), **fields)
        sae = LanguageModelSAETrainingRunner(
            cfg, override_model=language_model, override_dataset=token_dataset
        ).run()
        return sae, cfg

    _, cfg = run(n_checkpoints=1, checkpoint_path=str(tmp_path / "checkpoints"))
    (checkpoint,) = Path(cfg.checkpoint_path).iterdir()
    n_steps_before = int(checkpoint.name) // BATCH_SIZE
    assert 0 < n_steps_before < 40
    losses = list(step_losses[architecture])
    step_losses[architecture].clear()

    run(resume_from_checkpoint=str(checkpoint))
    resumed_losses = step_losses[architecture]
    assert len(resumed_losses) == len(losses) - n_steps_before
    # The batches are others (README says why), but the weights and the optimizer are those that
    # the first run had by then.
    assert resumed_losses[0] < 0.5 * (losses[0] + losses[n_steps_before - 1])


def test_resumed_run_that_prefetches_takes_the_same_batches(
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: dict[str, list[float]],
    tmp_path: Path,
):
    losses = step_losses["flex_topk"]

    def run(**fields: Any) -> tuple[Path, list[float]]:
        cfg = runner_config(training_sae_config("flex_topk"), **fields)
        torch.manual_seed(0)
        losses.clear()
        with sae_lens_flex.accelerate():
            LanguageModelSAETrainingRunner(
                cfg, override_model=language_model, override_dataset=token_dataset
            ).run()
        return Path(cfg.checkpoint_path or ""), list(losses)

    directory, _ = run(n_checkpoints=1, checkpoint_path=str(tmp_path))
    (checkpoint,) = directory.iterdir()
    without, prefetching = (
        run(resume_from_checkpoint=str(checkpoint), prefetch_llm_batches=n)[1] for n in (False, 3)
    )
    assert len(without) > 0
    assert prefetching == without


def test_multi_sae_runner_resumes_where_its_checkpoint_was_taken(
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: dict[str, list[float]],
    tmp_path: Path,
):
    fields = runner_fields()
    del fields["hook_name"], fields["verbose"]

    def run(**more: Any) -> MultiSAETrainingRunnerConfig:
        cfg = MultiSAETrainingRunnerConfig(
            saes={
                architecture: training_sae_config(
                    architecture, normalize_activations="covariance_whitening"
                )
                for architecture in ARCHITECTURES
            },
            hook_names=HOOK_NAME,
            **fields | more,
        )
        MultiSAETrainingRunner(
            cfg, override_model=language_model, override_dataset=token_dataset
        ).run()
        return cfg

    cfg = run(n_checkpoints=1, checkpoint_path=str(tmp_path))
    (checkpoint,) = Path(cfg.checkpoint_path or "").iterdir()
    n_steps_before = int(checkpoint.name) // BATCH_SIZE
    losses = {architecture: list(step_losses[architecture]) for architecture in ARCHITECTURES}
    step_losses.clear()

    run(resume_from_checkpoint=str(checkpoint))
    for architecture in ARCHITECTURES:
        resumed_losses = step_losses[architecture]
        assert len(resumed_losses) == len(losses[architecture]) - n_steps_before
        assert resumed_losses[0] < losses[architecture][0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_sae_loads_from_a_checkpoint(
    architecture: str, trained: dict[str, SimpleNamespace]
):
    run = trained[architecture]
    loaded = TrainingSAE.load_from_disk(run.checkpoint)
    assert type(loaded) is TRAINING_CLASSES[architecture]
    assert loaded.cfg.to_dict() == json.loads(json.dumps(run.sae.cfg.to_dict()))
    assert_same(loaded.state_dict(), run.sae.state_dict())
    steps = [
        sae.training_forward_pass(
            TrainStepInput(
                sae_in=activation_batches(1)[0],
                coefficients={},
                dead_neuron_mask=None,
                n_training_steps=0,
                is_logging_step=False,
            )
        )
        for sae in (loaded, run.sae)
    ]
    assert torch.equal(steps[0].loss, steps[1].loss)
    assert torch.equal(steps[0].sae_out, steps[1].sae_out)


@pytest.mark.parametrize("source", ["checkpoint", "output"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inference_sae_reconstructs_as_the_trained_one(
    architecture: str,
    source: str,
    trained: dict[str, SimpleNamespace],
    activations: torch.Tensor,
):
    run = trained[architecture]
    loaded = SAE.load_from_disk(getattr(run, source))
    assert type(loaded) is INFERENCE_CLASSES[architecture]
    assert loaded.cfg.k == K
    assert loaded.cfg.metadata.hook_name == run.cfg.hook_name
    torch.testing.assert_close(loaded(activations), run.sae(activations))
    torch.testing.assert_close(loaded.encode(activations), run.sae.encode(activations))
    torch.testing.assert_close(loaded(activations), reconstruct(run.sae, activations, K))


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "not-rescaled"])
@pytest.mark.parametrize("apply_b_dec", [True, False], ids=["b_dec-in", "no-b_dec-in"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_inference_sae_is_the_trained_one_whatever_the_options(
    architecture: str, apply_b_dec: bool, rescale: bool, tmp_path: Path
):
    cfg = training_sae_config(
        architecture,
        apply_b_dec_to_input=apply_b_dec,
        rescale_acts_by_decoder_norm=rescale,
        decoder_init_norm=0.3,
        normalize_activations="covariance_whitening",
    )
    batches = activation_batches(20)
    trainer = make_trainer(
        TrainingSAE.from_dict(cfg.to_dict()), batches, n_batches_for_norm_estimate=4
    )
    trainer.data_provider = iter(activation_batches(4, seed=1) + batches)
    sae = trainer.fit()
    sae.save_inference_model(tmp_path)
    loaded = SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(loaded(batches[0]), sae(batches[0]))
    torch.testing.assert_close(loaded(batches[0]), reconstruct(sae, batches[0], K))


def test_final_output_of_flex_topk_is_an_ordinary_topk(trained: dict[str, SimpleNamespace]):
    assert json.loads((trained["flex_topk"].output / "cfg.json").read_text())["architecture"] == (
        "topk"
    )


def test_final_output_of_flex_topk_loads_without_this_package(
    trained: dict[str, SimpleNamespace], activations: torch.Tensor, tmp_path: Path
):
    run = trained["flex_topk"]
    save_file({"x": activations}, tmp_path / "in.safetensors")
    run_python(
        """
        import sys
        from safetensors.torch import load_file, save_file
        from sae_lens import SAE, TopKSAE

        output, directory = sys.argv[1:]
        sae = SAE.load_from_disk(output)
        assert type(sae) is TopKSAE
        assert not any(name.startswith("sae_lens_flex") for name in sys.modules)
        x = load_file(directory + "/in.safetensors")["x"]
        save_file({"y": sae(x).detach()}, directory + "/out.safetensors")
        """,
        run.output,
        tmp_path,
    )
    reconstruction = load_file(tmp_path / "out.safetensors")["y"]
    torch.testing.assert_close(reconstruction, run.sae(activations))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_runner_starts_from_a_pretrained_path(
    architecture: str,
    trained: dict[str, SimpleNamespace],
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: dict[str, list[float]],
):
    run = trained[architecture]
    runner = LanguageModelSAETrainingRunner(
        runner_config(
            training_sae_config(architecture),
            from_pretrained_path=str(run.checkpoint),
            training_tokens=10 * BATCH_SIZE,
        ),
        override_model=language_model,
        override_dataset=token_dataset,
    )
    assert type(runner.sae) is TRAINING_CLASSES[architecture]
    assert_same(runner.sae.state_dict(), run.sae.state_dict())
    sae = runner.run()
    assert not torch.equal(sae.W_dec, run.sae.W_dec)
    assert torch.tensor(step_losses[architecture]).isfinite().all()


def test_checkpoint_of_training_with_budgets_keeps_them(tmp_path: Path):
    cfg = training_sae_config("hierarchical_topk", budgets=[1, 4, K], backend="torch")
    TrainingSAE.from_dict(cfg.to_dict()).save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert loaded.cfg.budgets == [1, 4, K]
    assert loaded.cfg.backend == "torch"
