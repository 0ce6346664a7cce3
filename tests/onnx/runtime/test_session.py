"""One session, many adapters, and ONNX Runtime's silent traps: that they are there, and closed.

Each test of a trap first shows it in ONNX Runtime itself, so that it tells when that changes.
"""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from boneconv.errors import (
    FormatError,
    MissingPathError,
    NameMatchError,
    ShapeError,
    UsageError,
)
from boneconv.onnx.runtime.graph import Slot, add_adapter_inputs
from boneconv.onnx.runtime.names import VERSION_KEY
from boneconv.onnx.runtime.session import AdapterSession
from tests.builders import BF16, F32, Array
from tests.onnx.runtime.cases import Linear, bone_update, linear, write_adapter

OUT, WIDTH, VERSION = 16, 24, 77
BLOCK = "m.up.bone_block"
RANKS = {"even": 8, "ragged": 5, "wide": 40}


@dataclass(frozen=True)
class Served:
    """A graph on disk and adapter files for it, with what each must answer."""

    model: Path
    case: Linear
    files: Mapping[str, Path]
    blocks: Mapping[str, Array]

    @property
    def x(self) -> Array:
        return self.case.x

    def expected(self, name: str | None) -> Array:
        update = 0.0 if name is None else bone_update(self.blocks[name], OUT, WIDTH)
        return self.case.expected(update)

    def is_from(self, found: Array, name: str | None) -> bool:
        return np.allclose(found, self.expected(name), rtol=1e-4, atol=1e-4)

    def plain(self) -> onnxruntime.InferenceSession:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        return onnxruntime.InferenceSession(self.model, options)


def serve(folder: Path, ranks: Mapping[str, int], seed: int = 0) -> Served:
    rng = np.random.default_rng(seed)
    case = linear("matmul-bias", out=OUT, width=WIDTH, seed=seed)
    add_adapter_inputs(case.model, {"m.up": Slot((case.place,))})
    case.model.metadata_props.add(key=VERSION_KEY, value=str(VERSION))
    onnx.save(case.model, folder / "model.onnx")
    blocks = {name: rng.standard_normal((r, OUT)).astype(F32) for name, r in ranks.items()}
    files = {
        name: write_adapter(folder / f"{name}.onnx_adapter", {BLOCK: b}, version=VERSION)
        for name, b in blocks.items()
    }
    return Served(folder / "model.onnx", case, files, blocks)


@pytest.fixture
def served(tmp_path: Path) -> Served:
    return serve(tmp_path, RANKS)


@pytest.fixture
def session(served: Served) -> AdapterSession:
    made = AdapterSession(served.model)
    for name, path in served.files.items():
        made.load(name, path)
    return made


def ort_adapter(path: Path) -> onnxruntime.LoraAdapter:
    adapter = onnxruntime.LoraAdapter()
    adapter.Load(str(path))
    return adapter


# --- serving ----------------------------------------------------------------------------------


def test_base_and_adapters_in_turn(served: Served, session: AdapterSession) -> None:
    assert session.adapters == tuple(RANKS)
    for name in (None, "even", "ragged", None, "wide", "even", None):
        (found,) = session.run(None, {"x": served.x}, name)
        assert served.is_from(found, name)


def test_the_folder_of_a_graph_will_do(served: Served) -> None:
    (found,) = AdapterSession(served.model.parent).run(["y"], {"x": served.x})
    assert served.is_from(found, None)


def test_inputs_may_be_ort_values(served: Served, session: AdapterSession) -> None:
    value = onnxruntime.OrtValue.ortvalue_from_numpy(served.x)
    (found,) = session.run(["y"], {"x": value}, "even")
    assert served.is_from(found, "even")


def test_providers_and_options_are_the_callers(served: Served) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    made = AdapterSession(served.model, ["CPUExecutionProvider"], options)
    assert made.session.get_session_options().intra_op_num_threads == 1
    assert made.session.get_providers() == ["CPUExecutionProvider"]


