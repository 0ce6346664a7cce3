"""Every error that boneconv raises on purpose.

    BoneconvError
    |-- CheckFailedError          exit 1: a check did not hold
    |-- InputError                exit 2: the input or the usage is wrong
    |   |-- UsageError              options that do not go together
    |   |-- MissingPathError        a path or a Hub repository that is not there
    |   |-- OutputExistsError       OUT exists and --force was not given
    |   |-- FormatError             a file that is not what its name says
    |   |-- NotABoneAdapterError    an adapter, but of another method
    |   |-- ConfigError             a configuration value that cannot be (a ValueError too)
    |   |-- NameMatchError          tensors without a home, or with several
    |   |-- ShapeError              a tensor of the wrong shape (a ValueError too)
    |   |-- NonFiniteError          NaN or infinity (a ValueError too)
    |   |-- BaseMismatchError       the base is not the one the adapter was made for
    |   `-- MissingExtraError       an optional dependency is needed (an ImportError too)
    `-- MachineError              exit 3: disk, network, locks
        |-- DiskFullError
        |-- NetworkError
        `-- LockedError

An error says where (``path``), what (``message``), what was ``expected`` and ``found``, and what
to do about it (``hint``). The command line maps the class to its exit code and prints the text.
"""

from __future__ import annotations

import os
from typing import ClassVar, Self

__all__ = [
    "BaseMismatchError",
    "BoneconvError",
    "CheckFailedError",
    "ConfigError",
    "DiskFullError",
    "FormatError",
    "InputError",
    "LockedError",
    "MachineError",
    "MissingExtraError",
    "MissingPathError",
    "NameMatchError",
    "NetworkError",
    "NonFiniteError",
    "NotABoneAdapterError",
    "OutputExistsError",
    "ShapeError",
    "UsageError",
    "first_line",
    "listing",
    "printable",
]

_LONGEST_LIST = 12
_LONGEST_PART = 900


class BoneconvError(Exception):
    """The root of the tree.

    Attributes:
        message: What went wrong, without the place.
        path: The file or folder it went wrong in.
        expected: What should have been there.
        found: What was there.
        hint: What the reader can do about it.
        exit_code: The command line's exit code for this class.
    """

    exit_code: ClassVar[int] = 3

    def __init__(
        self,
        message: str,
        *,
        path: str | os.PathLike[str] | None = None,
        expected: object = None,
        found: object = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.path = None if path is None else os.fspath(path)
        self.expected = None if expected is None else str(expected)
        self.found = None if found is None else str(found)
        self.hint = hint
        super().__init__(self._text())

    def restated(self, message: str, path: str | os.PathLike[str] | None) -> Self:
        """The same error with another message and place, for a caller that knows more."""
        return type(self)(
            message, path=path, expected=self.expected, found=self.found, hint=self.hint
        )

    def _text(self) -> str:
        message = _short(self.message)
        text = message if self.path is None else f"{_one_line(self.path)}: {message}"
        if self.expected is not None:
            text += f"; expected {_one_line(_short(self.expected))}"
        if self.found is not None:
            comma = "," if self.expected is not None else ";"
            text += f"{comma} found {_one_line(_short(self.found))}"
        if self.hint is not None:
            text += f". {_short(self.hint)}"
        return printable(text)


class CheckFailedError(BoneconvError):
    """A check that the user asked for did not hold."""

    exit_code = 1


class InputError(BoneconvError):
    """The input or the usage is wrong; trying again will not help."""

    exit_code = 2


class UsageError(InputError):
    """Options that do not go together."""


class MissingPathError(InputError):
    """A path or a Hub repository that is not there."""


class OutputExistsError(InputError):
    """OUT exists and may not be overwritten."""


class FormatError(InputError):
    """A file that is malformed, or not what its name says."""


class NotABoneAdapterError(InputError):
    """An adapter of another method, or no adapter at all."""


class ConfigError(InputError, ValueError):
    """A configuration value that cannot be."""


class NameMatchError(InputError):
    """Tensors that have no counterpart, or more than one."""


class ShapeError(InputError, ValueError):
    """A tensor whose shape contradicts the configuration or the base."""


class NonFiniteError(InputError, ValueError):
    """NaN or infinity where a finite number is needed."""


class BaseMismatchError(InputError):
    """The base differs from the one that the adapter's fingerprint names."""


class MissingExtraError(InputError, ImportError):
    """An optional dependency is needed for this input."""


class MachineError(BoneconvError):
    """The machine failed: I/O, disk, network, locks. Trying again may help."""


class DiskFullError(MachineError):
    """There is no room for the output."""


class NetworkError(MachineError):
    """The Hub could not be reached, or refused."""


class LockedError(MachineError):
    """Another process is writing the same output."""


def printable(text: str) -> str:
    r"""Escape what could move a terminal's cursor or forge a line (names come from files).

    Newlines stay in messages of our own, so names must be passed through `listing` or ``repr``
    before they are put into one.
    """
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def first_line(error: BaseException) -> str:
    """What a library's error says, in one line of at most 300 characters, after its class."""
    text = printable(str(error)).split("\\n")[0].split("\n")[0][:300]
    return f"{type(error).__name__}: {text}"


def _one_line(text: str) -> str:
    return text.replace("\n", "\\n")


def _short(text: str) -> str:
    """A part of a message, cut where a file's content would make it a page long."""
    return text if len(text) <= _LONGEST_PART else f"{text[:_LONGEST_PART]}..."


def listing(names: list[str]) -> str:
    """Names for a message: escaped, sorted, cut after a dozen with the count of the rest."""
    shown = [printable(name).replace("\n", "\\n") for name in sorted(names)[:_LONGEST_LIST]]
    rest = len(names) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")
