"""The merged checkpoint as the model that is traced, and which of its weights the graph must hold.

No code from a checkpoint is run and no file but safetensors is read: ``trust_remote_code`` is off,
and so is the network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from boneconv.dtypes import FLOATS
from boneconv.errors import InputError, NameMatchError, first_line, listing
from boneconv.io.checkpoint import Checkpoint
from boneconv.names.architecture import architectures
from boneconv.onnx.tracing.quiet import quiet_export
from boneconv.onnx.tracing.tasks import Task
from boneconv.pretrained import require_libraries

__all__ = ["Needed", "load_model", "needed_weights", "reached_parameters", "require_tracing"]


def require_tracing() -> None:
    """Raises MissingExtraError where a library that tracing needs is not installed."""
    require_libraries(("transformers", "onnxscript"), "tracing a model", "transformers")


def load_model(checkpoint: Checkpoint, task: Task, dtype: str) -> Any:
    """Loads a checkpoint with transformers, for one task.

    Args:
        checkpoint: A merged checkpoint, a folder with a config.json.
        task: What the model is for.
        dtype: ``float32``, ``float16`` or ``bfloat16``.

    Returns:
        The model in evaluation mode, on the CPU; it attends with torch's own attention.

    Raises:
        InputError: transformers has no class for it, or cannot load it.
    """
    auto = getattr(import_module("transformers"), task.auto_class)
    try:
        with quiet_export():
            model = auto.from_pretrained(
                str(checkpoint.root),
                dtype=getattr(import_module("torch"), dtype),
                trust_remote_code=False,
                local_files_only=True,
                use_safetensors=True,
            )
    except Exception as error:
        raise InputError(
            f"transformers cannot load this checkpoint for {task.name}: {first_line(error)}",
            path=checkpoint.root,
            hint="Code that comes with a checkpoint is never run. Choose another --task, or patch "
            "a graph that exists with --graph",
        ) from error
    return model.eval()


def reached_parameters(model: Any, outputs: Mapping[str, Any], names: tuple[str, ...]) -> set[str]:
    """The parameters that some outputs of a forward pass with gradients depend on.

    Nothing is differentiated: the graph that autograd recorded is walked to its leaves.

    Args:
        model: The model.
        outputs: What its forward pass gave.
        names: The outputs that count.

    Returns:
        Parameter names, every name of a tied one.
    """
    pending = [outputs[name].grad_fn for name in names]
    seen, leaves = set(), set()
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        pending.extend(following for following, _ in node.next_functions)
    every = model.named_parameters(remove_duplicate=False)
    return {name for name, parameter in every if id(parameter) in leaves}


@dataclass(frozen=True)
class Needed:
    """What a traced graph must hold.

    Attributes:
        tensors: Tensors of the checkpoint that are weights of the model as they stand.
        converted: Parameters that transformers puts together from several tensors.
        dropped: Tensors that the task has no use for, such as a pooler.
    """

    tensors: tuple[str, ...]
    converted: tuple[str, ...]
    dropped: tuple[str, ...]


def needed_weights(checkpoint: Checkpoint, model: Any, reached: set[str]) -> Needed:
    """Which tensors of a checkpoint a graph of the model must hold.

    A floating tensor is needed when the wanted outputs depend on the parameter that transformers
    makes of it, or when it is a buffer of the model.

    Raises:
        NameMatchError: An output depends on a parameter that the checkpoint does not hold; its
            values would be random.
    """
    config = checkpoint.root / "config.json"
    names = [name for name, tensor in checkpoint.tensors.items() if tensor.dtype in FLOATS]
    homes = next(architectures(config, [type(model).__name__])).load(names)
    counted = reached | {name for name, _ in model.named_buffers()}
    wanted = {name for name in names if counted & set(homes[name].targets)}
    held = {target for name in wanted for target in homes[name].targets}
    _check_none_random(model, reached - held, held, checkpoint.root)
    whole = {name for name in wanted if not homes[name].converted}
    converted = {t for name in wanted - whole for t in homes[name].targets if t in counted}
    return Needed(
        tensors=tuple(name for name in names if name in whole),
        converted=tuple(sorted(converted)),
        dropped=tuple(name for name in names if name not in wanted),
    )


def _check_none_random(model: Any, lacking: set[str], held: set[str], path: Path) -> None:
    """Raises NameMatchError for parameters that neither lie on the disk nor are tied to one."""
    every = dict(model.named_parameters(remove_duplicate=False))
    on_disk = {id(every[name]) for name in held if name in every}
    random = [name for name in lacking if id(every[name]) not in on_disk]
    if random:
        raise NameMatchError(
            f"the checkpoint has no {listing(random)}, which {type(model).__name__} needs",
            path=path,
            hint="Choose the --task that the checkpoint was trained for",
        )
