"""Adapter files: every block exact, under its input's name, in the graph's dtype."""

from __future__ import annotations

import os
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.adapter import Block
from boneconv.config import Axis, Variant
from boneconv.dtypes import name_of
from boneconv.engine.plan import Update
from boneconv.errors import (
    CheckFailedError,
    FormatError,
    MachineError,
    NameMatchError,
    NonFiniteError,
    ShapeError,
    UsageError,
)
from boneconv.io.safetensors import ArrayTensor
from boneconv.onnx.runtime.files import BlockInput, RuntimeInputs, read_inputs, write_adapter_file
from boneconv.onnx.runtime.graph import Slot, add_adapter_inputs
from boneconv.onnx.runtime.names import VERSION_KEY
from tests.builders import BF16, F16, F32, Array, grid, same_bits
from tests.onnx.runtime.cases import linear

OUT = 6
DTYPES = {"F32": F32, "F16": F16, "BF16": BF16}


def update(
    values: Array,
    variant: Variant = Variant.BONE,
    *,
    scale: float = 1.0,
    residue: float = 0.0,
    axis: Axis = Axis.OUT,
) -> Update:
    rank = values.shape[-1] if variant is Variant.BAT else values.shape[0]
    tensor = ArrayTensor("m", values)
    mini = values.shape[1] if variant is Variant.MINI else 1
    return Update(Block("m", variant, axis, tensor, rank, mini), scale, residue)


def inputs(dtype: str = "F32", **more: tuple[int | None, ...]) -> RuntimeInputs:
    blocks = {"m.bone_block": (None, OUT), "m.bat_block": (None, 2, 2)} | more
    given = {name: BlockInput(dtype, shape) for name, shape in blocks.items()}
    return RuntimeInputs(Path("model.onnx"), 12345, given)


def read(path: Path) -> tuple[onnxruntime.AdapterFormat, dict[str, Array]]:
    file = onnxruntime.AdapterFormat.read_adapter(str(path))
    return file, {name: _array(value) for name, value in file.get_parameters().items()}


def _array(value: Any) -> Array:
    if value.data_type() != "tensor(bfloat16)":
        return np.array(value.numpy())
    import ctypes

    size = value.tensor_size_in_bytes()
    return np.frombuffer(ctypes.string_at(value.data_ptr(), size), BF16).reshape(value.shape())


