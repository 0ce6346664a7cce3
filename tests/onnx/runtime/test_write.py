"""A graph's weights are copied as they are; those of its own file get one of theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from boneconv.errors import CheckFailedError
from boneconv.graphs import open_graph
from boneconv.onnx.runtime.graph import Slot, add_adapter_inputs
from boneconv.onnx.runtime.names import VERSION_KEY
from boneconv.onnx.runtime.products import Place
from boneconv.onnx.runtime.write import check_graph, write_graph
from tests.builders import F32, Array
from tests.onnx.runtime.cases import answer, bone_update, make_model

OUT, WIDTH = 48, 40


def weight(seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal((WIDTH, OUT)).astype(F32)


def graph_file(folder: Path, location: str | None = None, *, seed: int = 0) -> Path:
    """x W + b with W large enough for external data, and b not."""
    folder.mkdir(parents=True, exist_ok=True)
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    model = make_model(nodes, {"w": weight(seed), "b": np.ones(OUT, F32)}, (3, WIDTH), (3, OUT))
    if location is not None:
        (folder / location).parent.mkdir(parents=True, exist_ok=True)
        onnx.external_data_helper.convert_model_to_external_data(
            model, location=location, size_threshold=0
        )
    onnx.save(model, folder / "base.onnx")
    return folder / "base.onnx"


def rewritten(path: Path, target: Path) -> onnx.ModelProto:
    """The graph with adapter inputs, written to a folder."""
    target.mkdir()
    opened = open_graph(path)
    model = onnx.ModelProto()
    model.CopyFrom(opened.proto)
    add_adapter_inputs(model, {"m": Slot((Place("w", True, 0, OUT, WIDTH),))})
    version = write_graph(opened, model, target)
    written = onnx.load(target / "model.onnx", load_external_data=False)
    assert {p.key: p.value for p in written.metadata_props}[VERSION_KEY] == str(version)
    return written


def check_answers(path: Path) -> None:
    """With and without a block."""
    model = onnx.load(path)
    x = np.random.default_rng(5).standard_normal((3, WIDTH)).astype(F32)
    block = np.random.default_rng(6).standard_normal((7, OUT)).astype(F32)
    for feeds, update in (({}, 0.0), ({"m.bone_block": block}, bone_update(block, OUT, WIDTH).T)):
        expected = x.astype(np.float64) @ (weight() + update) + 1
        np.testing.assert_allclose(answer(model, x=x, **feeds), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("location", ["base.onnx.data", "weights/all.bin"])
def test_external_weights_keep_their_file_byte_for_byte(tmp_path: Path, location: str) -> None:
    source = graph_file(tmp_path / "base", location)
    before = source.read_bytes(), (tmp_path / "base" / location).read_bytes()
    rewritten(source, tmp_path / "out")
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*.*")}
    assert files == {"model.onnx", location}
    assert (tmp_path / "out" / location).read_bytes() == before[1]
    assert (source.read_bytes(), (tmp_path / "base" / location).read_bytes()) == before
    check_graph(tmp_path / "out" / "model.onnx")
    check_answers(tmp_path / "out" / "model.onnx")


def test_weights_behind_links_of_the_hubs_cache_are_copied(tmp_path: Path) -> None:
    blobs = tmp_path / "models--o--n" / "blobs"
    source = graph_file(blobs, "base.onnx.data")
    folder = tmp_path / "models--o--n" / "snapshots" / "c0ffee"
    folder.mkdir(parents=True)
    for name in ("base.onnx", "base.onnx.data"):
        (folder / name).symlink_to(blobs / name)
    rewritten(folder / "base.onnx", tmp_path / "out")
    assert not any(p.is_symlink() for p in (tmp_path / "out").iterdir())
    assert source.exists()
    check_graph(tmp_path / "out" / "model.onnx")
    check_answers(tmp_path / "out" / "model.onnx")


def test_inline_weights_get_a_file_and_small_ones_stay_inline(tmp_path: Path) -> None:
    written = rewritten(graph_file(tmp_path / "base"), tmp_path / "out")
    held = {t.name: t for t in written.graph.initializer}
    assert held["w"].data_location == held["w"].EXTERNAL
    assert held["b"].data_location == held["b"].DEFAULT
    np.testing.assert_array_equal(numpy_helper.to_array(held["b"]), np.ones(OUT))
    content = (tmp_path / "out" / "model.onnx.data").read_bytes()
    assert content == weight().tobytes()
    check_graph(tmp_path / "out" / "model.onnx")
    check_answers(tmp_path / "out" / "model.onnx")


def test_values_of_constant_nodes_stay_inline(tmp_path: Path) -> None:
    value = numpy_helper.from_array(weight(), "value")
    nodes = [
        helper.make_node("Constant", [], ["w"], value=value),
        helper.make_node("MatMul", ["x", "w"], ["m"]),
        helper.make_node("Add", ["m", "b"], ["y"]),
    ]
    model = make_model(nodes, {"b": np.ones(OUT, F32)}, (3, WIDTH), (3, OUT))
    onnx.save(model, tmp_path / "base.onnx")
    rewritten(tmp_path / "base.onnx", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["model.onnx"]
    check_graph(tmp_path / "out" / "model.onnx")
    check_answers(tmp_path / "out" / "model.onnx")


def test_the_version_follows_the_weights(tmp_path: Path) -> None:
    def version(name: str, seed: int, location: str | None) -> str:
        source = graph_file(tmp_path / f"{name}-base", location, seed=seed)
        written = rewritten(source, tmp_path / name)
        return next(p.value for p in written.metadata_props if p.key == VERSION_KEY)

    for location in (None, "w.data"):
        kind = "inline" if location is None else "external"
        one = version(f"{kind}-one", 0, location)
        assert one == version(f"{kind}-same", 0, location)
        assert one != version(f"{kind}-other", 1, location)


def test_a_graph_that_breaks_a_rule_is_refused(tmp_path: Path) -> None:
    model = make_model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": weight()}, (3, WIDTH), (3, OUT)
    )
    model.graph.node[0].input[1] = "missing"
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckFailedError, match="checker"):
        check_graph(tmp_path / "model.onnx")
    model.graph.node[0].input[1] = "w"
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(CheckFailedError, match="ONNX Runtime"):
        check_graph(tmp_path / "model.onnx")


def test_operators_that_only_the_runtime_knows_pass(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("SimplifiedLayerNormalization", ["x", "s"], ["n"], axis=-1, epsilon=1e-5),
        helper.make_node("MatMul", ["n", "w"], ["y"]),
    ]
    held = {"w": weight(), "s": np.ones(WIDTH, F32)}
    onnx.save(make_model(nodes, held, (3, WIDTH), (3, OUT)), tmp_path / "model.onnx")
    check_graph(tmp_path / "model.onnx")


MEASURE = """
import re, sys
from pathlib import Path
import onnx, blake3, numpy
from boneconv.graphs import open_graph
from boneconv.onnx.runtime.write import write_graph
status = Path("/proc/self/status")  # getrusage counts the parent's memory too
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+) kB", status.read_text())[1])
before = peak()
opened = open_graph(Path(sys.argv[1]))
write_graph(opened, opened.proto, Path(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("location", [None, "base.onnx.data"])
def test_memory_does_not_grow_with_the_weights(tmp_path: Path, location: str | None) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    large = np.zeros((4096, 8192), F32)
    model = make_model(nodes, {"w": large}, (1, 4096), (1, 8192))
    if location is not None:
        onnx.external_data_helper.convert_model_to_external_data(model, location=location)
    onnx.save(model, tmp_path / "base.onnx")
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "base.onnx"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ})
    assert done.returncode == 0, done.stderr
    sizes = [p.stat().st_size for p in (tmp_path / "out").iterdir()]
    assert sum(sizes) > large.nbytes
    assert int(done.stdout) * 1024 < large.nbytes / 4
