"""A saved SAE is trained on as it was trained, or as the run's own fields say."""

import json
import shutil
import warnings
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from fixtures import make_fixtures as made
from sae_lens import SAE, HookedSAETransformer, LanguageModelSAETrainingRunner, TrainingSAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE
from safetensors.torch import load_file

from sae_lens_flex import (
    FlexTopKTrainingSAE,
    FlexTopKTrainingSAEConfig,
    HierarchicalTopKSAEConfig,
    HierarchicalTopKTrainingSAE,
    HierarchicalTopKTrainingSAEConfig,
    export_topk,
    from_topk,
)
from sae_lens_flex.cli import main

from .flows import BATCH_SIZE, CONTEXT_SIZE, D_IN, D_SAE, K, runner_config, training_sae_config

# None of them the default.
FIELDS: dict[str, Any] = {
    "budgets": [1, 3, K],
    "level_weights": [1.0, 0.5, 2.0],
    "aux_loss_coefficient": 0.125,
    "backend": "torch",
    "use_sparse_activations": False,
    "decoder_init_norm": 0.5,
}
OF_LEVELS: dict[str, Any] = {"budgets": None, "level_weights": None}
FLEX_FIELDS = {name: value for name, value in FIELDS.items() if name not in OF_LEVELS}


def make_sae(architecture: str, **sae_fields: Any) -> TrainingSAE[Any]:
    return TrainingSAE.from_dict(training_sae_config(architecture, **sae_fields).to_dict())


@pytest.fixture
def hierarchical(tmp_path: Path) -> Path:
    """A hierarchical_topk SAE as it is saved for inference."""
    make_sae("hierarchical_topk", **FIELDS).save_inference_model(tmp_path / "hierarchical")
    return tmp_path / "hierarchical"


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "cfg.json").read_text())


def known(cfg: Any, names: Any = FIELDS) -> dict[str, Any]:
    return {name: getattr(cfg, name) for name in names}


# -- TrainingSAE.load_from_disk, which `from_pretrained_path` calls


def test_every_field_of_training_is_tested_here() -> None:
    training = {field.name for field in fields(HierarchicalTopKTrainingSAEConfig)}
    assert training - {field.name for field in fields(HierarchicalTopKSAEConfig)} == set(FIELDS)
    default = HierarchicalTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K)
    for name, value in FIELDS.items():
        assert getattr(default, name) != value, name


def test_sae_saved_for_inference_gets_its_fields_of_training_back(hierarchical: Path) -> None:
    assert not FIELDS.keys() & config_of(hierarchical).keys()
    loaded = TrainingSAE.load_from_disk(hierarchical)
    assert type(loaded) is HierarchicalTopKTrainingSAE
    assert known(loaded.cfg) == FIELDS


@pytest.mark.parametrize("name", [name for name in made.SAES if name.startswith("hierarchical")])
def test_sae_saved_for_inference_trains_as_the_one_in_training(name: str) -> None:
    path = made.ROOT / "saes" / name
    loaded = TrainingSAE.load_from_disk(path / "inference")
    assert loaded.cfg == TrainingSAE.load_from_disk(path / "training").cfg
    inputs = load_file(made.ROOT / "inputs.safetensors")
    step = made.step_computed(loaded, inputs["x"], inputs["is_dead"])
    # SAELens saves the inference form with the decoder's norms folded: the same function of x, but
    # of other weights, so the weights' gradients are others.
    expected = load_file(path / "expected.safetensors")
    names = [name for name in expected if name.startswith("step.") and "gradient" not in name]
    assert {"step.loss", "step.mse_loss", "step.sae_out"} < set(names)
    for name in names:
        torch.testing.assert_close(step[name], expected[name], msg=name)


def test_runner_trains_a_saved_sae_on_with_its_own_fields(
    hierarchical: Path, language_model: HookedSAETransformer, token_dataset: Dataset
) -> None:
    # The SAE that a runner loads never sees cfg.sae: README says so, and what to do.
    cfg = runner_config(
        training_sae_config("hierarchical_topk", budgets=[2, K]),
        from_pretrained_path=str(hierarchical),
        training_tokens=2 * BATCH_SIZE,
    )
    runner = LanguageModelSAETrainingRunner(
        cfg, override_model=language_model, override_dataset=token_dataset
    )
    assert known(runner.sae.cfg) == FIELDS
    assert known(runner.run().cfg) == FIELDS


