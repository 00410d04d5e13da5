"""A run that goes on from a checkpoint says which settings of the config are not taken."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from sae_lens import SAETrainer

import sae_lens_flex
from sae_lens_flex.acceleration.resumption import check_checkpoint

from .trainers import BATCH, new_trainer, take_steps

COSINE = {"lr_scheduler_name": "cosineannealing", "lr_warm_up_steps": 0, "lr_decay_steps": 0}
CONSTANT = {"lr_scheduler_name": "constant"}
OF_SCHEDULE = r"the schedule of the learning rate is of other lr_scheduler_name"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path)


def save(path: Path, **fields: Any) -> Path:
    trainer = new_trainer(**fields)
    take_steps(trainer, 2)
    trainer.save_checkpoint("48", base_path=path)
    return path / "48"


def resumed(checkpoint: Path, *, accelerated: bool = True, **fields: Any) -> SAETrainer[Any, Any]:
    trainer = new_trainer(accelerated=accelerated, **fields)
    if accelerated:
        with sae_lens_flex.accelerate():
            trainer.load_trainer_state(checkpoint)
    else:
        trainer.load_trainer_state(checkpoint)
    return trainer


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 5e-4}, r"lr is 0\.001, not 0\.0005"),
        ({"adam_beta1": 0.5}, r"adam_beta1 is 0\.9, not 0\.5"),
        ({"adam_beta2": 0.5}, r"adam_beta2 is 0\.999, not 0\.5"),
        ({"lr_warm_up_steps": 7}, OF_SCHEDULE),
        ({"lr_decay_steps": 400}, OF_SCHEDULE),
        ({"total_training_samples": 2000 * BATCH}, OF_SCHEDULE),  # when the decay begins
        ({"lr": 5e-4, "adam_beta1": 0.5}, r"lr is .*; adam_beta1 is 0\.9, not 0\.5$"),
    ],
    ids=str,
)
def test_what_the_checkpoint_replaces_is_named_and_is_what_trains(
    fields, message, checkpoint
) -> None:
    with pytest.warns(UserWarning, match=rf"^training goes on with the checkpoint's .*{message}"):
        trainer = resumed(checkpoint, **fields)
    # So it is: the optimizer and its schedule are those of the run that was stopped.
    expected = resumed(checkpoint)
    expected.cfg = trainer.cfg
    for each in (trainer, expected):
        take_steps(each, 3)
    assert trainer.optimizer.param_groups[0]["lr"] == expected.optimizer.param_groups[0]["lr"]
    assert trainer.optimizer.param_groups[0]["betas"] == (0.9, 0.999)


@pytest.mark.parametrize("changed", [{"lr_end": 1e-5}, {"total_training_samples": 2000 * BATCH}])
def test_a_cosine_of_another_end_is_told(changed, tmp_path) -> None:
    checkpoint = save(tmp_path, **COSINE)
    with pytest.warns(UserWarning, match=OF_SCHEDULE):
        resumed(checkpoint, **{**COSINE, **changed})


@pytest.mark.parametrize("fields", [COSINE, COSINE | CONSTANT | {"lr_warm_up_steps": 3}], ids=str)
def test_a_schedule_of_other_parts_is_refused_where_saelens_can_load_it(fields, tmp_path) -> None:
    checkpoint = save(tmp_path, **COSINE | CONSTANT)
    resumed(checkpoint, accelerated=False, **fields)
    with pytest.raises(ValueError, match=r"^the schedule of the learning rate has other parts"):
        resumed(checkpoint, **fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"lr_warm_up_steps": 0},
        {"lr_decay_steps": 0},
        {"lr_scheduler_name": "cosineannealing", "lr_decay_steps": 0},
    ],
    ids=str,
)
def test_a_schedule_that_cannot_be_loaded_is_refused_by_name(fields, checkpoint) -> None:
    message = "^the schedule of the learning rate has other parts in the checkpoint '.*48' than"
    with pytest.raises(ValueError, match=message):
        resumed(checkpoint, **fields)


def test_other_errors_stay_what_they_are(checkpoint) -> None:
    (checkpoint / "trainer_state.pt").write_bytes(b"")
    with pytest.raises(EOFError):
        resumed(checkpoint)


@pytest.mark.parametrize(
    "fields", [{}, {"dead_feature_window": 3}, {"feature_sampling_window": 8}], ids=str
)
def test_the_same_settings_and_those_of_the_config_are_not_told(fields, checkpoint) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed(checkpoint, **fields)


def test_nothing_is_told_outside_of_the_block(checkpoint) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed(checkpoint, accelerated=False, lr=5e-4)


def test_a_longer_run_is_told_where_the_checkpoints_rate_ends(tmp_path) -> None:
    fields = {"lr_decay_steps": 4, "total_training_samples": 10 * BATCH}
    checkpoint = save(tmp_path, **fields)
    message = "^the learning rate is 0 from step 10 on, where .* training_tokens makes 12 steps"
    with pytest.warns(UserWarning, match=OF_SCHEDULE), pytest.warns(UserWarning, match=message):
        trainer = resumed(checkpoint, **fields | {"total_training_samples": 12 * BATCH})
    take_steps(trainer, 7)
    assert (trainer.n_training_steps, trainer.optimizer.param_groups[0]["lr"] > 0) == (9, True)
    take_steps(trainer, 1)
    assert (trainer.n_training_steps, trainer.optimizer.param_groups[0]["lr"]) == (10, 0)


@pytest.mark.parametrize("n_steps", [0, 1, 2])
def test_a_run_without_a_step_to_take_says_so(n_steps, tmp_path) -> None:
    fields = {"lr_warm_up_steps": 0, "lr_decay_steps": 0}
    checkpoint = save(tmp_path, **fields)
    message = (
        f"^no step is left to take: training_tokens is {n_steps * BATCH}, which counts the "
        f"{2 * BATCH} tokens"
    )
    with pytest.warns(UserWarning, match=message):
        resumed(checkpoint, total_training_samples=n_steps * BATCH, **fields)


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (["9", "10"], "no trainer_state.pt in it, but below it: RUN/9, RUN/10"),
        (["a/9", "b/7"], "no trainer_state.pt in it, but below it: RUN/a/9, RUN/b/7"),
        (["1", "2", "3", "final_4"], "in it, but below it: ..., RUN/2, RUN/3, RUN/final_4"),
        ([], "there is no trainer_state.pt in it"),
        (None, "there is none"),
    ],
)
def test_a_folder_too_high_names_the_checkpoints_below_it(folders, found, tmp_path) -> None:
    run = tmp_path / "run"
    if folders is not None:
        run.mkdir()
    for folder in folders or ():
        (run / folder).mkdir(parents=True)
        (run / folder / "trainer_state.pt").touch()
    message = rf"^resume_from_checkpoint is '{run}', .*{re.escape(found.replace('RUN', str(run)))}$"
    with pytest.raises(FileNotFoundError, match=message):
        check_checkpoint(run)
    with pytest.raises(FileNotFoundError, match=message):
        resumed(run)
