"""Copying files: the bytes are the same by every way, and the copy is a file of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from boneconv.onnx import copying
from boneconv.onnx.copying import copy_file

CONTENT = bytes(range(256)) * 1000


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
