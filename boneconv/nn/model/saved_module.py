"""`SavedModule`: a module that adapters train in full (``modules_to_save``), and its original."""

from __future__ import annotations

import copy
from typing import Any

import torch

from boneconv.errors import ConfigError

__all__ = ["SavedModule"]

_CONTAINERS = (
    torch.nn.ModuleList,
    torch.nn.ModuleDict,
    torch.nn.ParameterList,
    torch.nn.ParameterDict,
)


class SavedModule(torch.nn.Module):
    """A module of the model with a copy of it for each adapter that trains it in full.

    The active adapter's copy runs in place of the original, which stays as it is. Attributes that
    this module does not have are those of the one that runs, so that ``.weight`` and the like work.

    Args:
        original: The module; a container that is only indexed has no forward to replace.

    Attributes:
        original_module: The model's own module.
        modules_to_save: The copies by adapter.
        active: The adapter whose copy runs, if any.
        enabled: Whether copies run at all.

    Raises:
        ConfigError: The module is a list or dict of modules or parameters.
    """

    original_module: torch.nn.Module

    def __init__(self, original: torch.nn.Module) -> None:
        super().__init__()
        if isinstance(original, _CONTAINERS):
            raise ConfigError(
                f"modules_to_save names a {type(original).__name__}, which has no forward",
                hint="Name the modules in it",
            )
        self.original_module = original
        self.modules_to_save = torch.nn.ModuleDict()
        self.active: str | None = None
        self.enabled = True
        self.training = original.training

    def add_adapter(self, name: str, *, meta: bool = False) -> None:
        """Makes an adapter's copy of the original.

        Args:
            name: The adapter.
            meta: Whether the copy's tensors are made on the meta device, without values.
        """
        memo: dict[int, Any] = {}
        for tensor in self.original_module.state_dict(keep_vars=True).values() if meta else ():
            empty = torch.empty_like(tensor, device="meta")
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)] = torch.nn.Parameter(empty, False) if is_parameter else empty
        self.modules_to_save[name] = copy.deepcopy(self.original_module, memo)

    def delete_adapter(self, name: str) -> None:
        """Drops an adapter's copy; does nothing where there is none."""
        if name in self.modules_to_save:
            del self.modules_to_save[name]
        if self.active == name:
            self.active = None

    def running(self) -> torch.nn.Module:
        """The module that runs now."""
        modules = self._modules
        original, copies = modules["original_module"], modules["modules_to_save"]
        assert original is not None
        assert isinstance(copies, torch.nn.ModuleDict)
        if not self.enabled or self.active is None:
            return original
        return copies[self.active]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the running module gives for the arguments."""
        return self.running()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "original_module" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self.running(), name)
