"""SAELens's training runners, on both architectures and with SAELens's options."""

import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import (
    SAE,
    HookedSAETransformer,
    LanguageModelSAETrainingRunner,
    MultiSAETrainingRunner,
    MultiSAETrainingRunnerConfig,
    TrainingSAEConfig,
)
from sae_lens.synthetic import (
    SyntheticModelConfig,
    SyntheticSAERunner,
    SyntheticSAERunnerConfig,
)
from sae_lens.training.activation_scaler import ActivationScaler
from torch._dynamo.utils import counters

import sae_lens_flex
from sae_lens_flex import (
    FlexTopKTrainingSAE,
    FlexTopKTrainingSAEConfig,
    HierarchicalTopKTrainingSAE,
    HierarchicalTopKTrainingSAEConfig,
)

from .flows import (
    ARCHITECTURES,
    BATCH_SIZE,
    D_IN,
    D_SAE,
    HOOK_NAME,
    K,
    assert_losses_fall,
    explained_variance,
    runner_config,
    runner_fields,
    training_sae_config,
)

SAE_CLASSES = {
    "hierarchical_topk": HierarchicalTopKTrainingSAE,
    "flex_topk": FlexTopKTrainingSAE,
}
CONFIG_CLASSES = {
    "hierarchical_topk": HierarchicalTopKTrainingSAEConfig,
    "flex_topk": FlexTopKTrainingSAEConfig,
}
StepLosses = dict[str, list[float]]


def run(
    sae: TrainingSAEConfig, model: HookedSAETransformer, dataset: Dataset, **fields: Any
) -> Any:
    return LanguageModelSAETrainingRunner(
        runner_config(sae, **fields), override_model=model, override_dataset=dataset
    ).run()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_runner_trains_from_a_config_object(
    architecture: str,
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: StepLosses,
):
    cfg = CONFIG_CLASSES[architecture](d_in=D_IN, d_sae=D_SAE, k=K)
    sae = run(cfg, language_model, token_dataset)
    assert type(sae) is SAE_CLASSES[architecture]
    assert sae.cfg.metadata.hook_name == HOOK_NAME
    assert_losses_fall(step_losses[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_runner_trains_from_a_config_dictionary(
    architecture: str,
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: StepLosses,
):
    budgets = {"budgets": [1, 2, K]} if architecture == "hierarchical_topk" else {}
    cfg = TrainingSAEConfig.from_dict(
        {"architecture": architecture, "d_in": D_IN, "d_sae": D_SAE, "k": K} | budgets
    )
    sae = run(cfg, language_model, token_dataset)
    assert type(sae) is SAE_CLASSES[architecture]
    assert getattr(sae.cfg, "budgets", None) == budgets.get("budgets")
    assert_losses_fall(step_losses[architecture])


def test_hierarchical_training_reconstructs_at_every_budget_better_than_topk(
    language_model: HookedSAETransformer, token_dataset: Dataset, activations: torch.Tensor
):
    saes = {}
    for architecture in ARCHITECTURES:
        torch.manual_seed(0)
        cfg = training_sae_config(architecture)
        saes[architecture] = run(
            cfg, language_model, token_dataset, training_tokens=150 * BATCH_SIZE
        )
    hierarchical, topk = (
        [explained_variance(saes[architecture], activations, budget) for budget in (1, 2, 4)]
        for architecture in ARCHITECTURES
    )
    assert hierarchical == sorted(hierarchical)
    assert all(ours > theirs for ours, theirs in zip(hierarchical, topk, strict=True))


def test_multi_sae_runner_trains_both_architectures_on_one_model(
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: StepLosses,
    activations: torch.Tensor,
    tmp_path: Path,
):
    fields = runner_fields()
    del fields["hook_name"], fields["verbose"]
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "hierarchical": training_sae_config("hierarchical_topk"),
            "flex": training_sae_config(
                "flex_topk", normalize_activations="expected_average_only_in"
            ),
        },
        hook_names={"hierarchical": HOOK_NAME, "flex": "blocks.1.hook_resid_post"},
        **fields | {"output_path": str(tmp_path)},
    )
    saes = MultiSAETrainingRunner(
        cfg, override_model=language_model, override_dataset=token_dataset
    ).run()
    assert type(saes["hierarchical"]) is HierarchicalTopKTrainingSAE
    assert type(saes["flex"]) is FlexTopKTrainingSAE
    for architecture in ARCHITECTURES:
        assert_losses_fall(step_losses[architecture])
    for name, sae in saes.items():
        loaded = SAE.load_from_disk(tmp_path / name)
        torch.testing.assert_close(loaded(activations), sae(activations))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_synthetic_runner_trains_evaluates_and_saves(
    architecture: str, step_losses: StepLosses, tmp_path: Path
):
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(
            num_features=32, hidden_dim=D_IN, orthogonalization=None, seed=0
        ),
        sae=training_sae_config(architecture),
        training_samples=60 * BATCH_SIZE,
        batch_size=BATCH_SIZE,
        lr=3e-3,
        checkpoint_path=None,
        output_path=str(tmp_path),
        eval_samples=4 * BATCH_SIZE,
        logger=runner_fields()["logger"],
    )
    result = SyntheticSAERunner(cfg).run()
    assert type(result.sae) is SAE_CLASSES[architecture]
    assert_losses_fall(step_losses[architecture])
    assert result.final_eval is not None
    assert 0 < result.final_eval.sae_l0 <= K
    x = torch.randn(32, D_IN)
    torch.testing.assert_close(SAE.load_from_disk(tmp_path)(x), result.sae(x))


