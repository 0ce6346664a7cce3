"""Digests of tensors: a BLAKE3 tree with fixed leaves, so that it streams and runs in parallel.

A tensor's bytes are cut into leaves of 1 MiB; the digest of the tensor covers its dtype, its shape
and the digests of its leaves (specification, section "Base fingerprint"). Whoever holds a
whole number of leaves can hash them without the rest.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import blake3

from boneconv.io.files import Reader
from boneconv.io.safetensors import StoredTensor, Tensor, byte_view

__all__ = ["LEAF", "LeafHasher", "file_digest", "same_values", "stored_digest", "tensor_digest"]

#: Bytes of a leaf; only the last one of a tensor may be shorter.
LEAF = 1024 * 1024


class LeafHasher:
    """Hashes consecutive bytes that start at a leaf's start, leaf by leaf."""

    def __init__(self) -> None:
        self._leaves: list[bytes] = []
        self._hasher = blake3.blake3()
        self._length = 0

    def update(self, data: memoryview) -> None:
        """Takes the next bytes, any number of them."""
        while len(data):
            part = data[: LEAF - self._length]
            self._hasher.update(part)
            self._length += len(part)
            data = data[len(part) :]
            if self._length == LEAF:
                self._close()

    def leaves(self) -> list[bytes]:
        """The digests of the leaves; the last one may have been short."""
        if self._length:
            self._close()
        return self._leaves

    def _close(self) -> None:
        self._leaves.append(self._hasher.digest())
        self._hasher = blake3.blake3()
        self._length = 0


def tensor_digest(dtype: str, shape: Sequence[int], leaves: Sequence[bytes]) -> str:
    """The digest of a tensor from those of its leaves, as 64 hexadecimal digits."""
    sizes = ",".join(map(str, shape))
    head = f"bone-adapter tensor 1\n{dtype}\n[{sizes}]\n{len(leaves)}\n"
    return blake3.blake3(head.encode("ascii") + b"".join(leaves)).hexdigest()


def stored_digest(tensor: StoredTensor, reader: Reader) -> str:
    """The digest of a tensor on disk, a leaf at a time."""
    hasher = LeafHasher()
    for part in _parts(reader, tensor.offset, tensor.nbytes):
        hasher.update(part)
    return tensor_digest(tensor.dtype, tensor.shape, hasher.leaves())


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have equal dtype, shape and bytes."""
    return _digest(one) == _digest(other)


def _digest(tensor: Tensor) -> str:
    if isinstance(tensor, StoredTensor):
        with Reader(tensor.path) as reader:
            return stored_digest(tensor, reader)
    hasher = LeafHasher()
    hasher.update(byte_view(tensor.array))
    return tensor_digest(tensor.dtype, tensor.shape, hasher.leaves())


def file_digest(path: Path) -> str:
    """The plain BLAKE3 digest of a file's bytes, as 64 hexadecimal digits."""
    hasher = blake3.blake3()
    with Reader(path) as reader:
        for part in _parts(reader, 0, path.stat().st_size):
            hasher.update(part)
    return hasher.hexdigest()


def _parts(reader: Reader, offset: int, nbytes: int) -> Iterator[memoryview]:
    """Consecutive leaves of a file's range, each valid until the next is asked for."""
    buffer = memoryview(bytearray(min(LEAF, nbytes)))
    for start in range(0, nbytes, LEAF):
        part = buffer[: min(LEAF, nbytes - start)]
        reader.read_into(part, offset + start)
        yield part
