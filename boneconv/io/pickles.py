"""Tensors out of torch's own files (``.bin``, ``.pth``), never by running code.

``weights_only=True`` restricts the unpickler to tensors and plain containers. torch is imported
only when such a file is read.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boneconv.dtypes import BF16
from boneconv.errors import FormatError, MissingPathError, listing
from boneconv.io.archive_check import check_archive
from boneconv.io.files import machine_errors
from boneconv.io.safetensors import ArrayTensor

__all__ = ["load_mapped", "read_torch_file", "to_numpy"]

#: What `torch.save` wrote before torch 1.6 begins with: a pickled number. Such a file has no places
#: that tensors could be read from one by one.
_LEGACY = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."


def read_torch_file(path: Path) -> dict[str, ArrayTensor]:
    """The tensors of a state dict that ``torch.save`` wrote, mapped rather than loaded.

    Raises:
        MissingPathError: There is no such file.
        FormatError: The file is damaged, holds anything but tensors, or a dtype that cannot be
            merged.
    """
    return {
        str(name): ArrayTensor(str(name), to_numpy(value, f"{path}: {listing([str(name)])}"))
        for name, value in load_mapped(path).items()
    }


def load_mapped(path: Path) -> Mapping[Any, Any]:
    """The dict in a file of torch's, its tensors mapped; raises as `read_torch_file`."""
    import torch

    if not path.is_file():
        raise MissingPathError("no such file", path=path)
    _refuse_legacy(path)
    check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise FormatError(
            "refused: the file holds more than tensors, and reading that could run code",
            path=path,
            hint="Save it as safetensors with the library that made it",
        ) from error
    except Exception as error:
        raise FormatError(
            "not a torch file, or a damaged one", path=path, hint="Download or copy it again"
        ) from error
    if not isinstance(content, Mapping):
        raise FormatError("holds no state dict", path=path, found=type(content).__name__)
    if not all(isinstance(name, str) for name in content):
        raise FormatError("holds no state dict: a name is no text", path=path)
    return content


def _refuse_legacy(path: Path) -> None:
    with machine_errors(path), path.open("rb") as file:
        head = file.read(2 + len(_LEGACY))
    if head[:1] == b"\x80" and head[2:] == _LEGACY:
        raise FormatError(
            "a torch file as it was written before torch 1.6, which cannot be read in pieces",
            path=path,
            hint="Load it with torch.load(weights_only=True) and save it again with torch.save, or "
            "load the model and save it with save_pretrained, which writes safetensors",
        )


def to_numpy(value: Any, where: str) -> NDArray[Any]:
    """A torch tensor of a float dtype as a numpy array that shares its memory.

    Raises:
        FormatError: ``value`` is no tensor, or one of another dtype.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise FormatError("expected a tensor", path=where, found=type(value).__name__)
    if value.layout != torch.strided or value.is_meta:
        raise FormatError(
            "not a dense tensor", path=where, found="no values" if value.is_meta else value.layout
        )
    value = value.detach().contiguous()
    if value.dtype == torch.bfloat16:
        return np.asarray(value.view(torch.uint16).numpy()).view(BF16)
    if value.dtype not in (torch.float16, torch.float32, torch.float64):
        raise FormatError("a dtype that cannot be merged", path=where, found=value.dtype)
    return np.asarray(value.numpy())
