"""``boneconv merge``: its help, its plan and what it then does, its outputs and exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from boneconv.cli import run
from tests.builders import (
    BF16,
    EMBEDDING,
    F32,
    HIDDEN,
    Q,
    grid,
    make_adapter,
    make_base,
    module,
    pack,
    snapshot,
    unpack_folder,
)
from tests.slow_writes import SLOW

MERGE = ["merge", "base", "adapter", "out"]
FILES = {"tokenizer.json": "{}", "pytorch_model.bin": "stale"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base", shards=2, files=FILES)
    make_adapter(tmp_path / "adapter", saved={EMBEDDING: grid((32, HIDDEN), F32, 5)})
    return tmp_path


def _run(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    found = run(list(arguments))
    stdout, stderr = capfd.readouterr()
    assert found == code, stderr
    return stdout, stderr


# --- help -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["merge", "--help"], ["merge", "-h"]])
def test_help_has_an_example(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    stdout, stderr = _run(capfd, *arguments)
    assert "Example: boneconv merge " in " ".join(stdout.split())
    assert stderr == ""


def test_help_names_every_command_and_option(capfd: pytest.CaptureFixture[str]) -> None:
    commands, _ = _run(capfd, "--help")
    assert all(name in commands for name in ("merge", "inspect", "demo"))
    options, _ = _run(capfd, "merge", "--help")
    for name in ("--adapter", "--scale", "--dtype", "--max-shard-size", "--device", "--workers"):
        assert name in options
    for name in ("--dry-run", "--no-card", "--force", "--json", "--quiet", "--verbose"):
        assert name in options


def test_no_command_prints_help_and_is_bad_usage(capfd: pytest.CaptureFixture[str]) -> None:
    _, stderr = _run(capfd, code=2)
    assert "Usage: boneconv" in stderr


def test_version(capfd: pytest.CaptureFixture[str]) -> None:
    from boneconv import __version__

    assert _run(capfd, "--version")[0].strip() == f"boneconv, version {__version__}"


# --- what is planned is what is done ----------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [[], ["--dtype", "float32"], ["--max-shard-size", "1kB"], ["--no-card"], ["--scale", "0.5"]],
    ids=" ".join,
)
def test_a_dry_run_writes_nothing_and_says_what_is_then_done(
    here: Path, capfd: pytest.CaptureFixture[str], options: list[str]
) -> None:
    before = snapshot(here)
    plan = json.loads(_run(capfd, *MERGE, *options, "--dry-run", "--json")[0])
    assert snapshot(here) == before
    done = json.loads(_run(capfd, *MERGE, *options, "--json")[0])
    assert plan["tensors"] == done["tensors"]
    assert plan["bytes"] == done["bytes"]
    assert plan["left_out"] == done["left_out"] == ["pytorch_model.bin"]
    assert plan["notes"] == done["notes"]
    found = unpack_folder(here / "out")
    dtypes = {"BF16": BF16, "F32": F32}
    assert {entry["name"] for entry in plan["plan"]} == set(found)
    for entry in plan["plan"]:
        tensor = found[entry["name"]]
        assert list(tensor.shape) == entry["shape"]
        assert tensor.dtype == dtypes.get(entry["dtype"], tensor.dtype)
    record = json.loads((here / "out" / "boneconv.json").read_text())["tensors"]
    assert {entry["name"]: entry["action"] for entry in plan["plan"]} == {
        name: entry["action"] for name, entry in record.items()
    }
    files = snapshot(here / "out")
    assert set(plan["files"]) | set(plan["copies"]) <= set(files)
    assert sum(map(len, files.values())) == plan["bytes"]
    assert plan["peak_memory"] > 1_000_000
    assert plan["matched_by"] == ["direct"]


def test_a_dry_run_in_words(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stdout, stderr = _run(capfd, *MERGE, "--dry-run")
    words = " ".join(stdout.split())
    assert "tensors 6 merged, 1 replaced, 3 copied" in words
    assert "names matched by direct" in words
    assert "disk " in words
    assert "peak memory about " in words
    assert "files 2 of weights, " in words
    assert "note left out: pytorch_model.bin" in words
    assert "q_proj" not in words
    assert stderr == ""


def test_a_verbose_dry_run_lists_every_tensor(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = [line.split() for line in _run(capfd, *MERGE, "--dry-run", "-v")[0].splitlines()]
    assert ["merge", f"{module(0, Q)}.weight", "BF16", "12x12"] in lines
    assert ["replace", EMBEDDING, "BF16", "32x12"] in lines
    assert ["copy", "model.position_ids", "I64", "6"] in lines


def test_a_dry_run_does_not_mind_an_output_that_exists(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (here / "out").mkdir()
    _run(capfd, *MERGE, "--dry-run")


# --- output -----------------------------------------------------------------------------------


def test_the_result_in_words(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stdout, stderr = _run(capfd, *MERGE)
    assert stdout.startswith("out: 6 merged, 1 replaced, 3 copied, ")
    assert len(stdout.splitlines()) == 1
    assert stderr == "left out: pytorch_model.bin\n"


def test_the_result_as_json(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    result = json.loads(_run(capfd, *MERGE, "--json")[0])
    assert result["out"] == "out"
    assert result["record"] == "out/boneconv.json"
    assert result["tensors"] == {"copy": 3, "cast": 0, "merge": 6, "replace": 1, "add": 0}


def test_quiet_says_nothing_but_the_result(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stdout, stderr = _run(capfd, *MERGE, "--quiet")
    assert stdout.startswith("out: ")
    assert stderr == ""


def test_names_from_files_move_no_cursor(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\nError: no"
    tensors = {evil: grid((2, 2)), f"{module(0, Q)}.weight": grid((HIDDEN, HIDDEN))}
    make_base(here / "evil", tensors)
    (here / "evil" / "\x1b[31m.bin").write_text("x")
    blocks = {module(0, Q): grid((4, HIDDEN))}
    make_adapter(here / "bad", blocks=blocks, **{evil: 1})
    for options in (["--dry-run", "-v"], []):
        stdout, stderr = _run(capfd, "merge", "evil", "bad", "out", *options)
        assert "\x1b" not in stdout + stderr
        assert "\nError" not in stdout + stderr
    make_adapter(here / "bad", blocks={evil: grid((4, 4))}, base_model_name_or_path=evil)
    for options in ([], ["--verbose"]):
        stdout, _ = _run(capfd, "inspect", "bad", *options)
        assert "\x1b" not in stdout
        assert "\nError" not in stdout


# --- options ----------------------------------------------------------------------------------


def test_more_adapters_force_and_workers(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make_adapter(here / "second", "bat")
    _run(capfd, *MERGE, "--adapter", "second", "--workers", "1")
    first = snapshot(here / "out")
    assert len(json.loads(first["boneconv.json"])["adapters"]) == 2
    _run(capfd, *MERGE, "--adapter", "second", code=2)
    _run(capfd, *MERGE, "--adapter", "second", "--force", "--workers", "3")
    assert snapshot(here / "out") == first


# --- interrupts -------------------------------------------------------------------------------


def test_an_interrupt_is_130(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("boneconv.engine.commit.stream", interrupted)
    stdout, stderr = _run(capfd, *MERGE, code=130)
    assert stdout == ""
    assert stderr.strip() == "Interrupted."
    assert not (here / "out").exists()
    assert (here / "out.partial").exists()


def _large(folder: Path) -> None:
    weights = {f"m{i}.weight": grid((1024, 1024), F32, i) for i in range(8)}
    make_base(folder / "large", weights, shards=8)
    make_adapter(
        folder / "fits", "bat", rank=64, blocks={f"m{i}": grid((16, 64, 64)) for i in range(8)}
    )


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)], ids=["SIGINT", "SIGKILL"]
)
def test_a_run_that_was_stopped_is_gone_on_with(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    _large(tmp_path)
    arguments = ["merge", "large", "fits", "out", "--workers", "2"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stderr=subprocess.PIPE, text=True
    )
    journal = tmp_path / "out.partial" / "journal"
    for _ in range(3000):
        if journal.exists() and len(journal.read_bytes().splitlines()) > 2:
            break
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert "Traceback" not in stderr
    assert not (tmp_path / "out").exists()
    finished = [json.loads(line)["name"] for line in journal.read_text().splitlines()[1:]]
    inodes = {n: (tmp_path / "out.partial" / "out" / n).stat().st_ino for n in finished}
    assert 0 < len(finished) < 8
    for _ in range(500):  # the workers of a killed run notice, and let go of the lock
        if run(arguments) == 0:
            break
        time.sleep(0.01)
    capfd.readouterr()
    assert {n: (tmp_path / "out" / n).stat().st_ino for n in finished} == inodes
    assert run(["merge", "large", "fits", "fresh", "--workers", "1"]) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


def test_a_reader_that_goes_away_is_no_traceback(here: Path) -> None:
    (here / "many").mkdir()
    tensors = {f"t{i}": grid((1,)) for i in range(20_000)}
    (here / "many" / "model.safetensors").write_bytes(
        pack(tensors | {f"{module(0, Q)}.weight": grid((HIDDEN, HIDDEN))})
    )
    make_adapter(here / "few", blocks={module(0, Q): grid((4, HIDDEN))})
    code = "import sys; from boneconv.cli import run; sys.exit(run(sys.argv[1:]))"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "merge", "many", "few", "out", "--dry-run", "-v"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.stderr is not None
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    process.wait(60)
