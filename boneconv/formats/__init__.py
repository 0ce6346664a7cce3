"""The formats that hold Bone, BAT and mini adapters, and the one place that tells them apart."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from boneconv.adapter import NATIVE, Adapter
from boneconv.config import CONFIG_NAME
from boneconv.errors import BoneconvError, MissingPathError, NotABoneAdapterError
from boneconv.formats import native, peft, rwkv
from boneconv.io.hub import ADAPTER, locate
from boneconv.io.safetensors import read_header
from boneconv.strict_json import read_object

__all__ = ["FORMATS", "detect", "load_adapter", "read_adapter", "says_native"]


def _read_peft(path: Path) -> Adapter:
    folder = path if path.is_dir() else path.parent
    return peft.read(folder, None if path.is_dir() else path)


def _read_rwkv(path: Path) -> Adapter:
    return rwkv.read(rwkv.find(path) or path if path.is_dir() else path)


#: How each format is read, by the name that `detect` gives it.
FORMATS: dict[str, Callable[[Path], Adapter]] = {
    NATIVE: native.read,
    "peft": _read_peft,
    "rwkv": _read_rwkv,
}


def load_adapter(given: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter from a folder, a file or a Hub id ``owner/name[@revision]``.

    Tensor values stay on disk until they are read. Raises as `read_adapter`, or NetworkError.
    """
    return read_adapter(locate(given, ADAPTER).path)


def read_adapter(path: Path) -> Adapter:
    """Reads an adapter of any known format; tensor values stay on disk until they are needed.

    Args:
        path: A folder or a weights file. A native adapter's weights are complete by themselves;
            others have their configuration beside them.

    Raises:
        MissingPathError: There is nothing at the path.
        NotABoneAdapterError: It is no adapter, or one of another method.
        FormatError, ConfigError, NameMatchError, ShapeError: It breaks a rule of its format.
    """
    return FORMATS[detect(path)](path)


def detect(path: Path) -> str:
    """The format of an adapter, a key of `FORMATS`.

    Native is what says so, in the metadata of its safetensors file or in adapter_config.json. What
    has a configuration and does not say so is PEFT's; a safetensors file without one can only be
    native. A ``.pth`` file, or a folder that holds no more, is RWKV-PEFT's.

    Raises:
        MissingPathError: There is nothing at the path.
        NotABoneAdapterError: It cannot be an adapter.
    """
    if not path.exists():
        raise MissingPathError("no such file or folder", path=path)
    if path.is_file() and path.suffix == rwkv.SUFFIX:
        return "rwkv"
    folder = path if path.is_dir() else path.parent
    if says_native(path):
        return NATIVE
    if (folder / CONFIG_NAME).is_file():
        return NATIVE if _names_native_type(folder / CONFIG_NAME) else "peft"
    if (path / native.WEIGHTS_NAME).is_file() or path.suffix == ".safetensors":
        return NATIVE
    if path.is_dir() and rwkv.find(path) is not None:
        return "rwkv"
    raise NotABoneAdapterError(
        "not an adapter",
        path=path,
        expected=f"{CONFIG_NAME} beside the weights, a native adapter's safetensors file, or an "
        f"RWKV-PEFT {rwkv.SUFFIX}",
        hint="BASE comes first, ADAPTER second",
    )


def says_native(path: Path) -> bool:
    """Whether there is a safetensors file whose metadata are those of the native format."""
    weights = path / native.WEIGHTS_NAME if path.is_dir() else path
    try:
        return native.METADATA_KEY in read_header(weights).metadata
    except BoneconvError:
        return False


def _names_native_type(config: Path) -> bool:
    try:
        return read_object(config).get("peft_type") == native.NATIVE_TYPE
    except BoneconvError:
        return False