@pytest.mark.parametrize(
    "normalization",
    [
        "none",
        "expected_average_only_in",
        "covariance_whitening",
        "layer_norm",
        "constant_norm_rescale",
    ],
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_runner_trains_with_every_normalization(
    architecture: str,
    normalization: str,
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: StepLosses,
    activations: torch.Tensor,
):
    has_no_aux_loss = normalization in ("layer_norm", "constant_norm_rescale")
    cfg = training_sae_config(
        architecture,
        normalize_activations=normalization,
        aux_loss_coefficient=0.0 if has_no_aux_loss else 1.0,
    )
    sae = run(
        cfg,
        language_model,
        token_dataset,
        training_tokens=80 * BATCH_SIZE,
        dead_feature_window=5,
    )
    assert_losses_fall(step_losses[architecture])
    # The runner has folded the trainer's estimates into the weights, so the SAE takes raw
    # activations.
    assert explained_variance(sae, activations, K) > 0.5


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast_trains(
    architecture: str,
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: StepLosses,
):
    sae = run(training_sae_config(architecture), language_model, token_dataset, autocast=True)
    assert sae.W_dec.dtype == torch.float32
    assert_losses_fall(step_losses[architecture])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bfloat16_parameters_train_and_are_saved_as_such(
    architecture: str,
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: StepLosses,
    tmp_path: Path,
):
    sae = run(
        training_sae_config(architecture, dtype="bfloat16"),
        language_model,
        token_dataset,
        dtype="bfloat16",
        output_path=str(tmp_path),
    )
    assert sae.W_dec.dtype == torch.bfloat16
    assert_losses_fall(step_losses[architecture])
    assert SAE.load_from_disk(tmp_path).W_dec.dtype == torch.bfloat16


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_compiled_training_takes_the_same_steps(
    language_model: HookedSAETransformer, token_dataset: Dataset, step_losses: StepLosses
):
    counters.clear()
    for compile_sae in (False, True):
        assert not counters["frames"]["total"]
        torch.manual_seed(0)
        run(
            training_sae_config("hierarchical_topk"),
            language_model,
            token_dataset,
            compile_sae=compile_sae,
            dead_feature_window=5,
        )
    assert counters["frames"]["total"]  # It was compiled; the step itself is called as it is.
    losses = torch.tensor(step_losses["hierarchical_topk"]).view(2, -1)
    assert_losses_fall(losses[1].tolist())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_heads_output_trains_and_attaches(
    architecture: str,
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: StepLosses,
    tmp_path: Path,
):
    hook_name = "blocks.0.attn.hook_z"
    trained_sae = run(
        training_sae_config(architecture, reshape_activations="hook_z"),
        language_model,
        token_dataset,
        hook_name=hook_name,
        output_path=str(tmp_path),
    )
    assert_losses_fall(step_losses[architecture])
    sae = SAE.load_from_disk(tmp_path)
    tokens = torch.as_tensor(token_dataset[:4]["tokens"])
    expected = language_model.run_with_hooks(
        tokens,
        fwd_hooks=[(hook_name, lambda z, hook: trained_sae(z.flatten(-2)).view_as(z))],
    )
    torch.testing.assert_close(language_model.run_with_saes(tokens, saes=[sae]), expected)


def test_prefetching_in_a_thread_trains(
    language_model: HookedSAETransformer, token_dataset: Dataset, step_losses: StepLosses
):
    run(
        training_sae_config("hierarchical_topk"),
        language_model,
        token_dataset,
        prefetch_llm_batches=True,
    )
    assert_losses_fall(step_losses["hierarchical_topk"])


def weights_of_runs(run_once: Callable[[], Any], *, with_accelerate: Sequence[bool]) -> list[Any]:
    """Return the state of the SAE, or of the SAEs by name, of runs from one random state."""
    states = []
    for is_accelerated in with_accelerate:
        torch.manual_seed(0)
        with sae_lens_flex.accelerate() if is_accelerated else nullcontext():
            trained = run_once()
        saes = trained if isinstance(trained, dict) else {"": trained}
        states.append({name: sae.state_dict() for name, sae in saes.items()})
    return states


@pytest.mark.parametrize("architecture", ["topk", *ARCHITECTURES])
@pytest.mark.parametrize("prefetch", [False, 3])
def test_accelerated_run_trains_the_same_sae(
    architecture: str,
    prefetch: bool | int,
    language_model: HookedSAETransformer,
    token_dataset: Dataset,
    step_losses: StepLosses,
):
    plain, accelerated = weights_of_runs(
        lambda: run(
            training_sae_config(architecture),
            language_model,
            token_dataset,
            prefetch_llm_batches=prefetch,
            exclude_special_tokens=[0],  # Chunks of activations differ in size.
        ),
        with_accelerate=(False, True),
    )
    torch.testing.assert_close(accelerated, plain, rtol=0, atol=1e-4)
    losses = torch.tensor(step_losses[architecture]).view(2, -1)
    assert_losses_fall(losses[1].tolist())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=0)


