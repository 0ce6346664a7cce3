"""JSON that comes from strangers: no duplicate keys, nothing that parsers disagree about.

Size, nesting and numbers are bounded, so that whoever works on the values need not be on guard.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any, NoReturn

from boneconv.errors import FormatError, MissingPathError, printable

__all__ = [
    "MAX_BYTES",
    "MAX_DEPTH",
    "no_constant",
    "parse_object",
    "read_object",
    "unique_keys",
]

#: The largest configuration or index file that is read: a 2 TB checkpoint's index is below 1 MB.
MAX_BYTES = 64 * 1024 * 1024

#: How deep objects and lists may be nested: far below where recursion ends, wherever it starts.
MAX_DEPTH = 128

#: No float64 has more digits before its point.
_LONGEST_INTEGER = 310


def read_object(path: Path, *, max_bytes: int = MAX_BYTES) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        MissingPathError: There is no such file.
        FormatError: The file is too large, is not UTF-8 or is not one JSON object, repeats a key,
            is nested too deeply, or holds NaN, infinity, a number beyond float64 or half a
            surrogate pair.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise MissingPathError("no such file", path=path) from error
    if size > max_bytes:
        raise FormatError(
            "the JSON file is too large",
            path=path,
            expected=f"at most {max_bytes} bytes",
            found=f"{size} bytes",
        )
    return parse_object(path.read_bytes(), path)


def parse_object(text: bytes, path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in some bytes that were read from ``path``; raises as `read_object` does."""
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=unique_keys,
            parse_constant=no_constant,
            parse_float=_finite,
            parse_int=_integer,
        )
        _refuse_nesting(value)
        if b"\\u" in text:
            _refuse_lone_surrogates(value)
    except UnicodeDecodeError as error:
        raise FormatError("not a JSON file: its bytes are not UTF-8", path=path) from error
    except RecursionError as error:
        raise FormatError("the JSON is nested too deeply", path=path) from error
    except ValueError as error:
        raise FormatError(f"not a JSON file: {printable(str(error))}", path=path) from error
    if not isinstance(value, dict):
        raise FormatError(
            "not a JSON object", path=path, expected="{...}", found=type(value).__name__
        )
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object from its members, for a parser; ValueError where a key stands twice."""
    result = dict(pairs)
    if len(result) != len(pairs):
        repeated, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {repeated!r} stands twice")
    return result


def no_constant(name: str) -> NoReturn:
    """Refuses NaN and infinity with a ValueError, for a parser."""
    raise ValueError(f"{name} is not JSON")


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"{number[:40]} is beyond the largest number")
    return value


def _integer(number: str) -> int:
    if len(number) > _LONGEST_INTEGER or math.isinf(float(number)):
        raise ValueError(f"{number[:40]} is beyond the largest number")
    return int(number)


def _refuse_nesting(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, dict | list)
        ]
        if not level:
            return
    raise RecursionError


def _refuse_lone_surrogates(value: Any) -> None:
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("an escape is half of a surrogate pair") from error
