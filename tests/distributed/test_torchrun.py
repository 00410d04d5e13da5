"""The command line as a user starts it on several GPUs, and on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from sae_lens import SAE

import sae_lens_flex

from .test_runner import D_IN, D_SAE, TINY_LM, K


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_torchrun_trains_and_saves_an_ordinary_sae(device: str, tmp_path: Path) -> None:
    # On GPUs the last steps are replayed from a CUDA graph.
    n_processes = torch.cuda.device_count() if device == "cuda" else 2
    if n_processes < 2:
        pytest.skip("needs two GPUs")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(sae_lens_flex.__file__).parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(n_processes), "-m", "sae_lens_flex"),
            *("train", "--architecture", "hierarchical_topk", "--budgets", "1", str(K)),
            *("--device", device, "--d_in", str(D_IN), "--d_sae", str(D_SAE), "--k", str(K)),
            *("--model_name", str(TINY_LM), "--model_class_name", "AutoModelForCausalLM"),
            *("--hook_name", "transformer.h.1"),
            *(
                "--dataset_path",
                str(TINY_LM / "wordnet_glosses"),
                "--is_dataset_tokenized",
                "false",
            ),
            *("--context_size", "32", "--training_tokens", "1280"),
            *("--train_batch_size_tokens", "128", "--lr", "1e-3", "--log_to_wandb", "false"),
            *("--checkpoint_path", str(tmp_path / "checkpoints"), "--n_checkpoints", "1"),
            *("--output_path", str(tmp_path / "sae")),
        ],
        cwd=tmp_path,
        env=environment | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path / 'sae'}: a hierarchical_topk SAE, k={K}\n"
    assert (
        result.stderr.count("Training SAE:   0%") <= 2
    )  # One bar, drawn when it opens and closes.
    assert result.stderr.count("Dataset is not tokenized") == 1
    assert isinstance(SAE.load_from_disk(tmp_path / "sae"), sae_lens_flex.HierarchicalTopKSAE)
    (checkpoint,) = tmp_path.glob("checkpoints/*/*")
    assert checkpoint.name == "768"
