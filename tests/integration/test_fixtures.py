"""Files of version 0.1.0 load and resume: they compute, and train on, as they did then.

tests/fixtures/make_fixtures.py made them and says what they hold.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures import make_fixtures as made
from sae_lens import SAE, TrainingSAE
from sae_lens.saes.topk_sae import TopKSAE
from safetensors.torch import load_file

from sae_lens_flex import (
    FlexTopKTrainingSAE,
    HierarchicalTopKSAE,
    HierarchicalTopKTrainingSAE,
    from_topk,
)

RELATIVE = 1e-5  # of float32 sums that are taken in another order
TRAINING_CLASSES = {
    "hierarchical_topk": HierarchicalTopKTrainingSAE,
    "flex_topk": FlexTopKTrainingSAE,
}


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    return load_file(made.ROOT / "inputs.safetensors")


def expected_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "expected.safetensors")


def assert_as_expected(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], relative: float = RELATIVE
) -> None:
    """Check that all names are there, and values to `relative` of the largest one of a tensor."""
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name].to_dense(),
            value,
            rtol=relative,
            atol=relative * value.abs().max().item() / 10,
            msg=lambda message, name=name: f"{name}: {message}",
        )


def assert_adam_is(actual: dict[str, Any], checkpoint: Path) -> None:
    """Check that Adam has the moments and step counts of a checkpoint, bit by bit."""
    saved = torch.load(checkpoint / "trainer_state.pt")["optimizer"]
    assert actual["state"].keys() == saved["state"].keys()
    assert len(saved["state"]) == len(made.WEIGHTS)
    for parameter, state in saved["state"].items():
        assert actual["state"][parameter].keys() == state.keys()
        for name, value in state.items():
            assert torch.equal(actual["state"][parameter][name], value), name
    for group, saved_group in zip(actual["param_groups"], saved["param_groups"], strict=True):
        for name in ("lr", "initial_lr", "betas", "eps", "weight_decay", "params"):
            assert group[name] == saved_group[name], name


@pytest.mark.parametrize("name", made.SAES)
def test_training_sae_computes_and_trains_as_it_did(
    name: str, inputs: dict[str, torch.Tensor]
) -> None:
    path, fields = made.ROOT / "saes" / name, made.SAES[name]
    sae = TrainingSAE.load_from_disk(path / "training")
    assert type(sae) is TRAINING_CLASSES[fields["architecture"]]
    for field, value in ({"d_in": made.D_IN, "d_sae": made.D_SAE, "k": made.K} | fields).items():
        if field != "architecture":
            assert getattr(sae.cfg, field) == value, field
    results = made.computed(sae, inputs["x"])
    results |= made.step_computed(sae, inputs["x"], inputs["is_dead"])
    results.pop("step.explained_variance_fall", None)  # 0.1.0 did not report it.
    assert_as_expected(results, expected_of(path))


@pytest.mark.parametrize("form", ["inference", "training"])
@pytest.mark.parametrize("name", made.SAES)
def test_inference_sae_computes_as_it_did(
    name: str, form: str, inputs: dict[str, torch.Tensor]
) -> None:
    path, fields = made.ROOT / "saes" / name, made.SAES[name]
    sae = SAE.load_from_disk(path / form)
    is_hierarchical = fields["architecture"] == "hierarchical_topk"
    assert type(sae) is (HierarchicalTopKSAE if is_hierarchical else TopKSAE)
    expected = expected_of(path)
    assert_as_expected(
        made.computed(sae, inputs["x"]),
        {name: value for name, value in expected.items() if not name.startswith("step.")},
    )


@pytest.mark.parametrize("name", [name for name in made.SAES if name.startswith("hierarchical")])
def test_exported_sae_computes_as_it_did(name: str, inputs: dict[str, torch.Tensor]) -> None:
    path = made.ROOT / "saes" / name
    sae = SAE.load_from_disk(path / "export")
    assert type(sae) is TopKSAE
    assert sae.cfg.k == made.EXPORTED_BUDGET
    expected = expected_of(path)
    assert_as_expected(
        made.computed(sae, inputs["x"]),
        {"acts": expected["acts_at_3"], "out": expected["out_at_3"]},
    )


@pytest.mark.parametrize("name", made.SAES)
def test_saved_sae_is_trained_on_by_from_topk(name: str, inputs: dict[str, torch.Tensor]) -> None:
    path = made.ROOT / "saes" / name
    started = from_topk(SAE.load_from_disk(path / "inference"))
    expected = expected_of(path)
    with torch.no_grad():
        acts = started.encode(inputs["x"])
        results = {"acts": acts, "out": started.decode(acts)}
    assert_as_expected(results, {name: expected[name] for name in results})


@pytest.mark.parametrize("is_fused", [False, True], ids=["adam", "fused-adam"])
@pytest.mark.parametrize("name", made.TRAINERS)
def test_trainer_goes_on_as_it_did(
    name: str, is_fused: bool, inputs: dict[str, torch.Tensor]
) -> None:
    path = made.ROOT / "trainers" / name
    trainer = made.resume_trainer(path, is_fused)
    assert type(trainer.sae) is TRAINING_CLASSES[made.TRAINERS[name][0]["architecture"]]
    assert trainer.n_training_steps == made.N_STEPS_BEFORE
    assert trainer.dead_neurons.any()
    assert_adam_is(trainer.optimizer.state_dict(), path)
    losses = made.take_steps(trainer, inputs["batches"][made.N_STEPS_BEFORE :])
    assert len(losses["loss"]) == made.N_STEPS_AFTER
    assert_as_expected(losses | made.weights_of(trainer.sae), expected_of(path))


@pytest.mark.parametrize("architecture", made.RUNNERS)
def test_runner_goes_on_as_it_did(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made.ROOT / "runners" / architecture
    monkeypatch.chdir(made.REPOSITORY)
    watched = made.resume_runner(path)
    assert_adam_is(watched.optimizer_state, path)
    assert len(watched.steps) == 5
    assert_as_expected(watched.losses(), expected_of(path))
