"""The kernels compile; what they compute, the interpreter and a GPU show."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled by their tests")
def test_every_kernel_compiles_for_a_gpu(tmp_path) -> None:
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET")
    result = subprocess.run(
        [sys.executable, Path(__file__).parent / "compile_kernels.py"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    compiled, not_compiled = (line.split()[1:] for line in result.stdout.splitlines()[-2:])
    assert "_hierarchical_kernel" in compiled
    assert not_compiled == ["compiled"]  # what the line begins with
