"""A base checkpoint on disk: which files hold its weights, which lie beside them.

The index is trusted over the folder's listing: weight files that it does not name are stale copies
and are neither read nor carried over.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from boneconv.errors import FormatError, MissingPathError, NameMatchError, listing
from boneconv.io.links import check_inside
from boneconv.io.model_index import read_components
from boneconv.io.pth import PTH_SUFFIXES, locate_tensors
from boneconv.io.quantised import refusal
from boneconv.io.safetensors import SafetensorsFile, StoredTensor, read_header
from boneconv.io.weight_files import (
    files_below,
    holds_weights,
    is_weight_copy,
    safetensors_name,
    single_of,
)
from boneconv.strict_json import read_object

__all__ = ["ADAPTER_CONFIG", "Checkpoint", "open_checkpoint"]

_INDEX_SUFFIX = ".safetensors.index.json"
_VARIANT_INDEX = "*.safetensors.index.*.json"
_SINGLE_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
#: torch's files, which loaders take where those above are absent.
_TORCH_INDEX = "*pytorch_model*.bin.index.json"
_TORCH_VARIANT_INDEX = "*pytorch_model*.bin.index.*.json"
_TORCH_SINGLE = ("pytorch_model.bin", "diffusion_pytorch_model.bin")
_TORCH_VARIANT = "*pytorch_model.*.bin"

#: Without the adapter's weights beside it, it would make loaders look for them.
ADAPTER_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint of safetensors files, or of torch's; only headers have been read.

    Attributes:
        root: Its folder.
        shards: The weight files by name, relative to the folder.
        tensors: Every tensor by name, in shard order.
        shard_of: The shard that holds a tensor.
        index_name: The index's file name, where there is one.
        index: The index's content.
        single_file: Whether the checkpoint was given as one file, without a folder around it.
        side_files: The other files to carry over, relative to the folder.
        left_out: Other copies of the weights, and linked folders, relative to the folder.
    """

    root: Path
    shards: Mapping[str, SafetensorsFile]
    tensors: Mapping[str, StoredTensor]
    shard_of: Mapping[str, str]
    index_name: str | None = None
    index: Mapping[str, Any] = field(default_factory=dict)
    single_file: bool = False
    side_files: tuple[PurePosixPath, ...] = ()
    left_out: tuple[PurePosixPath, ...] = ()

    @property
    def config(self) -> Path | None:
        """The config.json beside the weights, where there is one."""
        path = self.root / "config.json"
        return path if path.is_file() else None

    def written_name(self, name: str) -> str:
        """What a weight file or the index is called in an output: a folder's are safetensors."""
        return name if self.single_file else safetensors_name(name)


def open_checkpoint(path: Path) -> Checkpoint:
    """Reads the headers of a checkpoint.

    Args:
        path: A folder, one ``.safetensors`` file, or one file of torch's (``.pth``). A folder's
            safetensors files come first; where there are none, ``pytorch_model.bin`` or the files
            that ``pytorch_model.bin.index.json`` names are read.

    Raises:
        MissingPathError: The path, or a shard that the index names, is not there.
        FormatError: A file is malformed or a link out of the folder, the index contradicts the
            shards or names a file outside the folder, or the folder holds no weights that can be
            read.
        NameMatchError: Two shards hold a tensor of one name.
    """
    if path.is_file():
        if path.suffix == ".gguf":
            raise refusal("gguf", path)
        return _build(path.parent, [path.name], None, {}, single_file=True)
    if not path.is_dir():
        raise MissingPathError("no such file or folder", path=path)
    _refuse_pipeline(path)
    index_path = _find_index(path)
    if index_path is None:
        return _build(path, [_single_weights(path)], None, {}, single_file=False)
    index = read_object(index_path)
    names = _shard_names(index, index_path)
    found = _build(path, names, index_path.name, index, single_file=False)
    _check_index(found, index_path)
    return found


def _refuse_pipeline(folder: Path) -> None:
    components = read_components(folder)
    if components is not None:
        known = [name for name in components if holds_weights(folder / name)] or list(components)
        raise FormatError(
            "this is a diffusers pipeline, not one checkpoint",
            path=folder,
            expected=f"a component: {listing(known)}" if known else None,
            hint="To merge into a component, pass --component; elsewhere, give its folder",
        )


