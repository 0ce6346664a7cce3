"""Strict and canonical JSON, as the Bone Adapter Format 1.0 defines them (section 4.3).

Strict: UTF-8, one object, at most 16 levels deep, no key twice, no half of a surrogate pair,
integers below 2^53 in magnitude, fractions that are written without an exponent. Canonical: keys
sorted by code point, no space between tokens, no escape that is not needed, the fewest digits.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from boneconv.errors import ConfigError
from boneconv.strict_json import no_constant, unique_keys

__all__ = ["LARGEST_INTEGER", "MAX_DEPTH", "encode", "parse", "spelled"]

MAX_DEPTH = 16
#: Every JSON library holds integers up to this one exactly.
LARGEST_INTEGER = 2**53 - 1

#: A text that does not end is one token too: to try again from each quote in it takes forever.
_TOKENS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def parse(text: bytes) -> dict[str, Any]:
    """The object that a strict JSON text holds; ValueError says what is not strict about it."""
    if text[:1] != b"{":
        raise ValueError("it does not begin with {")
    _check_depth(text)
    try:
        decoded = text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("its bytes are not UTF-8") from error
    value: dict[str, Any] = json.loads(
        decoded,
        object_pairs_hook=unique_keys,
        parse_constant=no_constant,
        parse_int=_integer,
        parse_float=_fraction,
    )
    try:
        spelled(value).encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError("an escape is half of a surrogate pair") from error
    return value


def encode(value: Any) -> str:
    """The canonical text of a JSON value.

    Raises:
        ConfigError: The value holds a number that canonical JSON cannot write: not finite, an
            integer of 2^53 or more, a fraction below 0.0001 in magnitude.
    """
    text = spelled(_plain(value))
    try:
        parse(f'{{"value":{text}}}'.encode())
    except ValueError as error:
        raise ConfigError(f"the metadata cannot be written: {error}") from error
    return text


def spelled(value: Any) -> str:
    """The canonical text of a value that came from `parse`."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _plain(value: Any) -> Any:
    """The value with integral floats as integers, and tuples as lists."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _check_depth(text: bytes) -> None:
    depth = 0
    for match in _TOKENS.finditer(text):
        first = match[0][:1]
        if first in (b"[", b"{"):
            depth += 1
            if depth > MAX_DEPTH:
                raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")
        elif first != b'"':
            depth -= 1


def _integer(text: str) -> int:
    if len(text) > 17 or abs(int(text)) > LARGEST_INTEGER:
        raise ValueError(f"the integer {text[:40]} is 2^53 or more in magnitude")
    return int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if "e" in text.lower():
        raise ValueError(f"the number {text[:40]} has an exponent")
    if math.isinf(value) or value.is_integer():
        raise ValueError(f"the number {text[:40]} is written as a fraction and is none")
    return value