def test_flex_config_gets_its_fields_of_training_back() -> None:
    saved = training_sae_config("flex_topk", **FLEX_FIELDS).get_inference_sae_cfg_dict()
    assert saved["architecture"] == "topk"
    cfg = FlexTopKTrainingSAEConfig.from_dict(saved | {"architecture": "flex_topk"})
    assert known(cfg, FLEX_FIELDS) == FLEX_FIELDS


def test_fields_of_another_architecture_are_not_taken() -> None:
    saved = training_sae_config("flex_topk", **FLEX_FIELDS).get_inference_sae_cfg_dict()
    cfg = HierarchicalTopKTrainingSAEConfig.from_dict(saved | {"architecture": "hierarchical_topk"})
    default = HierarchicalTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K)
    assert known(cfg) == known(default)


def test_fields_beside_the_metadata_count(hierarchical: Path) -> None:
    beside = {"budgets": [2, K], "level_weights": [1.0, 3.0], "aux_loss_coefficient": 0.0}
    cfg = HierarchicalTopKTrainingSAEConfig.from_dict(config_of(hierarchical) | beside)
    assert known(cfg) == FIELDS | beside


def edit_details(path: Path, details: Any) -> None:
    cfg = config_of(path)
    cfg["metadata"]["training_architecture_details"] = details
    (path / "cfg.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize(
    ("name", "details"),
    [
        ("training_architecture_details", [1]),
        ("training_architecture_details", None),
        ("budgets", {"budgets": [1, 2]}),
        ("budgets", {"budgets": "8"}),
        ("level_weights", {"level_weights": [1, 2]}),
        ("level_weights", {"budgets": [1, K], "level_weights": [0, 0]}),
        ("backend", {"backend": "cuda"}),
        ("aux_loss_coefficient", {"aux_loss_coefficient": -1}),
    ],
    ids=str,
)
def test_impossible_fields_in_the_metadata_are_refused(
    name: str, details: Any, hierarchical: Path
) -> None:
    edit_details(hierarchical, details)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        TrainingSAE.load_from_disk(hierarchical)
    saved = SAE.load_from_disk(hierarchical)
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        from_topk(saved)


def test_unknown_fields_in_the_metadata_are_ignored(hierarchical: Path) -> None:
    edit_details(hierarchical, FIELDS | {"from_a_later_version": 1, "k": 3})
    for sae in (
        TrainingSAE.load_from_disk(hierarchical),
        from_topk(SAE.load_from_disk(hierarchical)),
    ):
        assert known(sae.cfg) == FIELDS
        assert sae.cfg.k == K


# -- from_topk


@pytest.mark.parametrize("form", ["in training", "saved for inference"])
def test_from_topk_keeps_the_fields_of_a_hierarchical_sae(form: str, hierarchical: Path) -> None:
    source = (
        make_sae("hierarchical_topk", **FIELDS)
        if form == "in training"
        else SAE.load_from_disk(hierarchical)
    )
    assert known(from_topk(source).cfg) == FIELDS
    # The level weights are those of the SAE's own budgets.
    told = (
        r"^budgets is .*level_weights is left out.*trained with level_weights \[1\.0, 0\.5, 2\.0\]"
    )
    given = {"budgets": [2, 5, K], "aux_loss_coefficient": 0.0}
    with pytest.warns(UserWarning, match=told) as caught:
        assert known(from_topk(source, **given).cfg) == FIELDS | given | {"level_weights": None}
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=told):
        assert known(from_topk(source, budgets=None).cfg, OF_LEVELS) == OF_LEVELS
    warnings.simplefilter("error")  # pytest restores the filters.
    assert known(from_topk(source, budgets=tuple(FIELDS["budgets"])).cfg) == FIELDS
    given = {"budgets": [2, 5, K], "level_weights": None}
    assert known(from_topk(source, **given).cfg) == FIELDS | given
    given = {"level_weights": [0.0, 0.0, 3.0]}
    assert known(from_topk(source, **given).cfg) == FIELDS | given
    given = {"budgets": [2, K], "level_weights": [3.0, 1.0]}
    assert known(from_topk(source, **given).cfg) == FIELDS | given


def test_from_topk_sees_what_was_edited_in_training() -> None:
    source = make_sae("hierarchical_topk", **FIELDS)
    source.cfg.budgets, source.cfg.level_weights = [4, K], [2.0, 1.0]
    assert known(from_topk(source).cfg, OF_LEVELS) == {
        "budgets": [4, K],
        "level_weights": [2.0, 1.0],
    }


