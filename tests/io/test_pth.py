"""Files of torch's: found a range at a time, and written without torch."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from boneconv.errors import FormatError, MissingPathError
from boneconv.io.files import Reader, Writer
from boneconv.io.pth import locate_tensors
from boneconv.io.pth_layout import layout_pth
from tests.builders import BF16, F16, F32, F64, NAMES, Array, grid

I64, U8, BOOL = np.dtype(np.int64), np.dtype(np.uint8), np.dtype(np.bool_)


def _bytes_at(path: Path, tensor: Any) -> bytes:
    content = bytearray(tensor.nbytes)
    with Reader(path) as reader:
        reader.read_into(memoryview(content), tensor.offset)
    return bytes(content)


def _raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())


def _write(path: Path, arrays: dict[str, Array]) -> Path:
    layout = layout_pth([(name, NAMES[a.dtype], a.shape) for name, a in arrays.items()])
    with Writer(path, layout.size) as writer:
        writer.write_at(layout.head, 0)
        for name, array in reversed(arrays.items()):
            writer.write_at(array.tobytes(), layout.offsets[name])
    layout.seal(path)
    return path


STATE = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "half": torch.ones(5, dtype=torch.float16),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "integers": torch.arange(7),
    "slice": torch.arange(10.0)[3:7],
}


def test_tensors_are_found_where_torch_put_them(tmp_path: Path) -> None:
    state = STATE | {"tied": STATE["a.weight"]}
    torch.save(state, tmp_path / "model.pth")
    found = locate_tensors(tmp_path / "model.pth")
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].shape == tuple(tensor.shape)
        assert _bytes_at(tmp_path / "model.pth", found[name]) == _raw(tensor)
    assert found["a.weight"].offset == found["tied"].offset
    assert [t.dtype for t in found.values()][:5] == ["BF16", "F16", "F64", "F32", "I64"]


def test_parameters_and_ordered_dicts_are_read(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 2)
    torch.save(module.state_dict(), tmp_path / "a.pth")
    torch.save(dict(module.named_parameters()), tmp_path / "b.pth")
    for name in ("a.pth", "b.pth"):
        found = locate_tensors(tmp_path / name)["weight"]
        assert _bytes_at(tmp_path / name, found) == _raw(module.weight.detach())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.zeros(2, 3).T}, "no tensor with its values in order"),
        ({"a": {"b": torch.zeros(2)}}, "'?a'? is no tensor"),
        ({"step": 3}, "step is no tensor"),
        ([torch.zeros(2)], "holds no state dict"),
    ],
)
def test_what_is_no_plain_state_dict_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "model.pth")
    with pytest.raises(FormatError, match=message):
        locate_tensors(tmp_path / "model.pth")


class _Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm-was-done"),)


def test_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"a": _Harmful()}, tmp_path / "model.pth")
    with pytest.raises(FormatError, match="could run code"):
        locate_tensors(tmp_path / "model.pth")
    assert not (tmp_path / "harm-was-done").exists()


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    torch.save(STATE, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match="damaged"):
        locate_tensors(path)
    path.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(FormatError, match="not a torch file"):
        locate_tensors(path)
    with pytest.raises(MissingPathError):
        locate_tensors(tmp_path / "absent.pth")


# --- writing ----------------------------------------------------------------------------------


@given(
    dtypes=st.lists(st.sampled_from([F64, F32, F16, BF16, I64, U8, BOOL]), max_size=6),
    shape=st.lists(st.integers(0, 5), max_size=3),
)
def test_torch_and_zip_tools_read_what_is_written(
    tmp_path_factory: pytest.TempPathFactory, dtypes: list[Any], shape: list[int]
) -> None:
    path = tmp_path_factory.mktemp("pth") / "model.pth"
    arrays = {
        f"layer.{i}.wéight": (grid(tuple(shape), seed=i) > 0).astype(dtype)
        for i, dtype in enumerate(dtypes)
    }
    _write(path, arrays)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    for mapped in (True, False):
        state = torch.load(path, weights_only=True, mmap=mapped)
        assert list(state) == list(arrays)
        for name, array in arrays.items():
            assert tuple(state[name].shape) == array.shape
            assert _raw(state[name]) == array.tobytes()
    found = locate_tensors(path)
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (NAMES[a.dtype], a.shape) for name, a in arrays.items()
    }
    assert all(t.offset % 64 == 0 for t in found.values())


def test_tensors_do_not_share_storage(tmp_path: Path) -> None:
    state = torch.load(_write(tmp_path / "m.pth", {"a": grid((2,)), "b": grid((2,))}))
    assert state["a"].untyped_storage().nbytes() == 8


@pytest.mark.slow
def test_files_beyond_four_gigabytes(tmp_path: Path) -> None:
    path, values = tmp_path / "large.pth", grid((2,))
    layout = layout_pth([("large", "U8", (5 * 2**30,)), ("last", "F32", (2,))])
    with Writer(path, layout.size) as writer:  # sparse: the large tensor takes no room
        writer.write_at(layout.head, 0)
        writer.write_at(values.tobytes(), layout.offsets["last"])
    layout.seal(path)
    state = torch.load(path, weights_only=True, mmap=True)
    assert state["large"].shape == (5 * 2**30,)
    assert _raw(state["last"]) == values.tobytes()
    assert _bytes_at(path, locate_tensors(path)["last"]) == values.tobytes()


def test_a_dtype_without_a_storage_is_refused() -> None:
    with pytest.raises(FormatError, match="F8_E4M3"):
        layout_pth([("a", "F8_E4M3", (2,))])
