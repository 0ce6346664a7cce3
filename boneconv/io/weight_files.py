"""Files of a model's folder by their names: which hold weights, which belong to which index."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path, PurePosixPath

__all__ = [
    "files_below",
    "holds_weights",
    "in_weight_folder",
    "index_of",
    "is_weight_copy",
    "safetensors_name",
    "single_of",
]

#: Files and folders that hold a model's weights in some form. Those that the plan does not write
#: are left out of a merged folder, since they would hold the unmerged weights.
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.safetensors.index.*.json",
    "*.bin",
    "*.bin.index.json",
    "*.bin.index.*.json",
    "*.pt",
    "*.pth",
    "*.ckpt",
    "*.h5",
    "*.msgpack",
    "*.gguf",
    "*.ggml",
    "*.onnx",
    "*.onnx_data",
    "*.onnx.data",
    "*.tflite",
    "*.mlmodel",
    "*.ot",
)
_WEIGHT_FOLDERS = ("onnx", "original", "openvino", "coreml")
_NOT_THE_MODEL = (".git", ".cache", "__pycache__", ".gitattributes")

_SINGLE = re.compile(r"(?P<stem>model|diffusion_pytorch_model)\.(?P<variant>\w+)\.safetensors")
_INDEX = re.compile(r"(?P<stem>.+)\.(?P<kind>safetensors|bin)\.index(?:\.(?P<variant>\w+))?\.json")
_TORCH = re.compile(r"(?P<stem>.+)\.bin(?P<index>\.index(?:\.\w+)?\.json)?")


def is_weight_copy(name: PurePosixPath) -> bool:
    """Whether a file of a model folder holds weights, in whatever form."""
    return in_weight_folder(name) or any(
        fnmatch.fnmatch(name.name, pattern) for pattern in _WEIGHTS
    )


def in_weight_folder(name: PurePosixPath) -> bool:
    """Whether a file lies below a folder that holds other forms of the weights, as ``onnx/``."""
    return any(part in _WEIGHT_FOLDERS for part in name.parts[:-1])


def holds_weights(folder: Path) -> bool:
    """Whether a folder holds a weight file, in whatever form, right in it."""
    return folder.is_dir() and any(is_weight_copy(PurePosixPath(p.name)) for p in folder.iterdir())


def index_of(single: str) -> str:
    """The index that goes with a model's name in one file.

    A variant stands before the last dot of every name: ``diffusion_pytorch_model.fp16.safetensors``
    goes with ``diffusion_pytorch_model.safetensors.index.fp16.json``.
    """
    match = _SINGLE.fullmatch(single)
    if match is None:
        return f"{single}.index.json"
    return f"{match['stem']}.safetensors.index.{match['variant']}.json"


def single_of(index: str) -> str:
    """The name in one file of the model that an index is for; the reverse of `index_of`."""
    match = _INDEX.fullmatch(index)
    assert match is not None, index
    variant = "" if match["variant"] is None else f".{match['variant']}"
    return f"{match['stem']}{variant}.{match['kind']}"


def safetensors_name(name: str) -> str:
    """What a weight file or an index of torch's is called as safetensors; other names as they are.

    ``pytorch_model-00001-of-00002.bin`` becomes ``model-00001-of-00002.safetensors``.
    """
    match = _TORCH.fullmatch(name)
    if match is None:
        return name
    stem = match["stem"]
    if stem.startswith("pytorch_model"):
        stem = stem.removeprefix("pytorch_")
    return f"{stem}.safetensors{match['index'] or ''}"


def files_below(
    root: Path, *, without: Collection[str] = ()
) -> Iterator[tuple[PurePosixPath, bool]]:
    """Every file below a folder, and every linked folder, which is not entered.

    Args:
        root: The folder.
        without: Folders right in it that are passed over.

    Yields:
        The path relative to the folder, and whether it is a linked folder.
    """
    for folder, folders, names in os.walk(root, followlinks=False):
        here = PurePosixPath(Path(folder).relative_to(root).as_posix())
        passed = without if here == PurePosixPath() else ()
        folders[:] = sorted(n for n in folders if n not in _NOT_THE_MODEL and n not in passed)
        for name in folders:
            if (Path(folder) / name).is_symlink():
                yield here / name, True
        for name in sorted(names):
            if name not in _NOT_THE_MODEL:
                yield here / name, False
