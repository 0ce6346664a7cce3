"""Where the tensors of torch's ``.pth`` files lie, so that they are read a range at a time.

torch opens the file (`boneconv.io.pickles`) and maps it; the mapping's start follows from holding
the tensors' addresses against the archive's own directory. No tensor byte is read.
"""

from __future__ import annotations

import re
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from boneconv.dtypes import SIZES
from boneconv.errors import FormatError, listing
from boneconv.io.files import Reader
from boneconv.io.pickles import load_mapped
from boneconv.io.safetensors import StoredTensor

__all__ = ["PTH_SUFFIXES", "locate_tensors"]

#: How a file of torch's own is told from a safetensors file.
PTH_SUFFIXES = (".pth", ".pt", ".bin")

_STORAGE = re.compile(r"[^/]+/data/[^/]+")
_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def locate_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a state dict on disk, each with its place in the file.

    Raises:
        MissingPathError: There is no such file.
        FormatError: The file is damaged, holds anything but dense tensors, or one that is a
            transposed or strided view of its bytes.
    """
    content = load_mapped(path)
    for name, value in content.items():
        _check(path, str(name), value)
    origin = _origin(path, content)
    return {str(name): _stored(path, str(name), v, origin) for name, v in content.items()}


def _check(path: Path, name: str, value: Any) -> None:
    import torch

    if not isinstance(value, torch.Tensor):
        raise FormatError(
            f"{listing([name])} is no tensor",
            path=path,
            expected="a plain state dict",
            found=type(value).__name__,
        )
    if value.layout != torch.strided or value.is_meta or not value.is_contiguous():
        raise FormatError(
            f"{listing([name])} is no tensor with its values in order",
            path=path,
            hint="Save the state dict again with every tensor made .contiguous()",
        )
    if _dtype(value) not in SIZES:
        raise FormatError(
            f"{listing([name])} has an unknown dtype", path=path, found=str(value.dtype)
        )


def _dtype(value: Any) -> str:
    name = str(value.dtype).removeprefix("torch.")
    return _DTYPES.get(name, name)


def _stored(path: Path, name: str, value: Any, origin: int) -> StoredTensor:
    nbytes = value.numel() * value.element_size()
    offset = value.data_ptr() - origin if nbytes else 0
    return StoredTensor(path, name, _dtype(value), tuple(value.shape), offset, nbytes)


def _origin(path: Path, content: Mapping[Any, Any]) -> int:
    """The address that the file's first byte is mapped to; 0 where no tensor has any bytes."""
    storages = {
        value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
        for value in content.values()
        if value.untyped_storage().nbytes()
    }
    places = _places(path)
    pairs = list(zip(sorted(storages.items()), sorted(places.items()), strict=False))
    starts = {address - offset for (address, _), (offset, _) in pairs}
    sizes_agree = all(one == other for (_, one), (_, other) in pairs)
    if len(storages) != len(places) or not sizes_agree or len(starts) > 1:
        raise FormatError(
            "its tensors cannot be told apart in the file",
            path=path,
            expected="a plain state dict, as torch.save writes it",
            hint="Load it with torch and save it again",
        )
    return starts.pop() if starts else 0


def _places(path: Path) -> dict[int, int]:
    """Where the bytes of each storage start in the file, and how many there are."""
    places = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [e for e in archive.infolist() if _STORAGE.fullmatch(e.filename)]
    except zipfile.BadZipFile as error:
        raise FormatError("a damaged torch file", path=path, hint="Copy it again") from error
    with Reader(path) as reader:
        for entry in entries:
            lengths = bytearray(4)
            reader.read_into(memoryview(lengths), entry.header_offset + 26)
            name, extra = struct.unpack("<2H", lengths)
            if entry.file_size:
                places[entry.header_offset + 30 + name + extra] = entry.file_size
    return places
