"""Which modules of a model a configuration adapts.

The rules are PEFT's (0.18.1, ``check_target_module_exists``), with these exceptions:

- 1x1 convolutions count as linear modules;
- what would go wrong without a word is an error here: a module whose owner reads its weight and
  never calls it (``out_proj`` of ``torch.nn.MultiheadAttention``), quantised weights;
- an entry of a list that matches nothing is a warning, also where others match: files often name
  modules of several architectures;
- ``layers_to_transform`` also counts lists of layers that stand at the top of the model;
- regular expressions run under a time limit (`boneconv.nn.model.regexes`).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from boneconv.config import BoneConfig
from boneconv.errors import ConfigError, listing
from boneconv.nn.linear import BoneLinear
from boneconv.nn.model.defaults import DEFAULT_TARGETS
from boneconv.nn.model.regexes import fullmatch, layer_indices
from boneconv.nn.model.saved_module import SavedModule
from boneconv.nn.model.walking import base_of, walk

__all__ = [
    "ALL_LINEAR",
    "candidates",
    "check_replaceable",
    "find_saved",
    "find_targets",
    "is_linear",
    "listed",
    "model_type",
    "refusal",
]

#: The `target_modules` that stands for every linear module but the output layer.
ALL_LINEAR = "all-linear"

_HEADS = ("score", "classifier")
_OUTPUT = "lm_head"
_PLAIN_NAME = re.compile(r"\w+")


def find_targets(model: torch.nn.Module, config: BoneConfig) -> dict[str, torch.nn.Module]:
    """The modules that a configuration adapts, by name, in the model's order.

    Args:
        model: The model, adapted or not. A layer that is adapted already is found as its
            `BoneLinear`.
        config: The configuration.

    Raises:
        ConfigError: Nothing matches, something matches that cannot be adapted, the architecture
            has no default, or a regular expression is none or takes too long.
    """
    modules = dict(walk(model))
    names = _matching(model, modules, config)
    excluded = _excluded(config, names)
    if config.exclude_modules and not excluded:
        warnings.warn(
            f"exclude_modules {_shown(config.exclude_modules)} leaves out none of the modules "
            "that target_modules names",
            stacklevel=3,
        )
    whole = _below(config.modules_to_save or (), names)
    found = [name for name in names if name not in excluded | whole]
    if not found:
        raise _nothing(modules, config, names, excluded, whole)
    for name in found:
        _check(modules, name)
    return {name: modules[name] for name in found}


def find_saved(model: torch.nn.Module, config: BoneConfig) -> dict[str, torch.nn.Module]:
    """The modules that a configuration trains in full, by name: the outermost that it names.

    Raises:
        ConfigError: None of the names is there, or a module holds adapted layers.
    """
    wanted = config.modules_to_save or ()
    modules = dict(walk(model))
    found = [name for name in modules if listed(wanted, name)]
    _check_entries("modules_to_save", wanted, modules)
    inner = {name for name in found for other in found if name.startswith(f"{other}.")}
    kept = {name: modules[name] for name in found if name not in inner}
    check_replaceable(modules, kept)
    return kept


def check_replaceable(modules: Mapping[str, torch.nn.Module], names: Iterable[str]) -> None:
    """Raises ConfigError where a module to train in full is, or holds, an adapted layer."""
    held = [n for n, module in modules.items() if isinstance(module, BoneLinear | SavedModule)]
    for name in names:
        inside = [n for n in held if n.startswith(f"{name}.")]
        if inside or isinstance(modules[name], BoneLinear):
            raise ConfigError(
                f"{name!r} would be trained in full, and another adapter changes it",
                found=listing(inside or [name]),
                hint="Keep the two adapters in models of their own",
            )


def is_linear(module: torch.nn.Module) -> bool:
    """Whether a module can be adapted: linear, or a convolution that is linear at every place."""
    return refusal(module) is None


def refusal(module: torch.nn.Module) -> str | None:
    """Why a module cannot be adapted; None where it can."""
    base = base_of(module)
    kind = type(module).__name__
    if isinstance(module, SavedModule):
        return "another adapter trains it in full"
    if isinstance(base, torch.nn.Conv2d):
        plain = base.stride == (1, 1) and base.groups == 1
        if base.kernel_size != (1, 1):
            return f"a {kind} of kernel {list(base.kernel_size)}, not 1x1"
        if not plain or base.padding not in ((0, 0), "valid", "same"):
            return f"a {kind} with stride, padding or groups"
        return None
    if not isinstance(base, torch.nn.Linear):
        return f"a {kind}"
    if isinstance(base, torch.nn.modules.linear.NonDynamicallyQuantizableLinear):
        return "a part of MultiheadAttention, which reads its weight and never calls it"
    weight = getattr(base, "weight", None)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        return f"a {kind} whose weight is not floating point"
    if weight.dim() != 2:
        return f"a {kind} whose weight is no matrix"
    return None


def candidates(modules: Mapping[str, torch.nn.Module]) -> list[str]:
    """The last parts of the names of what can be adapted, for messages."""
    return sorted({n.rpartition(".")[2] for n, module in modules.items() if is_linear(module)})


def listed(entries: Sequence[str], name: str) -> bool:
    """Whether a list of names holds a module's name, or what follows a dot in it."""
    return any(name == entry or name.endswith(f".{entry}") for entry in entries)