def written(
    tmp_path: Path, updates: Mapping[str, Update], given: RuntimeInputs
) -> dict[str, Array]:
    path = tmp_path / "a.onnx_adapter"
    names = write_adapter_file(updates, given, path)
    file, arrays = read(path)
    assert set(names) == set(arrays)
    assert file.get_model_version() == given.version
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx_adapter"]
    return arrays


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bone_block_is_cast_to_the_graphs_dtype(tmp_path: Path, dtype: str, stored: str) -> None:
    block = grid((5, OUT), DTYPES[stored])
    found = written(tmp_path, {"m": update(block)}, inputs(dtype))
    assert same_bits(found["m.bone_block"], block.astype(DTYPES[dtype]) + DTYPES[dtype].type(0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_mini_block_is_repeated_along_the_outputs(tmp_path: Path, dtype: str) -> None:
    block = grid((5, 2), F32)
    found = written(tmp_path, {"m": update(block, Variant.MINI)}, inputs(dtype))["m.bone_block"]
    expected = np.stack([block[:, column % 2] for column in range(OUT)], axis=1)
    assert same_bits(found, expected.astype(DTYPES[dtype]))


def test_a_bat_block_keeps_its_shape(tmp_path: Path) -> None:
    block = grid((3, 2, 2), F32)
    found = written(tmp_path, {"m": update(block, Variant.BAT, scale=0.5)}, inputs())
    assert same_bits(found["m.bat_block"], (block * F32.type(0.5)) + F32.type(0))


@given(
    scale=st.floats(-4, 4).filter(lambda s: s == 0 or abs(s) > 1e-3),
    dtype=st.sampled_from(["F32", "F16"]),
    seed=st.integers(0, 9),
)
def test_the_scale_is_folded_in_exactly_and_rounded_once(
    tmp_path_factory: pytest.TempPathFactory, scale: float, dtype: str, seed: int
) -> None:
    block = np.random.default_rng(seed).standard_normal((4, OUT)).astype(F32)
    residue = scale * 2.0**-55
    tmp_path = tmp_path_factory.mktemp("scale")
    found = written(tmp_path, {"m": update(block, scale=scale, residue=residue)}, inputs(dtype))
    factor = Fraction(scale) + Fraction(residue)
    for value, result in zip(block.flat, found["m.bone_block"].flat, strict=True):
        exact = Fraction(float(value)) * factor
        here = abs(Fraction(float(result)) - exact)
        for direction in (-np.inf, np.inf):
            neighbour = np.nextafter(result, DTYPES[dtype].type(direction))
            assert here <= abs(Fraction(float(neighbour)) - exact)


def test_a_module_without_an_input_is_an_error(tmp_path: Path) -> None:
    updates = {"m": update(grid((5, OUT))), "lost.up": update(grid((5, OUT)))}
    with pytest.raises(NameMatchError, match=r"1 of 2 blocks have no input in the graph: lost\.up"):
        write_adapter_file(updates, inputs(), tmp_path / "a")
    only_bone = RuntimeInputs(Path("g"), 1, {"m.bone_block": BlockInput("F32", (None, OUT))})
    with pytest.raises(NameMatchError, match="1 of 1 blocks have no input"):
        write_adapter_file({"m": update(grid((3, 2, 2)), Variant.BAT)}, only_bone, tmp_path / "a")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("shape", "variant"),
    [
        ((5, OUT + 1), Variant.BONE),
        ((5, 4), Variant.MINI),
        ((2, 3, 3), Variant.BAT),
    ],
)
def test_a_block_that_does_not_fit_is_an_error(
    tmp_path: Path, shape: tuple[int, ...], variant: Variant
) -> None:
    with pytest.raises(ShapeError, match="'m' does not fit the graph"):
        write_adapter_file({"m": update(grid(shape), variant)}, inputs(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_bat_along_the_inputs_is_an_error(tmp_path: Path) -> None:
    along = update(grid((3, 2, 2)), Variant.BAT, axis=Axis.IN)
    with pytest.raises(UsageError, match="along the inputs"):
        write_adapter_file({"m": along}, inputs(), tmp_path / "a")


def test_values_that_the_graph_cannot_hold_are_errors(tmp_path: Path) -> None:
    block = grid((5, OUT))
    block[2, 3] = 1e6
    with pytest.raises(NonFiniteError):
        write_adapter_file({"m": update(block)}, inputs("F16"), tmp_path / "a")
    block[2, 3] = np.nan
    with pytest.raises(NonFiniteError):
        write_adapter_file({"m": update(block)}, inputs(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_there_is_replaced_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.onnx_adapter"
    write_adapter_file({"m": update(grid((5, OUT)))}, inputs(), path)
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(MachineError):
            write_adapter_file({"m": update(grid((7, OUT)))}, inputs(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx_adapter"]
    assert path.read_bytes() == before
    write_adapter_file({"m": update(grid((7, OUT)))}, inputs(), path)
    assert path.read_bytes() != before


def test_a_file_that_reads_back_as_something_else_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = onnxruntime.AdapterFormat.export_adapter

    def flip_a_bit(adapter: onnxruntime.AdapterFormat, path: str) -> None:
        block = adapter.get_parameters()["m.bone_block"].numpy()
        export(adapter, path)
        content = Path(path).read_bytes()
        at = content.index(block.tobytes())
        Path(path).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])

    monkeypatch.setattr(onnxruntime.AdapterFormat, "export_adapter", flip_a_bit)
    with pytest.raises(CheckFailedError, match=r"does not read back.*m\.bone_block"):
        write_adapter_file({"m": update(grid((5, OUT)))}, inputs(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_the_inputs_are_read_from_the_graph() -> None:
    case = linear()
    with pytest.raises(FormatError, match="no inputs for adapters"):
        read_inputs(Path("g"), case.model)
    add_adapter_inputs(case.model, {"m.up": Slot((case.place,), True, 2)})
    with pytest.raises(FormatError, match="no inputs for adapters"):
        read_inputs(Path("g"), case.model)
    case.model.metadata_props.add(key=VERSION_KEY, value="9")
    found = read_inputs(Path("g"), onnx.ModelProto.FromString(case.model.SerializeToString()))
    assert found.version == 9
    assert found.blocks == {
        "m.up.bone_block": BlockInput(name_of(F32), (None, OUT)),
        "m.up.bat_block": BlockInput(name_of(F32), (None, 2, 2)),
    }
