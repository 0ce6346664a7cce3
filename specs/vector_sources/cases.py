"""What a vector is: a valid one, and one that breaks a rule."""

from __future__ import annotations

from dataclasses import dataclass, field

from vector_sources.adapters import Adapter
from vector_sources.tensors import Tensor


@dataclass
class Case:
    """A vector: adapters, a base, and what the merge must give."""

    title: str
    sections: str
    adapters: list[Adapter]
    base: dict[str, Tensor]
    peft: str
    ties: dict[str, str] = field(default_factory=dict)
    dtype: str | None = None


@dataclass
class Bad:
    """An invalid vector: one rule, and the files that break it and no other."""

    rule: str
    title: str
    file: bytes
    config: bytes | None = None
    base: dict[str, Tensor] | None = None
    strength: float = 1
