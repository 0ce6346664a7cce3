"""A native adapter made from one of another format (specification, section 16)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from boneconv import __version__
from boneconv.adapter import Adapter
from boneconv.config import BoneConfig, Variant
from boneconv.digest import same_values
from boneconv.errors import ConfigError, FormatError, NameMatchError, UsageError
from boneconv.formats.native.base import BaseTensor
from boneconv.formats.native.canonical import encode
from boneconv.formats.native.content import NativeAdapter
from boneconv.formats.native.metadata import Metadata, Module, root_of
from boneconv.formats.native.peft_config import FREE_FIELDS, HEAD_TASKS, HEADS
from boneconv.formats.native.tensors import BLOCK, PREFIX
from boneconv.io.safetensors import StoredTensor, Tensor

__all__ = ["from_adapter"]

_TRAINING = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "bias",
    "miss_dropout",
    "peft_version",
)


def from_adapter(
    adapter: Adapter,
    *,
    homes: Mapping[str, StoredTensor] | None = None,
    digests: Mapping[str, BaseTensor] | None = None,
) -> NativeAdapter:
    """What an adapter of any format holds, in the native format's terms.

    Args:
        adapter: The adapter.
        homes: The base's tensors by the adapter's names (`find_homes`), where the base is at hand.
            They tell shapes of weights, resized vocabularies and tensors that the base lacks.
        digests: The base's digests by module (`fingerprint`), to be recorded.

    Raises:
        UsageError: The adapter holds a bias, and without a base its weight's shape is not known.
        NameMatchError: It replaces an adapted weight by another than the base's.
    """
    saved = dict(adapter.saved)
    modules = {}
    for name in adapter.blocks:
        _drop_weight(adapter, name, saved, homes)
        modules[name] = _module(adapter, name, saved, homes, (digests or {}).get(name))
    replaced = _replaced(adapter, [n for n in saved if not _is_bias(n, modules)])
    bat = any(block.variant is Variant.BAT for block in adapter.blocks.values())
    metadata = Metadata(
        variant=adapter.config.variant,
        modules=modules,
        axis=adapter.config.axis if bat else None,
        scale=adapter.scale if adapter.scale != 1.0 else None,
        replaced={module: tuple(sorted(own)) for module, own in replaced.items()} or None,
        added=_added(adapter, replaced, homes) or None,
        vocab_size=_vocab_size(adapter, saved, homes),
        fingerprint=root_of(modules) if digests else None,
        info=_info(adapter.config),
    )
    tensors = {f"{PREFIX}{m}.{BLOCK}": block.tensor for m, block in adapter.blocks.items()}
    tensors |= {PREFIX + name: tensor for name, tensor in saved.items()}
    return NativeAdapter(metadata, tensors, _free(adapter.config))


def _drop_weight(
    adapter: Adapter,
    module: str,
    saved: dict[str, Tensor],
    homes: Mapping[str, StoredTensor] | None,
) -> None:
    """Leaves out the base's weight where PEFT saved it below the block of an output head."""
    under = saved.pop(f"{module}.weight", None)
    if under is None:
        return
    stored = (homes or {}).get(f"{module}.weight")
    if stored is None or not same_values(under, stored):
        raise NameMatchError(
            f"the adapter holds {f'{module}.weight'!r} and a block for it",
            path=adapter.weights,
            hint="Give the base: where it has the same weight, the block alone is enough"
            if stored is None
            else "Merge the adapter: no format but PEFT's says both",
        )


def _module(
    adapter: Adapter,
    name: str,
    saved: Mapping[str, Tensor],
    homes: Mapping[str, StoredTensor] | None,
    digest: BaseTensor | None,
) -> Module:
    block = adapter.blocks[name]
    stored = (homes or {}).get(f"{name}.weight")
    shape = block.base_shape
    if digest is not None:
        shape = digest.shape
    elif stored is not None:
        shape = stored.shape
    has_bias = f"{name}.bias" in saved
    if has_bias and shape is None:
        raise UsageError(
            f"the shape of {name!r} is not known, and an adapter with a bias has to say it",
            path=adapter.weights,
            hint="Give the base",
        )
    return Module(
        rank=block.rank,
        mini_rank=block.mini_rank if block.variant is Variant.MINI else None,
        bias=True if has_bias else None,
        base_shape=shape,
        base_dtype=None if digest is None else digest.dtype,
        base_digest=None if digest is None else digest.digest,
    )


def _is_bias(name: str, modules: Mapping[str, Module]) -> bool:
    module, _, leaf = name.rpartition(".")
    return leaf == "bias" and module in modules


def _replaced(adapter: Adapter, names: list[str]) -> dict[str, list[str]]:
    """Replaced tensors under the modules that were saved whole, or under their own."""
    wholes = [name.split(".") for name in adapter.config.modules_to_save or ()]
    found: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        if len(parts) < 2:
            raise FormatError(f"{name!r} lies in no module", path=adapter.weights)
        ends = [
            at
            for at in range(1, len(parts))
            if any(parts[max(0, at - len(whole)) : at] == whole for whole in wholes)
        ]
        at = ends[0] if ends else len(parts) - 1
        found.setdefault(".".join(parts[:at]), []).append(".".join(parts[at:]))
    return found


def _added(
    adapter: Adapter,
    replaced: Mapping[str, list[str]],
    homes: Mapping[str, StoredTensor] | None,
) -> tuple[str, ...]:
    """Replaced modules that the base lacks; without a base, the heads of the task."""
    if homes is not None:
        lacking = [m for m, own in replaced.items() if any(f"{m}.{n}" not in homes for n in own)]
        return tuple(sorted(lacking))
    if adapter.is_native:
        return adapter.may_add
    if adapter.config.task_type not in HEAD_TASKS:
        return ()
    return tuple(sorted(m for m in replaced if m.rpartition(".")[2] in HEADS))


def _vocab_size(
    adapter: Adapter, saved: Mapping[str, Tensor], homes: Mapping[str, StoredTensor] | None
) -> int | None:
    for name, tensor in saved.items():
        stored = (homes or {}).get(name)
        if stored is not None and tensor.shape != stored.shape and tensor.shape:
            return tensor.shape[0]
    return adapter.vocab_size


def _free(config: BoneConfig) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in FREE_FIELDS} | {"inference_mode": True}
    return {name: v if FREE_FIELDS[name][0](v) else None for name, v in values.items()}


def _info(config: BoneConfig) -> dict[str, Any]:
    training = {name: getattr(config, name) for name in _TRAINING} | config.unknown
    free = {name: v for name, v in _free(config).items() if v is not None}
    info = {**free, "producer": f"boneconv {__version__}"}
    kept = {name: value for name, value in training.items() if _can_be_written(value)}
    return info | ({"training": kept} if kept else {})


def _can_be_written(value: Any) -> bool:
    """Whether a value says something, and canonical JSON can hold it."""
    if value is None or value == 0.0:
        return False
    try:
        encode(value)
    except (ConfigError, TypeError):
        return False
    return True