def test_accelerated_run_of_several_saes_trains_the_same_ones(
    language_model: HookedSAETransformer, token_dataset: Dataset
):
    fields = runner_fields() | {"prefetch_llm_batches": True}
    del fields["hook_name"], fields["verbose"]
    cfg = MultiSAETrainingRunnerConfig(
        saes={
            "hierarchical": training_sae_config("hierarchical_topk"),
            "topk": training_sae_config("topk"),
        },
        hook_names={"hierarchical": HOOK_NAME, "topk": "blocks.1.hook_resid_post"},
        **fields,
    )
    plain, accelerated = weights_of_runs(
        lambda: MultiSAETrainingRunner(
            cfg, override_model=language_model, override_dataset=token_dataset
        ).run(),
        with_accelerate=(False, True),
    )
    assert accelerated.keys() == {"hierarchical", "topk"}
    torch.testing.assert_close(accelerated, plain, rtol=0, atol=1e-4)


def hugging_face_fields(hf_model_dir: Path) -> dict[str, Any]:
    return runner_fields() | {
        "model_class_name": "AutoModelForCausalLM",
        "model_name": str(hf_model_dir),
    }


def test_accelerated_run_on_hugging_faces_model_trains_the_same_sae(
    hf_model_dir: Path, token_dataset: Dataset, monkeypatch: pytest.MonkeyPatch
):
    # Inductor takes half a minute, and what it makes is not tested here.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    fields = hugging_face_fields(hf_model_dir)
    fields["hook_name"] = "transformer.h.1"
    compile_llm = iter((False, True))
    evaluated: list[dict[str, Any]] = []

    def run_once() -> Any:
        cfg = runner_config(
            training_sae_config("hierarchical_topk"),
            **fields,
            compile_llm=next(compile_llm),
            exclude_special_tokens=[0],
        )
        runner = LanguageModelSAETrainingRunner(cfg, override_dataset=token_dataset)
        sae = runner.run()
        evaluated.append(
            runner.evaluator(sae, runner.activations_store, ActivationScaler())  # cross-entropy too
        )
        return sae

    counters.clear()
    plain, accelerated = weights_of_runs(run_once, with_accelerate=(False, True))
    assert counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(accelerated, plain, rtol=0, atol=1e-4)
    assert "ce_loss_score" in evaluated[0]["model_performance_preservation"]
    assert evaluated[1].keys() == evaluated[0].keys()
    for group, metrics in evaluated[0].items():
        assert evaluated[1][group] == pytest.approx(metrics, rel=1e-3)


def test_accelerated_run_of_saes_at_several_modules_trains_the_same_ones(
    hf_model_dir: Path, token_dataset: Dataset
):
    fields = hugging_face_fields(hf_model_dir)
    del fields["hook_name"], fields["verbose"]
    hooks = {"layer": "transformer.h.1", "inside": "transformer.h.0.mlp"}
    cfg = MultiSAETrainingRunnerConfig(
        saes={name: training_sae_config("flex_topk") for name in hooks},
        hook_names=hooks,
        prefetch_llm_batches=True,
        **fields,
    )
    plain, accelerated = weights_of_runs(
        lambda: MultiSAETrainingRunner(cfg, override_dataset=token_dataset).run(),
        with_accelerate=(False, True),
    )
    assert accelerated.keys() == set(hooks)
    torch.testing.assert_close(accelerated, plain, rtol=0, atol=1e-4)


def test_final_output_records_how_it_was_trained(trained: dict[str, Any]):
    for architecture, run_ in trained.items():
        metadata = json.loads((run_.output / "cfg.json").read_text())["metadata"]
        assert metadata["training_architecture"] == architecture
        assert metadata["training_architecture_details"]["aux_loss_coefficient"] == 1.0
