"""Build from `sae_lens_flex/ops` the directory that Hugging Face's `kernels` package loads.

    python scripts/build_kernels.py OUT

OUT/build/<variant> then holds the sources as they are and metadata.json. They need torch alone, and
Triton for the functions with the prefix triton_. Where OUT holds an earlier build, it is replaced,
its README.md too; where it holds anything else, or sources were changed, nothing is written.
"""

import argparse
import hashlib
import json
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]

# The backends of the `kernels` package that torch's CUDA and CPU builds select. "cpu" can be chosen
# on any machine.
BACKENDS = ("cpu", "cuda")
# The version that the tests load a build with.
KERNELS_MINVER = "0.17.0"

README = """\
---
library_name: kernels
license: {license_id}
tags:
- kernels
---

# {name} {version}

The losses of HierarchicalTopK and TopK sparse autoencoders, for the
[`kernels`](https://github.com/huggingface/kernels) package ({minver} or later):

```python
from pathlib import Path
from kernels import get_local_kernel

losses = get_local_kernel(Path("path/to/this/directory"))
loss = losses.triton_hierarchical_sae_loss(indices, weight, vals, bias, target)
```

`triton_hierarchical_sae_loss` and `triton_topk_sae_loss` are fused Triton kernels, for CUDA
devices. `hierarchical_sae_loss` and `topk_sae_loss` are their definitions in plain PyTorch, for
every device. Their docstrings have the shapes.

Built by `scripts/build_kernels.py` of {name}; see LICENSE and NOTICE.
"""


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def read_sources(directory: Path) -> dict[str, bytes]:
    """Return the Python files under `directory` by their path in it."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*.py"))
    }


def kernel_id(name: str, backend: str, sources: dict[str, bytes]) -> str:
    """Return the name that the sources are imported by: one process can hold several builds."""
    digest = hashlib.sha256()
    for path, source in sources.items():
        digest.update(f"{path}\0{len(source)}\0".encode() + source)
    return f"_{name.replace('-', '_')}_{backend}_{digest.hexdigest()[:12]}"


def metadata(project: dict[str, Any], backend: str, sources: dict[str, bytes]) -> dict[str, Any]:
    """Return metadata.json of one variant.

    The package wants a whole number for a version, of which it expects that it changes with the
    interface: the first part of ours. Triton is not among the Python dependencies that it knows.
    """
    return {
        "id": kernel_id(project["name"], backend, sources),
        "name": project["name"],
        "version": int(project["version"].split(".")[0]),
        "kernels-minver": KERNELS_MINVER,
        "license": project["license"],
        "python-depends": [],
        "backend": {"type": backend},
    }


def build(root: Path) -> dict[str, bytes]:
    """Return the files of a build by their path in OUT."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    sources = read_sources(root / "sae_lens_flex" / "ops")
    files = {}
    for backend in BACKENDS:
        described = json.dumps(metadata(project, backend, sources), indent=2) + "\n"
        files[f"build/torch-{backend}/metadata.json"] = described.encode()
        for path, source in sources.items():
            files[f"build/torch-{backend}/{path}"] = source
    for path in project["license-files"]:
        files[path] = (root / path).read_bytes()
    files["README.md"] = README.format(
        name=project["name"],
        version=project["version"],
        license_id=project["license"].lower(),
        minver=KERNELS_MINVER,
    ).encode()
    return files


def is_earlier_build(out: Path, files: dict[str, bytes]) -> bool:
    """Return whether `out` holds what an earlier run wrote, and nothing else but bytecode."""
    if any(path.name not in {"build", *files} for path in out.iterdir()):
        return False
    try:
        variants = list((out / "build").iterdir())
        for variant in variants:
            described = json.loads((variant / "metadata.json").read_bytes())
            backend, sources = described["backend"]["type"], read_sources(variant)
            expected_id = kernel_id(str(described["name"]), backend, sources)
            if (variant.name, expected_id) != (f"torch-{backend}", described["id"]):
                return False
            others = (p for p in variant.rglob("*") if p.is_file() and p.suffix != ".pyc")
            if {p.relative_to(variant).as_posix() for p in others} != {"metadata.json", *sources}:
                return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(variants)


def write(out: Path, files: dict[str, bytes]) -> None:
    """Write a build to `out`, instead of an earlier one.

    Raises:
        FileExistsError: where `out` holds anything but an earlier build.
    """
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file, expected a directory or nothing")
    if out.is_dir() and any(out.iterdir()):
        if not is_earlier_build(out, files):
            raise FileExistsError(
                f"{out} is not empty and not an unchanged earlier build; nothing was written"
            )
        shutil.rmtree(out / "build")
    for path, content in files.items():
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_bytes(content)


def main(arguments: list[str]) -> None:
    parser = Parser(prog="build_kernels", description="Build the losses for the package `kernels`.")
    parser.add_argument("out", metavar="OUT", type=Path, help="directory to write")
    out = parser.parse_args(arguments).out
    files = build(ROOT)
    try:
        write(out, files)
    except OSError as error:
        parser.error(str(error))
    for backend in BACKENDS:
        variant = f"build/torch-{backend}"
        described = json.loads(files[f"{variant}/metadata.json"])
        n_files = sum(path.startswith(f"{variant}/") for path in files)
        print(f"{out / variant}: {n_files} files, {described['id']}")
    others = (path for path in files if "/" not in path)
    print(f"{out}: {', '.join(others)}")


if __name__ == "__main__":
    main(sys.argv[1:])
