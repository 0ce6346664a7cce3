"""A wrapper class whose ``forward`` has the signature of what it wraps.

transformers' Trainer looks at the class of a model and at the signature of its ``forward``: it
drops the columns of a data set that are no parameters, and finds the labels among them. A wrapper
that takes ``*args, **kwargs`` would get neither. So each class of models gets a subclass of its
wrapper, the same one every time.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

__all__ = ["rebuild", "wrapper_for"]


def wrapper_for(wrapper: Any, wrapped: Any) -> Any:
    """A subclass of a wrapper with the ``forward`` signature of what it wraps.

    Args:
        wrapper: A class of modules with a ``model`` that it hands its arguments to.
        wrapped: The class of that model.

    Returns:
        The subclass, named ``wrapper[wrapped]``, with the two classes in its ``wraps``.
    """
    return _wrapper_for(wrapper, wrapped)


@cache
def _wrapper_for(wrapper: Any, wrapped: Any) -> Any:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    forward.__doc__ = wrapper.forward.__doc__
    forward.__signature__ = inspect.signature(wrapped.forward)  # type: ignore[attr-defined]
    name = f"{wrapper.__name__}[{wrapped.__name__}]"
    members = {
        "forward": forward,
        "wraps": (wrapper, wrapped),
        "__doc__": wrapper.__doc__,
        "__module__": wrapper.__module__,
    }
    return type(name, (wrapper,), members)


def rebuild(wrapper: Any, wrapped: Any) -> Any:
    """An empty instance of `wrapper_for`'s class, which pickle fills: it has no name to find."""
    cls = wrapper_for(wrapper, wrapped)
    return cls.__new__(cls)
