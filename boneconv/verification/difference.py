"""`diff`: two checkpoints or two adapters, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from boneconv.adapter import Adapter
from boneconv.config import CONFIG_NAME, BoneConfig
from boneconv.dtypes import FLOATS
from boneconv.engine.compute import read_rows
from boneconv.engine.progress import Progress
from boneconv.engine.workers import Place, can_fork, run_queues, usable_cores
from boneconv.errors import UsageError
from boneconv.formats import read_adapter, says_native
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.hub import ADAPTER, BASE, Source, locate
from boneconv.io.open_files import OpenFiles
from boneconv.io.pth import PTH_SUFFIXES
from boneconv.io.safetensors import StoredTensor, Tensor
from boneconv.kernels.stage import Array
from boneconv.planning.plan import PathLike
from boneconv.verification.places import kind_of, layer_of
from boneconv.verification.report import CandidateKind, DiffReport, Presence, TensorDiff
from boneconv.verification.ulps import differing, ordered

__all__ = ["diff"]

_CHUNK = 1 << 19
#: Fields of an adapter's configuration that say where it came from, not what it does.
_ORIGIN = ("base_model_name_or_path", "revision", "unknown", "inference_mode")


def diff(
    a: PathLike, b: PathLike, *, workers: int | None = None, progress: Progress | None = None
) -> DiffReport:
    """Compares two checkpoints, or two adapters of any format.

    Memory is bounded whatever their size. Adapters are compared by the modules' names in the model,
    so that formats may differ.

    Args:
        a: A folder, a file or a Hub id.
        b: The same; what is measured relative to a.
        workers: Workers that compute; by default one for each usable core.
        progress: Is told how far it is.

    Returns:
        Every tensor of either side.

    Raises:
        UsageError: One is a checkpoint, the other an adapter.
        InputError: One of its kinds, for a side that cannot be read.
        MachineError: Reading failed.
    """
    kinds = [_is_adapter(Path(side)) for side in (a, b)]
    if kinds[0] != kinds[1]:
        raise UsageError("a checkpoint and an adapter cannot be compared", path=a, found=str(b))
    sources = [locate(side, ADAPTER if kinds[0] else BASE) for side in (a, b)]
    settings: tuple[tuple[str, str, str], ...] = ()
    if kinds[0]:
        adapters = [read_adapter(source.path) for source in sources]
        settings = _settings(*adapters)
        one, other = map(_adapter_tensors, adapters)
    else:
        one, other = map(_checkpoint_tensors, sources)
    found = _compare(one, other, workers, progress)
    names = [*one, *(name for name in other if name not in one)]
    return DiffReport(
        a=sources[0].given,
        b=sources[1].given,
        kind=CandidateKind.ADAPTER if kinds[0] else CandidateKind.CHECKPOINT,
        tensors=tuple(_report(n, one.get(n), other.get(n), found.get(n)) for n in names),
        settings=settings,
    )


def _is_adapter(path: Path) -> bool:
    """Whether a local path is an adapter; a Hub id is taken for one if its listing says so."""
    if path.is_dir():
        weights = (
            any(path.glob("*.safetensors.index.json")) or (path / "model.safetensors").exists()
        )
        return not weights and ((path / CONFIG_NAME).is_file() or says_native(path))
    return path.is_file() and (says_native(path) or _is_rwkv_adapter(path))


def _is_rwkv_adapter(path: Path) -> bool:
    if path.suffix not in PTH_SUFFIXES:
        return False
    return any(name.endswith((".bone", ".disha")) for name in open_checkpoint(path).tensors)


def _checkpoint_tensors(source: Source) -> Mapping[str, Tensor]:
    return open_checkpoint(source.path).tensors


def _adapter_tensors(adapter: Adapter) -> Mapping[str, Tensor]:
    """Its tensors by what they are: a block by its module's name."""
    blocks = {f"{name}.block": block.tensor for name, block in adapter.blocks.items()}
    return {**blocks, **adapter.saved}


def _settings(one: Adapter, other: Adapter) -> tuple[tuple[str, str, str], ...]:
    """Settings that differ and change what the adapters do."""
    found = [
        (field.name, str(getattr(one.config, field.name)), str(getattr(other.config, field.name)))
        for field in fields(BoneConfig)
        if field.name not in _ORIGIN
        and getattr(one.config, field.name) != getattr(other.config, field.name)
    ]
    if one.scale != other.scale:
        found.append(("scale", f"{one.scale:g}", f"{other.scale:g}"))
    return tuple(found)


@dataclass(frozen=True)
class _Sums:
    """What is summed up over some elements: a and b."""

    elements: int = 0
    same_bits: bool = True
    differing: int = 0
    max_ulp: float = 0.0
    max_abs: float = 0.0
    error: float = 0.0
    dot: float = 0.0
    a: float = 0.0
    b: float = 0.0

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(
            self.elements + other.elements,
            self.same_bits and other.same_bits,
            self.differing + other.differing,
            max(self.max_ulp, other.max_ulp),
            max(self.max_abs, other.max_abs),
            self.error + other.error,
            self.dot + other.dot,
            self.a + other.a,
            self.b + other.b,
        )


@dataclass(frozen=True)
class _Task:
    """Elements ``first .. first + count`` of two tensors of one shape."""

    name: str
    one: Tensor
    other: Tensor
    first: int
    count: int


