"""Where in a model a tensor stands, from its name: for tables and heat maps."""

from __future__ import annotations

__all__ = ["kind_of", "layer_of"]


def layer_of(name: str) -> int | None:
    """The number of a tensor's layer, the first number in its name; None where there is none."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def kind_of(name: str) -> str | None:
    """What a tensor is within its layer: the module's own name, such as ``q_proj``.

    A number at the end (as in a list of experts) goes with the name before it. A bias is told from
    its weight.
    """
    *modules, leaf = name.split(".")
    own = [part for part in modules if not part.isdecimal()]
    if not own:
        return leaf
    return own[-1] if leaf == "weight" else f"{own[-1]}.{leaf}"
