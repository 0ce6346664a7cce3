"""Work in progress: OUT is absent or whole, an error of the input leaves nothing, others resume."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path

import pytest

from boneconv.errors import (
    BoneconvError,
    CheckFailedError,
    DiskFullError,
    FormatError,
    InputError,
    LockedError,
    MachineError,
    OutputExistsError,
)
from boneconv.io.staging import Staging, check_free, require_space
from tests.builders import snapshot
from tests.io.staging_runs import failed_run

# --- publishing -------------------------------------------------------------------------------


def test_a_folder_is_published_whole(out: Path, partial: Path) -> None:
    with Staging(out, key="k", is_file=False) as staging:
        (staging.target / "sub").mkdir()
        (staging.target / "sub" / "a").write_text("a")
        assert not out.exists()
        staging.publish()
        assert snapshot(out) == {"sub/a": b"a"}
    assert not partial.exists()


def test_a_file_has_its_suffix_while_it_is_made(tmp_path: Path) -> None:
    """Whoever looks at it before it is published tells by that what it is."""
    out = tmp_path / "out.merged.pth"
    for resumed in (False, True):
        with (
            pytest.raises(MachineError),
            Staging(out, key="k", is_file=True) as staging,
        ):
            assert staging.target == tmp_path / "out.merged.pth.partial" / "out.pth"
            assert staging.target.exists() is resumed
            staging.target.write_text("a")
            raise MachineError("no")
    with Staging(out, key="k", is_file=True) as staging:
        staging.publish()
    assert snapshot(tmp_path) == {"out.merged.pth": b"a"}


def test_a_file_is_published_whole(out: Path, partial: Path) -> None:
    with Staging(out, key="k", is_file=True) as staging:
        staging.target.write_text("a")
        assert not out.exists()
        staging.publish()
    assert out.read_text() == "a"
    assert not partial.exists()


def test_the_folders_above_are_made(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with Staging(out, key="k", is_file=False) as staging:
        staging.publish()
    assert out.is_dir()


def test_folders_are_flushed_before_the_rename(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[str, str]] = []
    monkeypatch.setattr(
        "boneconv.io.staging.sync_folder", lambda path: done.append(("sync", path.name))
    )
    rename = Path.rename

    def renaming(self: Path, target: Path) -> Path:
        done.append(("rename", self.name))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", renaming)
    with Staging(out, key="k", is_file=False) as staging:
        (staging.target / "sub").mkdir()
        staging.publish()
    assert sorted(done[:2]) == [("sync", "out"), ("sync", "sub")]
    assert done[2:] == [
        ("sync", "out.partial"),
        ("sync", out.parent.name),
        ("rename", "out"),
        ("sync", out.parent.name),
    ]


def test_the_journal_is_flushed_line_by_line(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    fsync = os.fsync

    def syncing(fd: int) -> None:
        sizes.append(os.fstat(fd).st_size)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", syncing)
    with Staging(out, key="k", is_file=False) as staging:
        staging.record("one", {})
        staging.record("two", {})
        journal = (staging.root / "journal").read_text().splitlines(keepends=True)
    assert [json.loads(line) for line in journal] == [
        {"key": "k"},
        {"name": "one"},
        {"name": "two"},
    ]
    ends = [len("".join(journal[: i + 1])) for i in range(3)]
    assert sizes[:3] == ends


# --- errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [InputError("x"), FormatError("x"), CheckFailedError("x")])
def test_an_error_of_the_input_leaves_nothing(
    out: Path, partial: Path, error: BoneconvError
) -> None:
    failed_run(out, error)
    assert not out.exists()
    assert not partial.exists()


@pytest.mark.parametrize(
    "error",
    [MachineError("x"), DiskFullError("x"), KeyboardInterrupt(), SystemExit(1), RuntimeError("x")],
    ids=lambda error: type(error).__name__,
)
def test_any_other_error_leaves_what_was_done(
    out: Path, partial: Path, error: BaseException
) -> None:
    failed_run(out, error)
    assert not out.exists()
    assert (partial / "out" / "one").read_text() == "1"
    with Staging(out, key="k", is_file=False) as staging:
        assert staging.finished == {"one": {"name": "one", "digest": "d1"}}
        assert (staging.target / "one").read_text() == "1"


def test_a_journal_with_another_key_is_discarded(out: Path) -> None:
    failed_run(out, MachineError("x"))
    with Staging(out, key="other", is_file=False) as staging:
        assert staging.finished == {}
        assert list(staging.target.iterdir()) == []


@pytest.mark.parametrize(
    "journal",
    ["", "\n", "not json\n", "[]\n", '{"name": "one"}\n', '{"key": 3}\n', '{"key": "k"', "\0\0\0"],
)
def test_a_journal_without_the_key_is_discarded(out: Path, partial: Path, journal: str) -> None:
    failed_run(out, MachineError("x"))
    (partial / "journal").write_text(journal)
    with Staging(out, key="k", is_file=False) as staging:
        assert staging.finished == {}
        assert list(staging.target.iterdir()) == []


def test_a_line_torn_by_a_kill_is_passed_over(out: Path, partial: Path) -> None:
    failed_run(out, MachineError("x"))
    with (partial / "journal").open("a") as journal:
        journal.write('{"name": "two", "dig')
    with Staging(out, key="k", is_file=False) as staging:
        assert list(staging.finished) == ["one"]


def test_what_is_recorded_after_a_torn_line_counts_in_the_next_run(
    out: Path, partial: Path
) -> None:
    failed_run(out, MachineError("x"))
    with (partial / "journal").open("a") as journal:
        journal.write('{"name": "two", "dig')
    with pytest.raises(MachineError), Staging(out, key="k", is_file=False) as staging:
        staging.record("three", {})
        raise MachineError("x")
    with Staging(out, key="k", is_file=False) as staging:
        assert list(staging.finished) == ["one", "three"]


def test_a_journal_of_bytes_that_are_no_text(out: Path, partial: Path) -> None:
    failed_run(out, MachineError("x"))
    (partial / "journal").write_bytes(b'{"key": "k"}\n\xff\xfe\n')
    with Staging(out, key="k", is_file=False) as staging:
        assert staging.finished == {}


def test_two_runs_cannot_write_one_output(out: Path) -> None:
    with Staging(out, key="k", is_file=False) as staging:
        (staging.target / "one").write_text("1")
        with pytest.raises(LockedError):
            Staging(out, key="k", is_file=False)
        assert (staging.target / "one").exists()
        staging.publish()
    assert snapshot(out) == {"one": b"1"}


# --- what exists already ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_an_output_that_exists(out: Path, partial: Path, kind: str) -> None:
    if kind == "file":
        out.write_text("old")
    elif kind == "folder":
        out.mkdir()
    else:
        out.symlink_to("nowhere")
    with pytest.raises(OutputExistsError, match="--force"):
        Staging(out, key="k", is_file=False)
    assert not partial.exists()
    with pytest.raises(OutputExistsError):
        check_free(out, force=False)
    check_free(out, force=True)


@pytest.mark.parametrize("name", [".", "..", "/"])
def test_an_output_without_a_name_of_its_own(name: str) -> None:
    with pytest.raises(InputError):
        check_free(Path(name), force=True)


def test_somebody_else_s_folder_is_refused_and_kept(out: Path, partial: Path) -> None:
    partial.mkdir()
    (partial / "thesis.tex").write_text("years")
    with pytest.raises(OutputExistsError, match="holds other files") as caught:
        Staging(out, key="k", is_file=False)
    assert caught.value.path == str(partial)
    assert snapshot(partial) == {"thesis.tex": b"years"}


def test_force_replaces_a_folder(out: Path, partial: Path) -> None:
    out.mkdir()
    (out / "old").write_text("old")
    with Staging(out, key="k", is_file=False, force=True) as staging:
        (staging.target / "new").write_text("new")
        assert snapshot(out) == {"old": b"old"}
        staging.publish()
    assert snapshot(out) == {"new": b"new"}
    assert not partial.exists()


def test_force_replaces_a_file(out: Path) -> None:
    out.write_text("old")
    with Staging(out, key="k", is_file=True, force=True) as staging:
        staging.target.write_text("new")
        assert out.read_text() == "old"
        staging.publish()
    assert out.read_text() == "new"


def test_force_and_an_error_keep_the_old(out: Path, partial: Path) -> None:
    out.mkdir()
    (out / "old").write_text("old")
    failed_run(out, InputError("x"), force=True)
    assert snapshot(out) == {"old": b"old"}
    assert not partial.exists()


def _killed_between_renames(out: Path) -> None:
    """--force had moved OUT aside, but not yet put the new one in its place."""
    out.mkdir()
    (out / "old").write_text("old")
    failed_run(out, KeyboardInterrupt(), force=True)
    out.rename(out.with_name("out.partial") / "old")


def test_the_old_output_comes_back_after_a_kill(out: Path, partial: Path) -> None:
    _killed_between_renames(out)
    with pytest.raises(MachineError), Staging(out, key="k", is_file=False, force=True) as staging:
        assert snapshot(out) == {"old": b"old"}
        assert list(staging.finished) == ["one"]
        raise MachineError("x")
    assert snapshot(out) == {"old": b"old"}


def test_the_old_output_is_not_replaced_without_force(out: Path, partial: Path) -> None:
    _killed_between_renames(out)
    with pytest.raises(OutputExistsError):
        Staging(out, key="k", is_file=False)
    assert snapshot(out) == {"old": b"old"}
    with Staging(out, key="k", is_file=False, force=True) as staging:
        assert list(staging.finished) == ["one"]


def test_what_was_replaced_before_a_kill_is_removed(out: Path, partial: Path) -> None:
    _killed_between_renames(out)
    out.mkdir()
    (out / "new").write_text("new")
    with Staging(out, key="k", is_file=False, force=True):
        assert not (partial / "old").exists()
    assert snapshot(out) == {"new": b"new"}


def test_a_rename_that_fails_does_not_lose_the_old_output(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out.mkdir()
    (out / "old").write_text("old")
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "out" and self.parent.name == "out.partial":
            raise FileNotFoundError(2, "No such file or directory", str(self))
        return rename(self, target)

    with monkeypatch.context() as patch, pytest.raises(BoneconvError):
        patch.setattr(Path, "rename", failing)
        with Staging(out, key="k", is_file=False, force=True) as staging:
            staging.publish()
    if not out.exists():
        with pytest.raises(OutputExistsError):
            Staging(out, key="k", is_file=False)
    assert snapshot(out) == {"old": b"old"}


# --- space ------------------------------------------------------------------------------------


def test_space_is_checked_and_counts_what_is_there(
    out: Path, partial: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage(0, 0, 1000))
    require_space(out, 1000)
    with pytest.raises(DiskFullError, match="expected 1,000,000 bytes free, found 1,000"):
        require_space(out, 1_000_000)
    (partial / "out").mkdir(parents=True)
    (partial / "out" / "done").write_bytes(bytes(1_000_000))
    require_space(out, 1_000_000)
    with pytest.raises(DiskFullError):
        require_space(out, 2_000_000)
    file = out.with_name("out.safetensors")
    file.with_name("out.safetensors.partial").mkdir()
    (file.with_name("out.safetensors.partial") / "out.safetensors").write_bytes(bytes(1_000_000))
    require_space(file, 1_000_000)


def test_space_is_asked_for_where_the_output_will_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []
    usage = namedtuple("usage", "total used free")

    def disk_usage(place: Path) -> object:
        asked.append(place)
        return usage(0, 0, 10)

    monkeypatch.setattr("shutil.disk_usage", disk_usage)
    require_space(tmp_path / "not" / "yet" / "out", 5)
    assert asked == [tmp_path]


def test_what_another_run_takes_away_meanwhile_takes_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "out.partial" / "out"
    place.mkdir(parents=True)
    (place / "shard").write_bytes(b"x")
    is_dir = Path.is_dir

    def answer_and_remove(path: Path) -> bool:
        answer = is_dir(path)
        if path == place / "shard":
            path.unlink()
        return answer

    monkeypatch.setattr(Path, "is_dir", answer_and_remove)
    require_space(tmp_path / "out", 5)
    assert not (place / "shard").exists()