def test_from_topk_keeps_the_normalization_of_a_hierarchical_sae() -> None:
    path = made.ROOT / "saes" / "hierarchical_layer_norm" / "inference"
    cfg = from_topk(SAE.load_from_disk(path)).cfg
    assert (cfg.normalize_activations, cfg.aux_loss_coefficient) == ("layer_norm", 0.0)
    assert cfg.budgets == [2, 8]


@pytest.mark.parametrize("form", ["in training", "saved for inference", "exported"])
def test_from_topk_keeps_all_but_the_budgets_of_others_of_this_package(
    form: str, hierarchical: Path, tmp_path: Path
) -> None:
    if form == "exported":
        export_topk(SAE.load_from_disk(hierarchical), tmp_path / "sae", budget=3)
        source = SAE.load_from_disk(tmp_path / "sae")
    else:
        source = make_sae("flex_topk", **FLEX_FIELDS)
        if form == "saved for inference":
            source.save_inference_model(tmp_path / "sae")
            source = SAE.load_from_disk(tmp_path / "sae")
    cfg = from_topk(source).cfg
    assert known(cfg) == FLEX_FIELDS | OF_LEVELS


def test_from_topk_keeps_the_coefficient_of_a_saved_topk_sae(tmp_path: Path) -> None:
    sae = make_sae("topk", aux_loss_coefficient=0.125, decoder_init_norm=0.5)
    assert type(sae) is TopKTrainingSAE
    sae.save_inference_model(tmp_path)
    cfg = from_topk(SAE.load_from_disk(tmp_path)).cfg
    default = HierarchicalTopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K)
    assert known(cfg) == known(default) | {"aux_loss_coefficient": 0.125}


# -- the command line


@pytest.fixture
def train(
    hf_model_dir: Path,
    text_dir: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., SimpleNamespace]:
    """Train on the command line for two steps; return its output and the SAE that it trained."""
    runs: list[Any] = []
    run = LanguageModelSAETrainingRunner.run

    def recorded_run(self: Any) -> Any:
        runs.append(SimpleNamespace(runner=self, weights=self.sae.W_dec.detach().clone()))
        return run(self)

    monkeypatch.setattr(LanguageModelSAETrainingRunner, "run", recorded_run)

    def train(path: Path, flags: str = "") -> SimpleNamespace:
        runs.clear()
        capfd.readouterr()
        arguments = (
            f"train --from_pretrained_path {path} {flags} "
            f"--model_class_name AutoModelForCausalLM --model_name {hf_model_dir} "
            f"--hook_name transformer.h.0 --dataset_path {text_dir} --context_size {CONTEXT_SIZE} "
            f"--store_batch_size_prompts 8 --n_batches_in_buffer 4 --verbose false "
            f"--train_batch_size_tokens {BATCH_SIZE} --training_tokens {2 * BATCH_SIZE} "
            f"--output_path {tmp_path / 'trained'} --log_to_wandb false"
        )
        try:
            code = main(arguments.split())
        except SystemExit as stop:
            code = stop.code
        err = capfd.readouterr().err
        if not runs:
            return SimpleNamespace(code=code, err=err)
        (watched,) = runs
        return SimpleNamespace(
            code=code,
            err=err,
            sae=watched.runner.sae,
            started_with=watched.weights,
            recorded=json.loads((tmp_path / "trained" / "runner_cfg.json").read_text())["sae"],
        )

    return train


def test_command_line_trains_a_saved_sae_on_as_it_was_trained(train, hierarchical: Path) -> None:
    result = train(hierarchical)
    assert result.code == 0, result.err
    assert type(result.sae) is HierarchicalTopKTrainingSAE
    assert known(result.sae.cfg) == FIELDS
    assert torch.equal(result.started_with, SAE.load_from_disk(hierarchical).W_dec)
    assert {name: result.recorded[name] for name in FIELDS} == FIELDS
    assert (result.recorded["d_sae"], result.recorded["k"]) == (D_SAE, K)


