"""What a progress is told."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Told"]


@dataclass
class Told:
    """A progress that keeps what it is told.

    Attributes:
        total: The bytes to come.
        done: The bytes of each step.
    """

    total: int = 0
    done: list[int] = field(default_factory=list)

    def start(self, total: int) -> None:
        self.total = total

    def advance(self, nbytes: int) -> None:
        self.done.append(nbytes)
