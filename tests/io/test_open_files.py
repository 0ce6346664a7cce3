"""A worker's files: opened once, closed together."""

from __future__ import annotations

from pathlib import Path

import pytest

from boneconv.errors import BoneconvError
from boneconv.io.open_files import OpenFiles


def test_a_file_is_opened_once_and_closed_in_the_end(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_bytes(name.encode())
    found = bytearray(3)
    with OpenFiles() as files:
        first = files.reader(tmp_path / "one")
        assert files.reader(tmp_path / "one") is first
        files.reader(tmp_path / "two").read_into(memoryview(found), 0)
    assert found == b"two"
    with pytest.raises((BoneconvError, OSError, ValueError)):
        first.read_into(memoryview(found), 0)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with OpenFiles() as files, pytest.raises(BoneconvError, match="gone"):
        files.reader(tmp_path / "gone")
