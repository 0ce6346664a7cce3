"""How a workflow tells its caller how far it is."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress"]


class Progress(Protocol):
    """Is told how far a run is."""

    def start(self, total: int) -> None:
        """The run will go through ``total`` bytes of tensors."""
        ...

    def advance(self, nbytes: int) -> None:
        """It went through ``nbytes`` more."""
        ...
