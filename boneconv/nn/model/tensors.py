"""Tensors between torch and files, of any dtype that both have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from boneconv.errors import FormatError
from boneconv.io.files import Reader, Writer
from boneconv.io.safetensors import ArrayTensor, Tensor, layout

__all__ = ["SAFETENSORS_DTYPES", "to_torch", "write_torch"]

#: torch's dtype -> its name in a safetensors header.
SAFETENSORS_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_TORCH = {name: dtype for dtype, name in SAFETENSORS_DTYPES.items()}


def to_torch(tensor: Tensor) -> torch.Tensor:
    """The values of a tensor of a file, as a torch tensor of its own on the CPU.

    Raises:
        FormatError: torch has no such dtype, or the file ends too early.
    """
    if tensor.dtype not in _TORCH:
        raise FormatError(
            f"{tensor.name!r} has a dtype that cannot be used",
            expected=", ".join(_TORCH),
            found=tensor.dtype,
        )
    values = torch.empty(tensor.shape, dtype=_TORCH[tensor.dtype])
    target = _bytes(values).numpy().data
    if not len(target):
        return values
    if isinstance(tensor, ArrayTensor):
        target[:] = memoryview(tensor.array.tobytes())
    else:
        with Reader(tensor.path) as reader:
            reader.read_into(target, tensor.offset)
    return values


def write_torch(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes tensors of the CPU to a new safetensors file, the wider dtypes first.

    Args:
        path: The file.
        tensors: Tensors by name, of dtypes in `SAFETENSORS_DTYPES`; they may share memory.

    Raises:
        DiskFullError, MachineError: The file cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    described = [
        (name, SAFETENSORS_DTYPES[tensors[name].dtype], tuple(tensors[name].shape))
        for name in order
    ]
    head, offsets, size = layout(described, {"format": "pt"})
    with Writer(path, size) as writer:
        writer.write_at(head, 0)
        for name in order:
            if tensors[name].numel():
                writer.write_at(_bytes(tensors[name].contiguous()).numpy().data, offsets[name])


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as bytes, not copied."""
    return tensor.detach().reshape(-1).view(torch.uint8)
