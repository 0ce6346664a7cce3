"""The changes that a merge makes to the base's config.json, and no others."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from boneconv.errors import ConfigError
from boneconv.io.quantised import refusal
from boneconv.strict_json import read_object

__all__ = ["ConfigEdits"]


class ConfigEdits:
    """config.json, read once, edited and written back in the order of its keys.

    A model of several parts (vision and text) nests a configuration for each; an edit reaches every
    place that says what is changed.
    """

    def __init__(self, path: Path) -> None:
        """Reads config.json; raises FormatError."""
        self.path = path
        self._values = read_object(path)
        self._original = json.dumps(self._values)

    @property
    def values(self) -> dict[str, Any]:
        """The configuration as it stands after the edits so far."""
        return self._values

    @property
    def changed(self) -> bool:
        """Whether any edit changed anything."""
        return json.dumps(self._values) != self._original

    def encode(self) -> bytes:
        """The edited file's bytes, laid out as transformers does."""
        return (json.dumps(self._values, indent=2, ensure_ascii=False) + "\n").encode()

    def vocabulary_sizes(self) -> set[int]:
        """Every vocab_size that the configuration names."""
        sizes = (part.get("vocab_size") for part in self._parts())
        return {size for size in sizes if isinstance(size, int)}

    def quantisation(self) -> dict[str, Any] | None:
        """What the configuration says of quantised weights; None where it says nothing."""
        return next((part[key] for part, key in self._quantisations()), None)

    def refuse_quantised(self, readable: Collection[str] = ()) -> None:
        """Raises FormatError where the weights on disk are quantised, by a method not listed."""
        for part, key in self._quantisations():
            method = str(part[key].get("quant_method", "an unnamed method"))
            if method not in readable:
                raise refusal(method, self.path)

    def remove_quantisation(self) -> None:
        """Says nothing of quantised weights any more: they have been dequantised."""
        for part, key in list(self._quantisations()):
            del part[key]

    def _quantisations(self) -> Iterator[tuple[dict[str, Any], str]]:
        for part in self._parts():
            for key in ("quantization_config", "compression_config"):
                if isinstance(part.get(key), dict):
                    yield part, key

    @property
    def says_untied(self) -> bool:
        """Whether every part of it that has a vocabulary says that the head is untied."""
        return all(part.get("tie_word_embeddings") is False for part in self._vocabularies())

    def set_dtype(self, dtype: str) -> None:
        """Says that all floating tensors now have a dtype, such as ``bfloat16``.

        The configuration of a diffusers model says nothing of dtypes, and nothing is added to it.
        """
        keys = ("dtype", "torch_dtype")
        found = [(part, key) for part in self._parts() for key in keys if key in part]
        if not found and not self.is_diffusers:
            found = [(self._values, "torch_dtype")]
        for part, key in found:
            part[key] = dtype

    @property
    def is_diffusers(self) -> bool:
        """Whether it configures a model of diffusers, whose names transformers cannot tell."""
        return "_diffusers_version" in self._values

    def untie(self) -> None:
        """Says that the output head no longer shares the input embedding."""
        for part in self._vocabularies():
            part["tie_word_embeddings"] = False

    def resize_vocabulary(self, old: int, new: int) -> None:
        """Replaces the vocabulary's size.

        Raises:
            ConfigError: No ``vocab_size`` equals the old one.
        """
        parts = [part for part in self._parts() if part.get("vocab_size") == old]
        if not parts:
            raise ConfigError(
                "the adapter resizes an embedding, but no vocab_size fits the base's",
                path=self.path,
                expected=f"vocab_size {old}",
                found=f"{sorted(self.vocabulary_sizes())}",
            )
        for part in parts:
            part["vocab_size"] = new

    def _vocabularies(self) -> list[dict[str, Any]]:
        """The whole, and the parts in it that have a vocabulary of their own."""
        return [p for p in self._parts() if p is self._values or "vocab_size" in p]

    def _parts(self) -> Iterator[dict[str, Any]]:
        yield self._values
        for value in self._values.values():
            if isinstance(value, dict):
                yield value
