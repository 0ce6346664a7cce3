"""``boneconv demo``: a table that a newcomer understands, and a command to paste next."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

import boneconv.demo
from boneconv.cli import run


def test_the_table(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["demo"]) == 0
    stdout, stderr = capfd.readouterr()
    assert stderr == ""
    assert "W'[:, j] = W[:, j] + B[j mod r, :]" in stdout
    rows = [line.split() for line in stdout.splitlines() if "model.layers.0." in line]
    assert [row[0] for row in rows] == ["bone"] * 3 + ["bat"] * 3
    assert all(row[-1] == "0" for row in rows)
    assert "all are correctly rounded" in stdout
    assert all(len(line) <= 120 for line in stdout.splitlines())


def test_nothing_is_kept_without_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run(["demo"]) == 0
    assert list(tmp_path.iterdir()) == []


def test_what_it_tells_to_try_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["demo", "kept"]) == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("Try: boneconv merge ")
    assert run(last.removeprefix("Try: boneconv ").split()) == 0
    one, two = (Path("kept") / name / "model.safetensors" for name in ("merged-bone", "my-merge"))
    assert one.read_bytes() == two.read_bytes()


def test_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)
    assert len(rows) == 6
    assert rows[0]["weight_shape"] == [12, 12]


def test_a_wrong_weight_is_code_1(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real = boneconv.demo.merge

    def merge_badly(base: Path, adapter: Path, out: Path) -> Any:
        result = real(base, adapter, out)
        path = out / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return result

    monkeypatch.setattr(boneconv.demo, "merge", merge_badly)
    assert run(["demo"]) == 1
    stdout, stderr = capfd.readouterr()
    assert "2 ARE WRONG" in stdout
    assert stderr.startswith("Error: merged weights differ")
