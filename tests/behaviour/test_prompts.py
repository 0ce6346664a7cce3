"""Prompts: a file of lines, a JSON list, the built-in set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from boneconv.behaviour.prompts import (
    BUILT_IN,
    MOST_PROMPTS,
    random_ids,
    random_images,
    read_prompts,
)
from boneconv.errors import FormatError, InputError, MissingPathError, UsageError


def test_without_a_file_the_built_in_set() -> None:
    found = read_prompts(None)
    assert (found.texts, found.origin) == (BUILT_IN, "built-in")
    joined = "".join(BUILT_IN)
    assert not joined.isascii()
    assert "def " in joined
    assert any(c.isdigit() for c in joined)


def test_a_prompt_a_line_without_empty_ones(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n\n  \ntwo \n\u4e09\n", encoding="utf-8")
    found = read_prompts(tmp_path / "p.txt")
    assert (found.texts, found.origin) == (("one", "two ", "\u4e09"), "file")


def test_a_json_list_may_hold_lines(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text(json.dumps(["a\nb", "[c]"]))
    assert read_prompts(tmp_path / "p.json").texts == ("a\nb", "[c]")


def test_a_text_file_may_begin_with_a_bracket(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("[INST] hello\n")
    assert read_prompts(tmp_path / "p.txt").texts == ("[INST] hello",)


@pytest.mark.parametrize(
    ("name", "content", "error"),
    [
        ("p.txt", b"\n \n", FormatError),
        ("p.txt", b"\xff\xfe\x00", FormatError),
        ("p.json", b'{"a": 1}', FormatError),
        ("p.json", b'["a", 1]', FormatError),
        ("p.json", b'["a", " "]', FormatError),
        ("p.json", b"[]", FormatError),
        ("p.json", b'["a"', FormatError),
        ("p.json", b'["a"], "x": [1]', FormatError),
        ("p.txt", b"line\n" * (MOST_PROMPTS + 1), UsageError),
    ],
)
def test_what_is_refused(
    tmp_path: Path, name: str, content: bytes, error: type[InputError]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error) as raised:
        read_prompts(tmp_path / name)
    assert raised.value.path == str(tmp_path / name)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError):
        read_prompts(tmp_path / "none.txt")


def test_made_inputs_are_the_same_on_every_call_and_within_their_range() -> None:
    for first, second in zip(random_ids(100), random_ids(100), strict=True):
        assert np.array_equal(first, second)
        assert first.min() >= 0
        assert first.max() < 100
    first, second = random_images((3, 4, 5))
    assert first.shape == (1, 3, 4, 5)
    assert not np.array_equal(first, second)
    assert np.array_equal(first, first.astype(np.float16))