def test_command_line_applies_the_flags_that_are_given(train, hierarchical: Path) -> None:
    with pytest.warns(UserWarning, match=rf"^budgets is \[2, {K}\] and level_weights is left out"):
        result = train(
            hierarchical,
            f"--architecture hierarchical_topk --d_in {D_IN} --d_sae {D_SAE} -k {K} "
            f"--budgets 2 {K} --aux_loss_coefficient 0 --backend auto --normalize_activations none",
        )
    assert result.code == 0, result.err
    given = {"budgets": [2, K], "aux_loss_coefficient": 0.0, "backend": "auto"}
    given["level_weights"] = None  # Those of the saved SAE are of other budgets.
    assert known(result.sae.cfg) == FIELDS | given
    assert {name: result.recorded[name] for name in FIELDS} == FIELDS | given
    assert torch.equal(result.started_with, SAE.load_from_disk(hierarchical).W_dec)


def test_command_line_names_budgets_of_another_architecture(train, tmp_path: Path) -> None:
    make_sae("flex_topk").save_inference_model(tmp_path / "flex")
    result = train(tmp_path / "flex", "--architecture flex_topk --budgets 2 4")
    assert result.code != 0
    assert "--budgets is a flag of hierarchical_topk, not of --architecture flex_topk" in result.err


def test_command_line_keeps_level_weights_with_the_same_budgets(train, hierarchical: Path) -> None:
    result = train(hierarchical, f"--budgets {' '.join(map(str, FIELDS['budgets']))}")
    assert result.code == 0, result.err
    assert known(result.sae.cfg) == FIELDS


def test_command_line_applies_level_weights(train, hierarchical: Path) -> None:
    result = train(hierarchical, "--level_weights 0 1 3")
    assert result.code == 0, result.err
    assert known(result.sae.cfg) == FIELDS | {"level_weights": [0.0, 1.0, 3.0]}
    result = train(hierarchical, f"--budgets 2 {K} --level_weights 1 3")
    assert result.code == 0, result.err
    expected = FIELDS | {"budgets": [2, K], "level_weights": [1.0, 3.0]}
    assert known(result.sae.cfg) == expected


@pytest.mark.parametrize("decoder_init_norm", [None, 0.5])
@pytest.mark.parametrize("normalization", ["layer_norm", "constant_norm_rescale"])
def test_command_line_keeps_a_normalization_without_auxiliary_loss(
    normalization: str, decoder_init_norm: float | None, train, tmp_path: Path
) -> None:
    sae_fields = {
        "normalize_activations": normalization,
        "aux_loss_coefficient": 0.0,
        "rescale_acts_by_decoder_norm": False,
        "apply_b_dec_to_input": False,
        "decoder_init_norm": decoder_init_norm,
        **OF_LEVELS,
    }
    make_sae("hierarchical_topk", **sae_fields).save_inference_model(tmp_path / "sae")
    result = train(tmp_path / "sae")
    assert result.code == 0, result.err
    assert known(result.sae.cfg, sae_fields) == sae_fields
    result = train(tmp_path / "sae", "--aux_loss_coefficient 1")
    assert result.code == 2
    assert "aux_loss_coefficient is 1.0" in result.err


@pytest.mark.parametrize("flags", ["", "--architecture flex_topk"], ids=["left-out", "given"])
@pytest.mark.parametrize("form", ["inference", "training"])
def test_command_line_trains_a_flex_sae_on(form: str, flags: str, train, tmp_path: Path) -> None:
    sae = make_sae("flex_topk", **FLEX_FIELDS)
    save = sae.save_inference_model if form == "inference" else sae.save_model
    save(tmp_path / "sae")
    result = train(tmp_path / "sae", flags + " --aux_loss_coefficient 0.75")
    assert result.code == 0, result.err
    assert type(result.sae) is FlexTopKTrainingSAE
    assert known(result.sae.cfg, FLEX_FIELDS) == FLEX_FIELDS | {"aux_loss_coefficient": 0.75}
    assert torch.equal(result.started_with, SAE.load_from_disk(tmp_path / "sae").W_dec)


def test_command_line_starts_from_a_topk_sae(train, tmp_path: Path) -> None:
    make_sae("topk", aux_loss_coefficient=0.125).save_inference_model(tmp_path / "sae")
    result = train(tmp_path / "sae", f"--architecture hierarchical_topk --budgets 4 {K}")
    assert result.code == 0, result.err
    assert type(result.sae) is HierarchicalTopKTrainingSAE
    assert (result.sae.cfg.budgets, result.sae.cfg.aux_loss_coefficient) == ([4, K], 0.125)
    assert torch.equal(result.started_with, SAE.load_from_disk(tmp_path / "sae").W_dec)


