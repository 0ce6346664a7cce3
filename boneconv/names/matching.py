"""Wanted tensors matched one to one against the tensors of a checkpoint."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from boneconv.errors import MissingExtraError, NameMatchError, listing
from boneconv.names.architecture import Architecture, Home, architectures, transformers_version

__all__ = ["DIRECT", "Resolution", "disk_name", "parameter_shapes", "resolve", "tied_names"]

#: `Resolution.via` where every name stands in the checkpoint as it is.
DIRECT = "direct"


@dataclass(frozen=True)
class Resolution:
    """Where the wanted tensors are.

    Attributes:
        found: Wanted name -> name on disk; no two of one share the other.
        missing: Wanted names with no tensor on disk, sorted.
        via: `DIRECT`, or ``transformers <version>``.
    """

    found: dict[str, str]
    missing: tuple[str, ...]
    via: str


def resolve(
    wanted: Collection[str],
    on_disk: Collection[str],
    config: Path | None,
    *,
    optional: Collection[str] = (),
    architectures: Sequence[str] = (),
) -> Resolution:
    """Find each wanted tensor among those on disk.

    Names that are there as they stand are taken. Where one that is not optional is left over,
    transformers says what it loads each tensor on disk as, and all names are matched by that: a
    wanted tensor and one on disk belong together when they are loaded into the same parameter.
    Where there is no config, or transformers cannot add anything, what is left over is missing.

    Args:
        wanted: Tensor names in the model's namespace, such as
            ``model.layers.0.self_attn.q_proj.weight``.
        on_disk: All tensor names of the checkpoint.
        config: The checkpoint's config.json or its folder; None where there is none.
        optional: Those of the wanted names that alone do not make it ask transformers: whether
            they are on disk under another name is then left open, and `disk_name` tells.
        architectures: Classes the adapter may have been trained on (`trained_on`), tried before
            those of the config.

    Raises:
        MissingExtraError: A name has no direct match and transformers is not installed.
        NameMatchError: Two tensors for one name or two names for one tensor; a wanted tensor that
            is stored in another layout (fused, stacked, transposed); a config that transformers
            cannot build a model from.
    """
    disk = set(on_disk)
    left = sorted(set(wanted) - disk)
    if config is None or not set(left) - set(optional):
        return Resolution({name: name for name in wanted if name in disk}, tuple(left), DIRECT)
    try:
        via = f"transformers {transformers_version()}"
        model = _best_architecture(config, architectures, wanted, disk)
    except MissingExtraError as error:
        raise MissingExtraError(
            f"the checkpoint has no tensors named {listing(left)}; transformers may know them "
            f"under other names, but: {error.message}",
            path=config,
            hint=error.hint,
        ) from error
    except NameMatchError as error:
        raise NameMatchError(
            f"the checkpoint has no tensors named {listing(left)}, and {error.message}",
            path=error.path,
        ) from error
    found = _match(wanted, _goals(model, wanted, disk), model.load(disk), config)
    missing = tuple(sorted(set(wanted) - set(found)))
    return Resolution(found, missing, via)


def disk_name(
    wanted: str,
    on_disk: Collection[str],
    config: Path | None,
    *,
    architectures: Sequence[str] = (),
) -> str:
    """The name under which ``from_pretrained`` looks for a tensor that is to be added.

    The name follows the style of the checkpoint, and transformers was asked whether it loads it
    into the wanted parameter, and everything else as before. Where a tensor on disk is already
    loaded into that parameter, it is that tensor's name: replace it, do not add another.

    Args:
        wanted: The tensor's name in the model's namespace, such as ``classifier.weight``.
        on_disk: All tensor names of the checkpoint.
        config: The checkpoint's config.json or its folder.
        architectures: As in `resolve`; a head is only known to the class that has it.

    Raises:
        MissingExtraError: transformers is not installed, and the name is not on disk as it stands.
        NameMatchError: No known class has such a parameter, or it is stored in another layout, or
            there is no config to tell.
    """
    disk = set(on_disk)
    if wanted in disk:
        return wanted
    if config is None:
        raise NameMatchError(
            f"{listing([wanted])} is not in the checkpoint, and without a config.json there is no "
            "telling under which name it would be looked for"
        )
    model = _best_architecture(config, architectures, [wanted], disk)
    parameter = _goals(model, [wanted], disk).get(wanted)
    if parameter is None:
        raise NameMatchError(
            f"{model.name} has no parameter {listing([wanted])}",
            path=config,
            hint="The adapter may have been trained on another class than the config names",
        )
    homes = model.load(disk)
    there = _match([wanted], {wanted: parameter}, homes, config)
    if there:
        return there[wanted]
    for name in dict.fromkeys([*model.saved_as(parameter, homes), wanted]):
        if name not in disk and model.load([*disk, name]) == {
            **homes,
            name: Home((parameter,), converted=False),
        }:
            return name
    raise NameMatchError(
        f"there is no name under which transformers would load {listing([wanted])}", path=config
    )


def tied_names(config: Path, *, architectures: Sequence[str] = ()) -> dict[str, str]:
    """The parameters that share their values with another, as the configuration ties them.

    Args:
        config: The checkpoint's config.json or its folder.
        architectures: As in `resolve`.

    Returns:
        A tied parameter -> its source, both in the model's namespace, such as ``lm_head.weight``
        -> ``model.embed_tokens.weight``. Empty where nothing is tied. Usually only the source is
        on disk, but it may be the other alone, or both.

    Raises:
        MissingExtraError: transformers is not installed.
        NameMatchError: transformers cannot build a model from the config.
    """
    return dict(_best_architecture(config, architectures, [], ()).ties)


def parameter_shapes(
    wanted: Collection[str], config: Path, *, architectures: Sequence[str] = ()
) -> dict[str, tuple[int, ...]]:
    """The shapes that a configuration alone gives to parameters; those it does not know are absent.

    Args:
        wanted: Tensor names in the model's namespace.
        config: The checkpoint's config.json or its folder.
        architectures: As in `resolve`.

    Raises:
        MissingExtraError: transformers is not installed.
        NameMatchError: transformers cannot build a model from the config.
    """
    model = _best_architecture(config, architectures, wanted, ())
    goals = _goals(model, wanted, ())
    return {name: model.shapes[goal] for name, goal in goals.items() if goal is not None}


def _best_architecture(
    config: Path, preferred: Sequence[str], wanted: Collection[str], disk: Collection[str]
) -> Architecture:
    """The first class that knows all wanted names, or the one that knows most of them."""
    best: tuple[int, Architecture] | None = None
    for model in architectures(config, preferred):
        known = len(_goals(model, wanted, disk))
        if best is None or known > best[0]:
            best = (known, model)
        if known == len(wanted):
            break
    assert best is not None, "architectures() yields one or raises"
    return best[1]


def _goals(
    model: Architecture, wanted: Collection[str], disk: Collection[str]
) -> dict[str, str | None]:
    """Wanted name -> the parameter it stands for; None for a tensor on disk that is none.

    An adapter may speak of the class it was trained on, of an older namespace of it, or of the
    checkpoint's own: the model's names come first, then those that transformers still loads.
    """
    goals: dict[str, str | None] = {}
    foreign = []
    for name in wanted:
        if name in model.parameters:
            goals[name] = name
        elif name in disk:
            goals[name] = None
        else:
            foreign.append(name)
    for name, home in model.load(foreign).items():
        if not home.converted and home.targets[0] in model.parameters:
            goals[name] = home.targets[0]
    return goals


def _match(
    wanted: Collection[str],
    goals: Mapping[str, str | None],
    homes: Mapping[str, Home],
    config: Path,
) -> dict[str, str]:
    """Wanted name -> the one tensor that is loaded into its parameter."""
    plain: dict[str, list[str]] = defaultdict(list)
    converted: dict[str, list[str]] = defaultdict(list)
    for name, home in homes.items():
        for target in home.targets:
            (converted if home.converted else plain)[target].append(name)
    users = defaultdict(list)
    for name in wanted:
        if name not in goals:
            continue
        goal = goals[name]
        sources = [name] if goal is None else plain[goal]
        if goal is not None and converted[goal]:
            raise NameMatchError(
                f"{listing([name])} is stored in another layout: transformers makes it from "
                f"{listing(converted[goal] + sources)}",
                path=config,
                hint="Only a tensor that is a module's whole weight on disk can be changed there",
            )
        if len(sources) > 1:
            raise NameMatchError(
                f"several tensors are loaded as {listing([name])}: {listing(sources)}", path=config
            )
        if sources:
            users[sources[0]].append(name)
    for source, names in users.items():
        if len(names) > 1:
            raise NameMatchError(
                f"several names stand for the one tensor {listing([source])}: {listing(names)}",
                path=config,
            )
    return {names[0]: source for source, names in users.items()}
