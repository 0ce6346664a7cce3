"""Merging the adapters of a model into its weights, and giving the plain model back."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from tqdm import tqdm

from boneconv.errors import ConfigError, NonFiniteError, listing
from boneconv.nn.linear import BoneLinear
from boneconv.nn.model.walking import base_of, bone_layers, replace_modules, saved_modules

__all__ = ["merge_and_restore", "merge_layers", "restore_modules", "unmerge_layers"]

_MERGEABLE = (torch.float64, torch.float32, torch.float16, torch.bfloat16)

#: A layer by its name, and the adapters that are merged into it.
_Work = dict[str, tuple[BoneLinear, tuple[str, ...]]]


def merge_layers(model: torch.nn.Module, names: Sequence[str], *, safe_merge: bool = False) -> bool:
    """Puts adapters' updates into the weights of their layers, in the order of the names.

    Args:
        model: The adapted model.
        names: The adapters. What is merged already is left as it is.
        safe_merge: Whether the merged weights of all layers are formed first and checked, and
            nothing is changed where one is not finite.

    Returns:
        Whether there was anything to merge.

    Raises:
        ConfigError: A weight of a dtype that cannot be merged; nothing was changed.
        NonFiniteError: A weight, a block or a merged weight holds NaN or infinity.
    """
    work = _plan(model, names)
    _check(work, safe_merge=safe_merge, progressbar=False)
    for layer, chosen in work.values():
        layer.merge(names=chosen)
    return bool(work)


def merge_and_restore(
    model: torch.nn.Module, names: Sequence[str], *, safe_merge: bool, progressbar: bool
) -> None:
    """Merges as `merge_layers` and puts the plain layers back, a layer at a time.

    Takes the memory of one layer beyond the model. What shared its weight with an adapted layer
    keeps the weight as it was; the model's configuration then says that the two are not tied.

    Args:
        model: The adapted model.
        names: The adapters.
        safe_merge: As in `merge_layers`.
        progressbar: Whether to show one, where stderr is a terminal.

    Raises:
        ConfigError, NonFiniteError: As `merge_layers`.
    """
    work = _plan(model, names)
    _check(work, safe_merge=safe_merge, progressbar=progressbar)
    were_tied = _tied_embeddings(model)

    def merged() -> Iterator[tuple[torch.nn.Module, torch.nn.Module]]:
        for _, (layer, chosen) in _shown(work, progressbar, "Merging"):
            layer.merge(names=chosen)
            yield layer, layer.base_layer

    replace_modules(model, merged())
    _put_back(model, keep_copies=True)
    if were_tied and not _tied_embeddings(model):
        _say_untied(model)


def restore_modules(model: torch.nn.Module) -> None:
    """Takes merged updates out and puts the model's own modules back."""
    unmerge_layers(model)
    _put_back(model, keep_copies=False)


def unmerge_layers(model: torch.nn.Module) -> bool:
    """Puts the original weights back, to the bit; whether there was anything merged."""
    merged = [layer for layer in bone_layers(model).values() if layer.merged_adapters]
    for layer in merged:
        layer.unmerge()
    return bool(merged)


def _plan(model: torch.nn.Module, names: Sequence[str]) -> _Work:
    work: _Work = {}
    for name, layer in bone_layers(model).items():
        chosen = [n for n in names if n in layer.bone_block and n not in layer.merged_adapters]
        if chosen:
            work[name] = (layer, tuple(chosen))
    return work


def _check(work: _Work, *, safe_merge: bool, progressbar: bool) -> None:
    for name, (layer, _) in work.items():
        if layer.weight.dtype not in _MERGEABLE:
            raise ConfigError(
                f"the weight of {name!r} has a dtype that cannot be merged",
                expected=", ".join(map(str, _MERGEABLE)),
                found=str(layer.weight.dtype),
            )
    broken = []
    for name, (layer, chosen) in _shown(work, progressbar, "Checking") if safe_merge else ():
        try:
            layer.merged_weight((*layer.merged_adapters, *chosen), safe_merge=True)
        except NonFiniteError:
            broken.append(name)
    if broken:
        raise NonFiniteError(
            f"weights would be merged that are not finite: {listing(broken)}",
            found="NaN or infinity in a weight, a block or their sum",
            hint="Nothing was changed",
        )


def _put_back(model: torch.nn.Module, *, keep_copies: bool) -> None:
    pairs: list[tuple[torch.nn.Module, torch.nn.Module]] = []
    for layer in bone_layers(model).values():
        pairs.append((layer, layer.base_layer))
    for holder in saved_modules(model).values():
        pairs.append((holder, holder.running() if keep_copies else holder.original_module))
    replace_modules(model, pairs)


def _tied_embeddings(model: torch.nn.Module) -> bool:
    """Whether a model of transformers has one weight for its embeddings and its output layer."""
    weights = []
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        try:
            module = getattr(model, getter)()
        except (AttributeError, NotImplementedError):
            return False
        weights.append(getattr(base_of(module), "weight", None))
    return weights[0] is not None and weights[0] is weights[1]


def _say_untied(model: torch.nn.Module) -> None:
    """Lets the model's configuration say that its embeddings and its output layer differ."""
    config: Any = getattr(model, "config", None)
    parts: tuple[Any, ...] = (config, getattr(config, "text_config", None))
    for part in parts:
        if getattr(part, "tie_word_embeddings", False):
            part.tie_word_embeddings = False
    # What transformers 5 leaves out when it saves, and ties again when it loads.
    if isinstance(getattr(model, "all_tied_weights_keys", None), dict):
        model.all_tied_weights_keys = {}  # type: ignore[assignment]
    warnings.warn(
        "the embeddings and the output layer had one weight and now have two; the model's "
        "configuration says so (tie_word_embeddings false)",
        stacklevel=4,
    )


def _shown(
    work: _Work, progressbar: bool, title: str
) -> Iterable[tuple[str, tuple[BoneLinear, tuple[str, ...]]]]:
    hidden = not progressbar or not sys.stderr.isatty()
    return tqdm(work.items(), desc=title, unit="layer", disable=hidden)
