"""Reading and writing at offsets: the positioned calls, what stands in for them, and the errors."""

from __future__ import annotations

import errno
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.errors import (
    BoneconvError,
    DiskFullError,
    FormatError,
    MachineError,
    MissingPathError,
)
from boneconv.io.files import Reader, Writer, machine_errors, replacing, sync_folder


@pytest.fixture(params=["positioned", "seek"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A system with positioned calls, and one without."""
    if request.param == "seek":
        monkeypatch.delattr(os, "preadv", raising=False)
        monkeypatch.delattr(os, "pwrite", raising=False)
    return str(request.param)


def _read(reader: Reader, offset: int, size: int) -> bytes:
    buffer = bytearray(size)
    reader.read_into(memoryview(buffer), offset)
    return bytes(buffer)


@pytest.mark.usefixtures("system")
def test_what_is_written_at_an_offset_is_read_there(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with Writer(path, 10) as writer:
        writer.write_at(b"world", 5)
        writer.write_at(memoryview(b"hello"), 0)
        writer.sync()
    assert path.read_bytes() == b"helloworld"
    with Reader(path) as reader:
        assert _read(reader, 3, 4) == b"lowo"
        assert _read(reader, 10, 0) == b""


@pytest.mark.usefixtures("system")
def test_many_threads_share_a_file(tmp_path: Path) -> None:
    path, size, count = tmp_path / "f", 4099, 64
    parts = {i: bytes([i]) * size for i in range(count)}
    barrier = threading.Barrier(4)

    def write(i: int) -> None:
        if i < 4:
            barrier.wait(10)
        writer.write_at(parts[i], i * size)

    with Writer(path, size * count) as writer, ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(count)))
    with Reader(path) as reader, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: _read(reader, i * size, size), range(count)))
    assert found == list(parts.values())


@pytest.mark.usefixtures("system")
def test_a_file_that_ends_too_early(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"0123456789")
    with Reader(path) as reader, pytest.raises(FormatError) as caught:
        _read(reader, 6, 8)
    assert "ends too early; expected 8 bytes at offset 6, found 4 bytes" in str(caught.value)


@pytest.mark.parametrize("call", ["preadv", "pwrite"])
def test_short_counts_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    real_read, real_write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: real_read(fd, [b[0][:3]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:3], at))
    with Writer(tmp_path / "f", 11) as writer:
        writer.write_at(b"hello world", 0)
    with Reader(tmp_path / "f") as reader:
        assert _read(reader, 0, 11) == b"hello world"


def test_short_counts_without_positioned_calls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_read, real_write = os.read, os.write
    monkeypatch.delattr(os, "preadv")
    monkeypatch.delattr(os, "pwrite")
    monkeypatch.setattr(os, "read", lambda fd, count: real_read(fd, min(count, 3)))
    monkeypatch.setattr(os, "write", lambda fd, data: real_write(fd, data[:3]))
    with Writer(tmp_path / "f", 11) as writer:
        writer.write_at(b"hello world", 0)
    with Reader(tmp_path / "f") as reader:
        assert _read(reader, 0, 11) == b"hello world"


def test_a_writer_starts_anew_with_its_whole_size(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old content that is longer")
    Writer(path, 4).close()
    assert path.read_bytes() == bytes(4)


def test_a_closed_file_can_be_closed_again(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "f", 1)
    fd = writer.fileno()
    writer.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    writer.close()


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError) as caught:
        Reader(tmp_path / "none")
    assert caught.value.path == str(tmp_path / "none")


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, DiskFullError),
        (errno.EDQUOT, DiskFullError),
        (errno.EIO, MachineError),
        (errno.EACCES, MachineError),
        (errno.EROFS, MachineError),
        (errno.ENOENT, MissingPathError),
    ],
)
def test_errors_of_the_system_are_mapped_once(code: int, kind: type[BoneconvError]) -> None:
    with pytest.raises(kind) as caught, machine_errors(Path("some/file")):
        raise OSError(code, os.strerror(code))
    assert caught.value.path == "some/file"
    assert isinstance(caught.value.__cause__, OSError)


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), machine_errors(Path("x")):
        raise KeyError("x")


def test_a_full_disk_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with Writer(tmp_path / "f", 4) as writer, pytest.raises(DiskFullError) as caught:
        writer.write_at(b"abcd", 0)
    assert caught.value.exit_code == 3
    assert "Free some space" in str(caught.value)


def test_a_folder_is_flushed_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda fd: flushed.append(os.fstat(fd).st_ino))
    sync_folder(tmp_path)
    assert flushed == [tmp_path.stat().st_ino]


def test_windows_cannot_flush_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: pytest.fail("flushed"))
    with monkeypatch.context() as patch:
        patch.setattr("boneconv.io.files.os.name", "nt")
        sync_folder(tmp_path)


@given(content=st.binary(min_size=1, max_size=200), data=st.data())
def test_any_range_of_any_file(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("any") / "f"
    path.write_bytes(content)
    begin = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(begin, len(content)))
    with Reader(path) as reader:
        assert _read(reader, begin, end - begin) == content[begin:end]


def test_a_file_is_replaced_once_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with replacing(path) as draft:
        draft.write_bytes(b"one")
        assert not path.exists()
    with replacing(path) as draft:
        draft.write_bytes(b"two")
        assert path.read_bytes() == b"one"
    assert path.read_bytes() == b"two"
    assert list(tmp_path.iterdir()) == [path]


def _disk_is_full(fd: int) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_that_cannot_be_replaced_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"one")
    with pytest.raises(KeyboardInterrupt), replacing(path) as draft:
        draft.write_bytes(b"two")
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "fsync", _disk_is_full)
    with pytest.raises(DiskFullError), replacing(path) as draft:
        draft.write_bytes(b"two")
    with pytest.raises(MissingPathError, match="no such folder"), replacing(path / "x"):
        pass
    assert path.read_bytes() == b"one"
    assert list(tmp_path.iterdir()) == [path]
