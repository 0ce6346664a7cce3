"""A publication that was killed on its way, or withdrawn at its last flush."""

from __future__ import annotations

from pathlib import Path

import pytest

from boneconv.errors import (
    MachineError,
    OutputExistsError,
)
from boneconv.io.staging import Staging, check_all_free, check_free
from tests.builders import snapshot
from tests.io.staging_runs import failed_run

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
    staging._lock.close()


def _killed_after_publishing(out: Path, *, key: str = "k") -> None:
    staging = Staging(out, key=key, is_file=False)
    (staging.target / "one").write_text("1")
    staging.record("one", {"digest": "d1"})
    staging.publish()
    staging._lock.close()


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
    failed_run(out, MachineError("x"), key="")
    with Staging(out, key="", is_file=False) as staging:
        assert list(staging.target.iterdir()) == []
