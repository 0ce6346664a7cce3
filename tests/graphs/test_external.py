"""External data: where it may lie."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from boneconv.errors import FormatError
from boneconv.graphs import open_graph
from tests.graphs.onnx_files import DATA, hub_snapshot, make_graph

W = np.arange(24, dtype=np.float32).reshape(4, 6)


def _at(file: Path, location: str) -> Path:
    """A graph whose weights lie at a location."""
    make_graph(file, {"w": W})
    model = onnx.load(file, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = location
    file.write_bytes(model.SerializeToString())
    return file


@pytest.mark.parametrize(
    "location", ["/etc/passwd", "../secret", "a/../../secret", "..\\secret", "a\0b", ""]
)
def test_a_location_outside_the_folder_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(W.tobytes())
    file = _at(tmp_path / "graph" / "model.onnx", location)
    (file.parent / "a").mkdir()
    with pytest.raises(FormatError):
        open_graph(file)


def test_a_location_in_a_folder_below(tmp_path: Path) -> None:
    file = _at(tmp_path / "model.onnx", "weights/part.bin")
    (tmp_path / "weights").mkdir()
    (tmp_path / DATA).rename(tmp_path / "weights" / "part.bin")
    assert np.array_equal(open_graph(file).initializers["w"].read(), W)


def test_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    file = make_graph(tmp_path / "graph" / "model.onnx", {"w": W})
    (file.parent / DATA).rename(tmp_path / "elsewhere")
    (file.parent / DATA).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FormatError, match="a link that leaves its folder"):
        open_graph(file)


def test_a_link_within_the_folder_is_followed(tmp_path: Path) -> None:
    file = make_graph(tmp_path / "model.onnx", {"w": W})
    (tmp_path / DATA).rename(tmp_path / "real.bin")
    (tmp_path / DATA).symlink_to("real.bin")
    assert np.array_equal(open_graph(file).initializers["w"].read(), W)


@pytest.mark.parametrize("folder", ["", "onnx/"])
def test_a_snapshot_of_the_hub_is_read_through_its_links(tmp_path: Path, folder: str) -> None:
    file = make_graph(tmp_path / "graph" / "model.onnx", {"w": W})
    files = {f"{folder}model.onnx": file, f"{folder}{DATA}": file.parent / DATA}
    snapshot = hub_snapshot(tmp_path / "hub", files)
    graph = open_graph(snapshot / folder / "model.onnx")
    assert np.array_equal(graph.initializers["w"].read(), W)


def test_another_repositorys_blobs_are_refused(tmp_path: Path) -> None:
    file = make_graph(tmp_path / "graph" / "model.onnx", {"w": W})
    snapshot = hub_snapshot(tmp_path / "hub", {"model.onnx": file, DATA: file.parent / DATA})
    other = tmp_path / "hub" / "models--somebody--else" / "blobs"
    other.mkdir(parents=True)
    shutil.copyfile(file.parent / DATA, other / "blob")
    (snapshot / DATA).unlink()
    (snapshot / DATA).symlink_to(other / "blob")
    with pytest.raises(FormatError, match="a link that leaves its folder"):
        open_graph(snapshot / "model.onnx")
