"""JSON from strangers: what is refused, and that every refusal names the file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.errors import FormatError, MissingPathError
from boneconv.strict_json import MAX_BYTES, parse_object, read_object

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(st.text(), VALUES, max_size=5), st.booleans())
def test_it_reads_what_json_writes(value: dict[str, Any], ascii_only: bool) -> None:
    assert parse_object(json.dumps(value, ensure_ascii=ascii_only).encode(), "x") == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "not a JSON file"),
        (b"{", "not a JSON file"),
        (b"{} {}", "not a JSON file"),
        (b"{'a': 1}", "not a JSON file"),
        (b"\xef\xbb\xbf{}", "not a JSON file"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"{\x00}", "not a JSON file"),
        (b'{"a": 1, "b": 2, "a": 1}', "the key 'a' stands twice"),
        (b'{"deep": [{"a": 1, "a": 2}]}', "the key 'a' stands twice"),
        (b'{"a": NaN}', "NaN is not JSON"),
        (b'{"a": [Infinity]}', "Infinity is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b'{"a": 1e999}', "1e999"),
        (b'{"a": -1e999}', "-1e999"),
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\uDFFF": 1}', "surrogate"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON file"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[1]", "not a JSON object; expected {...}, found list"),
        (b"null", "not a JSON object"),
        (b'"text"', "not a JSON object"),
    ],
)
def test_it_refuses(text: bytes, says: str) -> None:
    with pytest.raises(FormatError) as caught:
        parse_object(text, "some/file.json")
    assert says in str(caught.value)
    assert str(caught.value).startswith("some/file.json: ")
    assert len(str(caught.value)) < 1000


def test_a_pair_of_surrogates_is_one_character() -> None:
    assert parse_object(b'{"a": "\\ud83d\\ude00"}', "x") == {"a": "\U0001f600"}


def test_a_repeated_key_cannot_forge_a_line_of_the_message() -> None:
    with pytest.raises(FormatError) as caught:
        parse_object(b'{"\\nError: all is well": 1, "\\nError: all is well": 2}', "x")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(FormatError, match="too large; expected at most 67108864 bytes"):
        read_object(path)


def test_the_cap_counts_the_last_byte(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(b'{"a":1}')
    assert read_object(path, max_bytes=7) == {"a": 1}
    with pytest.raises(FormatError, match="too large"):
        read_object(path, max_bytes=6)


def test_a_file_that_is_not_there_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match=r"none\.json"):
        read_object(tmp_path / "none.json")
