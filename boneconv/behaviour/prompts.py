"""What the models are asked: prompts of a file or a small set of our own, random ids, images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from boneconv.errors import FormatError, MissingPathError, UsageError
from boneconv.io.files import machine_errors
from boneconv.strict_json import parse_object

__all__ = [
    "BUILT_IN",
    "MOST_PROMPTS",
    "Prompts",
    "Question",
    "random_ids",
    "random_images",
    "read_prompts",
]

#: Several scripts, code and numbers; short, so that they run in seconds.
BUILT_IN = (
    "The lighthouse keeper climbed the stairs, counted them twice, and wrote down 217.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Question: What is 17 * 23 - 4?\nAnswer:",
    "Am Morgen lag der Hafen im Nebel, und niemand sah das Schiff kommen.",
    "La receta pide tres huevos, 250 g de harina y un poco de paciencia.",
    "\u6771\u4eac\u306e\u6625\u306f\u685c\u304c\u7f8e\u3057\u3044\u3002",
    '{"name": "bone", "rank": 64, "axis": null}',
)

MOST_PROMPTS = 128
_LARGEST_FILE = 4 * 2**20
_SEED = 20240915
_RANDOM_INPUTS, _RANDOM_LENGTH = 2, 24


@dataclass(frozen=True)
class Prompts:
    """Texts.

    Attributes:
        texts: The texts.
        origin: ``built-in`` or ``file``.
    """

    texts: tuple[str, ...]
    origin: str


@dataclass(frozen=True)
class Question:
    """One input.

    Attributes:
        kind: ``text``, ``random`` or ``images``.
        inputs: Arrays by the model's argument names, with a batch of one.
        prompt: How many of its tokens are the prompt; what follows was generated greedily.
    """

    kind: str
    inputs: Mapping[str, np.ndarray[Any, Any]]
    prompt: int = 0

    @property
    def length(self) -> int:
        """How many tokens it has; 0 for an image."""
        ids = self.inputs.get("input_ids")
        return 0 if ids is None else int(ids.shape[1])


def read_prompts(path: Path | None) -> Prompts:
    """The prompts of a file; without one, the built-in set.

    A file has a prompt a line, empty lines left out; one named ``.json`` has a list of texts.

    Raises:
        MissingPathError: There is no such file.
        FormatError: It holds no text, is no UTF-8, or its JSON is no list of texts.
        UsageError: It holds more than `MOST_PROMPTS`.
    """
    if path is None:
        return Prompts(BUILT_IN, "built-in")
    text = _read(path)
    if path.suffix == ".json":
        texts = _listed(text, path)
    else:
        texts = tuple(line for line in text.splitlines() if line.strip())
    if not texts:
        raise FormatError("holds no prompts", path=path, expected="a prompt a line")
    if len(texts) > MOST_PROMPTS:
        raise UsageError(
            "too many prompts", path=path, expected=f"at most {MOST_PROMPTS}", found=len(texts)
        )
    return Prompts(texts, "file")


def _read(path: Path) -> str:
    if not path.is_file():
        raise MissingPathError("no such file", path=path)
    with machine_errors(path):
        if path.stat().st_size > _LARGEST_FILE:
            raise FormatError("too large for prompts", path=path, expected="at most 4 MiB")
        content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FormatError("the prompts are not UTF-8", path=path) from error


def _listed(text: str, path: Path) -> tuple[str, ...]:
    content = parse_object(b'{"prompts": ' + text.encode() + b"}", path)
    found = content["prompts"] if content.keys() == {"prompts"} else None
    if not isinstance(found, list) or not all(isinstance(e, str) and e.strip() for e in found):
        raise FormatError("the prompts are no JSON list of texts", path=path)
    return tuple(found)


def random_ids(vocabulary: int) -> Sequence[np.ndarray[Any, Any]]:
    """Random token ids, ``[1, length]`` each, the same on every call."""
    generator = np.random.Generator(np.random.PCG64(_SEED))
    shape = (_RANDOM_INPUTS, 1, _RANDOM_LENGTH)
    return list(generator.integers(0, vocabulary, shape, dtype=np.int64))


def random_images(shape: tuple[int, int, int]) -> Sequence[np.ndarray[Any, Any]]:
    """Noise ``[1, channels, height, width]``, float64, the same on every call.

    Its values are numbers of float16, so that every dtype sees the same image.
    """
    generator = np.random.Generator(np.random.PCG64(_SEED))
    noise = generator.standard_normal((_RANDOM_INPUTS, 1, *shape)).clip(-2, 2)
    return list(noise.astype(np.float16).astype(np.float64))
