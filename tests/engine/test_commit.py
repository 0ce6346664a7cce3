"""Carrying out a plan: whole or not at all, and going on from what an earlier run finished."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import pytest

from boneconv.engine import commit
from boneconv.engine.commit import carry_out
from boneconv.engine.plan import Plan, PlannedShard
from boneconv.engine.stream import ShardDigests
from boneconv.errors import (
    BoneconvError,
    DiskFullError,
    FormatError,
    LockedError,
    MachineError,
    OutputExistsError,
)
from boneconv.io import copying
from boneconv.io.files import Writer
from boneconv.io.staging import Staging
from boneconv.planning import plan_merge
from tests.builders import make_adapter, make_base, snapshot

SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base", shards=3, files={"tokenizer.json": "{}", "sub/x.py": "x"})


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")


@pytest.fixture
def plan(base: Path, adapter: Path) -> Plan:
    return plan_merge(base, adapter).plan


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def _record(digests: ShardDigests) -> bytes:
    return json.dumps({name: each.output for name, each in sorted(digests.items())}).encode()


def _run(plan: Plan, out: Path, **more: Any) -> ShardDigests:
    options: dict[str, Any] = {"workers": 1, "device": "cpu", "force": False, "is_file": False}
    options |= {"identity": b"same", "record": _record, "record_name": "record.json"}
    return carry_out(plan, out, **(options | more))


class _Fault:
    """Writing to one shard fails; which shards were begun is noted."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str | None, error: BaseException):
        self.begun: list[str] = []
        self._real = Writer.__init__
        fault = self

        def init(self: Writer, path: Path, size: int | None = None) -> None:
            if size is not None:
                fault.begun.append(path.name)
            elif path.name == name:
                raise error
            fault._real(self, path, size)

        monkeypatch.setattr(Writer, "__init__", init)


@pytest.fixture
def interrupted(plan: Plan, out: Path) -> Callable[[], Path]:
    """A run that the disk failed in the second of three shards; its OUT.partial."""

    def run() -> Path:
        with pytest.MonkeyPatch.context() as patch:
            _Fault(patch, SHARDS[1], MachineError("the disk failed"))
            with pytest.raises(MachineError, match="the disk failed"):
                _run(plan, out)
        assert not out.exists()
        return out.with_name("out.partial")

    return run


@pytest.fixture
def expected(plan: Plan, tmp_path: Path) -> dict[str, bytes]:
    _run(plan, tmp_path / "expected")
    return snapshot(tmp_path / "expected")


def test_all_files_of_the_plan_and_no_others(plan: Plan, out: Path) -> None:
    digests = _run(plan, out)
    assert set(snapshot(out)) == {
        *SHARDS,
        "model.safetensors.index.json",
        "README.md",
        "record.json",
        "sub/x.py",
        "tokenizer.json",
    }
    assert set(digests) == {tensor.name for tensor in plan.tensors}
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_the_output_does_not_depend_on_the_workers(
    plan: Plan, out: Path, expected: dict[str, bytes], workers: int
) -> None:
    _run(plan, out, workers=workers)
    assert snapshot(out) == expected


# --- resuming ---------------------------------------------------------------------------------