def test_run_options_reach_onnx_runtime(served: Served, session: AdapterSession) -> None:
    config = {"memory.enable_memory_arena_shrinkage": "no such device"}
    with pytest.raises(Exception, match="no such device"):
        session.run(None, {"x": served.x}, "even", config=config)


def test_ten_adapters_from_several_threads_never_mix(tmp_path: Path) -> None:
    names = [f"a{i}" for i in range(10)]
    served = serve(tmp_path, {name: 3 + 2 * i for i, name in enumerate(names)})
    session = AdapterSession(served.model)
    for name in names:
        session.load(name, served.files[name])
    expected = {name: served.expected(name) for name in (None, *names)}
    gaps = [
        np.abs(expected[one] - expected[other]).max()
        for one in expected
        for other in expected
        if one != other
    ]
    assert min(gaps) > 1

    def client(seed: int) -> int:
        order = random.Random(seed)
        for _ in range(100):
            name = order.choice([None, *names])
            (found,) = session.run(None, {"x": served.x}, name)
            np.testing.assert_allclose(found, expected[name], rtol=1e-4, atol=1e-4)
        return seed

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(client, range(6))) == list(range(6))


def test_loading_and_unloading_while_others_run(served: Served, session: AdapterSession) -> None:
    stop = threading.Event()
    wrong: list[str] = []

    def client() -> None:
        while not stop.is_set():
            (found,) = session.run(None, {"x": served.x}, "even")
            if not served.is_from(found, "even"):
                wrong.append("another adapter's answer")

    threads = [threading.Thread(target=client) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            session.unload("ragged")
            session.load("ragged", served.files["ragged"])
            session.load("even", served.files["even"], replace=True)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_run_keeps_the_adapter_that_is_unloaded_meanwhile(
    served: Served, session: AdapterSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = session.session.run

    def unload_first(*args: object, **kwargs: object) -> object:
        session.unload("even")
        gc.collect()
        return run(*args, **kwargs)

    monkeypatch.setattr(session.session, "run", unload_first)
    (found,) = session.run(None, {"x": served.x}, "even")
    assert served.is_from(found, "even")
    assert "even" not in session.adapters


# --- names ------------------------------------------------------------------------------------


def test_an_unknown_name_is_an_error_that_says_which_there_are(
    served: Served, session: AdapterSession
) -> None:
    with pytest.raises(UsageError, match="no adapter 'evn' is loaded; found even, ragged, wide"):
        session.run(None, {"x": served.x}, "evn")
    with pytest.raises(UsageError, match="no adapter 'evn'"):
        session.run_with_iobinding(session.io_binding(), "evn")
    with pytest.raises(UsageError, match="no adapter 'evn'"):
        session.unload("evn")


def test_the_empty_name_is_not_the_base(served: Served, session: AdapterSession) -> None:
    with pytest.raises(UsageError, match="no adapter ''"):
        session.run(None, {"x": served.x}, "")


def test_an_unloaded_adapter_is_gone(served: Served, session: AdapterSession) -> None:
    session.unload("even")
    assert session.adapters == ("ragged", "wide")
    with pytest.raises(UsageError, match="no adapter 'even'"):
        session.run(None, {"x": served.x}, "even")


def test_a_taken_name_is_replaced_on_request_only(served: Served, session: AdapterSession) -> None:
    with pytest.raises(UsageError, match="already"):
        session.load("even", served.files["ragged"])
    assert served.is_from(session.run(None, {"x": served.x}, "even")[0], "even")
    session.load("even", served.files["ragged"], replace=True)
    assert served.is_from(session.run(None, {"x": served.x}, "even")[0], "ragged")


# --- the traps --------------------------------------------------------------------------------


FORGETFUL = """
import gc, sys
import numpy, onnxruntime
model, file, x = sys.argv[1:]
options, adapter = onnxruntime.RunOptions(), onnxruntime.LoraAdapter()
adapter.Load(file)
options.add_active_adapter(adapter)
if {drop}:
    del adapter
    gc.collect()
session = onnxruntime.InferenceSession(model)
numpy.save(x, session.run(None, {{"x": numpy.load(x)}}, options)[0])
"""


def forgetful(served: Served, name: str, *, drop: bool) -> Array | None:
    """ONNX Runtime's answer in a process of its own, which may not survive it."""
    x = served.model.with_name("x.npy")
    np.save(x, served.x)
    command = [sys.executable, "-c", FORGETFUL.format(drop=drop)]
    command += [str(served.model), str(served.files[name]), str(x)]
    done = subprocess.run(command, capture_output=True, timeout=120)
    return np.asarray(np.load(x)) if done.returncode == 0 else None


def test_trap_run_options_let_the_adapter_go(served: Served, session: AdapterSession) -> None:
    held = forgetful(served, "even", drop=False)
    assert held is not None and served.is_from(held, "even")
    dropped = forgetful(served, "even", drop=True)
    assert dropped is None or not served.is_from(dropped, "even"), "the trap is gone"

    gc.collect()
    assert served.is_from(session.run(None, {"x": served.x}, "even")[0], "even")


def test_trap_of_two_active_adapters_the_first_wins(
    served: Served, session: AdapterSession
) -> None:
    one, other = ort_adapter(served.files["even"]), ort_adapter(served.files["ragged"])
    options = onnxruntime.RunOptions()
    options.add_active_adapter(one)
    options.add_active_adapter(other)
    found = served.plain().run(None, {"x": served.x}, options)[0]
    assert served.is_from(found, "even"), "the trap is gone"

    for name in ("even", "ragged", "even"):
        assert served.is_from(session.run(None, {"x": served.x}, name)[0], name)


def test_trap_an_active_adapter_beats_the_blocks_that_are_fed(
    served: Served, session: AdapterSession
) -> None:
    adapter, options = ort_adapter(served.files["even"]), onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    feeds = {"x": served.x, BLOCK: served.blocks["ragged"]}
    assert served.is_from(served.plain().run(None, feeds, options)[0], "even"), "the trap is gone"

    for name in ("even", None):
        with pytest.raises(UsageError, match=r"hold adapter blocks: m\.up\.bone_block"):
            session.run(None, feeds, name)


def test_trap_io_binding_ignores_adapters(served: Served, session: AdapterSession) -> None:
    plain, options = served.plain(), onnxruntime.RunOptions()
    adapter = ort_adapter(served.files["even"])
    options.add_active_adapter(adapter)
    binding = plain.io_binding()
    binding.bind_cpu_input("x", served.x)
    binding.bind_output("y")
    plain.run_with_iobinding(binding, options)
    assert served.is_from(binding.copy_outputs_to_cpu()[0], None), "the trap is gone"

    ours = session.io_binding()
    ours.bind_cpu_input("x", served.x)
    ours.bind_output("y")
    for name in ("even", "ragged", None, "wide", None):
        session.run_with_iobinding(ours, name)
        assert served.is_from(ours.copy_outputs_to_cpu()[0], name)


def test_trap_overwriting_the_file_changes_the_adapter(
    served: Served, session: AdapterSession, tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "mapped", {BLOCK: served.blocks["even"]}, version=VERSION)
    adapter, options = ort_adapter(path), onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    session.load("mine", path)
    plain = served.plain()
    assert served.is_from(plain.run(None, {"x": served.x}, options)[0], "even")
    write_adapter(path, {BLOCK: -served.blocks["even"]}, version=VERSION)
    after = plain.run(None, {"x": served.x}, options)[0]
    assert not served.is_from(after, "even"), "the trap is gone"

    assert served.is_from(session.run(None, {"x": served.x}, "mine")[0], "even")
    path.unlink()
    assert served.is_from(session.run(None, {"x": served.x}, "mine")[0], "even")


def test_trap_an_adapter_may_replace_a_models_input(
    served: Served, session: AdapterSession, tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "hostile", {"x": 2 * served.x}, version=VERSION)
    adapter, options = ort_adapter(path), onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    found = served.plain().run(None, {"x": served.x}, options)[0]
    assert not served.is_from(found, None), "the trap is gone"

    with pytest.raises(NameMatchError, match="no blocks of"):
        session.load("hostile", path)


def test_trap_an_adapter_of_an_equally_shaped_graph_is_accepted(
    served: Served, session: AdapterSession, tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "other", {BLOCK: served.blocks["even"]}, version=VERSION + 1)
    adapter, options = ort_adapter(path), onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    found = served.plain().run(None, {"x": served.x}, options)[0]
    assert served.is_from(found, "even"), "the trap is gone"

    with pytest.raises(FormatError, match="another graph of this architecture"):
        session.load("other", path)


def test_trap_an_empty_adapter_is_the_base(
    served: Served, session: AdapterSession, tmp_path: Path
) -> None:
    path = write_adapter(tmp_path / "empty", {}, version=VERSION)
    adapter, options = ort_adapter(path), onnxruntime.RunOptions()
    options.add_active_adapter(adapter)
    found = served.plain().run(None, {"x": served.x}, options)[0]
    assert served.is_from(found, None), "the trap is gone"

    with pytest.raises(FormatError, match="holds no blocks"):
        session.load("empty", path)


# --- files that do not fit --------------------------------------------------------------------


def test_tensors_of_another_graph_are_refused_by_name(
    served: Served, session: AdapterSession, tmp_path: Path
) -> None:
    blocks = {BLOCK: served.blocks["even"], "m.down.bone_block": served.blocks["even"]}
    path = write_adapter(tmp_path / "other", blocks, version=VERSION)
    with pytest.raises(NameMatchError, match=r"1 of 2 tensors are no blocks of .*m\.down\.bone"):
        session.load("other", path)


@pytest.mark.parametrize("shape", [(4, OUT + 1), (OUT,), (4, OUT, 1), (0, OUT)])
def test_a_block_of_another_shape_is_refused(
    session: AdapterSession, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    path = write_adapter(tmp_path / "shape", {BLOCK: np.ones(shape, F32)}, version=VERSION)
    with pytest.raises(ShapeError, match=r"'m.up' does not fit the graph; expected \['r', 16\]"):
        session.load("shape", path)


@pytest.mark.parametrize("dtype", ["float16", "float64", "bfloat16"])
def test_a_block_of_another_dtype_is_refused(
    session: AdapterSession, tmp_path: Path, dtype: str
) -> None:
    block = np.ones((4, OUT), BF16 if dtype == "bfloat16" else dtype)
    path = write_adapter(tmp_path / "dtype", {BLOCK: block}, version=VERSION)
    with pytest.raises(
        FormatError, match=r"another dtype than the graph; expected tensor\(float\)"
    ):
        session.load("dtype", path)


def test_files_that_are_no_adapters(
    session: AdapterSession, served: Served, tmp_path: Path
) -> None:
    with pytest.raises(MissingPathError):
        session.load("none", tmp_path / "none.onnx_adapter")
    content = served.files["even"].read_bytes()
    for wrong in (b"", b"text", served.model.read_bytes(), content[: len(content) // 2]):
        (tmp_path / "wrong").write_bytes(wrong)
        with pytest.raises(FormatError, match="not an adapter file"):
            session.load("wrong", tmp_path / "wrong")
    assert session.adapters == tuple(RANKS)


def test_graphs_that_cannot_serve(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError):
        AdapterSession(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(FormatError, match="cannot load"):
        AdapterSession(tmp_path / "text.onnx")
    onnx.save(linear().model, tmp_path / "plain.onnx")
    with pytest.raises(FormatError, match="no inputs for adapters"):
        AdapterSession(tmp_path / "plain.onnx")