def model_type(model: torch.nn.Module) -> str | None:
    """The architecture that a model's configuration names (an object of any kind, or a dict)."""
    config: Any = getattr(model, "config", None)
    named = config.get("model_type") if isinstance(config, Mapping) else None
    found = named or getattr(config, "model_type", None)
    return found if isinstance(found, str) and found else None


def _matching(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], config: BoneConfig
) -> list[str]:
    """The names that ``target_modules`` and the layers select, nothing excluded yet."""
    targets = config.target_modules
    if isinstance(targets, str):
        if targets.lower() == ALL_LINEAR:
            output = _output_layers(model, modules, config)
            return [n for n, m in modules.items() if is_linear(m) and n not in output]
        matched = fullmatch("target_modules", targets, list(modules))
        return [name for name, hit in zip(modules, matched, strict=True) if hit]
    asked = targets is not None
    targets = _default(model, modules) if targets is None else targets
    _check_entries("target_modules", targets, modules, warn=asked)
    exact = [name for name in modules if name in targets]
    others = [name for name in modules if name not in targets and listed(targets, name)]
    chosen = {*exact, *_in_layers(config, others)}
    return [name for name in modules if name in chosen]


def _default(model: torch.nn.Module, modules: Mapping[str, torch.nn.Module]) -> tuple[str, ...]:
    kind = model_type(model)
    if kind not in DEFAULT_TARGETS:
        raise ConfigError(
            "target_modules is absent, and this architecture has no default",
            expected=f"target_modules, of: {listing(candidates(modules))}",
            found="a model without a model_type" if kind is None else f"model_type {kind!r}",
        )
    return DEFAULT_TARGETS[kind]


def _in_layers(config: BoneConfig, names: list[str]) -> list[str]:
    wanted, patterns = config.layers_to_transform, config.layers_pattern
    if wanted is None or wanted == ():
        return names
    layers = {wanted} if isinstance(wanted, int) else set(wanted)
    patterns = (patterns,) if isinstance(patterns, str) else patterns or ()
    patterns = tuple(pattern for pattern in patterns if pattern)
    if all(_PLAIN_NAME.fullmatch(pattern) for pattern in patterns):
        found = [_layer_index(name, patterns) for name in names]
    else:
        found = layer_indices(patterns, names)
    return [name for name, index in zip(names, found, strict=True) if index in layers]


