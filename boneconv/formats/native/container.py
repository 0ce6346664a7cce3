"""Rules R01 to R04: the safetensors file around an adapter.

Stricter than `boneconv.io.safetensors`, which reads what any writer may have written: the header is
strict JSON, and only the dtypes of the specification's table occur.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from boneconv.errors import FormatError, MissingPathError
from boneconv.formats.native.canonical import parse
from boneconv.formats.native.rules import StageFailed, Violation, fail_on
from boneconv.io.files import Reader
from boneconv.io.safetensors import MAX_HEADER, SafetensorsFile, StoredTensor, tensor_nbytes

__all__ = ["DTYPES", "read_container"]

#: The dtypes of the format, in the order in which a writer lays tensors out (section 4.5).
DTYPES = ("I64", "F64", "F32", "I32", "BF16", "F16", "U8", "BOOL")

_HINT = "Download or copy it again"


def read_container(path: Path, dtypes: tuple[str, ...] = DTYPES) -> SafetensorsFile:
    """Reads and checks a file's header; no tensor is read.

    Args:
        path: The file.
        dtypes: The dtypes that may occur.

    Raises:
        StageFailed: Violations of R01 to R04.
        MissingPathError, FormatError: There is no such file, or it is no regular one.
        MachineError: It cannot be read.
    """
    if not path.exists():
        raise MissingPathError("no such file", path=path)
    if not path.is_file():
        raise FormatError("not a regular file", path=path)
    size = path.stat().st_size
    with Reader(path) as reader:
        text = _header_text(reader, path, size)
    try:
        header = parse(text)
    except ValueError as error:
        raise StageFailed([Violation.of("R02", f"the header: {error}", path)]) from error
    metadata = header.pop("__metadata__", {})
    fail_on([*_metadata_faults(metadata, path), *_entry_faults(header, path, dtypes)])
    start = 8 + len(text)
    tensors = [_tensor(path, start, name, entry) for name, entry in header.items()]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    fail_on(_data_faults(tensors, path, start, size))
    return SafetensorsFile(path, {t.name: t for t in tensors}, metadata, start)


def _header_text(reader: Reader, path: Path, size: int) -> bytes:
    if size < 8:
        violation = Violation.of(
            "R01", "too short for a header", path, expected="8 bytes or more", found=size
        )
        raise StageFailed([violation])
    prefix = bytearray(8)
    reader.read_into(memoryview(prefix), 0)
    length = int.from_bytes(prefix, "little")
    most = min(MAX_HEADER, size - 8)
    if length > most:
        violation = Violation.of(
            "R01",
            "the header does not fit the file",
            path,
            expected=f"at most {most} bytes",
            found=f"{length} bytes",
            hint=_HINT,
        )
        raise StageFailed([violation])
    text = bytearray(length)
    reader.read_into(memoryview(text), 8)
    return bytes(text)


def _metadata_faults(metadata: Any, path: Path) -> Iterator[Violation]:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        yield Violation.of("R03", "the header's __metadata__ are no map of texts", path)


def _entry_faults(
    header: dict[str, Any], path: Path, dtypes: tuple[str, ...]
) -> Iterator[Violation]:
    for name, entry in header.items():
        fault = _entry_fault(entry, dtypes)
        if fault is not None:
            expected, found = fault
            message = f"the entry of {name!r} describes no tensor"
            yield Violation.of("R03", message, path, expected=expected, found=found)


def _entry_fault(entry: Any, dtypes: tuple[str, ...]) -> tuple[str, object] | None:
    """What an entry should hold and what it holds instead; None where all is well."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        return "dtype, shape and data_offsets", list(entry) if isinstance(entry, dict) else entry
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in dtypes:
        return f"a dtype of {', '.join(dtypes)}", repr(dtype)
    if not _are_sizes(shape):
        return "a shape of integers", repr(shape)
    if not _are_sizes(offsets) or len(offsets) != 2:
        return "two offsets", repr(offsets)
    nbytes = 0 if 0 in shape else _nbytes(dtype, shape)
    if offsets[1] - offsets[0] != nbytes:
        return f"{nbytes} bytes for {dtype} {shape}", offsets[1] - offsets[0]
    return None


def _nbytes(dtype: str, shape: list[int]) -> int:
    """Bytes of a shape without zeros, as far as 2^63: nobody multiplies a million sizes."""
    total = tensor_nbytes(dtype, ())
    for size in shape:
        total *= size
        if total >= 2**63:
            break
    return total


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _tensor(path: Path, start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    return StoredTensor(path, name, entry["dtype"], shape, start + begin, end - begin)


def _data_faults(
    tensors: list[StoredTensor], path: Path, start: int, size: int
) -> Iterator[Violation]:
    end = start
    for tensor in tensors:
        if tensor.offset != end:
            yield Violation.of(
                "R04",
                f"a gap or an overlap before {tensor.name!r}",
                path,
                expected=f"offset {end - start}",
                found=tensor.offset - start,
                hint=_HINT,
            )
        end = max(end, tensor.offset + tensor.nbytes)
    if end != size:
        message = "data are missing" if end > size else "data belong to no tensor"
        yield Violation.of(
            "R04", message, path, expected=f"{end} bytes", found=f"{size} bytes", hint=_HINT
        )
