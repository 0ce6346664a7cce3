"""What transformers knows about a model's names: the boundary to that library.

Nothing outside this module imports transformers for names. An `Architecture` is built from a
config.json alone, on the meta device: no weights are read, no code from the checkpoint is run.
Read against transformers 5.23; `_internals` is the one place that reaches below its public API.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

from boneconv.errors import MissingExtraError, NameMatchError, first_line, printable
from boneconv.pretrained import quiet_transformers

__all__ = ["Architecture", "Home", "architectures", "trained_on", "transformers_version"]

#: PEFT's task types and the auto classes that it loads their bases with.
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "FEATURE_EXTRACTION": "AutoModel",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
}

_INSTALL = "Install it with: pip install 'boneconv[transformers]'"


def trained_on(
    task_type: str | None = None, auto_mapping: Mapping[str, Any] | None = None
) -> tuple[str, ...]:
    """The transformers classes that an adapter may have been trained on, the likeliest first.

    Args:
        task_type: PEFT's task type, which stands for an auto class.
        auto_mapping: What PEFT writes where there is no task type: ``base_model_class`` and
            ``parent_library``. Classes from outside transformers are not taken.

    Returns:
        Class names for the ``architectures`` of `resolve`, `disk_name` and `tied_names`.
    """
    names = []
    if auto_mapping is not None:
        library = str(auto_mapping.get("parent_library", ""))
        if library.split(".")[0] == "transformers":
            names.append(str(auto_mapping.get("base_model_class", "")))
    if task_type is not None and task_type in _TASKS:
        names.append(_TASKS[task_type])
    return tuple(name for name in names if name)


def transformers_version() -> str:
    """The installed transformers.

    Raises:
        MissingExtraError: There is none.
    """
    try:
        return str(import_module("transformers").__version__)
    except ImportError as error:
        raise MissingExtraError("transformers is not installed", hint=_INSTALL) from error


@dataclass(frozen=True)
class _Internals:
    """The parts of transformers below its public API that names depend on."""

    #: model -> its transforms, without those for old checkpoints of any model
    own_transforms: Callable[[Any], list[Any]]
    #: model -> all transforms, in the order in which a checkpoint goes through them
    all_transforms: Callable[[Any], list[Any]]
    #: key, renamings, converters, base prefix, parameters -> new key, converter's pattern or None
    rename: Callable[..., tuple[str, str | None]]
    #: the order in which the keys of a checkpoint are renamed (some renames depend on it)
    order: Callable[[str], Any]
    renaming: type[Any]
    converter: type[Any]
    #: a renaming that says nothing about how the checkpoint was written, unless it was used
    prefix_change: type[Any] | None


def _internals() -> _Internals:
    version = transformers_version()
    try:
        mapping = import_module("transformers.conversion_mapping").get_model_conversion_mapping
        loading = import_module("transformers.core_model_loading")
        return _Internals(
            own_transforms=lambda model: list(mapping(model, add_legacy=False)),
            all_transforms=lambda model: list(mapping(model)),
            rename=loading.rename_source_key,
            order=loading.dot_natural_key,
            renaming=loading.WeightRenaming,
            converter=loading.WeightConverter,
            prefix_change=vars(loading).get("PrefixChange"),
        )
    except (ImportError, AttributeError) as error:
        raise MissingExtraError(
            f"transformers {version} does not have the conversion mapping that is needed here "
            f"({printable(str(error))})",
            expected="transformers 5, tested with 5.23",
            found=version,
            hint=_INSTALL,
        ) from error


@dataclass(frozen=True)
class Home:
    """Where transformers puts a checkpoint tensor.

    Attributes:
        targets: The parameters it becomes, in the model's namespace.
        converted: Whether it is stacked, split, transposed or the like on the way.
    """

    targets: tuple[str, ...]
    converted: bool


@dataclass(frozen=True)
class Architecture:
    """A model class with the names of a configuration.

    Attributes:
        name: The class.
        shapes: All names of its state dict, and their shapes.
        ties: A tied parameter -> the one whose values it shares, as the configuration has it.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    ties: Mapping[str, str]
    _base_prefix: str
    _own: tuple[Any, ...]
    _legacy: tuple[Any, ...]
    _library: _Internals

    @property
    def parameters(self) -> Collection[str]:
        """All names of its state dict."""
        return self.shapes.keys()

    def load(self, names: Collection[str]) -> dict[str, Home]:
        """Where ``from_pretrained`` puts each tensor of a checkpoint with these names."""
        library = self._library
        transforms = deepcopy([*self._own, *self._legacy])
        renamings = [t for t in transforms if isinstance(t, library.renaming)]
        converters = [t for t in transforms if isinstance(t, library.converter)]
        by_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
        known = dict.fromkeys(self.parameters, True)
        homes = {}
        for name in sorted(names, key=library.order):
            new, pattern = library.rename(name, renamings, converters, self._base_prefix, known)
            if new not in known and name in known:
                new, pattern = library.rename(name, [], [], self._base_prefix, known)
            if pattern is None:
                homes[name] = Home((new,), converted=False)
            else:
                first, *others = by_pattern[pattern].target_patterns
                targets = (new, *(new.replace(first, other) for other in others))
                homes[name] = Home(targets, converted=True)
        return homes

    def saved_as(self, parameter: str, homes: Mapping[str, Home]) -> Iterator[str]:
        """Names that a checkpoint may give a parameter, those in its own style first.

        Every way to undo the renames is tried on the tensors that are on disk; the one that gives
        most of them the name they have comes first.
        """
        plain = {home.targets[0]: name for name, home in homes.items() if not home.converted}
        styles = [(undo, prefix) for undo in self._reversals() for prefix in self._prefixings()]

        def agreement(style: tuple[Callable[[str], str], Callable[[str], str]]) -> int:
            undo, prefix = style
            return sum(prefix(undo(target)) == name for target, name in plain.items())

        for undo, prefix in sorted(styles, key=agreement, reverse=True):
            yield prefix(undo(parameter))

    def _reversals(self) -> Iterator[Callable[[str], str]]:
        """Ways to undo the renames; the first is how the library itself saves a new model."""
        change = self._library.prefix_change
        own = [t for t in self._own if isinstance(t, self._library.renaming)]
        legacy = [t for t in self._legacy if isinstance(t, self._library.renaming)]
        lasting = [t for t in own if change is None or not isinstance(t, change)]
        for chosen in (lasting, [], own, [*lasting, *legacy], [*own, *legacy]):
            yield _undo([t.reverse_transform() for t in reversed(chosen)])

    def _prefixings(self) -> Iterator[Callable[[str], str]]:
        """What a checkpoint of the bare model, or of a model with a head, does to the prefix."""
        yield lambda name: name
        if self._base_prefix:
            prefix = f"{self._base_prefix}."
            yield lambda name: name.removeprefix(prefix)
            yield lambda name: prefix + name