def _find_index(folder: Path) -> Path | None:
    has_single = any((folder / name).is_file() for name in _SINGLE_NAMES)
    found = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if not found and not has_single:
        found = sorted(folder.glob(_VARIANT_INDEX))
    if not found and not has_single:
        found = sorted(folder.glob(_TORCH_INDEX))
        if not found and not any((folder / name).is_file() for name in _TORCH_SINGLE):
            found = sorted(folder.glob(_TORCH_VARIANT_INDEX))
    if len(found) > 1:
        raise FormatError(
            f"several weight indexes: {listing([p.name for p in found])}",
            path=folder,
            hint="Keep the one that belongs to the model",
        )
    if not found:
        return None
    single = folder / single_of(found[0].name)
    if single.exists() and single.name not in _shard_names(read_object(found[0]), found[0]):
        raise FormatError(
            f"holds both {single.name} and {found[0].name}, which does not name it",
            path=folder,
            hint="Loaders disagree on which of the two is the model; remove the stale one",
        )
    return found[0]


def _single_weights(folder: Path) -> str:
    for name in (*_SINGLE_NAMES, *_TORCH_SINGLE):
        if (folder / name).is_file():
            return name
    for pattern in ("*.safetensors", _TORCH_VARIANT):
        found = sorted(p.name for p in folder.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise FormatError(
                f"several {pattern.rpartition('.')[2]} files and no index: {listing(found)}",
                path=folder,
                expected=f"model.safetensors, or model{_INDEX_SUFFIX}",
            )
    others = sorted(p.name for p in folder.iterdir() if is_weight_copy(PurePosixPath(p.name)))
    if others and all(name.endswith(".gguf") for name in others):
        raise refusal("gguf", folder / others[0])
    raise FormatError(
        "holds no safetensors weights, and no pytorch_model.bin",
        path=folder,
        expected=f"model.safetensors, or model{_INDEX_SUFFIX} and its shards",
        found=listing(others) if others else "no weights",
        hint="Load the model and save it with save_pretrained, which writes safetensors"
        if others
        else None,
    )


def _shard_names(index: Mapping[str, Any], path: Path) -> list[str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError("the index has no weight_map", path=path)
    if not isinstance(index.get("metadata") or {}, dict):
        raise FormatError("the index's metadata is no object", path=path)
    for name in weight_map.values():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):  # noqa: PTH119
            raise FormatError(
                f"the index points outside its folder: {name!r}",
                path=path,
                expected="plain file names",
                hint="Do not use this checkpoint unless you trust where it came from",
            )
        suffix = Path(single_of(path.name)).suffix
        if "\\" in name or "\0" in name or not name.endswith(suffix):
            kind = "safetensors file" if suffix == ".safetensors" else f"{suffix} file"
            raise FormatError(f"the index names a file that is no {kind}: {name!r}", path=path)
    return sorted(set(weight_map.values()))


def _build(
    root: Path,
    names: Iterable[str],
    index_name: str | None,
    index: Mapping[str, Any],
    *,
    single_file: bool,
) -> Checkpoint:
    shards = {name: _open_shard(root / name) for name in names}
    tensors: dict[str, StoredTensor] = {}
    shard_of: dict[str, str] = {}
    for shard_name, shard in shards.items():
        for name, tensor in shard.tensors.items():
            if name in shard_of:
                raise NameMatchError(
                    f"the tensor {name!r} stands in two shards",
                    path=root,
                    found=f"{shard_of[name]} and {shard_name}",
                )
            tensors[name] = tensor
            shard_of[name] = shard_name
    own = {*shards, index_name}
    side_files, left_out = ([], []) if single_file else _other_files(root, own)
    if not single_file:
        for name in (*shards, index_name or ".", *map(str, side_files)):
            check_inside(root, root / name)
    return Checkpoint(
        root,
        shards,
        tensors,
        shard_of,
        index_name,
        index,
        single_file,
        tuple(side_files),
        tuple(left_out),
    )


def _open_shard(path: Path) -> SafetensorsFile:
    if path.suffix in PTH_SUFFIXES:
        return SafetensorsFile(path, locate_tensors(path), {}, 0)
    return read_header(path)


def _check_index(checkpoint: Checkpoint, path: Path) -> None:
    listed: dict[str, str] = checkpoint.index["weight_map"]
    absent = [name for name, shard in listed.items() if checkpoint.shard_of.get(name) != shard]
    if absent:
        raise FormatError(
            f"the index names tensors that their shards do not hold: {listing(absent)}",
            path=path,
            hint="Index and shards are of different versions; download both again",
        )


def _other_files(
    root: Path, own: set[str | None]
) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
    side_files: list[PurePosixPath] = []
    left_out: list[PurePosixPath] = []
    for path, is_link in files_below(root):
        if str(path) in own and not is_link:
            continue
        stays = is_link or is_weight_copy(path) or path.name == ADAPTER_CONFIG
        (left_out if stays else side_files).append(path)
    return side_files, left_out
