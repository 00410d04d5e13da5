"""What ends one process ends all of them soon, with one error, and leaves whole checkpoints."""

import os
import re
import signal
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import ActivationsStore, SAETrainer
from safetensors.torch import load_file

from sae_lens_flex import cli
from sae_lens_flex.distributed import processes

from .launch import Launch, results
from .test_runner import BATCH_SIZE, D_IN, D_SAE, TINY_LM, K

SECONDS = 60


def flags(directory: Path) -> list[str]:
    """Return the command line of a long run with many checkpoints."""
    return f"""
        train --architecture flex_topk --device cpu --d_in {D_IN} --d_sae {D_SAE} --k {K}
        --model_name {TINY_LM} --model_class_name AutoModelForCausalLM
        --hook_name transformer.h.1 --dataset_path {TINY_LM / "wordnet_glosses"}
        --is_dataset_tokenized false --context_size 32 --store_batch_size_prompts 4
        --train_batch_size_tokens {BATCH_SIZE} --training_tokens {10**6} --lr 1e-3
        --n_checkpoints {10**6 // (2 * BATCH_SIZE)} --checkpoint_path {directory} --wandb_id run
        --output_path {directory / "sae"} --log_to_wandb false --verbose false
    """.split()


def checkpoints(directory: Path) -> list[Path]:
    return sorted(directory.glob("run/[0-9]*"))


def fail(kind: str, directory: Path) -> None:
    """Run the command line, in which one of the processes fails after the first checkpoints."""
    rank = int(os.environ["RANK"])
    patch = pytest.MonkeyPatch()

    def after_checkpoints(how: Any) -> None:
        get_activations = ActivationsStore.get_activations

        def failing(self: Any, tokens: torch.Tensor) -> torch.Tensor:
            if len(checkpoints(directory)) >= 2:
                how()
            return get_activations(self, tokens)

        patch.setattr(ActivationsStore, "get_activations", failing)

    def raise_error() -> None:
        raise torch.OutOfMemoryError("the memory is full")

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    save = SAETrainer.save_trainer_state

    def die_at_the_third(self: Any, checkpoint_path: Path) -> None:
        if len(checkpoints(directory)) >= 2:
            die()
        save(self, checkpoint_path)

    if kind == "out of memory" and rank == 1:
        after_checkpoints(raise_error)
    elif kind == "killed" and rank == 1:
        after_checkpoints(die)
    elif kind == "killed while it writes" and rank == 0:
        patch.setattr(SAETrainer, "save_trainer_state", die_at_the_third)
    sys.exit(cli.main(flags(directory)))


def diverge(directory: Path) -> None:
    short = ["--lr", "1e38", "--training_tokens", str(4 * BATCH_SIZE), "--n_checkpoints", "0"]
    patch = pytest.MonkeyPatch()
    if os.environ["RANK"] == "0":  # which tells what the other one has found, too
        patch.setattr(cli, "not_finite_weights", lambda sae: [])
    sys.exit(cli.main([*flags(directory), *short]))


def test_training_that_diverged_on_one_process_says_so_once(tmp_path: Path) -> None:
    launch = Launch(2, diverge, tmp_path, directory=tmp_path / "processes")
    assert launch.wait(SECONDS) == 0, launch.printed()
    told = re.findall("NaN or infinite values in (.*): its training", launch.printed())
    assert told == ["W_dec, W_enc, b_dec, b_enc"]


def be_late() -> bool:
    """Wait for a late process where that is allowed; return whether a collective gave up."""
    patch = pytest.MonkeyPatch()
    patch.setattr(processes, "LIMIT", timedelta(seconds=1.5))
    us = processes.join("cpu")
    us.gather(None)
    if us.rank == 0:
        time.sleep(2.5)
    us.meet()
    try:
        if us.rank == 0:
            time.sleep(2.5)
        us.gather(None)
    except RuntimeError:
        return True
    return False


def test_a_process_waits_for_others_for_a_limited_time(tmp_path: Path) -> None:
    assert results(2, be_late, directory=tmp_path) == [True, True]


@pytest.mark.parametrize(
    ("kind", "error"),
    [
        ("out of memory", "error: OutOfMemoryError: the memory is full"),
        ("killed", "error: |interrupted"),
        ("killed while it writes", "error: |interrupted"),
        ("SIGTERM", "interrupted"),
    ],
)
def test_all_processes_end_with_one_error_and_whole_checkpoints(
    kind: str, error: str, tmp_path: Path
) -> None:
    launch = Launch(2, fail, kind, tmp_path, directory=tmp_path / "processes")
    if kind == "SIGTERM":
        deadline = time.monotonic() + SECONDS
        while len(checkpoints(tmp_path)) < 2:
            assert time.monotonic() < deadline, launch.printed()
            time.sleep(0.1)
        launch.launcher.terminate()
    assert launch.wait(SECONDS) != 0

    told = re.split(r"sae-lens-flex train: (?!warning: )", launch.printed())[1:]
    assert len(told) == 1, launch.printed()
    assert re.match(error, told[0])
    assert len(checkpoints(tmp_path)) >= 2
    for checkpoint in checkpoints(tmp_path):
        assert load_file(checkpoint / "sae_weights.safetensors")["W_dec"].shape == (D_SAE, D_IN)
        state = torch.load(checkpoint / "trainer_state.pt")
        assert state["n_training_samples"] == int(checkpoint.name)
        positions = load_file(checkpoint / "activations_store_state.safetensors")
        assert positions["n_dataset_processed_by_rank"].shape == (2,)
