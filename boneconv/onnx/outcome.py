"""What every way of making a graph says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from boneconv.formats.native import Violation

__all__ = ["Made"]


@dataclass(frozen=True)
class Made:
    """A graph in its place of work.

    Attributes:
        graph: Its file, relative to the folder.
        weights: How many tensors carry the adapters.
        tensors: For the record: what became of each tensor.
        options: For the record: what determined the graph.
        strangers: Adapters that were made for another base.
    """

    graph: str
    weights: int
    tensors: Mapping[str, Any]
    options: Mapping[str, Any]
    strangers: tuple[Violation, ...] = field(default=())
