"""The journal: what it says is what was written, and nonsense says nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from boneconv.io.journal import Journal, is_same_file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal"


def _lines(path: Path, *entries: object) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def test_what_was_written_is_read(path: Path, tmp_path: Path) -> None:
    out, beside = tmp_path / "work", tmp_path / "beside"
    out.mkdir()
    beside.write_text("{}")
    journal = Journal(path)
    journal.start("k")
    journal.append({"name": "one", "digest": "d"})
    journal.commit(out, beside, tmp_path / "out.json")
    for again in (journal, Journal.of(path)):
        assert again.key == "k"
        assert again.is_committed
        assert is_same_file(out, again.out)
        assert is_same_file(beside, again.beside)
        assert again.beside_name == "out.json"
    assert list(Journal.of(path).finished) == ["one"]


def test_a_new_start_forgets_what_was(path: Path, tmp_path: Path) -> None:
    journal = Journal(path)
    journal.start("k")
    journal.append({"name": "one"})
    journal.commit(tmp_path, None, None)
    journal.start("other")
    assert (journal.key, journal.is_committed) == ("other", False)
    assert Journal.of(path).finished == {}


@pytest.mark.parametrize(
    "entries",
    [
        [],
        [{"name": "one"}, {"commit": {"out": [1]}}],
        [{"key": 3}, {"commit": {"out": [1]}}],
        [3, {"commit": {"out": [1]}}],
        [{"key": "k"}, {"commit": 3}],
    ],
    ids=str,
)
def test_nonsense_commits_nothing(path: Path, entries: list[object]) -> None:
    _lines(path, *entries)
    assert not Journal.of(path).is_committed


def test_no_journal_says_nothing(path: Path, tmp_path: Path) -> None:
    for place in (path, tmp_path):
        assert Journal.of(place).key is None


def test_a_torn_line_is_ended_before_the_next(path: Path) -> None:
    _lines(path, {"key": "k"})
    with path.open("a") as file:
        file.write('{"name": "o')
    journal = Journal(path)
    journal.read()
    journal.append({"name": "two"})
    assert list(Journal.of(path).finished) == ["two"]


def test_a_file_is_told_from_one_that_took_its_place(tmp_path: Path) -> None:
    journal, out = Journal(tmp_path / "journal"), tmp_path / "out"
    out.write_text("1")
    os.utime(out, ns=(1, 1))
    journal.start("k")
    journal.commit(out, None, None)
    out.rename(tmp_path / "renamed")
    assert is_same_file(tmp_path / "renamed", journal.out)
    assert not is_same_file(out, journal.out)
    out.write_text("2")
    assert not is_same_file(out, journal.out)
    assert not is_same_file(tmp_path, journal.out)
    assert not is_same_file(out, None)
