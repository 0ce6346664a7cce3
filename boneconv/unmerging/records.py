"""boneconv.json: what a merge recorded, read; what an unmerge records, written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from boneconv import __version__
from boneconv.engine.plan import RECORD_NAME, Action
from boneconv.errors import FormatError, UsageError
from boneconv.strict_json import read_object

__all__ = [
    "RECORD_NAME",
    "AdapterRecord",
    "MergeRecord",
    "RestoredTensor",
    "TensorRecord",
    "encode_record",
    "read_record",
]

_VERSION = 1


@dataclass(frozen=True)
class AdapterRecord:
    """An adapter that was merged.

    Attributes:
        digest: The BLAKE3 digest of its weights file.
        scale: S in ``W + S (W' - W)``, as it was given.
    """

    digest: str
    scale: float


@dataclass(frozen=True)
class TensorRecord:
    """A tensor of the merged checkpoint.

    Attributes:
        action: Where its values came from.
        digest: Its digest.
        base_digest: The digest of what was merged into, where it was merged.
        dequantised: Whether the base had it quantised.
    """

    action: Action
    digest: str
    base_digest: str | None
    dequantised: bool = False


@dataclass(frozen=True)
class MergeRecord:
    """What a merge recorded.

    Attributes:
        path: The record.
        adapters: The adapters, in order.
        dtype: The ``--dtype`` of the merge.
        tensors: Every tensor by name.
    """

    path: Path
    adapters: tuple[AdapterRecord, ...]
    dtype: str
    tensors: Mapping[str, TensorRecord]


@dataclass(frozen=True)
class RestoredTensor:
    """A tensor that was computed from the merged one.

    Attributes:
        name: Its name in the checkpoint.
        bound: No element differs from the base's by more.
        condition: The largest condition number of a block I + S B, in the norm of absolute column
            sums; 1 where nothing was inverted, None where that was not possible and the delta file
            alone restored it.
        exact: Whether every byte is the base's, by its digest; None where that is not known.
    """

    name: str
    bound: float
    condition: float | None
    exact: bool | None


def read_record(merged: Path) -> MergeRecord | None:
    """The record of a merged folder or file; None where there is none.

    A component of a merged pipeline has its part of the pipeline's record, one folder up.

    Raises:
        FormatError: The record is malformed, or of a newer version.
        UsageError: The folder was written by an unmerge.
    """
    beside = merged.with_name(f"{merged.name}.{RECORD_NAME}")
    path = merged / RECORD_NAME if merged.is_dir() else beside
    if path.is_file():
        return _parse(path, read_object(path), merged)
    folder = merged.resolve()
    path = folder.parent / RECORD_NAME
    if not merged.is_dir() or not path.is_file():
        return None
    part = _of_component(read_object(path), folder.name)
    return None if part is None else _parse(path, part, merged)


def _of_component(record: dict[str, Any], component: str) -> dict[str, Any] | None:
    """What a pipeline's record says of one component; None where it does not speak of it."""
    prefix = f"{component}/"
    tensors, adapters = record.get("tensors"), record.get("adapters")
    if not isinstance(tensors, dict) or not isinstance(adapters, list):
        return None
    own = {n.removeprefix(prefix): entry for n, entry in tensors.items() if n.startswith(prefix)}
    merged = [e for e in adapters if isinstance(e, dict) and e.get("component") == component]
    return record | {"tensors": own, "adapters": merged} if own else None


def _parse(path: Path, value: Mapping[str, Any], merged: Path) -> MergeRecord:
    if value.get("workflow") == "unmerge":
        raise UsageError("this is an unmerged checkpoint: nothing is merged into it", path=merged)
    if value.get("record_version") != _VERSION:
        raise FormatError(
            "a record of an unknown version",
            path=path,
            expected=f"record_version {_VERSION}",
            found=repr(value.get("record_version")),
        )
    try:
        return MergeRecord(
            path,
            tuple(AdapterRecord(str(e["blake3"]), float(e["scale"])) for e in value["adapters"]),
            str(value["options"]["dtype"]),
            {name: _tensor(entry) for name, entry in value["tensors"].items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FormatError(
            f"the record is malformed: {type(error).__name__}: {error}", path=path
        ) from error


def _tensor(entry: Mapping[str, Any]) -> TensorRecord:
    return TensorRecord(
        Action(entry["action"]),
        str(entry["digest"]),
        entry.get("base_digest"),
        "dequantised" in entry,
    )


def encode_record(
    *,
    adapters: Sequence[AdapterRecord],
    delta: str | None,
    restored: Sequence[RestoredTensor],
    digests: Mapping[str, str],
) -> bytes:
    """An unmerge's record: canonical JSON.

    Args:
        adapters: What was taken out, in the order in which it was merged.
        delta: The BLAKE3 digest of the delta file.
        restored: The tensors that were computed.
        digests: The digest of every tensor of the output.
    """
    found = {each.name: asdict(each) for each in restored}
    tensors = {
        name: {
            "digest": digest,
            **{key: value for key, value in found.get(name, {}).items() if key != "name"},
        }
        for name, digest in digests.items()
    }
    record = {
        "boneconv": __version__,
        "workflow": "unmerge",
        "record_version": _VERSION,
        "numerics": "canonical",
        "digest": "blake3-1MiB",
        "adapters": [{"blake3": each.digest, "scale": each.scale} for each in adapters],
        "delta": delta,
        "tensors": tensors,
    }
    return (json.dumps(record, indent=1, sort_keys=True) + "\n").encode()
