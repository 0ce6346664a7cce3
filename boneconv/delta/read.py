"""Opening a delta file."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import blake3

from boneconv.delta.document import Document
from boneconv.errors import FormatError
from boneconv.io.files import Reader
from boneconv.io.safetensors import SafetensorsFile, StoredTensor, read_header

__all__ = ["CORRECTION", "DOCUMENT", "FILE", "HEAD", "STORED", "DeltaFile", "open_delta"]

DOCUMENT, HEAD, FILE, CORRECTION, STORED = "document", "head/", "file/", "correction/", "base/"
FORMAT, VERSION = "boneconv-delta", "1"

_LARGEST_FILE = 1 << 30


@dataclass(frozen=True)
class DeltaFile:
    """A delta file whose document has been read.

    Attributes:
        path: The file.
        document: Its document.
    """

    path: Path
    document: Document
    _file: SafetensorsFile

    def head(self, shard: str) -> bytes:
        """The first bytes of a weight file of the base; raises FormatError."""
        wanted = next(each.head for each in self.document.shards if each.name == shard)
        return self._checked(self._bytes(HEAD + shard), wanted, shard)

    def file(self, name: str) -> bytes:
        """A file of the base that the delta file holds; raises FormatError."""
        unpacker = zlib.decompressobj(-15)
        try:
            content = unpacker.decompress(self._bytes(FILE + name), _LARGEST_FILE)
        except zlib.error as error:
            raise self._malformed(name) from error
        return self._checked(content, self.document.files[name].digest, name)

    def correction(self, name: str) -> StoredTensor:
        """The correction of a tensor; raises FormatError."""
        return self._tensor(CORRECTION + name)

    def stored(self, name: str) -> StoredTensor:
        """A tensor that the delta file holds as it is; raises FormatError."""
        tensor = self._tensor(STORED + name)
        entry = self.document.tensors[name]
        if (tensor.dtype, tensor.shape) != (entry.dtype, entry.shape):
            raise self._malformed(name)
        return tensor

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._file.tensors:
            raise self._malformed(name)
        return self._file.tensors[name]

    def _bytes(self, name: str) -> bytes:
        return _read(self._tensor(name))

    def _checked(self, content: bytes, digest: str, name: str) -> bytes:
        if blake3.blake3(content).hexdigest() != digest:
            raise self._malformed(name)
        return content

    def _malformed(self, name: str) -> FormatError:
        return FormatError(
            f"the delta file is damaged: what it holds of {name!r} is wrong",
            path=self.path,
            hint="Copy it again",
        )


def open_delta(path: Path) -> DeltaFile:
    """Reads the document of a delta file.

    Raises:
        MissingPathError: There is no such file.
        FormatError: It is no delta file, or a damaged one.
    """
    file = read_header(path)
    found = file.metadata.get("format"), file.metadata.get("version")
    if found[0] != FORMAT or DOCUMENT not in file.tensors:
        raise FormatError("not a delta file", path=path, expected="what --keep-delta wrote")
    if found[1] != VERSION:
        raise FormatError(
            "a delta file of another version",
            path=path,
            expected=f"version {VERSION}",
            found=repr(found[1]),
            hint="Use a newer boneconv",
        )
    return DeltaFile(path, Document.parse(_read(file.tensors[DOCUMENT]), path), file)


def _read(tensor: StoredTensor) -> bytes:
    content = bytearray(tensor.nbytes)
    with Reader(tensor.path) as reader:
        reader.read_into(memoryview(content), tensor.offset)
    return bytes(content)
