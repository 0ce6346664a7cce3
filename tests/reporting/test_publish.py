"""Report files: whole or as before; a step's summary: added to, never too large."""

from __future__ import annotations

from pathlib import Path

import pytest

from boneconv.errors import MachineError, UsageError
from boneconv.reporting.publish import append_summary, check_places, write_report


def test_a_report_is_written_with_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "reports" / "deep" / "report.html"
    write_report(path, "naïve\n")
    assert path.read_bytes() == "naïve\n".encode()
    assert [each.name for each in path.parent.iterdir()] == ["report.html"]


def test_an_older_report_stays_where_writing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    write_report(path, "old")

    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MachineError, match="the disk is full"):
        write_report(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError):
        write_report(tmp_path / "file" / "report.html", "text")


def test_places_are_checked_before_any_work(tmp_path: Path) -> None:
    one, other = tmp_path / "one.xml", tmp_path / "other.html"
    check_places([one, other], [str(tmp_path), "owner/name"])
    for places, inputs in (
        ([tmp_path], []),
        ([one, tmp_path / "x" / ".." / "one.xml"], []),
        ([one], [str(one)]),
    ):
        with pytest.raises(UsageError):
            check_places(places, inputs)


def test_a_summary_is_added_to(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    assert append_summary("after\n", {"GITHUB_STEP_SUMMARY": str(path)})
    assert path.read_text() == "before\nafter\n\n"


def test_no_summary_outside_of_a_step(tmp_path: Path) -> None:
    assert not append_summary("text", {})
    assert not append_summary("text", {"GITHUB_STEP_SUMMARY": ""})


def test_a_full_summary_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "summary.md"
    path.write_bytes(b"x" * (1024 * 1024 - 3))
    assert not append_summary("text", {"GITHUB_STEP_SUMMARY": str(path)})
    assert append_summary("é", {"GITHUB_STEP_SUMMARY": str(path)})
    assert path.stat().st_size == 1024 * 1024


def test_a_summary_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(MachineError):
        append_summary("text", {"GITHUB_STEP_SUMMARY": str(tmp_path)})
