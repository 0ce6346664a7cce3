"""The wheel and the source archive: what is in them, twice the same, and working on their own."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import boneconv

ROOT = Path(__file__).parents[1]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def _build(out: Path) -> dict[str, Path]:
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(out), str(ROOT)],
        check=True,
        capture_output=True,
    )
    return {path.suffix: path for path in out.iterdir()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return _build(tmp_path_factory.mktemp("dist"))


def _source() -> set[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "boneconv"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return set(filter(None, listed.stdout.split("\0")))


def test_the_wheel_holds_the_package_and_nothing_else(built: dict[str, Path]) -> None:
    wheel = built[".whl"]
    assert wheel.name == f"boneconv-{boneconv.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == _source()


def test_the_source_archive_holds_what_the_tests_need(built: dict[str, Path]) -> None:
    with tarfile.open(built[".gz"]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert _source() <= names
    assert {"README.md", "SECURITY.md", "action.yml", "tests/test_package.py"} <= names
    assert "specs/bone-adapter-1.0.md" in names


def test_a_second_build_has_the_same_bytes(built: dict[str, Path], tmp_path: Path) -> None:
    again = _build(tmp_path)
    for suffix, path in built.items():
        assert again[suffix].read_bytes() == path.read_bytes(), suffix


def test_the_wheel_works_in_an_empty_environment(built: dict[str, Path], tmp_path: Path) -> None:
    venv.create(tmp_path / "empty", with_pip=True)
    scripts = tmp_path / "empty" / Path(sys.executable).parent.name
    constraints = ROOT / "constraints.txt"
    subprocess.run(
        [str(scripts / "pip"), "install", "-q", "-c", str(constraints), str(built[".whl"])],
        check=True,
        capture_output=True,
    )
    done = subprocess.run(
        [str(scripts / "boneconv"), "demo"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "all are correctly rounded" in done.stdout
