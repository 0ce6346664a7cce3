"""Copying files: the bytes are the same by every way, and the copy is a file of its own."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.errors import DiskFullError
from boneconv.io import copying
from boneconv.io.copying import copy_file, share_range
from boneconv.io.files import Reader, Writer
from tests.sharing import sharing_file_system

CONTENT = bytes(range(256)) * 1000
BLOCK = 64 * 1024


@pytest.mark.parametrize("without", [(), ("_clone",), ("_clone", "_copy_in_kernel")])
def test_every_way_copies_all_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: tuple[str, ...]
) -> None:
    for name in without:
        monkeypatch.setattr(copying, name, lambda source, target: False)
    (tmp_path / "real").write_bytes(CONTENT)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    copy_file(tmp_path / "link", tmp_path / "below" / "copy")
    copy = tmp_path / "below" / "copy"
    assert copy.read_bytes() == CONTENT
    assert not copy.is_symlink()
    copy.write_bytes(b"changed")
    assert (tmp_path / "real").read_bytes() == CONTENT


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "empty").write_bytes(b"")
    copy_file(tmp_path / "empty", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b""


def share(folder: Path, source_offset: int, offset: int, count: int) -> tuple[range, bytes]:
    """What was shared of random bytes, and what the target then holds."""
    size = max(source_offset, offset) + count
    (folder / "source").write_bytes(os.urandom(size))
    with Reader(folder / "source") as source, Writer(folder / "target", size) as target:
        shared = share_range(source, source_offset, target, offset, count)
    return shared, (folder / "target").read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


@given(
    source_block=st.integers(0, 3),
    block=st.integers(0, 3),
    within=st.integers(0, BLOCK - 1),
    count=st.integers(1, 4 * BLOCK),
    askew=st.sampled_from([0, 0, 8, 4096]),
)
def test_whole_blocks_that_lie_alike_are_shared(
    folder: Path, source_block: int, block: int, within: int, count: int, askew: int
) -> None:
    source_offset, offset = source_block * BLOCK + within, block * BLOCK + within + askew
    with sharing_file_system():
        shared, target = share(folder, source_offset, offset, count)
    source = (folder / "source").read_bytes()
    begin = source_offset + shared.start - offset
    assert target[shared.start : shared.stop] == source[begin : begin + len(shared)]
    assert not any(target[: shared.start]) and not any(target[shared.stop :])
    assert offset <= shared.start <= shared.stop <= offset + count
    least = 0 if askew else count - 2 * (BLOCK - 1)
    assert len(shared) >= least
    assert not (askew and len(shared))


@pytest.mark.parametrize("error", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL])
def test_a_file_system_that_cannot_share(folder: Path, error: int) -> None:
    with sharing_file_system(error):
        shared, target = share(folder, 0, 0, 2 * BLOCK)
    assert not len(shared)
    assert not any(target)


def test_a_file_system_that_is_full(folder: Path) -> None:
    with sharing_file_system(errno.ENOSPC), pytest.raises(DiskFullError):
        share(folder, 0, 0, 2 * BLOCK)


def test_whatever_this_file_system_does(tmp_path: Path) -> None:
    shared, target = share(tmp_path, BLOCK, BLOCK, 3 * BLOCK)
    assert shared in (range(BLOCK, BLOCK), range(BLOCK, 4 * BLOCK))
    source = (tmp_path / "source").read_bytes()
    assert target[shared.start : shared.stop] == source[shared.start : shared.stop]
