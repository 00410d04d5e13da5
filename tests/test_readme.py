"""Python blocks and command lines of README and docs run as printed, on stand-ins for the hub."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
}
TEXT = "\n".join(DOCUMENTS.values())

LOSSES = "The losses alone"

# What README leaves to the reader, and the hub.
STAND_INS = """
import torch
import stand_ins

stand_ins.install(width=768)
stand_ins.end_training_early(n_steps=2, d_sae=128)

from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

names = {
    "activations": stand_ins.token_directions(768)[torch.randint(1, 41, (4, 8))],
    "topk_sae": TopKSAE(TopKSAEConfig(d_in=768, d_sae=128, k=64)),
}
torch.manual_seed(0)
stand_ins.CpuForCuda().__enter__()
"""

# It takes the code to run as JSON: pairs of a name for it and the code.
RUN = """
import json, sys

for name, code in json.load(sys.stdin):
    exec(compile(code, name, "exec"), names)
    print(f"<ran {name}>", flush=True)
"""


@dataclass(frozen=True)
class Block:
    """A block of code.

    Args:
        document (str): Where it stands.
        section (str): Heading above it.
        language (str): What stands behind the three backticks.
        text (str): The code.
        line (int): Its first line, from 1.
    """

    document: str
    section: str
    language: str
    text: str
    line: int

    @property
    def name(self) -> str:
        return f"{self.document}, line {self.line}"


def code_blocks(markdown: str, document: str = "README.md") -> list[Block]:
    blocks, section, start, language = [], "", None, ""
    lines = markdown.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("```") and start is None:
            start, language = number + 1, line[3:].strip()
        elif line.startswith("```"):
            text = "\n".join(lines[start:number]) + "\n"
            blocks.append(Block(document, section, language, text, start + 1))
            start = None
        elif start is None and line.startswith("#"):
            section = line.lstrip("#").strip()
    return blocks


BLOCKS = [block for name, text in DOCUMENTS.items() for block in code_blocks(text, name)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
SHELL = [block for block in BLOCKS if block.language in ("sh", "bash")]


def run(
    blocks: Sequence[tuple[str, str]],
    directory: Path,
    preparation: str = STAND_INS,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    """Run pieces of code one after the other in a fresh interpreter, in `directory`."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-c", preparation + RUN],
        input=json.dumps(blocks),
        env=inherited
        | {
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        }
        | environment,
        cwd=directory,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def assert_ran(result: subprocess.CompletedProcess[str], blocks: Sequence[tuple[str, str]]) -> None:
    assert result.returncode == 0, result.stderr
    assert re.findall("<ran (.*)>", result.stdout) == [name for name, _ in blocks]


def test_every_block_is_found() -> None:
    fences = [line for line in TEXT.splitlines() if line.lstrip().startswith("```")]
    assert len(fences) == 2 * len(BLOCKS)
    assert len(PYTHON) == TEXT.count("```python") >= 8
    assert {block.language for block in BLOCKS} <= {"python", "sh", "bibtex"}


def test_broken_block_is_an_error_that_names_its_line(tmp_path: Path) -> None:
    good, bad, never = (
        (block.name, block.text)
        for block in code_blocks(
            "# A\n```python\nx = 1\n```\n```python\nx + y\n```\n```python\nx = 3\n```\n"
        )
    )
    result = run([good, bad, never], tmp_path, preparation="names = {}")
    assert result.returncode == 1
    assert re.findall("<ran (.*)>", result.stdout) == ["README.md, line 3"]
    assert 'File "README.md, line 6"' in result.stderr
    assert "NameError: name 'y' is not defined" in result.stderr


def test_python_blocks_and_command_lines_run_in_order(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    blocks = []
    for block in BLOCKS:
        if block.language == "python" and block.section != LOSSES:
            blocks.append((block.name, block.text))
        elif block.language == "sh" and block.text.startswith("sae-lens-flex"):
            for line in block.text.replace("\\\n", "").splitlines():
                command, *arguments = shlex.split(line)
                assert command == "sae-lens-flex"
                call = f"import sae_lens_flex.cli\nassert sae_lens_flex.cli.main({arguments}) == 0"
                blocks.append((line, call))
    assert_ran(run(blocks, tmp_path), blocks)
    assert (tmp_path / "uploaded" / "user" / "repository" / "layer_6" / "cfg.json").is_file()
    for name in ("sweep.html", "topk_at_16/cfg.json", "from_activations/cfg.json"):
        assert (tmp_path / "output" / name).is_file()


def test_losses_run_in_the_interpreter(tmp_path: Path) -> None:
    blocks = [(block.name, block.text) for block in PYTHON if block.section == LOSSES]
    assert len(blocks) == 2
    if find_spec("kernels") is None:  # it cannot be installed beside transformers 4
        blocks = [(name, text) for name, text in blocks if "kernels" not in text]
        assert len(blocks) == 1
    (command,) = re.findall(r"`python (scripts/\S+) (\S+)`", TEXT)
    subprocess.run([sys.executable, ROOT / command[0], command[1]], cwd=tmp_path, check=True)
    assert_ran(run(blocks, tmp_path, TRITON_INTERPRET="1"), blocks)


def test_only_the_losses_ask_for_a_gpu() -> None:
    for section, blocks in groupby(PYTHON, lambda block: block.section):
        asks = any('"cuda"' in block.text for block in blocks)
        assert asks == (section == LOSSES), section


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.name)
def test_shell_block_is_bash_and_names_what_is_there(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    for path in re.findall(r"[\w/]+\.py\b", block.text):
        assert (ROOT / path).is_file(), path
    for names in re.findall(r"\.\[(.*?)\]", block.text):
        assert set(names.split(",")) <= set(extras), names
