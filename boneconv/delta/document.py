"""The document of a delta file: what the base consisted of, and how each part is restored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from boneconv.dtypes import FLOATS, SIZES
from boneconv.errors import FormatError
from boneconv.strict_json import parse_object

__all__ = ["Document", "How", "ShardEntry", "StoredFile", "TensorEntry", "UpdateEntry"]

#: ``copy``: the merged checkpoint's bytes are the base's; ``correct``: the updates are undone and
#: the result corrected; ``stored``: the delta file holds the tensor.
How = Literal["copy", "correct", "stored"]


@dataclass(frozen=True)
class UpdateEntry:
    """One update that was merged into a tensor.

    Attributes:
        adapter: The number of the adapter, from 0.
        module: The adapter's module.
        scale: How strongly it was applied.
        residue: What the scale lacks: the factor is exactly ``scale + residue``.
    """

    adapter: int
    module: str
    scale: float
    residue: float


@dataclass(frozen=True)
class TensorEntry:
    """A tensor of the base.

    Attributes:
        dtype: Its safetensors dtype.
        shape: Its shape.
        digest: Its digest.
        how: Where its bytes come from.
        merged: The digest of the tensor of its name in the merged checkpoint (copy, correct).
        updates: What was merged into it, in order (correct; none where it was only cast).
        rows: How many rows each piece of the correction covers (correct).
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str
    how: How
    merged: str | None = None
    updates: tuple[UpdateEntry, ...] = ()
    rows: int = 0


@dataclass(frozen=True)
class ShardEntry:
    """A weight file of the base.

    Attributes:
        name: Its name.
        head: The BLAKE3 digest of its header, with the length before it.
        tensors: Its tensors, in the order of their bytes.
    """

    name: str
    head: str
    tensors: tuple[str, ...]


@dataclass(frozen=True)
class StoredFile:
    """Another file of the base.

    Attributes:
        digest: The BLAKE3 digest of its bytes.
        stored: Whether the delta file holds it; otherwise the merged checkpoint does.
    """

    digest: str
    stored: bool


@dataclass(frozen=True)
class Document:
    """What is known of a base.

    Attributes:
        adapters: The BLAKE3 digests of the adapters' weight files, in the order of the merge.
        shards: The weight files.
        tensors: Every tensor by name.
        files: Every other file that is restored, by its path in the folder.
        left_out: Files of the base that are not restored: other copies of its weights.
        single_file: Whether the base was one file, without a folder around it.
    """

    adapters: tuple[str, ...]
    shards: tuple[ShardEntry, ...]
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, StoredFile]
    left_out: tuple[str, ...] = ()
    single_file: bool = False

    def encode(self) -> bytes:
        """The document as JSON."""
        return (json.dumps(asdict(self), sort_keys=True) + "\n").encode()

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Document:
        """Reads a document that came from ``path``; raises FormatError."""
        value = parse_object(content, path)
        try:
            document = cls(
                adapters=tuple(map(_text, value["adapters"])),
                shards=tuple(_shard(each) for each in value["shards"]),
                tensors={name: _tensor(each) for name, each in value["tensors"].items()},
                files={_plain(name): _file(each) for name, each in value["files"].items()},
                left_out=tuple(map(_text, value["left_out"])),
                single_file=_of(value["single_file"], bool),
            )
            document._check()
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                f"the delta file's document is malformed: {type(error).__name__}: {error}",
                path=path,
            ) from error
        return document

    def _check(self) -> None:
        listed = [name for shard in self.shards for name in shard.tensors]
        if sorted(listed) != sorted(self.tensors) or len(set(listed)) != len(listed):
            raise ValueError("its shards do not hold its tensors")
        if not self.shards or (self.single_file and (len(self.shards) > 1 or self.files)):
            raise ValueError("its shards are no checkpoint")
        for update in (update for each in self.tensors.values() for update in each.updates):
            if not 0 <= update.adapter < len(self.adapters):
                raise ValueError("it names an adapter that it does not list")


def _shard(value: Mapping[str, Any]) -> ShardEntry:
    return ShardEntry(
        _plain(value["name"]), _text(value["head"]), tuple(map(_text, value["tensors"]))
    )


def _tensor(value: Mapping[str, Any]) -> TensorEntry:
    how, merged = value["how"], value["merged"]
    if how not in ("copy", "correct", "stored") or value["dtype"] not in SIZES:
        raise ValueError("a tensor's entry is of an unknown kind")
    entry = TensorEntry(
        dtype=value["dtype"],
        shape=tuple(_of(size, int) for size in value["shape"]),
        digest=_text(value["digest"]),
        how=how,
        merged=None if merged is None else _text(merged),
        updates=tuple(_update(each) for each in value["updates"]),
        rows=_of(value["rows"], int),
    )
    needs_rows = how == "correct" and (entry.rows <= 0 or not entry.shape)
    if min(entry.shape, default=0) < 0 or needs_rows:
        raise ValueError("a tensor's entry has an impossible size")
    if (how == "correct" and entry.dtype not in FLOATS) or (how == "stored") != (merged is None):
        raise ValueError("a tensor's entry contradicts itself")
    return entry


def _update(value: Mapping[str, Any]) -> UpdateEntry:
    return UpdateEntry(
        _of(value["adapter"], int),
        _text(value["module"]),
        _of(value["scale"], float),
        _of(value["residue"], float),
    )


def _file(value: Mapping[str, Any]) -> StoredFile:
    return StoredFile(_text(value["digest"]), _of(value["stored"], bool))


def _text(value: Any) -> str:
    return str(_of(value, str))


def _of(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _plain(name: Any) -> str:
    """A path that stays in its folder."""
    parts = PurePosixPath(_text(name)).parts
    if not parts or ".." in parts or "\\" in name or "\0" in name or ":" in parts[0]:
        raise ValueError(f"{name!r} leads outside the folder")
    if PurePosixPath(name).is_absolute() or str(PurePosixPath(name)) != name:
        raise ValueError(f"{name!r} leads outside the folder")
    return str(name)
