"""Adapters as RWKV-PEFT saves them: a ``.pth`` state dict and nothing else.

Blocks are named ``<module>.bone``, in newer versions ``<module>.disha``; everything else in the
file replaces the base's tensor of that name. There is no configuration: two dimensions are a Bone
block ``[r, out]``, three a BAT block ``[in / r, r, r]``, which RWKV-PEFT runs along the input axis
(its ``merge_bone.py`` and ``merge_disha.py``):

    Bone  W'[:, j] = W[:, j] + B[j mod r, :]
    BAT   W'[a][b] = W[a][b] + W[a][b] @ B[b] + B[b]        (W in r x r tiles)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from boneconv.adapter import Adapter, Block
from boneconv.config import Axis, BoneConfig, Variant
from boneconv.errors import FormatError, NotABoneAdapterError, UsageError, listing
from boneconv.formats.writing import TensorFile, describe
from boneconv.io.pickles import read_torch_file
from boneconv.io.safetensors import Tensor
from boneconv.names import module_key

__all__ = ["SUFFIX", "find", "read", "write"]

#: The file name's end by which such an adapter is known.
SUFFIX = ".pth"

_BLOCK = re.compile(r"(?P<module>.+)\.(?P<key>bone|disha)")
_NEWEST_KEY = "disha"


def find(folder: Path) -> Path | None:
    """The one ``.pth`` file of a folder; None where there is none.

    Raises:
        FormatError: There are several.
    """
    found = sorted(path for path in folder.glob(f"*{SUFFIX}") if path.is_file())
    if len(found) > 1:
        raise FormatError(
            f"holds several {SUFFIX} files: {listing([path.name for path in found])}",
            path=folder,
            hint="Give the path of the one to use",
        )
    return found[0] if found else None


def read(path: Path) -> Adapter:
    """Reads an adapter file; its tensors are mapped, and no code in it is run.

    Raises:
        MissingPathError: There is no such file.
        NotABoneAdapterError: It holds no ``.bone`` and no ``.disha`` tensor.
        FormatError, ShapeError: Its blocks contradict each other, or are of the layout
            ``[out, r]`` that RWKV-PEFT used before September 2024.
    """
    found: dict[str, Tensor] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in read_torch_file(path).items():
        match = _BLOCK.fullmatch(key)
        home = saved if match is None else found
        name = module_key(key if match is None else match["module"])
        if name in home:
            raise FormatError(f"two tensors for {name!r}", path=path)
        home[name] = tensor
    if not found:
        raise NotABoneAdapterError(
            "not a Bone adapter of RWKV-PEFT",
            path=path,
            expected="tensors named <module>.bone or <module>.disha",
            found=listing(list(saved)[:3]) if saved else "no tensors",
            hint="BASE comes first, ADAPTER second",
        )
    variant, rank = _variant(found, path), _rank(found, path)
    axis = Axis.IN if variant is Variant.BAT else Axis.OUT
    config = BoneConfig(inference_mode=True, r=rank, init_weights=_init_weights(variant), axis=axis)
    blocks = {name: Block(name, variant, axis, tensor, rank) for name, tensor in found.items()}
    return Adapter(path, path, "rwkv", config, blocks, saved)


def write(adapter: Adapter, path: Path) -> None:
    """Writes an adapter as a ``.pth`` file, a tensor at a time, and reads it back.

    Blocks keep the key that an RWKV-PEFT file gave them; others get ``.disha``.

    Raises:
        UsageError: RWKV-PEFT has no such adapters: BAT over the output axis, mini, several ranks,
            a strength of its own.
        FormatError: A tensor has a dtype that a ``.pth`` file does not hold.
        MachineError: The file cannot be written, or reads back differently.
    """
    _check_fits(adapter)
    tensors = {_key(adapter, block): block.tensor for block in adapter.blocks.values()}
    tensors |= adapter.saved
    with TensorFile(path, describe(tensors), pth=True) as file:
        for name, tensor in tensors.items():
            file.copy(name, tensor)
    file.check()


def _variant(found: Mapping[str, Tensor], path: Path) -> Variant:
    dimensions = {len(tensor.shape) for tensor in found.values()}
    if dimensions == {2}:
        return Variant.BONE
    if dimensions == {3}:
        return Variant.BAT
    raise FormatError(
        "its blocks are not all Bone or all BAT",
        path=path,
        expected="2 dimensions (Bone) or 3 (BAT) throughout",
        found=", ".join(map(str, sorted(dimensions))),
    )


def _rank(found: Mapping[str, Tensor], path: Path) -> int:
    """The one rank of all blocks, which their shapes give."""
    shapes = {tensor.shape for tensor in found.values()}
    ranks = {shape[-1] if len(shape) == 3 else shape[0] for shape in shapes}
    looks_old = all(len(shape) == 2 and shape[0] > shape[1] for shape in shapes)
    if len(ranks) > 1 or looks_old:
        raise FormatError(
            "its blocks do not have one rank",
            path=path,
            expected="[r, out] with one r, or [in / r, r, r]",
            found=", ".join(map(str, sorted(map(list, shapes))[:4])),
            hint="The layout [out, r] of RWKV-PEFT before September 2024 is not supported"
            if all(len(shape) == 2 for shape in shapes)
            else None,
        )
    rank = ranks.pop()
    if rank == 0:
        raise FormatError("its blocks are empty", path=path)
    return rank


def _init_weights(variant: Variant) -> bool | str:
    return True if variant is Variant.BONE else str(variant)


def _key(adapter: Adapter, block: Block) -> str:
    own = _BLOCK.fullmatch(block.tensor.name) if adapter.format == "rwkv" else None
    return f"{block.module}.{own['key'] if own else _NEWEST_KEY}"


def _check_fits(adapter: Adapter) -> None:
    ranks = sorted({block.rank for block in adapter.blocks.values()})
    wrong = None
    if adapter.config.variant is Variant.MINI:
        wrong = "mini exists in PEFT's MiSS alone"
    elif any(b.variant is Variant.BAT and b.axis is Axis.OUT for b in adapter.blocks.values()):
        wrong = "RWKV-PEFT applies BAT over the input axis, this adapter is over the output axis"
    elif len(ranks) > 1:
        wrong = f"RWKV-PEFT has one rank for all modules, this adapter has {ranks}"
    elif adapter.scale != 1.0:
        wrong = f"RWKV-PEFT has no strength, this adapter has {adapter.scale:g}"
    elif not adapter.blocks:
        wrong = "the adapter has no blocks, only replaced tensors"
    if wrong is not None:
        raise UsageError(
            wrong, path=adapter.path, hint="Convert it to native, or merge it with boneconv merge"
        )
