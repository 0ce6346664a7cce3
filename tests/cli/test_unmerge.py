"""``boneconv unmerge`` and ``merge --keep-delta``: help, outputs, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from boneconv.cli import run
from tests.builders import (
    EMBEDDING,
    F32,
    HIDDEN,
    VOCABULARY,
    Q,
    base_tensors,
    blocks_for_all,
    grid,
    make_adapter,
    make_base,
    module,
    snapshot,
)

UNMERGE = ["unmerge", "merged", "adapter", "back"]
DELTA = [*UNMERGE, "--delta", "delta"]


@pytest.fixture
def here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Path:
    """A folder with a base, a BAT adapter, their merge and its delta file."""
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base", shards=2, files={"pytorch_model.bin": "stale"})
    make_adapter(tmp_path / "adapter", "bat")
    _run(capfd, "merge", "base", "adapter", "merged", "--keep-delta", "delta")
    return tmp_path


def _run(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    found = run(list(arguments))
    stdout, stderr = capfd.readouterr()
    assert found == code, stderr
    return stdout, stderr


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_has_an_example(option: str, capfd: pytest.CaptureFixture[str]) -> None:
    stdout, stderr = _run(capfd, "unmerge", option)
    assert "Example: boneconv unmerge ./merged ./my-bone-adapter ./base-again" in stdout
    assert stderr == ""
    assert "--keep-delta FILE" in _run(capfd, "merge", "--help")[0]


def test_the_bound_and_the_condition_number_are_printed(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stdout, stderr = _run(capfd, *UNMERGE)
    lines = stdout.splitlines()
    assert lines[0].startswith("back: 6 restored, 4 copied, ")
    assert lines[1].startswith("bound       no weight differs from the base's by more than ")
    assert lines[2].startswith("condition   at most ")
    assert lines[4].split() == ["tensor", "bound", "condition", "exact"]
    assert lines[5].startswith("model.layers.*.self_attn.q_proj.weight x2 ")
    assert len(lines) == 8
    assert stderr == "README.md is left out: the merge wrote it\n"


def test_verbose_lists_every_tensor_and_quiet_says_nothing(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stdout, stderr = _run(capfd, *UNMERGE, "-v", "-q")
    assert stderr == ""
    rows = stdout.splitlines()[5:]
    assert [row.split()[0] for row in rows] == [f"{name}.weight" for name in blocks_for_all()]


def test_json_has_the_bound_of_every_module(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stdout, _ = _run(capfd, *UNMERGE, "--json")
    result = json.loads(stdout)
    assert set(result) == {
        *("out", "record", "tensors", "exact", "bound", "condition", "restored", "bytes"),
        *("left_out", "notes"),
    }
    assert (result["out"], result["record"]) == ("back", "back/boneconv.json")
    assert result["tensors"] == {"restored": 6, "copied": 4, "stored": 0}
    assert len(result["restored"]) == 6
    for each in result["restored"]:
        assert set(each) == {"name", "bound", "condition", "exact"}
        assert 0 < each["bound"] <= result["bound"]
        assert 1 < each["condition"] <= result["condition"]


def test_a_delta_file_restores_every_byte(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stdout, stderr = _run(capfd, *DELTA)
    assert stderr == ""
    assert "exact       every tensor is the base's, by its digest" in stdout
    assert "left out    pytorch_model.bin" in stdout
    found, expected = snapshot(here / "back"), snapshot(here / "base")
    found.pop("boneconv.json")
    expected.pop("pytorch_model.bin")
    assert found == expected


def test_merge_says_where_the_delta_file_is(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = ["merge", "base", "adapter", "more", "--json"]
    assert json.loads(_run(capfd, *arguments)[0])["delta"] is None
    arguments += ["--force", "--keep-delta", "another"]
    assert json.loads(_run(capfd, *arguments)[0])["delta"] == "another"
    assert (here / "another").read_bytes() == (here / "delta").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["unmerge", "nowhere", "adapter", "back"], "nowhere"),
        (["unmerge", "merged", "merged", "back"], "not an adapter"),
        (["unmerge", "merged", "adapter", "base"], "the output exists already"),
        (["unmerge", "merged", "other", "back"], "these are not the adapters that were merged"),
        ([*UNMERGE, "--adapter", "other"], "these are not the adapters that were merged"),
        ([*UNMERGE, "--scale", "2"], "the merge had another scale"),
        ([*UNMERGE, "--delta", "nowhere"], "no such file"),
        ([*UNMERGE, "--delta", "merged/boneconv.json"], "not a safetensors file"),
        (["unmerge", "singular", "no-inverse", "back"], f"'{module(0, Q)}.weight': I + B is sing"),
        (["unmerge", "replaced", "saved", "back"], f"lost: replaced: {EMBEDDING}"),
        ([*UNMERGE, "--workers", "0"], "--workers"),
        (["unmerge", "merged"], "Missing argument 'ADAPTER'"),
        (["merge", "base", "adapter", "x", "--keep-delta", "delta"], "delta: the output exists"),
        (["merge", "base", "adapter", "x", "--keep-delta", "x/d"], "must not lie in the base or"),
    ],
)
def test_bad_input_exits_with_2_and_leaves_nothing(
    here: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    make_adapter(here / "other", "bat", blocks=blocks_for_all("bat", seed=3))
    singular = blocks_for_all("bat") | {module(0, Q): np.tile(-np.eye(4, dtype=F32), (3, 1, 1))}
    make_adapter(here / "no-inverse", "bat", blocks=singular)
    make_adapter(here / "saved", saved={EMBEDDING: grid((VOCABULARY, HIDDEN), F32, 5)})
    _run(capfd, "merge", "base", "no-inverse", "singular")
    _run(capfd, "merge", "base", "saved", "replaced")
    before = snapshot(here)
    stdout, stderr = _run(capfd, *arguments, code=2)
    assert stdout == ""
    assert text in stderr
    assert "Traceback" not in stderr
    assert snapshot(here) == before


def test_a_float32_merge_that_lost_nothing_is_exact(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_base(here / "wide", base_tensors(F32))
    make_adapter(here / "bone")
    _run(capfd, "merge", "wide", "bone", "wide-merged")
    stdout, _ = _run(capfd, "unmerge", "wide-merged", "bone", "back")
    assert "exact       every tensor is the base's" in stdout
