"""Names of adapters: which can be, and which are meant."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from boneconv.errors import ConfigError, listing

__all__ = ["check_names", "check_new_name", "chosen_names"]


def check_new_name(name: str, taken: Collection[str]) -> None:
    """Raises ConfigError for a name that is taken or cannot be one.

    A name is a part of the names of parameters and the name of a folder: no dots, no slashes, not a
    member of torch's dictionaries of parameters and modules.
    """
    fault = None
    if not isinstance(name, str) or not name or not name.isprintable():
        fault = "a text that can be printed"
    elif any(sign in name for sign in "./\\:"):
        fault = "one without dots, slashes and colons"
    elif hasattr(torch.nn.ParameterDict(), name) or hasattr(torch.nn.ModuleDict(), name):
        fault = "one that torch's dictionaries do not use themselves"
    elif name in taken:
        fault = f"one other than {listing(list(taken))}"
    if fault is not None:
        raise ConfigError("no name for a new adapter", expected=fault, found=repr(name))


def check_names(names: Sequence[str], there: Collection[str]) -> None:
    """Raises ConfigError for a name that no adapter has, and for one that stands twice."""
    unknown = [name for name in names if name not in there]
    if unknown:
        raise ConfigError(
            "there is no such adapter",
            expected=listing(list(there)) or "none, the model has no adapters",
            found=listing(unknown),
        )
    if len(set(names)) < len(names):
        raise ConfigError("an adapter is named twice", found=", ".join(names))


def chosen_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (names,) if isinstance(names, str) else tuple(names)
