"""What a merge takes: memory, disk, imports. Each is measured on a process of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import real

LIMIT = 150_000_000
FOREIGN = {
    "huggingface_hub",
    "onnx",
    "onnxruntime",
    "peft",
    "safetensors",
    "scipy",
    "torch",
    "transformers",
}

#: Runs a command line and says at its end what it has imported.
COMMAND = """
import json, sys
from boneconv.cli import main
try:
    main()
finally:
    with open({modules!r}, "w") as file:
        json.dump(sorted(sys.modules), file)
"""

#: Runs a command and watches the memory of its processes: the pages of their own, those that a fork
#: shares counted once, and the libraries' pages of the largest. A small process does this, for a
#: command inherits the largest memory of the one that starts it as its own.
WATCH = """
import json, os, subprocess, sys, time

def values(path):
    with open(path) as file:
        return {line.split()[0]: int(line.split()[1]) for line in file if line.endswith("kB\\n")}

def tree(pid):
    yield pid
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        children = file.read().split()
    for child in children:
        yield from tree(child)

def resident(pid):
    own = libraries = 0
    for one in list(tree(pid)):
        try:
            shares = values(f"/proc/{one}/smaps_rollup")
            own += shares["Pss_Anon:"] + shares["Pss_Shmem:"]
            libraries = max(libraries, values(f"/proc/{one}/status")["RssFile:"])
        except (OSError, KeyError):
            pass  # it has just ended
    return 1024 * (own + libraries)

process = subprocess.Popen(sys.argv[2:])
peak = 0
while True:
    pid, status, usage = os.wait4(process.pid, os.WNOHANG)
    if pid:
        break
    try:
        peak = max(peak, resident(pid or process.pid))
    except OSError:
        pass
    time.sleep(0.002)
with open(sys.argv[1], "w") as file:
    json.dump({"together": peak, "largest": 1024 * usage.ru_maxrss}, file)
sys.exit(os.waitstatus_to_exitcode(status))
"""

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")


@dataclass(frozen=True)
class Run:
    """A finished command.

    Attributes:
        stdout: What it printed.
        modules: The top-level modules that it imported.
        peak: The most resident memory of all its processes together, in bytes.
    """

    stdout: str
    modules: frozenset[str]
    peak: int


def run(folder: Path, *arguments: str | Path) -> Run:
    """Run `boneconv` with these arguments, which must succeed."""
    modules, memory = folder / "modules.json", folder / "memory.json"
    command = [sys.executable, "-c", COMMAND.format(modules=str(modules)), *arguments]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", WATCH, memory, *command],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    measured = json.loads(memory.read_text())
    names = {name.partition(".")[0] for name in json.loads(modules.read_text())}
    return Run(done.stdout, frozenset(names), max(measured.values()))


def nbytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def large(tmp_path: Path) -> Iterator[Path]:
    """A folder that is too large to be kept after the test."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def plan(folder: Path, *arguments: str | Path) -> dict[str, Any]:
    found = json.loads(run(folder, "merge", *arguments, "--dry-run", "--json").stdout)
    assert isinstance(found, dict)
    return found


@on_linux
@pytest.mark.parametrize("workers", ["1", "2", pytest.param("4", marks=pytest.mark.slow)])
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_memory_is_small_and_foretold(
    cache: Path, large: Path, variant: real.Variant, workers: str
) -> None:
    inputs = real.smollm2(cache), real.trained(cache, variant), large / "out"
    foretold = plan(large, *inputs, "--workers", workers)["peak_memory"]
    merged = run(large, "merge", *inputs, "--workers", workers)
    print(  # noqa: T201
        f"{variant}, {workers} workers: {merged.peak / 1e6:.1f} MB, foretold {foretold / 1e6:.1f}"
    )
    assert merged.peak < LIMIT
    assert 0.8 * merged.peak <= foretold <= 1.2 * merged.peak
    assert not merged.modules & FOREIGN


@pytest.mark.parametrize("dtype", ["keep", "float32"])
def test_the_foretold_disk_space_is_what_the_output_takes(
    real_base: Path, trained_bone: Path, large: Path, dtype: str
) -> None:
    inputs = real_base, trained_bone, large / "out"
    foretold = plan(large, *inputs, "--dtype", dtype)["bytes"]
    assert not (large / "out").exists()
    done = run(large, "merge", *inputs, "--dtype", dtype, "--json")
    assert foretold == nbytes(large / "out") == json.loads(done.stdout)["bytes"]


def test_a_dry_run_imports_no_more(real_base: Path, trained_bat: Path, tmp_path: Path) -> None:
    done = run(tmp_path, "merge", real_base, trained_bat, tmp_path / "out", "--dry-run")
    assert not done.modules & FOREIGN
    assert "210 merged, 62 copied" in done.stdout


def test_a_ragged_rank_in_float32_imports_no_more(
    minilm_base: Path, minilm_bone: Path, large: Path
) -> None:
    done = run(large, "merge", minilm_base, minilm_bone, large / "out")
    assert not done.modules & FOREIGN
    assert done.peak < LIMIT
