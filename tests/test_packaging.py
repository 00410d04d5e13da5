"""The sdist and the wheel: what is in them, and that the wheel comes from the sdist alone."""

import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest

import sae_lens_flex

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "sae_lens_flex"
NAME = f"sae_lens_flex-{sae_lens_flex.__version__}"


def package_files() -> dict[str, bytes]:
    """Return the files of the package in this checkout, by path."""
    paths = [*PACKAGE.rglob("*.py"), PACKAGE / "py.typed"]
    return {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with the sdist and with the wheel that was built from it."""
    pytest.importorskip("build", reason="the extra `test` is older than this test")
    pytest.importorskip("hatchling", reason="the extra `test` is older than this test")
    out = tmp_path_factory.mktemp("dist")
    # Without isolation the registry is not asked for the build backend.
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(built / f"{NAME}-py3-none-any.whl") as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_holds_the_package_and_its_licenses_alone(wheel: dict[str, bytes]) -> None:
    info = f"{NAME}.dist-info"
    described = ("METADATA", "WHEEL", "RECORD", "entry_points.txt")
    licenses = {
        f"{info}/licenses/{name}": (ROOT / name).read_bytes() for name in ("LICENSE", "NOTICE")
    }
    expected = package_files() | licenses
    assert wheel.keys() == expected.keys() | {f"{info}/{name}" for name in described}
    for name, content in expected.items():
        assert wheel[name] == content, name


def test_wheel_says_what_it_is_and_what_it_needs(wheel: dict[str, bytes]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    metadata = BytesParser().parsebytes(wheel[f"{NAME}.dist-info/METADATA"])
    assert metadata["Name"] == project["name"]
    assert metadata["Version"] == sae_lens_flex.__version__
    assert metadata["License-Expression"] == project["license"]
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(required) == len(project["dependencies"])
    assert "# sae_lens_flex" in metadata.get_payload()
    entry_points = wheel[f"{NAME}.dist-info/entry_points.txt"].decode()
    assert "sae-lens-flex = sae_lens_flex.cli:main" in entry_points


def test_sdist_holds_what_a_build_needs_and_little_else(built: Path) -> None:
    with tarfile.open(built / f"{NAME}.tar.gz") as archive:
        names = {name.removeprefix(f"{NAME}/") for name in archive.getnames()}
    others = {"pyproject.toml", "README.md", "CHANGELOG.md", "LICENSE", "NOTICE"}
    written_by_the_build = {"PKG-INFO", ".gitignore"}
    assert names == package_files().keys() | others | written_by_the_build
