"""``boneconv inspect``: adapters and checkpoints in words, in a table and as JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from boneconv.cli import run
from tests.builders import (
    HIDDEN,
    base_tensors,
    block_for,
    blocks_for_all,
    grid,
    make_adapter,
    make_base,
)


def _run(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert run(list(arguments)) == 0
    stdout, stderr = capfd.readouterr()
    assert stderr == ""
    return stdout


def _lines(text: str) -> list[list[str]]:
    return [line.split() for line in text.splitlines()]


def test_an_adapter_in_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = make_adapter(
        tmp_path / "a",
        "bat",
        saved={"score.weight": grid((3, HIDDEN))},
        base_model_name_or_path="owner/base",
        strange=1,
    )
    text = _run(capfd, "inspect", str(folder))
    lines = _lines(text)
    assert lines[0] == ["adapter", str(folder)]
    assert ["variant", "bat", "over", "the", "output", "axis,", "rank", "4,", "F32"] in lines
    assert ["base", "owner/base"] in lines
    assert ["modules", "6"] in lines
    assert ["replaces", "score.weight"] in lines
    assert "unknown     strange (kept, not understood)" in text


def test_a_row_for_each_kind_of_module(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = _lines(_run(capfd, "inspect", str(make_adapter(tmp_path / "a"))))
    assert ["module", "layers", "block", "dtype", "parameters"] in lines
    assert ["model.layers.*.self_attn.q_proj", "0-1", "4x12", "F32", "96"] in lines
    assert ["model.layers.*.mlp.up_proj", "0-1", "4x20", "F32", "160"] in lines


def test_layers_that_are_not_in_a_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    block = block_for("bone", (HIDDEN, HIDDEN))
    blocks = {f"h.{i}.q": block for i in (0, 1, 2, 5, 7, 8)} | {"head": block}
    lines = _lines(_run(capfd, "inspect", str(make_adapter(tmp_path / "a", blocks=blocks))))
    assert ["h.*.q", "0-2,", "5,", "7-8", "4x12", "F32", "288"] in lines
    assert ["head", "-", "4x12", "F32", "48"] in lines


def test_verbose_lists_every_module(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lines = _lines(_run(capfd, "inspect", str(make_adapter(tmp_path / "a")), "-v"))
    for name in blocks_for_all():
        assert any(line[:1] == [name] for line in lines)


def test_a_checkpoint_in_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = {"tokenizer.json": "{}", "old.bin": "x"}
    base = make_base(tmp_path / "base", shards=2, files=files)
    text = _run(capfd, "inspect", str(base))
    lines = _lines(text)
    assert lines[0] == ["checkpoint", str(base)]
    assert ["tensors", str(len(base_tensors())), "(9", "BF16,", "1", "I64)"] in lines
    assert ["beside", "tokenizer.json"] in lines
    assert "stale       old.bin (a merge leaves these out)" in text
    assert lines[-2][0] == "model-00001-of-00002.safetensors"


def test_as_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapter = json.loads(_run(capfd, "inspect", str(make_adapter(tmp_path / "a")), "--json"))
    assert (adapter["variant"], adapter["rank"]) == ("bone", 4)
    assert adapter["blocks"][0]["shape"] == [4, 12]
    base = json.loads(_run(capfd, "inspect", str(make_base(tmp_path / "b")), "--json"))
    assert base["dtypes"] == {"BF16": 9, "I64": 1}
    assert base["shards"][0]["name"] == "model.safetensors"


def test_help_has_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    assert "Example: boneconv inspect " in _run(capfd, "inspect", "--help")
