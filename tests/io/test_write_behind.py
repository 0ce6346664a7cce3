"""Writing behind the caller's back: the same bytes, with direct writes or without."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from boneconv.errors import DiskFullError, MachineError, MissingPathError
from boneconv.io.files import Writer
from boneconv.io.write_behind import WriteBehind

BLOCK = 4096
KIB = 1024
MIB = KIB * KIB
SIZE = 9 * MIB

on_linux = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no direct writes here")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file of `SIZE` bytes, all 0xFF."""
    path = tmp_path / "f"
    path.write_bytes(b"\xff" * SIZE)
    return path


@pytest.fixture
def behind() -> Iterator[WriteBehind]:
    with WriteBehind() as behind:
        yield behind


def _content(count: int, seed: int = 1) -> bytes:
    """Bytes that repeat nowhere near a block's length, and hold no 0xFF."""
    unit = bytes((seed + i * 7) % 251 for i in range(251))
    return (unit * (count // 251 + 1))[:count]


def _write(behind: WriteBehind, path: Path, offset: int, parts: list[bytes]) -> None:
    behind.begin(path, offset)
    for part in parts:
        behind.room(len(part))[:] = part
    behind.finish()


def _cut(content: bytes, sizes: list[int]) -> list[bytes]:
    """The content in parts of these sizes, in turn."""
    parts, start = [], 0
    while start < len(content):
        size = sizes[len(parts) % len(sizes)]
        parts.append(content[start : start + size])
        start += size
    return parts


@pytest.fixture(params=["direct", "ordinary"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system with direct writes, and one without."""
    if request.param == "ordinary":
        monkeypatch.delattr(os, "O_DIRECT", raising=False)


@pytest.mark.usefixtures("system")
@given(
    offset=st.integers(0, 3 * BLOCK),
    count=st.one_of(st.integers(0, 3 * BLOCK), st.integers(0, 5 * MIB)),
    sizes=st.lists(
        st.one_of(st.integers(1, 40 * KIB), st.sampled_from([256 * KIB, MIB, 3 * MIB])),
        min_size=1,
        max_size=4,
    ).filter(lambda sizes: max(sizes) > 10 * KIB),
)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_run_is_what_was_put_there(
    path: Path, behind: WriteBehind, offset: int, count: int, sizes: list[int]
) -> None:
    path.write_bytes(b"\xff" * SIZE)
    content = _content(count)
    _write(behind, path, offset, _cut(content, sizes))
    written = path.read_bytes()
    assert written[offset : offset + count] == content
    assert set(written[:offset] + written[offset + count :]) == {0xFF}


@pytest.mark.usefixtures("system")
def test_runs_that_meet_within_a_block(path: Path, behind: WriteBehind) -> None:
    first, second = _content(MIB + 100), _content(2 * MIB, 5)
    _write(behind, path, 10, [first])
    _write(behind, path, 10 + len(first), [second])
    assert path.read_bytes()[10 : 10 + 3 * MIB + 100] == first + second


@pytest.mark.usefixtures("system")
def test_several_files(path: Path, behind: WriteBehind) -> None:
    other = path.with_name("other")
    Writer(other, SIZE).close()
    for turn in range(2):
        for each in (path, other):
            _write(behind, each, turn * MIB, [_content(MIB, turn + len(each.name))])
    assert path.read_bytes()[: 2 * MIB] == _content(MIB, 1) + _content(MIB, 2)
    assert other.read_bytes()[: 2 * MIB] == _content(MIB, 5) + _content(MIB, 6)


def test_many_runs_hold_no_more_buffers_than_one(path: Path, behind: WriteBehind) -> None:
    for count in (0, 10, MIB, 3 * MIB, 0, 2 * MIB) * 5:
        _write(behind, path, 0, _cut(_content(count), [256 * KIB]))
    assert len(behind._spare) <= 4


def test_a_file_that_does_not_exist(tmp_path: Path, behind: WriteBehind) -> None:
    with pytest.raises(MissingPathError):
        behind.begin(tmp_path / "none", 0)


# --- direct writes ----------------------------------------------------------------------------


def _is_direct(fd: int) -> bool:
    import fcntl

    return bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)


@pytest.fixture
def takes_direct(tmp_path: Path) -> None:
    """Skips where the tests' own file system takes no direct writes."""
    page = mmap.mmap(-1, BLOCK)
    try:
        fd = os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT, 0o600)
        try:
            os.pwrite(fd, page, 0)
        finally:
            os.close(fd)
    except OSError:
        pytest.skip("the file system takes no direct writes")


@pytest.fixture
def direct_calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """The lengths of direct and of ordinary writes, as they are made."""
    calls: dict[str, list[int]] = {"direct": [], "ordinary": []}
    real = os.pwrite

    def pwrite(fd: int, data: Any, offset: int) -> int:
        direct = _is_direct(fd)
        if direct:
            assert len(data) % BLOCK == offset % BLOCK == 0
        calls["direct" if direct else "ordinary"].append(len(data))
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    return calls


@on_linux
@pytest.mark.usefixtures("takes_direct")
def test_whole_blocks_go_past_the_page_cache(
    path: Path, behind: WriteBehind, direct_calls: dict[str, list[int]]
) -> None:
    content = _content(4 * MIB)
    _write(behind, path, 100, _cut(content, [256 * KIB]))
    assert sum(direct_calls["direct"]) > 4 * MIB - 2 * BLOCK
    assert min(direct_calls["direct"]) >= 256 * KIB
    assert all(length < BLOCK for length in direct_calls["ordinary"])


@on_linux
def test_little_is_written_the_ordinary_way(
    path: Path, behind: WriteBehind, direct_calls: dict[str, list[int]]
) -> None:
    _write(behind, path, 0, [_content(100 * KIB)])
    assert direct_calls == {"direct": [], "ordinary": [100 * KIB]}


@on_linux
@pytest.mark.usefixtures("takes_direct")
def test_a_file_system_that_refuses_at_the_write(
    path: Path, behind: WriteBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, refused = os.pwrite, []

    def pwrite(fd: int, data: Any, offset: int) -> int:
        if _is_direct(fd):
            refused.append(len(data))
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    content = _content(3 * MIB)
    _write(behind, path, 0, _cut(content, [MIB]))
    assert path.read_bytes()[: 3 * MIB] == content
    assert len(refused) == 1


@on_linux
def test_a_file_system_that_refuses_at_the_opening(
    path: Path, behind: WriteBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refusing(path: Any, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", refusing)
    content = _content(3 * MIB)
    _write(behind, path, 0, [content])
    assert path.read_bytes()[: 3 * MIB] == content


@on_linux
@pytest.mark.parametrize("most", [300 * KIB, 3 * BLOCK, 5000])
def test_short_counts_are_gone_on_with(
    path: Path, behind: WriteBehind, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[:most], at))
    content = _content(2 * MIB + 5)
    _write(behind, path, 3, [content])
    assert path.read_bytes()[3 : 3 + len(content)] == content


# --- behind the caller's back ------------------------------------------------------------------


def test_the_next_bytes_are_made_while_the_last_are_written(
    path: Path, behind: WriteBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, may_write = os.pwrite, threading.Event()

    def pwrite(fd: int, data: Any, offset: int) -> int:
        assert may_write.wait(10)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    content = _content(2 * MIB)
    behind.begin(path, 0)
    behind.room(MIB)[:] = content[:MIB]
    behind.room(MIB)[:] = content[MIB:]  # the first half waits to be written
    may_write.set()
    behind.finish()
    assert path.read_bytes()[: 2 * MIB] == content


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ENOSPC, DiskFullError), (errno.EIO, MachineError)]
)
def test_a_write_that_fails_is_told_before_the_end(
    path: Path, behind: WriteBehind, monkeypatch: pytest.MonkeyPatch, code: int, kind: type
) -> None:
    def failing(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "pwrite", failing)
    behind.begin(path, 0)
    with pytest.raises(kind) as caught:
        for _ in range(8):
            behind.room(MIB)
    assert caught.value.path == str(path)


def test_the_last_write_that_fails_is_told_at_the_end(
    path: Path, behind: WriteBehind, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", failing)
    behind.begin(path, 0)
    behind.room(MIB)
    with pytest.raises(DiskFullError):
        behind.finish()


def test_its_end_waits_for_what_is_being_written(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, begun, may_write = os.pwrite, threading.Event(), threading.Event()

    def pwrite(fd: int, data: Any, offset: int) -> int:
        begun.set()
        assert may_write.wait(10)
        return real(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with WriteBehind() as behind:
        behind.begin(path, 0)
        behind.room(MIB)[:] = _content(MIB)
        behind.room(MIB)
        assert begun.wait(10)
        threading.Timer(0.05, may_write.set).start()
    assert path.read_bytes()[:MIB] == _content(MIB)  # not into whatever file has its number next
