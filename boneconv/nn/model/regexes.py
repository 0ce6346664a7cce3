"""Regular expressions that come from adapter files, under a time limit.

Python's engine backtracks: ``(a+)+$`` takes hours for a name of forty letters, and while it runs no
timer of the same process can stop it everywhere (signals reach the main thread alone, threads
cannot be ended). A subset of the syntax that cannot backtrack would refuse what PEFT's users write,
look-ahead above all. So the expressions are compiled and matched in a Python of their own, with the
same engine and the same meaning, and that process is ended when its time is up. It costs some 30 ms
for all names of a model, works in any thread, and bounds the compilation too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from boneconv.errors import ConfigError

__all__ = ["LAYER_INDEX", "SECONDS", "fullmatch", "layer_indices"]

#: How long all names of a model may take together; what an honest expression needs is a
#: hundredth of it.
SECONDS = 1.0
#: The group that holds a layer's index.
LAYER_INDEX = "boneconv_layer_index"

_HINT = "Give a list of names instead"
_MATCHER = f"""
import json, re, sys
print("ready", flush=True)
try:
    job = json.loads(sys.stdin.read())
    patterns = [re.compile(pattern) for pattern in job["patterns"]]
    found = [next(filter(None, (p.fullmatch(name) for p in patterns)), None)
             for name in job["names"]]
    answer = [None if m is None else m.groupdict().get("{LAYER_INDEX}") or "" for m in found]
    print(json.dumps({{"found": answer}}))
except (re.error, ArithmeticError, RecursionError, MemoryError) as error:
    print(json.dumps({{"error": str(error) or type(error).__name__}}))
"""


def fullmatch(field: str, pattern: str, names: Sequence[str]) -> list[bool]:
    """Which names a regular expression matches from their first to their last character.

    Args:
        field: The field of the configuration that holds the expression, for messages.
        pattern: The expression, as Python's ``re`` reads it.
        names: The names.

    Raises:
        ConfigError: It is no regular expression, or takes longer than `SECONDS`.
    """
    return [found is not None for found in _match(field, [pattern], names)]


def layer_indices(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    r"""The index of the layer that each name lies in: ``N`` of ``(.*\.)?<pattern>\.N\..*``.

    Args:
        patterns: Names of lists of layers, or regular expressions for them; the first one that
            matches counts, and within a name the last place.
        names: The names.

    Raises:
        ConfigError: As `fullmatch`.
    """
    whole = [rf"(?:.*\.)?(?:{each})\.(?P<{LAYER_INDEX}>\d+)\..*" for each in patterns]
    found = _match("layers_pattern", whole, names)
    return [None if index is None else int(index) for index in found]


def _match(field: str, patterns: Sequence[str], names: Sequence[str]) -> list[str | None]:
    job = json.dumps({"patterns": list(patterns), "names": list(names)}).encode()
    try:
        with subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _MATCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
        ) as process:
            answer = _ask(process, job)
    except subprocess.TimeoutExpired as error:
        raise ConfigError(
            f"{field} is a regular expression that takes too long",
            expected=f"at most {SECONDS:g} s for the {len(names)} modules of the model",
            found=repr(patterns[0]),
            hint=f"It may repeat what is repeated already. {_HINT}",
        ) from error
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{field} is a regular expression, which needs a Python process of its own to match",
            found=f"{sys.executable!r} does not start as one",
            hint=_HINT,
        ) from error
    if "error" in answer:
        raise ConfigError(
            f"{field} is no regular expression: {answer['error']}", found=repr(patterns[0])
        )
    found: list[str | None] = answer["found"]
    return found


def _ask(process: subprocess.Popen[bytes], job: bytes) -> dict[str, Any]:
    """The matcher's answer; its time starts when it has started."""
    assert process.stdout is not None
    try:
        if process.stdout.readline() != b"ready\n":
            raise ValueError("no matcher")
        answer, _ = process.communicate(job, timeout=SECONDS)
        content = json.loads(answer)
        assert isinstance(content, dict)
        return content
    finally:
        with suppress(OSError):
            process.kill()