class _Worker(OpenFiles):
    """Compares parts of tensors, one after the other; a context manager."""

    def __init__(self, queues: Sequence[Sequence[_Task]]) -> None:
        super().__init__()
        self._queues = queues

    def __call__(self, place: Place) -> _Sums:
        task = self._queues[place[0]][place[1]]
        if task.one.dtype not in FLOATS or task.other.dtype not in FLOATS:
            return self._bytes(task)
        one, other = (self._values(side, task) for side in (task.one, task.other))
        if one.dtype == other.dtype and not len(differing(one, other)):
            with np.errstate(all="ignore"):
                wide = one.astype(np.promote_types(one.dtype, np.float32))
                norm = float(np.vdot(wide, wide))
            return _Sums(elements=task.count, dot=norm, a=norm, b=norm)
        return _measured(one, other)

    def _values(self, tensor: Tensor, task: _Task) -> Array:
        reader = self.reader(tensor.path) if isinstance(tensor, StoredTensor) else None
        return read_rows(tensor, reader, task.first, (task.count, 1)).reshape(-1)

    def _bytes(self, task: _Task) -> _Sums:
        """Another dtype: whether the bytes are equal, in one piece of the file."""
        if task.one.dtype != task.other.dtype:
            return _Sums(elements=task.count, same_bits=False)
        parts = []
        for tensor in (task.one, task.other):
            assert isinstance(tensor, StoredTensor)
            part = bytearray(task.count)
            self.reader(tensor.path).read_into(memoryview(part), tensor.offset + task.first)
            parts.append(part)
        return _Sums(elements=task.count, same_bits=parts[0] == parts[1])


def _measured(one: Array, other: Array) -> _Sums:
    with np.errstate(all="ignore"):
        a, b = one.astype(np.float64), other.astype(np.float64)
        coarser = min(one.dtype, other.dtype, key=_digits)
        steps = np.abs(ordered(one.astype(coarser)) - ordered(other.astype(coarser)))
        wrong = ~(a == b)
        usable = np.isfinite(a) & np.isfinite(b)
        a, b = a[usable], b[usable]
        error = b - a
        return _Sums(
            elements=one.size,
            same_bits=False,
            differing=int(np.count_nonzero(wrong)),
            max_ulp=float(steps[wrong & usable].max(initial=0)),
            max_abs=float(np.abs(error).max(initial=0.0)),
            error=float(np.vdot(error, error)),
            dot=float(np.vdot(a, b)),
            a=float(np.vdot(a, a)),
            b=float(np.vdot(b, b)),
        )


def _digits(dtype: np.dtype[Any]) -> int:
    """Significant bits."""
    return {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}[dtype.name]


def _compare(
    one: Mapping[str, Tensor],
    other: Mapping[str, Tensor],
    workers: int | None,
    progress: Progress | None,
) -> dict[str, _Sums]:
    """What differs in tensors that both sides have in one shape."""
    shared = [n for n in one if n in other and one[n].shape == other[n].shape]
    tasks = [task for name in shared for task in _tasks(name, one[name], other[name])]
    if progress is not None:
        progress.start(sum(task.count for task in tasks))
    found = {name: _Sums() for name in shared}

    def on_done(place: Place, sums: _Sums) -> None:
        task = tasks[place[1]]
        found[task.name] += sums
        if progress is not None:
            progress.advance(task.count)

    run_queues(
        [len(tasks)],
        lambda: _Worker([tasks]),
        on_done,
        workers or usable_cores(),
        processes=can_fork(),
    )
    return found


def _tasks(name: str, one: Tensor, other: Tensor) -> list[_Task]:
    floats = one.dtype in FLOATS and other.dtype in FLOATS
    total = math.prod(one.shape) if floats else one.nbytes
    step = _CHUNK
    return [
        _Task(name, one, other, first, min(step, total - first)) for first in range(0, total, step)
    ]


def _report(name: str, one: Tensor | None, other: Tensor | None, sums: _Sums | None) -> TensorDiff:
    either = one or other
    assert either is not None
    sides = Presence.BOTH
    if one is None or other is None:
        sides = Presence.ONLY_B if one is None else Presence.ONLY_A
    floats = one is not None and other is not None and {one.dtype, other.dtype} <= FLOATS.keys()
    measured = sums if sums is not None and floats else None
    same_kind = one is not None and other is not None and one.dtype == other.dtype
    return TensorDiff(
        name=name,
        presence=sides,
        dtype_a=one.dtype if one else None,
        dtype_b=other.dtype if other else None,
        shape_a=one.shape if one else None,
        shape_b=other.shape if other else None,
        identical=sums is not None and sums.same_bits and same_kind,
        elements=math.prod(either.shape),
        layer=layer_of(name),
        kind=kind_of(name),
        differing=measured.differing if measured else None,
        max_ulp=measured.max_ulp if measured else None,
        max_abs=measured.max_abs if measured else None,
        relative_frobenius=_ratio(measured) if measured else None,
        cosine=_cosine(measured) if measured else None,
    )


def _ratio(sums: _Sums) -> float | None:
    if sums.a > 0:
        return math.sqrt(sums.error / sums.a)
    return 0.0 if sums.error == 0 else None


def _cosine(sums: _Sums) -> float | None:
    if sums.same_bits:
        return 1.0
    if not sums.a > 0 or not sums.b > 0:
        return None
    return max(-1.0, min(1.0, sums.dot / math.sqrt(sums.a) / math.sqrt(sums.b)))