def _layer_index(name: str, lists: Sequence[str]) -> int | None:
    """The number behind the last list of layers in a name: ``model.layers.3.mlp.fc`` -> 3."""
    parts = name.split(".")
    places = range(len(parts) - 2, 0, -1)
    for wanted in lists or (None,):
        for at in places:
            if parts[at].isdecimal() and wanted in (None, parts[at - 1]):
                return int(parts[at])
    return None


def _output_layers(
    model: torch.nn.Module, modules: Mapping[str, torch.nn.Module], config: BoneConfig
) -> set[str]:
    """The names of the layer that gives the model's answer, by its own word or by convention."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        head = getter() if callable(getter) else None
    except (NotImplementedError, AttributeError):
        head = None
    if isinstance(head, torch.nn.Module):
        return {name for name, module in modules.items() if module is head}
    if config.task_type == "SEQ_CLS":
        classifiers = [name for name in _HEADS if name in modules]
        return set(classifiers[:1])
    return {name for name in modules if name.rpartition(".")[2] == _OUTPUT}


def _excluded(config: BoneConfig, names: list[str]) -> set[str]:
    excluded = config.exclude_modules
    if not excluded:
        return set()
    if isinstance(excluded, str):
        matched = fullmatch("exclude_modules", excluded, names)
        return {name for name, hit in zip(names, matched, strict=True) if hit}
    return {name for name in names if listed(excluded, name)}


def _below(saved: Sequence[str], names: list[str]) -> set[str]:
    """The names that lie in a module that is trained in full, or are one."""
    dotted = {name: f".{name}." for name in names}
    return {name for name in names if any(f".{each}." in dotted[name] for each in saved)}


def _check(modules: Mapping[str, torch.nn.Module], name: str) -> None:
    reason = refusal(modules[name])
    if reason is not None:
        raise ConfigError(
            f"{name!r} cannot be adapted: {reason}",
            expected="linear modules and 1x1 convolutions: "
            + (listing(candidates(modules)) or "the model has none"),
            hint="Name fewer modules in target_modules, or leave it out by exclude_modules",
        )


def _check_entries(
    field: str,
    entries: Sequence[str],
    modules: Mapping[str, torch.nn.Module],
    *,
    warn: bool = True,
) -> None:
    """Raises ConfigError where a list matches nothing; warns of entries that match nothing."""
    unmatched = [each for each in entries if not any(listed((each,), name) for name in modules)]
    if not unmatched:
        return
    if len(unmatched) == len(entries):
        there = sorted({name.rpartition(".")[2] for name in modules})
        raise ConfigError(
            f"the model has none of the modules that {field} names",
            expected=f"of: {listing(candidates(modules) if field == 'target_modules' else there)}",
            found=listing(unmatched),
        )
    if warn:
        warnings.warn(
            f"the model has no module for these entries of {field}: {listing(unmatched)}",
            stacklevel=4,
        )


def _nothing(
    modules: Mapping[str, torch.nn.Module],
    config: BoneConfig,
    names: list[str],
    excluded: set[str],
    whole: set[str],
) -> ConfigError:
    """Why nothing is left to adapt."""
    if names:
        reasons = [
            reason
            for reason, applies in (
                (f"exclude_modules {_shown(config.exclude_modules)}", excluded),
                (f"modules_to_save {_shown(config.modules_to_save)}", whole),
            )
            if applies
        ]
        message = f"all {len(names)} modules that match are left out by {' and '.join(reasons)}"
    else:
        message = f"target_modules {_shown(config.target_modules)} matches no module"
        if config.layers_to_transform is not None:
            message += f" in the layers {_shown(config.layers_to_transform)}"
        if config.layers_pattern is not None:
            message += f" of {_shown(config.layers_pattern)}"
    return ConfigError(message, expected=f"some of: {listing(candidates(modules))}")


def _shown(value: Any) -> str:
    return f"[{listing(list(map(str, value)))}]" if isinstance(value, tuple) else repr(value)
