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
from boneconv.io.staging import Staging, check_all_free, check_free, require_space
from tests.builders import snapshot


def _fail(out: Path, error: BaseException, *, key: str = "k", force: bool = False) -> None:
    """A run that finishes one file and then fails."""
    with (
        pytest.raises(type(error)),
        Staging(out, key=key, is_file=False, force=force) as staging,
    ):
        (staging.target / "one").write_text("1")
        staging.record("one", {"digest": "d1"})
        raise error


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def partial(out: Path) -> Path:
    return out.with_name("out.partial")


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
    _fail(out, error)
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
    _fail(out, error)
    assert not out.exists()
    assert (partial / "out" / "one").read_text() == "1"
    with Staging(out, key="k", is_file=False) as staging:
        assert staging.finished == {"one": {"name": "one", "digest": "d1"}}
        assert (staging.target / "one").read_text() == "1"


def test_a_journal_with_another_key_is_discarded(out: Path) -> None:
    _fail(out, MachineError("x"))
    with Staging(out, key="other", is_file=False) as staging:
        assert staging.finished == {}
        assert list(staging.target.iterdir()) == []


@pytest.mark.parametrize(
    "journal",
    ["", "\n", "not json\n", "[]\n", '{"name": "one"}\n', '{"key": 3}\n', '{"key": "k"', "\0\0\0"],
)
def test_a_journal_without_the_key_is_discarded(out: Path, partial: Path, journal: str) -> None:
    _fail(out, MachineError("x"))
    (partial / "journal").write_text(journal)
    with Staging(out, key="k", is_file=False) as staging:
        assert staging.finished == {}
        assert list(staging.target.iterdir()) == []


def test_a_line_torn_by_a_kill_is_passed_over(out: Path, partial: Path) -> None:
    _fail(out, MachineError("x"))
    with (partial / "journal").open("a") as journal:
        journal.write('{"name": "two", "dig')
    with Staging(out, key="k", is_file=False) as staging:
        assert list(staging.finished) == ["one"]


def test_what_is_recorded_after_a_torn_line_counts_in_the_next_run(
    out: Path, partial: Path
) -> None:
    _fail(out, MachineError("x"))
    with (partial / "journal").open("a") as journal:
        journal.write('{"name": "two", "dig')
    with pytest.raises(MachineError), Staging(out, key="k", is_file=False) as staging:
        staging.record("three", {})
        raise MachineError("x")
    with Staging(out, key="k", is_file=False) as staging:
        assert list(staging.finished) == ["one", "three"]


def test_a_journal_of_bytes_that_are_no_text(out: Path, partial: Path) -> None:
    _fail(out, MachineError("x"))
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
    _fail(out, InputError("x"), force=True)
    assert snapshot(out) == {"old": b"old"}
    assert not partial.exists()


def _killed_between_renames(out: Path) -> None:
    """--force had moved OUT aside, but not yet put the new one in its place."""
    out.mkdir()
    (out / "old").write_text("old")
    _fail(out, KeyboardInterrupt(), force=True)
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


# --- killed while it was published ------------------------------------------------------------


class _Killed(BaseException):
    """Stands for a kill: nothing is cleaned up after it."""