@pytest.mark.parametrize("architecture", ["flex_batchtopk", "flex_matryoshka_batchtopk"])
def test_command_line_trains_a_checkpoint_of_a_batch_architecture_on(
    architecture: str, train, tmp_path: Path
) -> None:
    widths = {"matryoshka_widths": [16, D_SAE]} if "matryoshka" in architecture else {}
    saved = make_sae(architecture, topk_threshold_lr=0.02, **widths)
    saved.save_model(tmp_path / "sae")
    size = f"--d_in {D_IN} --d_sae {D_SAE} --k {K}"
    result = train(tmp_path / "sae", size)
    assert result.code == 0, result.err
    assert type(result.sae) is type(saved)
    torch.testing.assert_close(result.started_with, saved.W_dec.detach())
    assert result.recorded["architecture"] == architecture
    assert result.recorded["topk_threshold_lr"] == 0.02
    for flags, words in (
        (f"--d_in {D_IN} --d_sae {D_SAE} --k 4", "k is 4.0, expected 8"),
        (f"{size} --topk_threshold_lr 0.5", "topk_threshold_lr is 0.5, expected 0.02"),
        (f"{size} --architecture topk", f"architecture is 'topk', expected {architecture!r}"),
    ):
        result = train(tmp_path / "sae", flags)
        assert (result.code, words in result.err) == (2, True), result.err


def test_command_line_does_not_train_another_architecture_than_is_said(
    train, tmp_path: Path
) -> None:
    make_sae("flex_batchtopk").save_inference_model(tmp_path / "sae")
    flags = f"--architecture flex_batchtopk --d_in {D_IN} --d_sae {D_SAE} --k {K}"
    result = train(tmp_path / "sae", flags)
    assert result.code == 2
    assert "architecture is 'flex_batchtopk', expected 'jumprelu'" in result.err


def test_command_line_leaves_saelens_its_own(train, tmp_path: Path) -> None:
    make_sae("topk").save_inference_model(tmp_path / "sae")
    result = train(tmp_path / "sae", f"--architecture topk --d_in {D_IN} --d_sae {D_SAE} --k {K}")
    assert result.code == 0, result.err
    assert type(result.sae) is TopKTrainingSAE


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--d_in 17", ["d_in is 17, expected 16"]),
        ("--d_sae 32", ["d_sae is 32, expected 64"]),
        ("--k 4", ["k is 4, expected 8"]),
        ("-k 4 --budgets 1 4", ["k is 4, expected 8"]),
        ("--k many", ["k is many, expected 8"]),
        ("--normalize_activations layer_norm", ["normalize_activations is layer_norm", "none"]),
        ("--rescale_acts_by_decoder_norm false", ["rescale_acts_by_decoder_norm is False"]),
        ("--apply_b_dec_to_input false", ["apply_b_dec_to_input is False, expected", "True"]),
        ("--reshape_activations hook_z", ["reshape_activations is 'hook_z'"]),
        ("--sae.dtype bfloat16", ["dtype is 'bfloat16', expected", "'float32'"]),
        ("--budgets 1 4", ["budgets is [1, 4]", "k (8)"]),
        ("--backend cuda", ["backend"]),
        ("--architecture topk", ["architecture is 'topk', expected 'hierarchical_topk'"]),
        ("--architecture standard", ["architecture is 'standard'"]),
        ("--d 16", ["--d is no flag"]),
        ("--nonsense 1", ["--nonsense"]),
    ],
)
def test_command_line_refuses_what_the_saved_sae_is_not(
    flags: str, words: list[str], train, hierarchical: Path
) -> None:
    result = train(hierarchical, flags)
    assert result.code == 2
    assert len(result.err.splitlines()) == 1, result.err
    for word in words:
        assert word in result.err, result.err


def test_command_line_refuses_what_is_no_saved_topk_sae(
    train, hierarchical: Path, tmp_path
) -> None:
    StandardSAE(StandardSAEConfig(d_in=D_IN, d_sae=D_SAE)).save_model(tmp_path / "standard")
    broken = Path(shutil.copytree(hierarchical, tmp_path / "broken"))
    (broken / "cfg.json").write_text("{nonsense")
    for path, word in (
        (tmp_path / "missing", "from_pretrained_path"),
        (tmp_path / "standard", "StandardSAE"),
        (broken, str(broken)),
    ):
        result = train(path, "--architecture hierarchical_topk")
        assert result.code == 2
        assert len(result.err.splitlines()) == 1, result.err
        assert word in result.err, result.err
