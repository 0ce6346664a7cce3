"""`TrainedBiases`: the biases that an adapter trains with its blocks, and the model's own.

Biases are trained where they are, in the model. So that the model without the adapter is still the
model as it was, the other set of values is kept aside: while the adapter runs, the model's own, and
else the adapter's. (PEFT 0.18.1 trains them in place, keeps nothing and saves none of them.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from boneconv.nn.model.walking import bone_layers, inner_name

__all__ = ["TrainedBiases", "bias_places"]

#: Modules below these are an adapter's own.
_OWN = frozenset({"bone_block", "modules_to_save"})

#: A module and the name of a bias in it.
_Place = tuple[torch.nn.Module, str]


class TrainedBiases:
    """Two sets of values for some biases of a model, one of them in it.

    Args:
        places: The biases by their names in the model, as `bias_places` gives them.

    Attributes:
        inside: Whether the adapter's values are in the model.
    """

    def __init__(self, places: Mapping[str, _Place]) -> None:
        self.inside = True
        self._places = dict(places)
        self._aside = {name: value.detach().clone() for name, value in self.parameters()}

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The biases by name, as they are in the model."""
        for name, (module, leaf) in self._places.items():
            yield name, getattr(module, leaf)

    def trained(self) -> dict[str, torch.Tensor]:
        """The adapter's values by name."""
        if self.inside:
            return {name: value.detach() for name, value in self.parameters()}
        return dict(self._aside)

    def put(self, inside: bool) -> None:
        """Puts the adapter's values into the model, or its own back; gradients are not recorded."""
        if inside == self.inside:
            return
        self.inside = inside
        for name, parameter in self.parameters():
            other = self._aside[name]
            self._aside[name] = parameter.detach().clone()
            # Through .data: a forward whose backward is still to come must not be invalidated.
            parameter.data.copy_(other)


def bias_places(
    model: torch.nn.Module, which: str, adapter: str, saved: tuple[str, ...]
) -> dict[str, _Place]:
    """The biases that a configuration trains.

    Args:
        model: The adapted model.
        which: ``all``, or ``bone_only`` for those of the adapter's own layers.
        adapter: The adapter.
        saved: Names of the modules that it trains in full; their copies have their own biases.
    """
    if which == "bone_only":
        return {
            f"{name}.bias": (layer.base_layer, "bias")
            for name, layer in bone_layers(model).items()
            if adapter in layer.bone_block and isinstance(layer.base_layer.bias, torch.Tensor)
        }
    places: dict[str, _Place] = {}
    for path, parameter in model.named_parameters():
        name = inner_name(path)
        leaf = path.rpartition(".")[2]
        is_bias = leaf == "bias" or leaf.endswith("_bias")
        is_copied = any(name.startswith(f"{module}.") for module in saved)
        if is_bias and parameter.is_floating_point() and not is_copied | _is_own(path):
            places[name] = (model.get_submodule(path.rpartition(".")[0]), leaf)
    return places


def _is_own(path: str) -> bool:
    return not _OWN.isdisjoint(path.split("."))
