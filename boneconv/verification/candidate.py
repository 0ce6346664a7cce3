"""Opening what is to be verified, however broken it is: headers only.

A base that contradicts itself is an error of the input. A candidate that does is what a
verification is for: what is wrong is noted, and the rest is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from boneconv.config import CONFIG_NAME
from boneconv.engine.plan import RECORD_NAME
from boneconv.errors import BoneconvError, FormatError, InputError, MissingPathError, listing
from boneconv.formats import says_native
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.pth import PTH_SUFFIXES
from boneconv.io.safetensors import StoredTensor, Tensor, read_header
from boneconv.strict_json import read_object
from boneconv.verification.report import CandidateKind, FileReport, Status

__all__ = ["Candidate", "kind_of_candidate", "open_candidate", "read_record"]

_INDEXES = ("*.safetensors.index.json", "*.safetensors.index.*.json")
_WHOLE = ("model.safetensors", "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True)
class Candidate:
    """A merged checkpoint.

    Attributes:
        path: Its folder or file.
        kind: ``checkpoint`` or ``file``.
        tensors: Its tensors by name.
        file_of: The weight file that holds each.
        record: What boneconv.json says; empty where there is none.
        files: What was found about its weight files and index.
        index_name: The name of its index, where there is one.
    """

    path: Path
    kind: CandidateKind
    tensors: Mapping[str, Tensor]
    file_of: Mapping[str, str]
    record: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[FileReport, ...] = ()
    index_name: str | None = None


def kind_of_candidate(path: Path, base_names: frozenset[str]) -> CandidateKind:
    """What a candidate is, from its files' names and headers.

    Raises:
        MissingPathError: There is nothing at the path.
        FormatError: It is nothing that can be verified.
    """
    if not path.exists():
        raise MissingPathError("no such file or folder", path=path)
    if path.is_file():
        return _kind_of_file(path, base_names)
    has_weights = _indexes(path) or any((path / name).is_file() for name in _WHOLE)
    if has_weights:
        return CandidateKind.CHECKPOINT
    if (path / CONFIG_NAME).is_file():
        return _kind_of_adapter(path / CONFIG_NAME)
    if says_native(path):
        return CandidateKind.ADAPTER
    if any(path.glob("*.onnx")) or any(path.glob("onnx/*.onnx")):
        return CandidateKind.ONNX
    if any(path.glob("*.safetensors")):
        return CandidateKind.CHECKPOINT
    if any(path.glob("*.pth")):
        return CandidateKind.ADAPTER
    raise FormatError(
        "nothing that can be verified",
        path=path,
        expected="safetensors weights, an ONNX graph or an adapter",
        found=listing([child.name for child in path.iterdir()]) or "an empty folder",
    )


def _kind_of_file(path: Path, base_names: frozenset[str]) -> CandidateKind:
    if path.suffix == ".onnx":
        return CandidateKind.ONNX
    if path.suffix not in (".safetensors", *PTH_SUFFIXES):
        raise FormatError(
            "nothing that can be verified",
            path=path,
            expected="a name that ends in .safetensors, .pth or .onnx",
        )
    if says_native(path):
        return CandidateKind.ADAPTER
    if base_names & open_checkpoint(path).tensors.keys():
        return CandidateKind.FILE
    if (path.parent / CONFIG_NAME).is_file():
        return _kind_of_adapter(path.parent / CONFIG_NAME)
    return CandidateKind.ADAPTER if path.suffix in PTH_SUFFIXES else CandidateKind.FILE


def _kind_of_adapter(config: Path) -> CandidateKind:
    is_lora = str(read_object(config).get("peft_type", "")).upper() == "LORA"
    return CandidateKind.LORA if is_lora else CandidateKind.ADAPTER


def read_record(path: Path) -> Mapping[str, Any]:
    """What boneconv.json, in a folder or beside a file, says; empty where there is none.

    Raises:
        FormatError: It is no JSON object.
    """
    place = path / RECORD_NAME if path.is_dir() else path.with_name(f"{path.name}.{RECORD_NAME}")
    return read_object(place) if place.is_file() else {}


def open_candidate(path: Path, kind: CandidateKind) -> Candidate:
    """Reads the headers of a merged checkpoint or file.

    Raises:
        FormatError: A single file is malformed, or a folder's index cannot be read.
    """
    record = read_record(path)
    if kind is CandidateKind.FILE:
        found = open_checkpoint(path)
        names = dict.fromkeys(found.tensors, path.name)
        return Candidate(path, kind, found.tensors, names, record)
    indexes = _indexes(path)
    if not indexes:
        files = [path / name for name in _WHOLE if (path / name).is_file()][:1]
        opened = _Opened(path)
        for file in files or sorted(path.glob("*.safetensors")):
            opened.add(file.name)
        return opened.candidate(record, None)
    index = read_object(indexes[0])
    listed = index.get("weight_map")
    if not isinstance(listed, dict):
        raise FormatError("the index has no weight_map", path=indexes[0])
    opened = _Opened(path)
    for name in sorted({str(name) for name in listed.values()}):
        opened.add(name)
    opened.check_index(indexes[0].name, listed)
    for spare in indexes[1:]:
        opened.note(spare.name, "a second index: loaders disagree on which one holds")
    return opened.candidate(record, indexes[0].name)


def _indexes(folder: Path) -> list[Path]:
    return sorted(place for pattern in _INDEXES for place in folder.glob(pattern))


class _Opened:
    """Weight files of a folder, as they are opened."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._tensors: dict[str, StoredTensor] = {}
        self._file_of: dict[str, str] = {}
        self._files: list[FileReport] = []

    def add(self, name: str) -> None:
        """Opens a weight file; one that cannot be opened is noted."""
        if PurePosixPath(name).name != name or "\\" in name:
            self.note(name, "the index points outside its folder")
            return
        try:
            shard = read_header(self._root / name)
        except (InputError, BoneconvError) as error:
            self.note(name, f"cannot be read: {error.message}")
            return
        twice = sorted(shard.tensors.keys() & self._tensors.keys())
        if twice:
            self.note(name, f"holds tensors that another file holds too: {listing(twice)}")
        else:
            self._files.append(FileReport(name, Status.PASS))
        for tensor_name, tensor in shard.tensors.items():
            self._tensors.setdefault(tensor_name, tensor)
            self._file_of.setdefault(tensor_name, name)

    def check_index(self, name: str, listed: Mapping[str, Any]) -> None:
        """Holds the index against the files."""
        wrong = [tensor for tensor, file in listed.items() if self._file_of.get(tensor) != file]
        unlisted = [tensor for tensor in self._tensors if tensor not in listed]
        if wrong:
            self.note(name, f"names tensors that their files do not hold: {listing(wrong)}")
        elif unlisted:
            self.note(name, f"does not name tensors of its files: {listing(unlisted)}")
        else:
            self._files.append(FileReport(name, Status.PASS))

    def note(self, name: str, reason: str) -> None:
        """Notes a file that is not as it should be."""
        self._files.append(FileReport(name, Status.FAIL, reason))

    def candidate(self, record: Mapping[str, Any], index_name: str | None) -> Candidate:
        """What was opened."""
        return Candidate(
            self._root,
            CandidateKind.CHECKPOINT,
            self._tensors,
            self._file_of,
            record,
            tuple(self._files),
            index_name,
        )
