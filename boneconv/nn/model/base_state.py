"""State dicts of adapted models that leave out the base's own parameters.

transformers' Trainer and accelerate save a model's whole state dict at every checkpoint; the base,
frozen, is most of it. Where it is left out, a checkpoint is as small as the adapters, and loading
it leaves the base's parameters as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["leave_out_base"]

_ADAPTERS = frozenset({"bone_block", "modules_to_save"})


def leave_out_base(model: torch.nn.Module) -> None:
    """Makes a module's state dict lack the base while ``base_in_state_dict`` is false.

    What adapters train, biases of the base among it, and buffers stay in it.
    """
    model.register_state_dict_post_hook(_drop)  # type: ignore[no-untyped-call]
    model.register_load_state_dict_pre_hook(_fill)  # type: ignore[no-untyped-call]


def _left_out(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    if model.base_in_state_dict:
        return
    biases = {id(p) for each in model._biases.values() for _, p in each.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if _ADAPTERS.isdisjoint(name.split(".")) and id(parameter) not in biases:
            yield name, parameter


def _drop(model: torch.nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
    for name, _ in _left_out(model):
        state_dict.pop(f"{prefix}{name}", None)


def _fill(model: torch.nn.Module, state_dict: dict[str, Any], prefix: str, *_others: Any) -> None:
    for name, parameter in _left_out(model):
        state_dict.setdefault(f"{prefix}{name}", parameter.detach())
