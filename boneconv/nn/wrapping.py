"""Which layers can be adapted, and how the adapted one is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from boneconv.errors import ConfigError

__all__ = ["as_function", "check_base"]


def check_base(layer: nn.Module) -> None:
    """Refuse what is no linear layer.

    Raises:
        ConfigError: Neither a `torch.nn.Linear` (or a subclass) nor a 1x1 `torch.nn.Conv2d` of
            stride 1, without padding and groups. transformers' ``Conv1D``, whose weight is
            ``[in, out]``, is refused, as PEFT 0.18.1 does.
    """
    if isinstance(layer, nn.Linear):
        return
    if isinstance(layer, nn.Conv2d):
        plain = layer.kernel_size == (1, 1) and layer.stride == (1, 1) and layer.groups == 1
        if plain and layer.padding in ((0, 0), "valid", "same"):
            return
        raise ConfigError(
            "this convolution is no linear layer",
            expected="kernel 1x1, stride 1, padding 0, groups 1",
            found=f"kernel {layer.kernel_size}, stride {layer.stride}, "
            f"padding {layer.padding}, groups {layer.groups}",
        )
    raise ConfigError(
        "a layer that cannot be adapted",
        expected="torch.nn.Linear, or torch.nn.Conv2d of kernel 1x1",
        found=type(layer).__name__,
    )


def as_function(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor], Tensor] | None:
    """A layer as a function of an input whose last axis is ``in``.

    Args:
        layer: A layer that `check_base` lets through.
        args: What its forward takes beside the input.
        kwargs: The same.

    Returns:
        The function; nothing where it is no more than `torch.nn.functional.linear`: no subclass
        with a forward of its own, no hooks, no forward put in by others.
    """
    if isinstance(layer, nn.Conv2d):
        return lambda x: layer(x.movedim(-1, -3)).movedim(-3, -1)
    own = vars(layer)
    hooked = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]
    if type(layer).forward is nn.Linear.forward and "forward" not in own and not hooked:
        return None
    return lambda x: layer(x, *args, **kwargs)
