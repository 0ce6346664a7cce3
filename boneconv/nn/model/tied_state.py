"""State dicts of models whose parameters stand at several places.

`torch.nn.Module.state_dict` holds such a parameter under each of its names, with the same memory,
which safetensors refuses to write (and transformers' Trainer writes checkpoints with it). Here it
is held once, under its first name; loading puts it into all its places.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["hold_once"]


def hold_once(model: torch.nn.Module) -> None:
    """Makes a module's state dict hold each of its parameters once."""
    model.register_state_dict_post_hook(_drop_others)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(_add_others)  # type: ignore[no-untyped-call]


def _others(model: torch.nn.Module) -> dict[str, str]:
    """Further names of parameters -> their first names."""
    first: dict[int, str] = {}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known = first.setdefault(id(parameter), name)
        if known != name:
            found[name] = known
    return found


def _drop_others(
    model: torch.nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any
) -> None:
    for name in _others(model):
        state_dict.pop(f"{prefix}{name}", None)


def _add_others(
    model: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *_others_of_load: Any
) -> None:
    for name, first in _others(model).items():
        if f"{prefix}{first}" in state_dict:
            state_dict.setdefault(f"{prefix}{name}", state_dict[f"{prefix}{first}"])
