"""Build from `sae_lens_flex/ops` the directory that Hugging Face's `kernels` package loads.

    python scripts/build_kernels.py OUT

writes OUT/build/<variant> with the sources, unchanged, and metadata.json. The sources need torch
alone; the functions with the prefix triton_ need Triton too.

An earlier build in OUT is replaced, with its README.md. Nothing is written if OUT holds anything
else, or an earlier build whose sources were changed.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[1]

# The `kernels` package picks "cuda" for a torch that was built for CUDA, and "cpu" for one that was
# built without. A user may ask for "cpu" on any machine.
BACKENDS = ("cpu", "cuda")
# The tests load a build with this version.
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
    """An ArgumentParser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def read_sources(directory: Path) -> dict[str, bytes]:
    """Return the content of the Python files under `directory`, by their path in it."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*.py"))
    }


def kernel_id(name: str, backend: str, sources: dict[str, bytes]) -> str:
    """Return the name under which the sources are imported.

    It depends on the sources, so that one process can import several builds.
    """
    digest = hashlib.sha256()
    for path, source in sources.items():
        digest.update(f"{path}\0{len(source)}\0".encode() + source)
    return f"_{name.replace('-', '_')}_{backend}_{digest.hexdigest()[:12]}"


def metadata(project: dict[str, Any], backend: str, sources: dict[str, bytes]) -> dict[str, Any]:
    """Return the content of metadata.json, for one variant.

    `kernels` takes a whole number for a version, and expects another number where the interface is
    another. The first part of our version is such a number. Triton is left out of "python-depends",
    because `kernels` does not know it.
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


def read_project(root: Path) -> dict[str, Any]:
    """Return the table [project] of pyproject.toml, with the version that the package states."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    source = (root / "sae_lens_flex" / "__init__.py").read_text(encoding="utf-8")
    (version,) = re.findall(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    return {**project, "version": version}


def build(root: Path) -> dict[str, bytes]:
    """Return the content of a build's files, by their path in OUT."""
    project = read_project(root)
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
    """Return whether `out` holds what an earlier run wrote, unchanged, and nothing else.

    Bytecode does not count: it appears where a build was imported.

    Args:
        out: an existing directory.
        files: the files of the new build, by their path in `out`.
    """
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
    """Write a build to `out`, in place of an earlier one if there is one.

    Raises:
        FileExistsError: if `out` is a file, or holds anything but an unchanged earlier build.
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
