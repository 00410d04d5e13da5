"""The losses as the package `kernels` loads them, without SAELens."""

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from kernels import Metadata

import sae_lens_flex

ROOT = Path(__file__).resolve().parents[1]
OPS = ROOT / "sae_lens_flex" / "ops"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
VERSION = sae_lens_flex.__version__

WITHOUT_SAELENS = """
import sys
for name in ("sae_lens", "sae_lens_flex", "transformer_lens"):
    sys.modules[name] = None
"""

CHECK = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel

out = Path(sys.argv[1])
generator = torch.Generator().manual_seed(0)
shapes = {"weight": (17, 70), "vals": (5, 3), "bias": (70,), "target": (5, 70)}  # B5-K3-F17-D70
indices = torch.randint(17, (5, 3), generator=generator)
tensors = {
    name: torch.randn(shape, generator=generator, dtype=torch.float64)
    for name, shape in shapes.items()
}

def leaves(dtype):
    return {name: t.to(dtype, copy=True).requires_grad_() for name, t in tensors.items()}

def formulas(weight, vals, bias, target):
    reconstruction, levels = bias, []
    for j in range(3):
        reconstruction = reconstruction + vals[:, j, None] * weight[indices[:, j]]
        levels.append((reconstruction - target).square().mean())
    return {"hierarchical": sum(levels) / 3, "topk": levels[-1]}

def compare(which, loss, dtype, tolerance):
    inputs, expected_inputs = leaves(dtype), leaves(torch.float64)
    actual, expected = loss(indices, **inputs), formulas(**expected_inputs)[which]
    actual.backward()
    expected.backward()
    close = dict(rtol=tolerance, atol=tolerance, check_dtype=False)
    torch.testing.assert_close(actual, expected, **close)
    for name in inputs:
        torch.testing.assert_close(inputs[name].grad, expected_inputs[name].grad, **close)

def check(losses):
    for which in ("hierarchical", "topk"):
        definition = getattr(losses, f"{which}_sae_loss")
        by_triton = getattr(losses, f"triton_{which}_sae_loss")
        compare(which, definition, torch.float64, 1e-12)
        compare(which, by_triton, torch.float32, 1e-5)

        def by_torch(indices, weight, vals, bias, target):
            return losses.losses.differentiable_loss(
                *(indices, weight, vals, bias, target),
                levels="every" if which == "hierarchical" else "last",
                backend="torch",
            )

        compare(which, by_torch, torch.float32, 1e-5)
"""


def build(out: Path, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(root / "scripts" / "build_kernels.py"), str(out)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def run_python(script: str, out: Path) -> None:
    """Run a script in a fresh process, without a hub and without a GPU."""
    environment = {
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "1",
    }
    result = subprocess.run(
        [sys.executable, "-c", script, str(out)],
        env=os.environ | environment,
        cwd=out,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr


def files_below(directory: Path, pattern: str = "*") -> dict[str, bytes]:
    """Return the content of the files in a directory and its folders, by path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob(pattern)
        if path.is_file()
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernels") / "build of ours"
    result = build(out)
    assert result.returncode == 0, result.stderr
    return out


def test_build_holds_the_sources_unchanged_and_says_so(tmp_path: Path):
    out = tmp_path / "new" / "kernels"
    printed = build(out).stdout
    sources = files_below(OPS, "*.py")
    assert "kernels/launch.py" in sources
    for variant in ("torch-cpu", "torch-cuda"):
        written = files_below(out / "build" / variant)
        assert written.pop("metadata.json")
        assert written == sources
        assert f"{out / 'build' / variant}: {len(sources) + 1} files" in printed
    for name in ("LICENSE", "NOTICE"):
        assert (out / name).read_bytes() == (ROOT / name).read_bytes()
    assert f"# {PROJECT['name']} {VERSION}" in (out / "README.md").read_text()
    assert f"{out}: LICENSE, NOTICE, README.md" in printed


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
def test_metadata_is_read_by_kernels(built: Path, backend: str):
    metadata = Metadata.read_from_file(built / "build" / f"torch-{backend}" / "metadata.json")
    assert str(metadata.name) == PROJECT["name"]
    assert metadata.license == PROJECT["license"]
    assert metadata.version == int(VERSION.split(".")[0])
    assert str(metadata.kernels_minver) == "0.17.0"
    assert str(metadata.backend.backend_type) == backend
    assert metadata.id.startswith(f"_sae_lens_flex_{backend}_")
    assert metadata.id.isidentifier()


