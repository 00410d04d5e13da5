"""The command line as a user starts it on several GPUs, and on the CPU."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

import sae_lens_flex

from .test_runner import D_IN, D_SAE, TINY_LM, K


def start(device: str, directory: Path, *flags: str) -> subprocess.Popen[str]:
    """Train in the directory, on every GPU or in two processes on the CPU."""
    n_processes = torch.cuda.device_count() if device == "cuda" else 2
    if n_processes < 2:
        pytest.skip("needs two GPUs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(sae_lens_flex.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(n_processes), "-m", "sae_lens_flex"),
            *("train", "--architecture", "hierarchical_topk", "--budgets", "1", str(K)),
            *("--device", device, "--d_in", str(D_IN), "--d_sae", str(D_SAE), "--k", str(K)),
            *("--model_name", str(TINY_LM), "--model_class_name", "AutoModelForCausalLM"),
            *("--hook_name", "transformer.h.1"),
            *("--dataset_path", str(TINY_LM / "wordnet_glosses")),
            *("--is_dataset_tokenized", "false", "--context_size", "32"),
            *("--train_batch_size_tokens", "128", "--lr", "1e-3", "--log_to_wandb", "false"),
            *("--checkpoint_path", str(directory / "checkpoints")),
            *("--output_path", str(directory / "sae"), *flags),
        ],
        cwd=directory,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torchrun_trains_and_saves_an_ordinary_sae(device: str, tmp_path: Path) -> None:
    # On GPUs the last steps are replayed from a CUDA graph.
    process = start(device, tmp_path, "--training_tokens", "1280", "--n_checkpoints", "1")
    printed, told = process.communicate(timeout=240)
    assert process.returncode == 0, told
    assert printed == f"{tmp_path / 'sae'}: a hierarchical_topk SAE, k={K}\n"
    assert told.count("Training SAE:   0%") <= 2  # One bar, drawn when it opens and closes.
    assert told.count("Dataset is not tokenized") == 1
    assert isinstance(SAE.load_from_disk(tmp_path / "sae"), sae_lens_flex.HierarchicalTopKSAE)
    (checkpoint,) = tmp_path.glob("checkpoints/*/*")
    assert checkpoint.name == "768"


@pytest.mark.gpu
def test_a_killed_rank_ends_all_on_gpus(tmp_path: Path) -> None:
    flags = ("--training_tokens", str(10**8), "--n_checkpoints", str(10**5))
    process = start("cuda", tmp_path, *flags)
    deadline = time.monotonic() + 120
    try:
        while len(list(tmp_path.glob("checkpoints/*/[0-9]*"))) < 2:
            assert time.monotonic() < deadline, "no checkpoints"
            assert process.poll() is None, process.communicate()
            time.sleep(0.1)
        ranks = pids(tmp_path)
        assert sorted(ranks) == list(range(torch.cuda.device_count()))
        os.kill(ranks[1], signal.SIGKILL)
        process.communicate(timeout=60)
    finally:
        process.terminate()  # It ends its processes, too.
    assert process.returncode != 0
    assert not pids(tmp_path)
    assert not list((tmp_path / "sae").iterdir())


def pids(directory: Path) -> dict[int, int]:
    """Return the ids of the processes that train in a directory, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            is_here = (process / "cwd").readlink() == directory
        except OSError:  # It has ended.
            continue
        ranks = [int(line[5:]) for line in environment if line.startswith(b"RANK=")]
        if is_here and ranks:
            found[ranks[0]] = int(process.name)
    return found
