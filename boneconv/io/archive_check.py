"""Whether a file of torch's is what ``torch.save`` writes of a state dict, before torch reads it.

torch unpacks what is compressed, and its unpickler, which runs no code, still makes buffers of any
size and objects that take forever to hash. A state dict needs nothing of that.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import zipfile
from pathlib import Path
from typing import Any

from boneconv.errors import FormatError

__all__ = ["MAX_PICKLE", "check_archive"]

#: The largest pickle that is read: that of a state dict takes some 200 bytes per tensor.
MAX_PICKLE = 64 * 1024 * 1024

#: No tuple of a state dict has more parts, all levels counted: most are shapes.
_LARGEST_TUPLE = 1000

_PICKLE = re.compile(r"[^/]+/data\.pkl")
_GLOBALS = re.compile(
    r"collections OrderedDict"
    r"|torch\._utils _rebuild_(tensor_v2|tensor_v3|parameter|parameter_with_state)"
    r"|torch (\w+Storage|float\w+|bfloat16|u?int\w+|bool)"
    r"|torch\.storage (UntypedStorage|TypedStorage)"
)
_MARK = -1


def check_archive(path: Path) -> None:
    """Checks an archive's directory and its pickle; reads no tensor.

    Raises:
        FormatError: It is no archive, is compressed, or its pickle makes anything but dicts,
            tensors and what they consist of.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            packed = [e for e in entries if e.compress_type or e.file_size != e.compress_size]
            pickles = [e for e in entries if _PICKLE.fullmatch(e.filename)]
            large = any(e.file_size > MAX_PICKLE for e in pickles)
            if packed or large or len(pickles) != 1:
                raise FormatError(
                    "not an archive that torch.save wrote",
                    path=path,
                    expected=f"stored entries, and one data.pkl of at most {MAX_PICKLE} bytes",
                    found="compressed entries" if packed else f"{len(pickles)} of them",
                )
            text = archive.read(pickles[0])
    except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
        raise FormatError(
            "not a torch file, or a damaged one", path=path, hint="Download or copy it again"
        ) from error
    try:
        _walk(text)
    except pickle.UnpicklingError as error:
        raise FormatError(
            f"refused: {error}",
            path=path,
            hint="Save it as safetensors with the library that made it",
        ) from error
    except (ValueError, LookupError) as error:
        raise FormatError(
            "not a torch file, or a damaged one", path=path, hint="Download or copy it again"
        ) from error


def _walk(text: bytes) -> None:
    """Follows a pickle without making anything: each object is the number of its parts."""
    stack: list[int] = []
    memo: dict[Any, int] = {}
    last: list[str] = []
    for code, argument, _ in pickletools.genops(text):
        name = code.name
        if name in ("GLOBAL", "STACK_GLOBAL", "INST"):
            found = str(argument) if name != "STACK_GLOBAL" else " ".join(last[-2:])
            if name == "INST" or not _GLOBALS.fullmatch(found):
                raise pickle.UnpicklingError(
                    f"the file holds more than tensors ({found[:80]!r}), and reading that could "
                    "run code"
                )
        if "UNICODE" in name:
            last = [*last[-1:], str(argument)]
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(_MARK)
        else:
            _apply(code, stack)


def _apply(code: pickletools.OpcodeInfo, stack: list[int]) -> None:
    before, parts = len(code.stack_before), 0
    if pickletools.markobject in code.stack_before:
        while (top := stack.pop()) != _MARK:
            parts += top
        before = code.stack_before.index(pickletools.markobject)
    for _ in range(before):
        parts += stack.pop()
    if "TUPLE" in code.name and parts > _LARGEST_TUPLE:
        raise pickle.UnpicklingError("the file holds tuples that no state dict has")
    stack.extend([parts + 1 if "TUPLE" in code.name else 1] * len(code.stack_after))
