"""Adapters as PEFT 0.14 to 0.18 saved them: types BONE and MISS.

A folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``). Blocks are
named ``base_model.model.<module>.bone_block`` (``miss_block`` for MISS), everything else that was
saved is a whole parameter of the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from boneconv.adapter import Adapter, Block
from boneconv.config import CONFIG_NAME, BoneConfig
from boneconv.digest import same_values
from boneconv.errors import FormatError, MissingPathError, listing
from boneconv.formats.beside import tokenizer_files
from boneconv.io.pickles import read_torch_file
from boneconv.io.safetensors import Tensor, read_header
from boneconv.names import module_key

__all__ = ["SAFETENSORS_NAME", "read"]

SAFETENSORS_NAME = "adapter_model.safetensors"
BIN_NAME = "adapter_model.bin"

_SUFFIX = {"BONE": "bone_block", "MISS": "miss_block"}
#: Segments that PEFT puts into the names of a module that it saves as a whole: the trained one, and
#: the frozen one that it came from.
_TRAINED, _FROZEN = "modules_to_save", "original_module"
_BLOCK = re.compile(r"\.(?P<suffix>bone_block|miss_block)(?:\.[^.]+)?$")


def read(folder: Path, weights: Path | None = None) -> Adapter:
    """Reads an adapter folder.

    Args:
        folder: The folder that holds adapter_config.json.
        weights: The weights file, where the user named one.

    Raises:
        MissingPathError: The configuration or the weights are not there.
        NotABoneAdapterError, ConfigError, FormatError, ShapeError: As `read_adapter`.
    """
    config = BoneConfig.from_file(folder / CONFIG_NAME)
    weights = weights or _find_weights(folder)
    tensors: Mapping[str, Tensor]
    if weights.suffix == ".safetensors":
        tensors = read_header(weights).tensors
    else:
        tensors = read_torch_file(weights)
    blocks, saved = _sort_tensors(tensors, config, weights)
    return Adapter(
        folder,
        weights,
        "peft",
        config,
        blocks,
        saved,
        tokenizer_files(folder),
        may_add=config.modules_to_save or (),
    )


def _find_weights(folder: Path) -> Path:
    for name in (SAFETENSORS_NAME, BIN_NAME):
        if (folder / name).is_file():
            return folder / name
    raise MissingPathError(
        "the adapter's weights are missing", path=folder, expected=SAFETENSORS_NAME
    )


def _sort_tensors(
    tensors: Mapping[str, Tensor], config: BoneConfig, path: Path
) -> tuple[dict[str, Block], dict[str, Tensor]]:
    blocks: dict[str, Block] = {}
    saved: dict[str, Tensor] = {}
    foreign = []
    for key, tensor in _without_copies(tensors).items():
        match = _BLOCK.search(key)
        name = module_key(key if match is None else key[: match.start()])
        if match is not None and match["suffix"] != _SUFFIX[config.peft_type]:
            foreign.append(key)
        elif name in (saved if match is None else blocks):
            raise FormatError(f"two tensors for {name!r}", path=path)
        elif match is None:
            saved[name] = tensor
        else:
            rank, mini_rank = config.r, config.mini_r
            blocks[name] = Block(name, config.variant, config.axis, tensor, rank, mini_rank)
    if foreign:
        raise FormatError(
            f"its tensors do not belong to peft_type {config.peft_type}: {listing(foreign)}",
            path=path,
            expected=f"names that end in .{_SUFFIX[config.peft_type]}",
        )
    return blocks, saved


def _without_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the copies that PEFT writes of a saved embedding.

    Where the vocabulary was resized, PEFT 0.18 writes an embedding of ``modules_to_save`` three
    times: under its own name, which is what it loads, with the same values under
    ``<module>.modules_to_save``, and untrained under ``<module>.original_module``.
    """
    trained: dict[str, dict[bool, Tensor]] = {}
    for key, tensor in tensors.items():
        segments = key.split(".")
        if _FROZEN not in segments:
            trained.setdefault(module_key(key), {})[_TRAINED in segments] = tensor

    def is_copy(key: str, tensor: Tensor) -> bool:
        segments, others = key.split("."), trained.get(module_key(key), {})
        if _FROZEN in segments:
            return bool(others)
        return _TRAINED in segments and False in others and same_values(tensor, others[False])

    return {key: tensor for key, tensor in tensors.items() if not is_copy(key, tensor)}