def _killed(staging: Staging, monkeypatch: pytest.MonkeyPatch, call: str, after: int = 0) -> None:
    """Publishes, and is gone at a rename or flush; only the lock goes with the process."""
    real, done = getattr(Path, call), []

    def dying(self: Path, *arguments: object) -> object:
        if len(done) == after:
            raise _Killed
        done.append(self)
        return real(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(Path, call, dying)
        patch.setattr(Staging, "withdraw", lambda self: None)
        staging.publish()
    staging._lock.release()


def _killed_after_publishing(out: Path, *, key: str = "k") -> None:
    staging = Staging(out, key=key, is_file=False)
    (staging.target / "one").write_text("1")
    staging.record("one", {"digest": "d1"})
    staging.publish()
    staging._lock.release()


def test_what_was_published_before_a_kill_is_taken_for_done(out: Path, partial: Path) -> None:
    _killed_after_publishing(out)
    check_free(out, force=False)
    with Staging(out, key="k", is_file=False) as staging:
        assert staging.published
        assert list(staging.finished) == ["one"]
    assert snapshot(out.parent) == {"out/one": b"1"}


@pytest.mark.parametrize("key", ["other", ""])
def test_what_another_run_had_published_is_an_output_that_exists(out: Path, key: str) -> None:
    _killed_after_publishing(out)
    with pytest.raises(OutputExistsError):
        Staging(out, key=key, is_file=False)
    assert snapshot(out.parent) == {"out/one": b"1"}


def test_something_else_in_the_place_of_what_was_published(out: Path, partial: Path) -> None:
    _killed_after_publishing(out)
    out.rename(out.with_name("moved"))
    out.mkdir()
    (out / "mine").write_text("mine")
    with pytest.raises(OutputExistsError):
        Staging(out, key="k", is_file=False)
    assert snapshot(out) == {"mine": b"mine"}


def test_with_force_what_another_run_had_published_is_replaced(out: Path) -> None:
    _killed_after_publishing(out)
    with Staging(out, key="other", is_file=False, force=True) as staging:
        assert not staging.published
        (staging.target / "two").write_text("2")
        staging.publish()
    assert snapshot(out.parent) == {"out/two": b"2"}


def test_a_kill_between_the_file_beside_and_the_output(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = out.with_name("out.json")
    staging = Staging(out, key="k", is_file=True, beside=beside)
    staging.target.write_text("1")
    staging.beside.write_text("{}")
    _killed(staging, monkeypatch, "replace")
    assert beside.exists()
    assert not out.exists()
    check_free(out, force=False, beside=beside)
    with Staging(out, key="k", is_file=True, beside=beside) as again:
        assert not beside.exists()
        assert again.target.read_text() == "1"
        again.beside.write_text("{}")
        again.publish()
    assert snapshot(out.parent) == {"out": b"1", "out.json": b"{}"}


def test_a_kill_after_the_old_file_beside_was_moved_away(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = out.with_name("out.json")
    out.write_text("old")
    beside.write_text("old")
    staging = Staging(out, key="k", is_file=True, beside=beside, force=True)
    staging.target.write_text("1")
    staging.beside.write_text("{}")
    _killed(staging, monkeypatch, "replace")
    assert (out.read_text(), beside.read_text()) == ("old", "{}")
    with pytest.raises(OutputExistsError):
        Staging(out, key="other", is_file=True, beside=beside)
    assert (out.read_text(), beside.read_text()) == ("old", "old")


@pytest.mark.parametrize("names", [[], ["lock"]], ids=str)
def test_a_place_of_work_that_was_nearly_removed(
    out: Path, partial: Path, names: list[str]
) -> None:
    out.write_text("whole")
    partial.mkdir()
    for name in names:
        (partial / name).touch()
    with pytest.raises(OutputExistsError):
        check_free(out, force=False)
    assert snapshot(out.parent) == {"out": b"whole"}


def test_outputs_of_one_run_of_which_one_has_no_traces_left(tmp_path: Path) -> None:
    outs = [tmp_path / "a", tmp_path / "b"]
    for out in outs:
        _killed_after_publishing(out)
    with Staging(outs[1], key="k", is_file=False):
        pass
    with pytest.raises(OutputExistsError):
        check_all_free(outs, force=False)
    assert snapshot(tmp_path) == {"a/one": b"1", "b/one": b"1"}


# --- withdrawing ------------------------------------------------------------------------------


@pytest.mark.parametrize("is_file", [False, True])
@pytest.mark.parametrize("is_old", [False, True])
def test_a_publication_whose_last_flush_fails_is_withdrawn(
    out: Path, monkeypatch: pytest.MonkeyPatch, is_file: bool, is_old: bool
) -> None:
    if is_old and is_file:
        out.write_text("old")
    elif is_old:
        out.mkdir()
    with (
        pytest.raises(MachineError),
        Staging(out, key="k", is_file=is_file, force=True) as staging,
    ):
        place = staging.target if is_file else staging.target / "one"
        place.write_text("new")
        real = staging._rename

        def rename() -> None:
            real()
            monkeypatch.setattr("boneconv.io.staging.sync_folder", _broken)

        monkeypatch.setattr(staging, "_rename", rename)
        staging.publish()
    monkeypatch.undo()
    if is_old:
        assert out.read_text() == "old" if is_file else snapshot(out) == {}
    else:
        assert not out.exists()
    with Staging(out, key="k", is_file=is_file, force=True) as staging:
        assert not staging.published
        staging.publish()
    assert (out if is_file else out / "one").read_text() == "new"


def _broken(path: Path) -> None:
    raise MachineError("the disk is broken", path=path)


def test_an_output_that_has_appeared_meanwhile_is_kept(out: Path) -> None:
    with pytest.raises(OutputExistsError), Staging(out, key="k", is_file=False) as staging:
        out.write_text("somebody's")
        staging.publish()
    assert snapshot(out.parent) == {"out": b"somebody's"}


def test_nothing_is_resumed_without_a_key(out: Path) -> None:
    _fail(out, MachineError("x"), key="")
    with Staging(out, key="", is_file=False) as staging:
        assert list(staging.target.iterdir()) == []


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