@pytest.mark.parametrize(
    "load",
    ["get_local_kernel(out, backend='cpu')", "get_local_kernel(out / 'build' / 'torch-cuda')"],
    ids=["cpu", "cuda"],
)
def test_kernels_loads_losses_and_gradients_where_saelens_is_missing(built: Path, load: str):
    run_python(f"{WITHOUT_SAELENS}{CHECK}\ncheck({load})", built)


def test_kernels_selects_a_variant_by_itself(built: Path):
    run_python(
        f"{WITHOUT_SAELENS}{CHECK}\n"
        "variant = 'torch-cpu' if torch.version.cuda is None else 'torch-cuda'\n"
        "loaded = Path(get_local_kernel(out).__file__)\n"
        "assert loaded == out / 'build' / variant / '__init__.py', loaded\n",
        built,
    )


def test_installed_and_loaded_losses_work_in_one_process(built: Path):
    imports = ["import sae_lens_flex.ops", "loaded = get_local_kernel(out, backend='cpu')"]
    compare = "check(loaded); check(sae_lens_flex.ops); check(loaded)"
    distinct = "assert loaded.losses.NAMESPACE != sae_lens_flex.ops.losses.NAMESPACE"
    # Either is imported first, in a fork of a process that has imported SAELens, which takes long.
    orders = ["\n".join([*order, distinct, compare]) for order in (imports, imports[::-1])]
    fork = f"""
import os, sae_lens
for order in {orders!r}:
    process = os.fork()
    if process == 0:
        exec(order)
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0, order
"""
    run_python(CHECK + fork, built)


def test_earlier_build_of_other_sources_is_replaced(tmp_path: Path):
    earlier, out = tmp_path / "earlier", tmp_path / "out"
    shutil.copytree(OPS, earlier / "sae_lens_flex" / "ops")
    (earlier / "sae_lens_flex" / "ops" / "gone.py").touch()
    for name in (
        *("pyproject.toml", "LICENSE", "NOTICE"),
        *("sae_lens_flex/__init__.py", "scripts/build_kernels.py"),
    ):
        (earlier / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, earlier / name)
    assert build(out, root=earlier).returncode == 0
    variant = out / "build" / "torch-cpu"
    before = json.loads((variant / "metadata.json").read_text())
    assert (variant / "gone.py").exists()
    (variant / "__pycache__").mkdir()
    (variant / "__pycache__" / "gone.cpython-311.pyc").touch()  # as an import does

    result = build(out)
    assert result.returncode == 0, result.stderr
    assert files_below(variant).keys() == {"metadata.json", *files_below(OPS, "*.py")}
    # Under two names, one process can import both.
    assert json.loads((variant / "metadata.json").read_text())["id"] != before["id"]


@pytest.mark.parametrize(
    "stray",
    ["notes.txt", "build/notes.txt", "build/torch-cpu/notes.txt", "build/torch-cpu/mine.py"],
)
def test_directory_with_other_files_is_refused_in_one_line(tmp_path: Path, stray: str):
    assert build(tmp_path).returncode == 0
    (tmp_path / stray).write_text("mine")
    before = files_below(tmp_path)
    result = build(tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        f"build_kernels: error: {tmp_path} is not empty and not an unchanged earlier build; "
        "nothing was written\n"
    )
    assert files_below(tmp_path) == before


def test_directory_that_only_looks_like_a_build_is_refused(tmp_path: Path):
    (tmp_path / "build").mkdir()
    (tmp_path / "README.md").write_text("mine")
    assert build(tmp_path).returncode == 2
    assert (tmp_path / "README.md").read_text() == "mine"


def test_file_in_the_way_is_refused_in_one_line(tmp_path: Path):
    out = tmp_path / "file"
    out.write_text("mine")
    result = build(out)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert out.read_text() == "mine"


@pytest.mark.parametrize("path", sorted(OPS.rglob("*.py")), ids=lambda path: path.stem)
def test_ops_import_the_standard_library_torch_and_triton_only(path: Path):
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    depth = len(path.relative_to(OPS).parts)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module is not None
            assert node.module.split(".")[0] in allowed
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= depth, "a relative import that leaves ops"
