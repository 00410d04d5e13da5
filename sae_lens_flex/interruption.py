"""Ctrl-C and SIGTERM on the command line: a run of training saves a checkpoint, and says where."""

import signal
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.training._interruption import InterruptedException
from sae_lens.training.sae_trainer import SAETrainer
from typing_extensions import override

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stop:
    """
    What the signals have asked for.

    Attributes:
        number: the last signal that came, or None.
        can_wait: whether the first signal is left to the trainer, which ends after its step. Any
            other signal raises KeyboardInterrupt where the program is.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.can_wait = False

    def receive(self, number: int, frame: Any) -> None:
        is_first, self.number = self.number is None, number
        if not (is_first and self.can_wait):
            raise KeyboardInterrupt


_stop = Stop()


@contextmanager
def catching_signals(stop: Stop) -> Iterator[None]:
    """Catch Ctrl-C and SIGTERM within the block. Only in the main thread this has an effect."""
    global _stop
    _stop = stop
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop.receive) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ignore_signals() -> None:
    """Within a block of `catching_signals`, ignore them from here on.

    A command that has failed then prints why, also where a launcher is ending its process.
    """
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class InterruptibleRunner(LanguageModelSAETrainingRunner):
    """
    SAELens's runner, which on a signal ends after a step and saves a whole checkpoint.

    SAELens's own handler ends within a step. Of the run it would save the position in the text
    alone, without weights and optimizer, and it fails because it does not make the directory.
    """

    @override
    def run(self) -> Any:
        _stop.can_wait = True
        try:
            return super().run()
        finally:
            _stop.can_wait = False

    @override
    def run_trainer_with_interruption_handling(self, trainer: SAETrainer[Any, Any]) -> Any:
        begin = trainer.maybe_reset_sparsity  # `fit` calls it first in every step.

        def begin_unless_stopped() -> dict[str, Any]:
            if _stop.number is not None:
                self._save_interrupted(trainer)
            return begin()

        trainer.maybe_reset_sparsity = begin_unless_stopped
        return trainer.fit()

    def _save_interrupted(self, trainer: SAETrainer[Any, Any]) -> None:
        n_tokens = trainer.n_training_samples
        if self.cfg.checkpoint_path is None or trainer.n_training_steps == 0:
            raise InterruptedException
        trainer.save_checkpoint(str(n_tokens))
        path = Path(self.cfg.checkpoint_path, str(n_tokens))
        raise InterruptedException(
            f"interrupted after {n_tokens} tokens, saved {path} (go on with the same flags and "
            f"--resume_from_checkpoint {path})"
        )


@contextmanager
def telling_what_is_saved(cfg: Any) -> Iterator[None]:
    """Give an interruption of the run in the block a message about its checkpoints."""
    try:
        yield
    except (KeyboardInterrupt, InterruptedException) as interruption:
        traceback.clear_frames(interruption.__traceback__)  # So the progress bar ends its line.
        if str(interruption) or cfg.checkpoint_path is None:
            raise
        paths = Path(cfg.checkpoint_path).glob("*")
        saved = [path for path in paths if path.name.isdecimal()]
        if not saved:
            raise
        last = max(saved, key=lambda path: int(path.name))
        raise InterruptedException(f"interrupted, nothing saved since {last}") from interruption
