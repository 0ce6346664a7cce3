"""The formats that hold Bone, BAT and mini adapters, and the one place that tells them apart."""

from __future__ import annotations

import os
from pathlib import Path

from boneconv.adapter import Adapter
from boneconv.config import CONFIG_NAME
from boneconv.errors import MissingPathError, NotABoneAdapterError
from boneconv.formats import peft
from boneconv.io.hub import ADAPTER, locate

__all__ = ["load_adapter", "read_adapter"]


def load_adapter(given: str | os.PathLike[str]) -> Adapter:
    """Reads an adapter from a folder, a file or a Hub id ``owner/name[@revision]``.

    Tensor values stay on disk until they are read. Raises as `read_adapter`, or NetworkError.
    """
    return read_adapter(locate(given, ADAPTER).path)


def read_adapter(path: Path) -> Adapter:
    """Reads an adapter of any known format; tensor values stay on disk until they are needed.

    Args:
        path: A folder, or a weights file with its configuration beside it.

    Raises:
        MissingPathError: There is nothing at the path.
        NotABoneAdapterError: It is no adapter, or one of another method.
        FormatError, ConfigError, ShapeError: It breaks a rule of its format.
    """
    if not path.exists():
        raise MissingPathError("no such file or folder", path=path)
    folder = path if path.is_dir() else path.parent
    if not (folder / CONFIG_NAME).is_file():
        raise NotABoneAdapterError(
            "not an adapter",
            path=path,
            expected=f"{CONFIG_NAME} beside the weights",
            hint="BASE comes first, ADAPTER second",
        )
    return peft.read(folder, None if path.is_dir() else path)