def _undo(transforms: Sequence[Any]) -> Callable[[str], str]:
    def undo(name: str) -> str:
        for transform in transforms:
            name, _ = transform.rename_source_key(name)
        return name

    return undo


def architectures(config: Path, preferred: Sequence[str] = ()) -> Iterator[Architecture]:
    """The classes that a configuration can be built with: preferred, its own, the bare model.

    Args:
        config: A config.json, or the folder it lies in.
        preferred: Names of classes or auto classes of transformers, tried first. Those that do not
            fit the configuration are passed over.

    Raises:
        MissingExtraError: transformers is missing or too old.
        NameMatchError: There is no config.json, or transformers cannot build any class from it.
    """
    _internals()
    file = config / "config.json" if config.is_dir() else config
    if not file.is_file():
        raise NameMatchError("there is no config.json to tell the architecture", path=file)
    stamp = file.stat()
    own = _declared(file)
    failure: NameMatchError | None = None
    built = set()
    for name in dict.fromkeys([*preferred, *own, "AutoModel"]):
        try:
            found = _build(str(file), (stamp.st_mtime_ns, stamp.st_size), name)
        except NameMatchError as error:
            failure = failure or error
            continue
        if found is not None and found.name not in built:
            built.add(found.name)
            yield found
    if not built:
        raise failure or NameMatchError("transformers knows no class for this config", path=file)


def _declared(file: Path) -> list[str]:
    declared = getattr(_configuration(file), "architectures", None)
    return [str(name) for name in declared] if isinstance(declared, list) else []


def _configuration(file: Path) -> Any:
    auto = import_module("transformers").AutoConfig
    try:
        with quiet_transformers():
            return auto.from_pretrained(str(file), trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise _cannot_build(file, error) from error


@lru_cache(maxsize=8)
def _build(file: str, stamp: tuple[int, int], name: str) -> Architecture | None:
    """The class ``name`` with the names of a config.json; None where the two do not fit.

    ``stamp``, the file's time and size, keeps the cache from answering for an older file.
    """
    library = _internals()
    path = Path(file)
    try:
        with quiet_transformers():
            model = _model(name, _configuration(path))
            if model is None:
                return None
            own, every = library.own_transforms(model), library.all_transforms(model)
            return Architecture(
                name=type(model).__name__,
                shapes={name: tuple(t.shape) for name, t in model.state_dict().items()},
                ties=dict(model.all_tied_weights_keys),
                _base_prefix=str(model.base_model_prefix),
                _own=tuple(own),
                _legacy=tuple(every[len(own) :]),
                _library=library,
            )
    except NameMatchError:
        raise
    except Exception as error:
        raise _cannot_build(path, error) from error


def _model(name: str, config: Any) -> Any:
    torch = import_module("torch")
    transformers = import_module("transformers")
    found: Any = getattr(transformers, name, None) if name.isidentifier() else None
    is_class = isinstance(found, type)
    if not is_class:
        return None
    with torch.device("meta"):
        if name.startswith("AutoModel"):
            return found.from_config(config, trust_remote_code=False)
        if not issubclass(found, transformers.PreTrainedModel):
            return None
        return found(config) if isinstance(config, found.config_class) else None


def _cannot_build(file: Path, error: Exception) -> NameMatchError:
    return NameMatchError(
        f"transformers {transformers_version()} cannot build the model to tell its names: "
        f"{first_line(error)}",
        path=file,
    )
