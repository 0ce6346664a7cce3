"""The exception tree: classes, exit codes, texts, and what names from files may not do."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv import errors
from boneconv.errors import (
    BoneconvError,
    CheckFailedError,
    ConfigError,
    FormatError,
    InputError,
    MachineError,
    MissingExtraError,
    NonFiniteError,
    ShapeError,
    listing,
    printable,
)

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, BoneconvError)
]


def _leaf_branch(kind: type[BoneconvError]) -> int:
    return {True: 1}.get(issubclass(kind, CheckFailedError)) or (
        2 if issubclass(kind, InputError) else 3
    )


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_has_the_exit_code_of_its_branch(kind: type[BoneconvError]) -> None:
    assert kind.exit_code == _leaf_branch(kind)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_every_class_is_exported_and_drawn_in_the_tree(kind: type[BoneconvError]) -> None:
    assert kind.__name__ in errors.__all__
    assert f"{kind.__name__}" in (errors.__doc__ or "")
    assert kind.__name__.endswith("Error")


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (ConfigError, ValueError),
        (ShapeError, ValueError),
        (NonFiniteError, ValueError),
        (MissingExtraError, ImportError),
    ],
)
def test_some_are_the_builtin_that_callers_expect(
    kind: type[BoneconvError], builtin: type[Exception]
) -> None:
    assert issubclass(kind, builtin)


def test_the_text_says_where_what_expected_found_and_what_to_do() -> None:
    error = FormatError(
        "too short", path=Path("a/b.json"), expected="8 bytes", found=3, hint="Copy it again"
    )
    assert str(error) == "a/b.json: too short; expected 8 bytes, found 3. Copy it again"
    assert (error.path, error.expected, error.found) == ("a/b.json", "8 bytes", "3")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({}, "broken"),
        ({"expected": "x"}, "broken; expected x"),
        ({"found": 0}, "broken; found 0"),
        ({"path": "p"}, "p: broken"),
        ({"hint": "Do this"}, "broken. Do this"),
    ],
)
def test_parts_that_are_absent_leave_no_trace(given: dict[str, object], text: str) -> None:
    assert str(MachineError("broken", **given)) == text  # type: ignore[arg-type]


@given(st.text())
def test_a_printable_text_moves_no_cursor(text: str) -> None:
    shown = printable(text)
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert printable(shown) == shown


def test_an_error_escapes_what_files_put_into_it() -> None:
    error = FormatError("\x1b[2Jcleared", path="a\x07b", found="\x9b31m", hint="\u202ereversed")
    assert "\x1b" not in str(error)
    assert "\\x1b[2Jcleared" in str(error)
    assert "a\\x07b" in str(error)
    assert "\\x9b31m" in str(error)
    assert "\\u202e" in str(error)


def test_a_listing_is_sorted_escaped_and_cut_after_a_dozen() -> None:
    assert listing(["b", "a"]) == "a, b"
    assert listing(["two\nlines", "\x1b"]) == "\\x1b, two\\nlines"
    assert listing([f"{i:02d}" for i in range(12)]).endswith("10, 11")
    assert listing([f"{i:02d}" for i in range(40)]).endswith("10, 11 and 28 more")


def test_a_name_of_a_megabyte_does_not_become_a_message_of_one() -> None:
    name = "x" * 1_000_000
    error = FormatError(f"no home for {listing([name])}", expected=name, found=name, path="here")
    assert len(str(error)) < 4000
    assert str(error).startswith("here: no home for xxx")
