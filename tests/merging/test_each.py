"""Several outputs from one pass over the base: each is what a merge of its own gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from boneconv.cli import run
from boneconv.errors import OutputExistsError, UsageError
from boneconv.io.files import Reader
from boneconv.merging import merge
from tests.builders import make_adapter, make_base, snapshot


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", shards=3, files={"tokenizer.json": "{}"})


@pytest.fixture
def adapters(tmp_path: Path) -> list[Path]:
    variants = ("bone", "bat", "bone")
    ranks = (4, 4, 3)
    return [
        make_adapter(tmp_path / f"adapter{i}", variant, rank=rank)
        for i, (variant, rank) in enumerate(zip(variants, ranks, strict=True))
    ]


@pytest.mark.parametrize("workers", [1, 3])
def test_every_output_is_what_a_merge_of_its_own_gives(
    base: Path, adapters: list[Path], tmp_path: Path, workers: int
) -> None:
    outs = [tmp_path / f"out{i}" for i in range(3)]
    each = list(zip(adapters[1:], outs[1:], strict=True))
    result = merge(base, adapters[0], outs[0], each=each, workers=workers)
    assert [result.out, *(one.out for one in result.each)] == outs
    for i, (adapter, out) in enumerate(zip(adapters, outs, strict=True)):
        alone = tmp_path / f"alone{i}"
        merge(base, adapter, alone)
        assert snapshot(out) == snapshot(alone)


def test_a_base_shard_is_read_for_all_outputs_before_the_next(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    read = Reader.read_into

    def noting(self: Reader, buffer: memoryview, offset: int) -> None:
        if self.path.parent == base and offset > 8 and (not order or order[-1] != self.path.name):
            order.append(self.path.name)
        read(self, buffer, offset)

    plain = [(adapters[1], tmp_path / "b"), (adapters[2], tmp_path / "c")]
    monkeypatch.setattr(Reader, "read_into", noting)
    merge(base, adapters[0], tmp_path / "a", each=plain, workers=1)
    streamed = order[-3:]
    assert streamed == sorted(streamed)
    assert len(set(streamed)) == 3


def test_nothing_appears_when_one_adapter_is_bad(
    base: Path, adapters: list[Path], tmp_path: Path
) -> None:
    weights = adapters[1] / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    before = {path.name for path in tmp_path.iterdir()}
    arguments = ["merge", str(base), str(adapters[0]), str(tmp_path / "a")]
    assert run([*arguments, "--each", f"{adapters[1]}={tmp_path / 'b'}"]) == 2
    assert {path.name for path in tmp_path.iterdir()} == before


def test_outputs_need_places_of_their_own(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UsageError, match="two outputs in one place"):
        merge(base, adapters[0], out, each=[(adapters[1], out / "inner")])
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputExistsError):
        merge(base, adapters[0], out, each=[(adapters[1], tmp_path / "taken")])
    with pytest.raises(UsageError, match="delta"):
        delta = tmp_path / "delta.safetensors"
        merge(base, adapters[0], out, each=[(adapters[1], tmp_path / "b")], keep_delta=delta)
    assert not out.exists()


def test_the_command_line_names_pairs(
    base: Path, adapters: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["merge", str(base), str(adapters[0]), str(tmp_path / "a"), "--json"]
    pair = f"{adapters[1]}={tmp_path / 'b'}"
    assert run([*arguments, "--each", pair, "--dry-run"]) == 0
    assert len(json.loads(capsys.readouterr().out)["each"]) == 1
    assert run([*arguments, "--each", pair]) == 0
    assert json.loads(capsys.readouterr().out)["each"][0]["out"] == str(tmp_path / "b")
    assert run([*arguments, "--each", "no pair", "--force"]) == 2
