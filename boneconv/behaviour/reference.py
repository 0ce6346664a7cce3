"""The reference: the base in torch, with the adapters attached and then put into its weights.

The updates are formed by the plain torch formulas of `boneconv.nn`, not by the kernels that a merge
uses, in the dtype that the model has. A model that computes in float64 keeps the adapters' numbers
exact; what it forms is off by float64's rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from boneconv.adapter import Adapter
from boneconv.behaviour.loading import quiet
from boneconv.names import module_key

__all__ = ["attach", "form", "named_tensors", "resize", "round_weights"]

_ODD = 1


def resize(model: Any, adapters: Sequence[Adapter]) -> None:
    """Gives a model as many embeddings as the adapters bring."""
    names = {id(module): module_key(name) for name, module in model.named_modules()}
    for getter in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            module = getter()
        except (NotImplementedError, AttributeError):
            continue
        key = f"{names.get(id(module))}.weight"
        for adapter in adapters:
            rows = adapter.saved[key].shape[0] if key in adapter.saved else None
            if rows is not None and rows != module.weight.shape[0]:
                import torch

                with quiet(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    model.resize_token_embeddings(rows, mean_resizing=False)
                return


def attach(model: Any, adapters: Sequence[Adapter], scale: float) -> Any:
    """A model with adapters attached in order.

    Args:
        model: A model of transformers; changed in place.
        adapters: The adapters.
        scale: S in ``W + S (W' - W)``, for each.

    Returns:
        The `BoneModel`.

    Raises:
        NameMatchError, ShapeError, ConfigError: An adapter does not fit the model.
    """
    from boneconv.nn.model.bone_model import BoneModel
    from boneconv.nn.model.walking import bone_layers

    bone: Any = None
    with quiet():
        resize(model, adapters)
        names = [f"adapter{number}" for number in range(len(adapters))]
        for name, adapter in zip(names, adapters, strict=True):
            if bone is None:
                bone = BoneModel.from_pretrained(model, adapter.path, name)
            else:
                bone.load_adapter(adapter.path, name)
        bone.set_adapter(names)
        bone.eval()
    for layer in bone_layers(bone.model).values():
        for block in layer.bone_block.values():
            block.data = block.data.to(layer.weight.dtype) * scale
    bone.requires_grad_(False)
    return bone


def form(bone: Any) -> int:
    """Puts the active adapters' updates into the weights, in the weights' own dtype.

    The weights are new parameters: what was tied to one keeps the old.

    Args:
        bone: The `BoneModel`; its adapted layers are plain ones afterwards.

    Returns:
        How many weights' elements the adapters change.
    """
    import torch

    from boneconv.nn.model.walking import bone_layers, saved_modules
    from boneconv.nn.weights import compose

    changed = 0
    with torch.no_grad():
        for layer in bone_layers(bone.model).values():
            weight = layer.weight
            formed = compose(weight.detach().flatten(1), layer.updates()).view(weight.shape)
            layer.base_layer.weight = torch.nn.Parameter(formed, requires_grad=False)
            layer.set_adapter(())
            layer.bone_block.clear()
            changed += formed.numel()
    holders = saved_modules(bone.model).values()
    for holder in holders:
        changed += sum(parameter.numel() for parameter in holder.running().parameters())
    return changed


def named_tensors(model: Any) -> Iterator[tuple[str, Any]]:
    """Parameters and buffers that run, under the names that the plain model gives them."""
    from boneconv.nn.model.saved_module import SavedModule
    from boneconv.nn.model.walking import base_of, walk

    for name, module in (("", model), *walk(model)):
        whole = isinstance(module, SavedModule)
        inner = module.running() if whole else base_of(module)
        for found in (inner.named_parameters, inner.named_buffers):
            for leaf, tensor in found(recurse=whole):
                yield f"{name}.{leaf}".lstrip("."), tensor


def round_weights(model: Any, dtypes: Mapping[str, str]) -> None:
    """Rounds weights once to the half precision that they have elsewhere; they keep their dtype.

    Args:
        model: A model, or the adapted one, in float64 or float32; changed in place.
        dtypes: ``bfloat16`` or ``float16`` by the plain model's names; others are left alone.
    """
    import torch

    done: set[int] = set()
    with torch.no_grad():
        for name, tensor in named_tensors(model):
            if name in dtypes and tensor.is_floating_point() and id(tensor) not in done:
                done.add(id(tensor))
                tensor.copy_(_once(tensor, getattr(torch, dtypes[name])))


def _once(tensor: Any, dtype: Any) -> Any:
    """A tensor rounded once to half precision.

    torch goes from float64 to half precision through float32, which rounds twice. Here float32 is
    rounded to odd, which keeps what the second rounding has to know.
    """
    import torch

    if tensor.dtype != torch.float64:
        return tensor.to(dtype)
    near = tensor.to(torch.float32)
    back = near.to(torch.float64)
    bits = near.view(torch.int32)
    even = (bits & _ODD) == 0
    # Where float32 was rounded to an even number, the exact value lies towards its odd neighbour.
    away = torch.where(back.abs() < tensor.abs(), 1, -1).to(torch.int32)
    inexact = even & (back != tensor) & near.isfinite()
    return torch.where(inexact, bits + away, bits).view(torch.float32).to(dtype)