def test_finished_shards_are_not_written_again(
    plan: Plan,
    out: Path,
    expected: dict[str, bytes],
    interrupted: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    partial = interrupted()
    inode = (partial / "out" / SHARDS[0]).stat().st_ino
    fault = _Fault(monkeypatch, None, MachineError("x"))
    digests = _run(plan, out)
    assert fault.begun == SHARDS[1:]
    assert (out / SHARDS[0]).stat().st_ino == inode
    assert snapshot(out) == expected
    assert set(digests) == {tensor.name for tensor in plan.tensors}


def _flip_a_value(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _change_the_header(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'{"format": "pt"}', b'{"format": "tf"}'))


def _cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize(
    "tamper", [_flip_a_value, _change_the_header, _cut, Path.unlink], ids=lambda f: f.__name__
)
def test_a_shard_that_somebody_touched_is_written_again(
    plan: Plan,
    out: Path,
    expected: dict[str, bytes],
    interrupted: Callable[[], Path],
    tamper: Callable[[Path], None],
) -> None:
    path = interrupted() / "out" / SHARDS[0]
    before = path.read_bytes()
    tamper(path)
    assert not path.exists() or path.read_bytes() != before
    _run(plan, out)
    assert snapshot(out) == expected


@pytest.mark.parametrize("change", ["identity", "base", "options"])
def test_another_run_s_work_is_not_used(
    plan: Plan,
    base: Path,
    adapter: Path,
    out: Path,
    interrupted: Callable[[], Path],
    monkeypatch: pytest.MonkeyPatch,
    change: str,
) -> None:
    interrupted()
    fault = _Fault(monkeypatch, None, MachineError("x"))
    if change == "identity":
        _run(plan, out, identity=b"another")
    elif change == "base":
        stat = (base / SHARDS[0]).stat()
        os.utime(base / SHARDS[0], ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        _run(plan, out)
    else:
        _run(plan_merge(base, adapter, dtype="float32").plan, out)
    assert fault.begun == SHARDS


@pytest.mark.parametrize(
    "entry", [{}, {"tensors": 3}, {"tensors": {"a": {}}}, {"tensors": {"a": {"x": 1}}}], ids=str
)
def test_a_journal_that_makes_no_sense_is_not_believed(
    plan: Plan,
    out: Path,
    expected: dict[str, bytes],
    interrupted: Callable[[], Path],
    entry: dict[str, Any],
) -> None:
    with (interrupted() / "journal").open("a") as journal:
        journal.write(json.dumps({"name": SHARDS[0]} | entry) + "\n")
    _run(plan, out)
    assert snapshot(out) == expected


def test_progress_is_whole_when_resumed(
    plan: Plan, out: Path, interrupted: Callable[[], Path]
) -> None:
    interrupted()
    told: list[int] = []
    _run(plan, out, advance=told.append)
    copied = sum(path.stat().st_size for path in plan.copies.values())
    assert copied > 0
    assert sum(told) == plan.work_bytes == sum(t.nbytes for t in plan.tensors) + copied


def test_a_shard_without_tensors_is_written(plan: Plan, out: Path) -> None:
    empty = PlannedShard.lay_out("empty.safetensors", [], {"format": "pt"})
    _run(Plan((*plan.shards, empty), {}, {}), out)
    assert (out / "empty.safetensors").read_bytes() == empty.head


@pytest.fixture
def killed_at_the_end(plan: Plan, out: Path) -> None:
    """A run that was killed when it had published, and not yet removed OUT.partial."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Staging, "_clear", lambda self: None)
        _run(plan, out)
    assert out.with_name("out.partial").exists()


@pytest.mark.usefixtures("killed_at_the_end")
def test_what_was_published_is_not_written_again(
    plan: Plan, out: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = _Fault(monkeypatch, None, MachineError("x"))
    checked: list[Path] = []
    told: list[int] = []
    digests = _run(
        plan,
        out,
        advance=told.append,
        before_publish=lambda made, digests: checked.append(made),
    )
    assert sum(told) == plan.work_bytes
    assert fault.begun == []
    assert checked == [out]
    assert set(digests) == {tensor.name for tensor in plan.tensors}
    assert snapshot(out) == expected
    assert not out.with_name("out.partial").exists()


@pytest.mark.usefixtures("killed_at_the_end")
@pytest.mark.parametrize("tamper", [_flip_a_value, _cut, Path.unlink], ids=lambda f: f.__name__)
def test_what_was_published_and_changed_since_is_an_output_that_exists(
    plan: Plan, out: Path, tamper: Callable[[Path], None]
) -> None:
    tamper(out / SHARDS[0])
    changed = snapshot(out)
    with pytest.raises(OutputExistsError, match="has changed"):
        _run(plan, out)
    assert snapshot(out) == changed
    assert not out.with_name("out.partial").exists()


def test_outputs_of_one_run_are_published_together(
    plan: Plan, out: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the second cannot be, the first is withdrawn."""
    second = out.with_name("second")
    runs = [commit.Run(plan, place, b"same", _record, "record.json") for place in (out, second)]
    publish = Staging.publish

    def publishing(self: Staging) -> None:
        if self.out == second:
            assert out.exists()
            raise MachineError("the disk failed")
        publish(self)

    with monkeypatch.context() as patch, pytest.raises(MachineError, match="the disk failed"):
        patch.setattr(Staging, "publish", publishing)
        commit.carry_out_all(runs, workers=1)
    assert not out.exists()
    assert not second.exists()
    commit.carry_out_all(runs, workers=1)
    assert snapshot(out) == snapshot(second) == expected


# --- failures ---------------------------------------------------------------------------------


def test_an_error_in_the_input_leaves_nothing(
    plan: Plan, out: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(base)
    _Fault(monkeypatch, SHARDS[1], FormatError("broken"))
    with pytest.raises(FormatError):
        _run(plan, out)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()
    assert snapshot(base) == before


def test_an_interrupt_keeps_what_is_done(plan: Plan, out: Path, expected: dict[str, bytes]) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        _Fault(patch, SHARDS[2], KeyboardInterrupt())
        _run(plan, out)
    partial = out.with_name("out.partial")
    assert (partial / "out" / SHARDS[0]).read_bytes() == expected[SHARDS[0]]
    _run(plan, out)
    assert snapshot(out) == expected


def test_a_file_to_copy_that_cannot_be_copied(
    plan: Plan, out: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(DiskFullError):
        patch.setattr(copying, "_clone", full)
        _run(plan, out)
    assert not out.exists()
    _run(plan, out)
    assert snapshot(out) == expected


def test_too_little_space_is_told_before_anything_is_written(
    plan: Plan, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(out.parent)._replace(free=plan.total_bytes - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(DiskFullError, match="not enough room"):
        _run(plan, out)
    assert not out.with_name("out.partial").exists()


def test_out_exists(plan: Plan, out: Path) -> None:
    out.mkdir()
    with pytest.raises(OutputExistsError):
        _run(plan, out)
    _run(plan, out, force=True)
    assert (out / SHARDS[0]).exists()


def test_two_runs_at_once(plan: Plan, out: Path) -> None:
    def record(digests: ShardDigests) -> bytes:
        with pytest.raises(LockedError):
            _run(plan, out)
        return _record(digests)

    _run(plan, out, record=record)
    assert (out / "record.json").exists()


def test_a_link_that_leads_nowhere_is_named(base: Path, adapter: Path, out: Path) -> None:
    (base / "vocab.json").symlink_to("gone")
    with pytest.raises(BoneconvError, match=r"vocab\.json") as caught:
        _run(plan_merge(base, adapter).plan, out)
    assert caught.value.exit_code == 2


# --- the order of flushes and renames ---------------------------------------------------------


@pytest.mark.parametrize("is_file", [False, True])
def test_everything_is_flushed_before_the_rename(
    plan: Plan, out: Path, base: Path, monkeypatch: pytest.MonkeyPatch, is_file: bool
) -> None:
    flushed: set[int] = set()
    fsync, publish = os.fsync, Staging.publish
    checked: list[str] = []

    def syncing(fd: int) -> None:
        fsync(fd)
        flushed.add(os.fstat(fd).st_ino)

    def publishing(self: Staging) -> None:
        files = [p for p in self.root.rglob("*") if p.is_file() and p.name != "lock"]
        for path in files:
            assert path.stat().st_ino in flushed, path
            checked.append(path.name)
        publish(self)

    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(Staging, "publish", publishing)
    if is_file:
        one = Plan(plan.shards[:1], {}, {})
        _run(one, out, is_file=True, record_name="out.record.json")
        assert set(checked) == {"out", "beside", "journal"}
    else:
        _run(plan, out)
        assert {*SHARDS, "record.json", "tokenizer.json", "journal"} <= set(checked)
    assert out.stat().st_ino in flushed
    assert out.parent.stat().st_ino in flushed


def test_a_file_has_its_record_beside_it(plan: Plan, out: Path) -> None:
    _run(Plan(plan.shards[:1], {}, {}), out, is_file=True, record_name="out.record.json")
    assert out.is_file()
    assert json.loads(out.with_name("out.record.json").read_bytes())


def test_total_bytes_is_what_is_written(plan: Plan, out: Path) -> None:
    _run(plan, out)
    (out / "record.json").unlink()
    assert (
        sum(len(content) for content in snapshot(out).values())
        == plan.total_bytes - plan.record_bytes
    )
    assert PurePosixPath("tokenizer.json") in plan.copies
    assert commit.__all__ == ["Run", "carry_out", "carry_out_all"]
