"""Adapter files for ONNX Runtime: blocks under the names of a graph's inputs, in its dtype."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from boneconv.config import Axis, Variant
from boneconv.dtypes import FLOATS
from boneconv.engine.plan import Update
from boneconv.errors import (
    CheckFailedError,
    FormatError,
    NameMatchError,
    ShapeError,
    UsageError,
    listing,
)
from boneconv.io.files import replacing
from boneconv.kernels import RowMerger, Scratch, Stage
from boneconv.kernels.stage import Array
from boneconv.onnx.runtime.names import (
    BAT_SUFFIX,
    BONE_SUFFIX,
    VERSION_KEY,
    is_block,
    module_of,
)

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["ADAPTER_SUFFIX", "BlockInput", "RuntimeInputs", "read_inputs", "write_adapter_file"]

ADAPTER_SUFFIX = ".onnx_adapter"
_FORMAT = 1
#: ONNX element type -> safetensors dtype.
_DTYPES = {1: "F32", 10: "F16", 11: "F64", 16: "BF16"}


@dataclass(frozen=True)
class BlockInput:
    """A graph's input for a block.

    Attributes:
        dtype: Its safetensors dtype.
        shape: Its shape; None for a size that is free.
    """

    dtype: str
    shape: tuple[int | None, ...]


@dataclass(frozen=True)
class RuntimeInputs:
    """The inputs of a graph that adapters can be swapped in.

    Attributes:
        path: The graph.
        version: The number that tells this graph's adapter files from others'.
        blocks: Its inputs for blocks, by name.
    """

    path: Path
    version: int
    blocks: Mapping[str, BlockInput]


def read_inputs(path: Path, model: ModelProto) -> RuntimeInputs:
    """The inputs of a graph's structure.

    Raises:
        FormatError: The graph was not made for adapters.
    """
    version = next((e.value for e in model.metadata_props if e.key == VERSION_KEY), "")
    blocks = {
        given.name: BlockInput(
            _DTYPES.get(given.type.tensor_type.elem_type, "an unknown dtype"),
            tuple(
                dim.dim_value if dim.HasField("dim_value") else None
                for dim in given.type.tensor_type.shape.dim
            ),
        )
        for given in model.graph.input
        if is_block(given.name)
    }
    if not blocks or not version.isdigit():
        raise FormatError(
            "the graph has no inputs for adapters",
            path=path,
            hint="Make it with: boneconv export-onnx --runtime-adapters",
        )
    return RuntimeInputs(path, int(version), blocks)


def write_adapter_file(
    updates: Mapping[str, Update], inputs: RuntimeInputs, path: Path
) -> tuple[str, ...]:
    """Writes the file that ONNX Runtime loads an adapter from, whole or not at all.

    The scale is folded into the blocks: each element is the exact product rounded once to the
    input's dtype. A mini block is repeated along the outputs.

    Args:
        updates: The adapter's update of each module, by the module's name in the graph.
        inputs: The graph's inputs.
        path: The file.

    Returns:
        The inputs that the file holds blocks for.

    Raises:
        NameMatchError: A module has no input in the graph.
        ShapeError: A block does not fit its input.
        NonFiniteError: A block is not finite, or beyond the range of the graph's dtype.
        CheckFailedError: The file does not read back as it was written.
        MissingPathError: The file's folder is not there.
        MachineError: The file cannot be written.
    """
    import onnxruntime

    lost = [m for m, update in updates.items() if _input_name(m, update) not in inputs.blocks]
    if lost:
        raise NameMatchError(
            f"{len(lost)} of {len(updates)} blocks have no input in the graph: {listing(lost)}",
            path=inputs.path,
            found=f"inputs for {listing([module_of(name) for name in inputs.blocks][:3])}",
            hint="Make the graph again with all adapters that it is to serve",
        )
    values = {}
    for module, update in updates.items():
        name = _input_name(module, update)
        values[name] = _ort_value(_fitted(module, update, inputs.blocks[name]))
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(_FORMAT)
    adapter.set_model_version(inputs.version)
    adapter.set_parameters(values)
    with replacing(path) as draft:
        adapter.export_adapter(str(draft.absolute()))
        _check_written(draft, values)
    return tuple(values)


def _check_written(path: Path, values: Mapping[str, Any]) -> None:
    """Raises CheckFailedError unless a file holds exactly these OrtValues."""
    import onnxruntime

    file = onnxruntime.AdapterFormat.read_adapter(str(path))
    found = file.get_parameters()
    wrong = [name for name in values if name not in found or not _same(values[name], found[name])]
    if wrong or len(found) != len(values):
        raise CheckFailedError(
            f"the adapter file does not read back as it was written: {listing(wrong)}", path=path
        )


def _same(one: Any, other: Any) -> bool:
    if (one.data_type(), one.shape()) != (other.data_type(), other.shape()):
        return False
    size = one.tensor_size_in_bytes()
    return ctypes.string_at(one.data_ptr(), size) == ctypes.string_at(other.data_ptr(), size)


def _input_name(module: str, update: Update) -> str:
    return module + (BAT_SUFFIX if update.block.variant is Variant.BAT else BONE_SUFFIX)


def _fitted(module: str, update: Update, given: BlockInput) -> Array:
    """An update's block as the input takes it; raises ShapeError."""
    block = update.block
    shape = block.tensor.shape
    is_bat = block.variant is Variant.BAT
    if block.variant is Variant.MINI:
        shape = (shape[0], given.shape[1] or 0)
    fits = len(shape) == len(given.shape) and all(
        wanted in (None, size) for size, wanted in zip(shape, given.shape, strict=True)
    )
    if not fits or (block.variant is Variant.MINI and shape[1] % block.tensor.shape[1]):
        raise ShapeError(
            f"the block of {module!r} does not fit the graph",
            expected=[size or "r" for size in given.shape],
            found=list(block.tensor.shape),
            hint="BAT's rank is fixed in a graph" if is_bat else None,
        )
    if is_bat and block.axis is not Axis.OUT:
        raise UsageError(f"the blocks of {module!r} run along the inputs, the graph's do not")
    values = block.tensor.read()
    if is_bat:
        rows = shape[0] * shape[1]
        return _scaled(values.reshape(rows, -1), update, (rows, shape[2]), given).reshape(shape)
    return _scaled(values, update, (shape[0], shape[1]), given)


def _scaled(values: Array, update: Update, shape: Sequence[int], given: BlockInput) -> Array:
    """Scale times values, rounded once: what a merge into a weight of zeros gives, transposed."""
    rank, out = shape
    variant = Variant.MINI if update.block.variant is Variant.MINI else Variant.BONE
    stage = Stage(variant, values, scale=update.scale, residue=update.residue)
    target: np.dtype[Any] = FLOATS[given.dtype]
    merger = RowMerger([stage], (out, rank), np.dtype(np.float32), target)
    result = np.empty((out, rank), target)
    merger.merge(np.zeros((out, rank), np.float32), 0, result, Scratch())
    return np.ascontiguousarray(result.T)


def _ort_value(array: Array) -> Any:
    import onnxruntime

    if array.dtype == FLOATS["BF16"]:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array.view(np.uint16), 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)
