"""What `merge` is given to look at its output before anybody else sees it."""

from __future__ import annotations

from pathlib import Path

import pytest

from boneconv.errors import CheckFailedError, MachineError
from boneconv.io.checkpoint import open_checkpoint
from boneconv.merging import merge
from tests.builders import base_tensors, make_adapter, make_base, pack, snapshot


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", shards=2, files={"tokenizer.json": "{}"})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")


class Look:
    """Notes what it is shown, and may refuse it."""

    def __init__(self, out: Path, refuse: bool = False) -> None:
        self.out, self.refuse = out, refuse
        self.seen: list[dict[str, bytes]] = []

    def __call__(self, made: Path) -> None:
        assert not self.out.exists()
        assert made != self.out
        open_checkpoint(made)
        self.seen.append(snapshot(made) if made.is_dir() else {"": made.read_bytes()})
        if self.refuse:
            raise CheckFailedError("not what it should be", path=made)


def test_it_is_shown_the_complete_folder(base: Path, adapter: Path, tmp_path: Path) -> None:
    look = Look(tmp_path / "out")
    merge(base, adapter, tmp_path / "out", check=look)
    assert look.seen == [snapshot(tmp_path / "out")]
    assert "boneconv.json" in look.seen[0]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_it_is_shown_the_complete_file_by_its_kind(
    adapter: Path, tmp_path: Path, suffix: str
) -> None:
    tensors = base_tensors()
    (tmp_path / "base.safetensors").write_bytes(pack(tensors))
    out = tmp_path / f"out{suffix}"
    look = Look(out)
    merge(tmp_path / "base.safetensors", adapter, out, check=look)
    assert look.seen == [{"": out.read_bytes()}]
    assert set(open_checkpoint(out).tensors) == set(tensors)


@pytest.mark.parametrize("name", ["out", "out.safetensors"])
def test_what_it_refuses_is_not_published(
    base: Path, adapter: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "file").mkdir()
    given = base
    if name != "out":
        given = tmp_path / "file" / "base.safetensors"
        given.write_bytes(pack(base_tensors()))
    before = snapshot(tmp_path)
    with pytest.raises(CheckFailedError) as caught:
        merge(given, adapter, tmp_path / name, check=Look(tmp_path / name, refuse=True))
    assert caught.value.exit_code == 1
    assert snapshot(tmp_path) == before


def test_what_it_refuses_leaves_no_delta_file_and_the_old_output(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    out = merge(base, adapter, tmp_path / "out").out
    before = snapshot(tmp_path)

    def refuse(made: Path) -> None:
        raise CheckFailedError("no")

    with pytest.raises(CheckFailedError):
        merge(
            base,
            adapter,
            out,
            scale=2.0,
            check=refuse,
            keep_delta=tmp_path / "delta.safetensors",
            force=True,
        )
    assert snapshot(tmp_path) == before


def test_it_goes_with_a_delta_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    look = Look(tmp_path / "out")
    delta = tmp_path / "delta.safetensors"
    result = merge(base, adapter, tmp_path / "out", check=look, keep_delta=delta)
    assert result.delta == delta
    assert delta.is_file()
    assert len(look.seen) == 1


def test_every_output_is_looked_at_before_any_is_published(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    second = make_adapter(tmp_path / "second", "bat")
    first_out, second_out = tmp_path / "a", tmp_path / "b"
    look = Look(first_out)
    merge(base, adapter, first_out, each=[(second, second_out)], check=look)
    assert look.seen == [snapshot(first_out), snapshot(second_out)]

    seen = []

    def refuse_the_second(made: Path) -> None:
        seen.append(made)
        if len(seen) == 2:
            raise CheckFailedError("no")

    third, fourth = tmp_path / "c", tmp_path / "d"
    with pytest.raises(CheckFailedError):
        merge(base, adapter, third, each=[(second, fourth)], check=refuse_the_second)
    assert not any(path.name.startswith(("c", "d")) for path in tmp_path.iterdir())


def test_after_a_failure_of_the_machine_it_is_asked_again(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    def fail(made: Path) -> None:
        raise MachineError("no memory")

    out = tmp_path / "out"
    with pytest.raises(MachineError):
        merge(base, adapter, out, check=fail)
    assert (tmp_path / "out.partial" / "journal").exists()
    look = Look(out)
    merge(base, adapter, out, check=look)
    assert look.seen == [snapshot(out)]
