"""The numbered rules of the Bone Adapter Format 1.0, and what breaks them.

Every rule has a number, an error class and a stage (specification, section "Validation rules"). A
stage is checked only where all before it hold; all violations of the first stage that fails are
found together.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from boneconv.errors import (
    BaseMismatchError,
    ConfigError,
    FormatError,
    InputError,
    NameMatchError,
    NonFiniteError,
    NotABoneAdapterError,
    ShapeError,
    printable,
)

__all__ = ["RULES", "Rule", "StageFailed", "Violation", "fail_on", "first_error"]


@dataclass(frozen=True)
class Rule:
    """A rule of the specification.

    Attributes:
        id: Its number, such as ``R20``.
        title: What it demands.
        error: The class that a reader raises.
    """

    id: str
    title: str
    error: type[InputError]


_TABLE: tuple[tuple[type[InputError], dict[int, str]], ...] = (
    (
        FormatError,
        {
            1: "the file holds a header's length and the whole header",
            2: "the header is strict JSON, an object",
            3: "the header's metadata are texts and its entries describe tensors",
            4: "the tensors fill the data without gaps or overlaps",
            6: "the metadata are strict JSON, an object",
            7: "the metadata are written in canonical form",
            8: "the version is 1.x",
            9: "every required feature is known",
            19: "blocks and biases have a floating dtype that they may have",
            24: "adapter_config.json is strict JSON, an object",
        },
    ),
    (
        NotABoneAdapterError,
        {
            5: "the file holds the metadata of a Bone adapter",
            25: "peft_type is BONE or BONE_ADAPTER",
        },
    ),
    (
        ConfigError,
        {
            10: "the required fields are there",
            11: "every known field has a value of its type and range",
            12: "axis is given for BAT alone, mini_rank for mini alone",
            15: "a fingerprint comes with dtype, shape and digest of every module",
            16: "the fingerprint is the root over the digests",
            26: "adapter_config.json says what the metadata say",
            27: "peft_type is BONE only where PEFT 0.14 to 0.18 apply the adapter rightly",
        },
    ),
    (
        NameMatchError,
        {
            13: "names are dotted, printable and free of wrappers",
            14: "no tensor is named twice, and what is added is replaced",
            17: "every announced tensor is there",
            18: "every tensor is announced",
            28: "the base has every adapted or replaced tensor",
        },
    ),
    (
        ShapeError,
        {
            20: "every block has the shape of its variant and rank",
            21: "every bias has the length of its module's output",
            22: "a replaced tensor has vocab_size rows",
            29: "the base's tensors have the shapes and dtypes that the adapter fits",
        },
    ),
    (
        NonFiniteError,
        {
            23: "the adapter's numbers are finite",
            31: "adapted weights are finite, and so is the result",
        },
    ),
    (BaseMismatchError, {30: "the base's tensors have the digests that the adapter names"}),
)

#: Every rule by its number.
RULES: dict[str, Rule] = {
    rule.id: rule
    for rule in sorted(
        (
            Rule(f"R{number:02d}", title, error)
            for error, titles in _TABLE
            for number, title in titles.items()
        ),
        key=lambda rule: rule.id,
    )
}


@dataclass(frozen=True)
class Violation:
    """A rule that an adapter breaks.

    Attributes:
        rule: The rule's number.
        message: What is wrong.
        path: The file that it is wrong in.
        expected: What should be there.
        found: What is there.
        hint: What to do about it.
    """

    rule: str
    message: str
    path: str
    expected: str | None = None
    found: str | None = None
    hint: str | None = None

    @classmethod
    def of(
        cls,
        rule: str,
        message: str,
        path: str | os.PathLike[str],
        *,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> Violation:
        """A violation whose expected and found may be anything that prints, on one line."""
        texts = [None if value is None else _one_line(str(value)) for value in (expected, found)]
        return cls(rule, message, os.fspath(path), texts[0], texts[1], hint)

    def error(self) -> InputError:
        """The error that a reader raises."""
        return RULES[self.rule].error(
            f"{self.rule}: {self.message}",
            path=self.path,
            expected=self.expected,
            found=self.found,
            hint=self.hint,
        )


def _one_line(text: str) -> str:
    return printable(text).replace("\n", "\\n")


class StageFailed(Exception):  # noqa: N818 - it never leaves boneconv.formats and its callers
    """All violations of the first stage that fails.

    Attributes:
        violations: At least one, in the order of the rules.
    """

    def __init__(self, violations: Iterable[Violation]) -> None:
        self.violations = tuple(sorted(violations, key=lambda violation: violation.rule))
        super().__init__(", ".join(violation.rule for violation in self.violations))


def fail_on(violations: Iterable[Violation]) -> None:
    """Ends a stage; raises StageFailed where there are violations."""
    found = tuple(violations)
    if found:
        raise StageFailed(found)


def first_error(failed: StageFailed) -> InputError:
    """The error of the first violation, which says how many others there are."""
    first, *others = failed.violations
    if not others or first.hint is not None:
        return first.error()
    more = f"{len(others)} more: boneconv validate lists them all"
    return Violation(
        first.rule, first.message, first.path, first.expected, first.found, more
    ).error()
