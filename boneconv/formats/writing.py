"""Writing a file of tensors one at a time, and reading it back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from boneconv.digest import LeafHasher, stored_digest, tensor_digest
from boneconv.dtypes import name_of
from boneconv.errors import MachineError, listing
from boneconv.io.files import Reader, Writer
from boneconv.io.pth import locate_tensors
from boneconv.io.pth_layout import layout_pth
from boneconv.io.safetensors import (
    ArrayTensor,
    StoredTensor,
    Tensor,
    byte_view,
    layout,
    read_header,
)

__all__ = ["Description", "TensorFile", "describe"]

#: Name, safetensors dtype and shape of a tensor.
Description = tuple[str, str, tuple[int, ...]]

_CHUNK = 8 * 1024 * 1024


def describe(tensors: Mapping[str, Tensor]) -> list[Description]:
    """The descriptions of tensors under new names, in their order."""
    return [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()]


class TensorFile:
    """A new file of tensors that are written in any order; a context manager.

    Args:
        path: The file to make.
        tensors: What it will hold, in the order of their bytes.
        pth: Whether it is a file of torch's rather than a safetensors file.
    """

    def __init__(self, path: Path, tensors: Sequence[Description], *, pth: bool = False) -> None:
        self._path = path
        self._described = {name: (dtype, shape) for name, dtype, shape in tensors}
        self._digests: dict[str, str] = {}
        self._pth = layout_pth(tensors) if pth else None
        if self._pth is not None:
            head, self._offsets, self.size = self._pth.head, self._pth.offsets, self._pth.size
        else:
            head, self._offsets, self.size = layout(tensors, {"format": "pt"})
        self._writer = Writer(path, self.size)
        self._writer.write_at(head, 0)

    def put(self, name: str, array: NDArray[Any]) -> None:
        """Writes the values of a tensor; raises DiskFullError or MachineError."""
        assert self._described[name] == (name_of(array.dtype), array.shape), name
        hasher = LeafHasher()
        data = byte_view(np.ascontiguousarray(array))
        self._write(hasher, data, self._offsets[name])
        self._finish(name, hasher)

    def copy(self, name: str, tensor: Tensor) -> None:
        """Writes the bytes of another file's tensor; raises as `put`, or FormatError."""
        if isinstance(tensor, ArrayTensor):
            self.put(name, tensor.array)
            return
        hasher = LeafHasher()
        buffer = memoryview(bytearray(min(_CHUNK, tensor.nbytes)))
        with Reader(tensor.path) as reader:
            for start in range(0, tensor.nbytes, _CHUNK):
                part = buffer[: min(_CHUNK, tensor.nbytes - start)]
                reader.read_into(part, tensor.offset + start)
                self._write(hasher, part, self._offsets[name] + start)
        self._finish(name, hasher)

    def check(self) -> None:
        """Reads the finished file back.

        Raises:
            MachineError: It is not what was written.
        """
        found: Mapping[str, StoredTensor]
        if self._pth is not None:
            found = locate_tensors(self._path)
        else:
            found = read_header(self._path).tensors
        with Reader(self._path) as reader:
            wrong = [
                name
                for name, digest in self._digests.items()
                if name not in found or stored_digest(found[name], reader) != digest
            ]
        if wrong or set(found) != set(self._described):
            raise MachineError(
                f"what was written reads back differently: {listing(wrong)}",
                path=self._path,
                hint="Check the disk, and run the command again",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                missing = set(self._described) - set(self._digests)
                assert not missing, f"not written: {missing}"
                if self._pth is not None:
                    self._pth.seal(self._path)
                self._writer.sync()
        finally:
            self._writer.close()

    def _write(self, hasher: LeafHasher, data: memoryview, offset: int) -> None:
        hasher.update(data)
        self._writer.write_at(data, offset)

    def _finish(self, name: str, hasher: LeafHasher) -> None:
        dtype, shape = self._described[name]
        self._digests[name] = tensor_digest(dtype, shape, hasher.leaves())
