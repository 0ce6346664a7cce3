"""Models of transformers, and what they take and give. No code that comes with a model is run."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from boneconv.errors import InputError, NameMatchError, UsageError, first_line
from boneconv.names.architecture import trained_on
from boneconv.pretrained import image_size, quiet_transformers, require_libraries
from boneconv.strict_json import read_object

__all__ = [
    "Loaded",
    "accepted",
    "check_complete",
    "classes_of",
    "image_shape",
    "load_model",
    "load_tokenizer",
    "quiet",
    "require_torch",
]


@dataclass(frozen=True)
class Loaded:
    """A model and what its checkpoint lacks.

    Attributes:
        model: The model, in evaluation mode, on the CPU.
        missing: Parameters that the checkpoint does not hold and that are random now.
    """

    model: Any
    missing: tuple[str, ...]


def require_torch(*more: str) -> None:
    """Raises MissingExtraError where torch, transformers or another library is not installed."""
    require_libraries(("torch", "transformers", *more), "comparing logits", "transformers")


def classes_of(folder: Path, adapters: Sequence[Any]) -> tuple[str, ...]:
    """The classes that a base may be loaded as, those that the adapters were trained on first.

    Args:
        folder: The base's.
        adapters: The adapters.

    Raises:
        UsageError: The base is a file, or a folder without a config.json.
    """
    config = folder / "config.json"
    if not config.is_file():
        raise UsageError(
            "comparing logits needs a base with a config.json, which says what to compute",
            path=folder,
        )
    names: list[str] = []
    for adapter in adapters:
        names += trained_on(adapter.config.task_type, adapter.config.auto_mapping)
    declared = read_object(config).get("architectures")
    names += [str(name) for name in declared] if isinstance(declared, list) else []
    return tuple(dict.fromkeys([*names, "AutoModel"]))


def load_model(folder: Path, class_name: str, dtype: str) -> Loaded | None:
    """Loads a folder with transformers; None where the class is not one of its own for the folder.

    Args:
        folder: A folder with config.json and safetensors weights.
        class_name: A class or auto class of transformers.
        dtype: ``float64`` or ``float32``.

    Raises:
        InputError: transformers cannot load it.
    """
    transformers, torch = import_module("transformers"), import_module("torch")
    found = getattr(transformers, class_name, None) if class_name.isidentifier() else None
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        return None
    state = torch.random.get_rng_state()
    torch.manual_seed(0)  # what the checkpoint lacks is drawn the same in every load
    try:
        with quiet():
            model, report = found.from_pretrained(
                str(folder),
                dtype=getattr(torch, dtype),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
    except Exception as error:
        raise InputError(
            f"transformers cannot load this as {class_name}: {first_line(error)}",
            path=folder,
            hint="Code that comes with a checkpoint is never run",
        ) from error
    finally:
        torch.random.set_rng_state(state)
    model.requires_grad_(False)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others do not compute in float64
    return Loaded(model.eval(), tuple(sorted(report["missing_keys"])))


def load_tokenizer(*folders: Path) -> Any:
    """The tokenizer of the first folder that has one; None where none has."""
    auto = import_module("transformers").AutoTokenizer
    for folder in folders:
        if not any((folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json")):
            continue
        with contextlib.suppress(Exception), quiet():
            return auto.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    return None


def accepted(model: Any) -> frozenset[str]:
    """The names of the arguments of a model's forward pass."""
    return frozenset(inspect.signature(model.forward).parameters)


def image_shape(model: Any, folder: Path) -> tuple[int, int, int]:
    """Channels, height and width of a model's images: the configuration's, else the processor's."""
    config = getattr(model.config, "vision_config", None) or model.config
    channels = int(getattr(config, "num_channels", 3) or 3)
    return (channels, *image_size(config, folder))


def check_complete(missing: Sequence[str], brought: Sequence[str], folder: Path) -> None:
    """Raises NameMatchError where a base lacks parameters that no adapter brings either."""
    lacking = [name for name in missing if name not in brought]
    if lacking:
        raise NameMatchError(
            f"the base lacks {len(lacking)} parameters that the adapter does not bring: "
            f"{', '.join(lacking[:4])}",
            path=folder,
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps the library's remarks, bars and warnings off the user's screen."""
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
