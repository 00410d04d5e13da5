"""What a run that goes on from a checkpoint is told.

SAELens loads the optimizer and the schedule of the learning rate as they were. So the settings that
they were made of are the checkpoint's, whatever the config says.
"""

import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import TRAINER_STATE_FILENAME
from sae_lens.training.sae_trainer import SAETrainer

LOAD_TRAINER_STATE = SAETrainer.load_trainer_state

# The settings in a schedule's state. What else is there is counted while it runs, or is the rate
# itself.
_OF_SCHEDULE = (
    "_milestones",
    "start_factor",
    "end_factor",
    "total_iters",
    "T_max",
    "T_0",
    "eta_min",
)
_SCHEDULE = "the schedule of the learning rate"
_MOST_NAMED = 3


def load_trainer_state(self: SAETrainer[Any, Any], checkpoint_path: Path | str) -> None:
    """Load a checkpoint as SAELens does. Warn where it replaces what the config says.

    Raises:
        FileNotFoundError: where there is no checkpoint. It names those in the folders below.
        ValueError: where the schedule in the checkpoint is of another kind than the config's.
            SAELens fails then, or loads a part into another one, which follows neither.
    """
    check_checkpoint(checkpoint_path)
    configured = _settings(self)
    schedule = self.lr_scheduler.state_dict()
    theirs = schedule
    with suppress(Exception):  # What is wrong with the file SAELens says when it loads it.
        file = Path(checkpoint_path, TRAINER_STATE_FILENAME)
        theirs = torch.load(file, "cpu", mmap=True)["lr_scheduler"]
    if _parts(theirs) != _parts(schedule):
        raise ValueError(
            f"{_SCHEDULE} has other parts in the checkpoint {str(checkpoint_path)!r} than the "
            "config's: expected the same lr_scheduler_name, and lr_warm_up_steps and "
            "lr_decay_steps that are 0 where they were 0"
        )
    LOAD_TRAINER_STATE(self, checkpoint_path)
    loaded = _settings(self)
    kept = [
        f"{name} is {loaded[name]!r}, not {value!r}"
        for name, value in configured.items()
        if name != _SCHEDULE and loaded[name] != value
    ]
    if loaded[_SCHEDULE] != configured[_SCHEDULE]:
        kept.append(
            f"{_SCHEDULE} is of other lr_scheduler_name, lr_warm_up_steps, lr_decay_steps, lr_end, "
            "n_restart_cycles or training_tokens"
        )
    if kept:
        warnings.warn(
            "training goes on with the checkpoint's settings where SAELens loads them, not with "
            f"the config's: {'; '.join(kept)}",
            stacklevel=3,
        )
    n_steps = self.cfg.total_training_samples // self.cfg.train_batch_size_samples
    end = _end(self.lr_scheduler.state_dict())
    if end is not None and end < n_steps:
        warnings.warn(
            f"the learning rate is 0 from step {end} on, where the checkpoint's schedule ends, and "
            f"training_tokens makes {n_steps} steps: those beyond it train nothing",
            stacklevel=3,
        )
    if self.n_training_samples >= self.cfg.total_training_samples:
        warnings.warn(
            f"no step is left to take: training_tokens is {self.cfg.total_training_samples}, which "
            f"counts the {self.n_training_samples} tokens that the checkpoint was trained on, too",
            stacklevel=3,
        )


def check_checkpoint(path: Path | str) -> None:
    """Raise a FileNotFoundError where a directory is no checkpoint; it names those below it."""
    path = Path(path)
    if (path / TRAINER_STATE_FILENAME).is_file():
        return
    found = f"there is no {TRAINER_STATE_FILENAME} in it" if path.is_dir() else "there is none"
    # A run's checkpoints lie in a directory each, the runs in that of `checkpoint_path`.
    files = [
        file for below in ("*", "*/*") for file in path.glob(f"{below}/{TRAINER_STATE_FILENAME}")
    ]
    below = sorted((file.parent for file in files), key=lambda p: (p.parent, _number(p)))
    if below:
        more = ["..."] if len(below) > _MOST_NAMED else []
        names = [*more, *(str(each) for each in below[-_MOST_NAMED:])]
        found += f", but below it: {', '.join(names)}"
    raise FileNotFoundError(
        f"resume_from_checkpoint is {str(path)!r}, expected the directory of a checkpoint: {found}"
    )


def _number(path: Path) -> int:
    """Return the tokens after which a checkpoint was written, as its name has them."""
    digits = path.name.removeprefix("final_")
    return int(digits) if digits.isdecimal() else 0


def _parts(schedule: dict[str, Any]) -> list[set[str]]:
    """Return which settings each part of a schedule has in its state. They tell its kind."""
    return [set(part) & set(_OF_SCHEDULE) for part in schedule.get("_schedulers", ())]


def _end(schedule: dict[str, Any]) -> int | None:
    """Return from which step on a schedule that decays to 0 is 0, or None for another one."""
    decay = (schedule.get("_schedulers") or [{}])[-1]
    if decay.get("end_factor") != 0:
        return None
    return schedule["_milestones"][-1] + decay["total_iters"]


def _settings(trainer: SAETrainer[Any, Any]) -> dict[str, Any]:
    """Return the settings in a trainer that it takes from a checkpoint, by their config's name."""
    group = trainer.optimizer.param_groups[0]
    beta1, beta2 = group.get("betas", (None, None))
    schedule = trainer.lr_scheduler.state_dict()
    parts = [schedule, *schedule.get("_schedulers", ())]
    return {
        "lr": group.get("initial_lr"),
        "adam_beta1": beta1,
        "adam_beta2": beta2,
        _SCHEDULE: [{name: part.get(name) for name in _OF_SCHEDULE} for part in parts],
    }
