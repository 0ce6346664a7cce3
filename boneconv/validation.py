"""Checking an adapter against the numbered rules, and against its base.

The stages are those of the specification (section "Validation"): all violations of the first stage
that fails are reported. Nothing is written.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boneconv.adapter import NATIVE, Adapter, Block
from boneconv.config import CONFIG_NAME
from boneconv.digest import LeafHasher, tensor_digest
from boneconv.dtypes import FLOATS
from boneconv.engine.plan import Action, PlannedTensor, Update
from boneconv.engine.station import new_merger
from boneconv.errors import NameMatchError, NonFiniteError, NotABoneAdapterError
from boneconv.formats import detect, native, peft, read_adapter
from boneconv.formats.native import StageFailed, Violation
from boneconv.formats.native.foreign import check_peft, loads_in_peft
from boneconv.formats.native.peft_config import NATIVE_TYPE, misread_by_peft
from boneconv.formats.native.rules import RULES, fail_on
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.files import Reader
from boneconv.io.hub import ADAPTER, BASE, locate
from boneconv.io.quantised import refuse_quantised_tensors
from boneconv.io.safetensors import StoredTensor, Tensor, byte_view
from boneconv.kernels import Scratch, cast_rows

__all__ = ["PeftSupport", "Validation", "validate"]

PathLike = str | os.PathLike[str]

_CHUNK = 1 << 18  # elements


@dataclass(frozen=True)
class PeftSupport:
    """What PEFT does with an adapter.

    Attributes:
        versions: The versions that load it rightly, such as ``0.14 to 0.18``; None for none.
        reason: Why no version does.
    """

    versions: str | None
    reason: str | None = None

    def __str__(self) -> str:
        return f"loads in PEFT {self.versions}" if self.versions else f"refused: {self.reason}"


@dataclass(frozen=True)
class Validation:
    """What a check found.

    Attributes:
        path: The adapter.
        format: Its format: ``native``, ``peft`` and so on.
        with_base: Whether it was held against a base.
        violations: All violations of the first stage that fails; empty if it is valid.
        peft: What PEFT does with it.
    """

    path: Path
    format: str
    with_base: bool
    violations: tuple[Violation, ...]
    peft: PeftSupport

    @property
    def valid(self) -> bool:
        """Whether no rule is broken."""
        return not self.violations

    @property
    def is_adapter(self) -> bool:
        """Whether it is a Bone, BAT or mini adapter at all (R05, R25)."""
        errors = {RULES[violation.rule].error for violation in self.violations}
        return NotABoneAdapterError not in errors


def validate(adapter: PathLike, *, base: PathLike | None = None, scale: float = 1.0) -> Validation:
    """Checks an adapter against all rules that apply to its format.

    Args:
        adapter: A folder, a file or a Hub id ``owner/name[@revision]``.
        base: The base to hold it against (R28 to R31): a folder, a ``.safetensors`` file or a Hub
            id. Its adapted weights are read and merged, and nothing is written.
        scale: S in ``W + S (W' - W)``, for R31.

    Raises:
        MissingPathError: There is nothing at a path.
        NotABoneAdapterError: There is nothing that could be an adapter.
        FormatError: The base, or an adapter of a format without rules, is malformed.
        MachineError: A file cannot be read.
    """
    path = locate(adapter, ADAPTER).path
    kind = detect(path)
    try:
        support = _CHECKS.get(kind, _check_other)(path)
    except StageFailed as failed:
        broken = ", ".join(sorted({violation.rule for violation in failed.violations}))
        support = PeftSupport(None, f"it breaks {broken}")
        return Validation(path, kind, False, failed.violations, support)
    if base is None:
        return Validation(path, kind, False, (), support)
    try:
        _check_base(read_adapter(path), locate(base, BASE).path, scale)
    except StageFailed as failed:
        return Validation(path, kind, True, failed.violations, support)
    return Validation(path, kind, True, (), support)


def _check_native(path: Path) -> PeftSupport:
    opened = native.open_native(path, values=True)
    if opened.config is None:
        return PeftSupport(None, f"there is no {CONFIG_NAME}")
    if opened.config["peft_type"] != NATIVE_TYPE:
        return PeftSupport("0.14 to 0.18")
    task = opened.config.get("task_type")
    reasons = list(misread_by_peft(opened.metadata, opened.file.tensors, task))
    return PeftSupport(None, "; ".join(reasons) or f"its peft_type is {NATIVE_TYPE}")


def _check_peft(path: Path) -> PeftSupport:
    folder = path if path.is_dir() else path.parent
    weights = path if path.is_file() else folder / peft.SAFETENSORS_NAME
    if not weights.exists():
        _check_other(path)  # a .bin file, or none
        weights = folder / "adapter_model.bin"
    check_peft(folder / CONFIG_NAME, weights)
    read_adapter(path)
    return PeftSupport(loads_in_peft(folder / CONFIG_NAME))


def _check_other(path: Path) -> PeftSupport:
    adapter = read_adapter(path)
    fail_on(_array_faults(adapter))
    return PeftSupport(None, f"its format is {adapter.format}")


_CHECKS = {NATIVE: _check_native, "peft": _check_peft}


def _array_faults(adapter: Adapter) -> Iterator[Violation]:
    """Violations of R23 where a format's tensors are not in a safetensors file."""
    tensors = {f"{b.module}'s block": b.tensor for b in adapter.blocks.values()}
    for name, tensor in {**tensors, **adapter.saved}.items():
        if tensor.dtype in FLOATS and not _all_finite(tensor):
            yield Violation.of("R23", f"{name} holds NaN or infinity", adapter.weights)


def _all_finite(tensor: Tensor) -> bool:
    return all(np.isfinite(part).all() for part in _chunks(tensor, _CHUNK))


def _check_base(adapter: Adapter, base: Path, scale: float) -> None:
    """Raises StageFailed for violations of R28 to R31."""
    try:
        checkpoint = open_checkpoint(base)
        refuse_quantised_tensors(checkpoint.tensors, base)
        homes = native.find_homes(adapter, checkpoint)
    except NameMatchError as error:
        violation = Violation.of("R28", error.message, base, hint=error.hint)
        raise StageFailed([violation]) from error
    fail_on(native.home_faults(adapter, homes))
    fail_on(native.shape_faults(adapter, homes))
    dtypes = list(native.weight_faults(adapter, homes))
    floats = {n: t for n, t in homes.items() if t.dtype in FLOATS}
    digests: dict[str, str] = {}
    weights, results = [], []
    for block in adapter.blocks.values():
        if f"{block.module}.weight" in floats:
            merged = _Merged(adapter, block, floats[f"{block.module}.weight"], scale)
            digests[f"{block.module}.weight"] = merged.digest
            weights += [] if merged.weight_fault is None else [merged.weight_fault]
            results += [] if merged.result_fault is None else [merged.result_fault]
    stranger = native.mismatch(adapter, digests)
    fail_on([*dtypes, *weights, *([] if stranger is None else [stranger])])
    fail_on([*results, *_saved_faults(adapter, floats)])


class _Merged:
    """One weight merged into nowhere: its digest, and what is not finite (R31)."""

    def __init__(self, adapter: Adapter, block: Block, weight: StoredTensor, scale: float) -> None:
        self.weight_fault: Violation | None = None
        self.result_fault: Violation | None = None
        update = Update(block, scale * adapter.scale)
        planned = PlannedTensor(weight.name, weight.dtype, Action.MERGE, weight, (update,))
        merger, scratch = new_merger(planned), Scratch()
        _, columns = planned.matrix_shape
        hasher, row = LeafHasher(), 0
        for part in _chunks(weight, merger.preferred_rows() * columns):
            rows = part.reshape(-1, columns)
            hasher.update(byte_view(rows))
            if self.weight_fault is None and not np.isfinite(rows).all():
                self.weight_fault = _fault(f"{weight.name!r} holds NaN or infinity", weight)
            if self.weight_fault is None and self.result_fault is None:
                try:
                    merger.merge(rows, row, np.empty_like(rows), scratch)
                except NonFiniteError as error:
                    self.result_fault = _fault(f"{weight.name!r}: {error.message}", weight)
            row += len(rows)
        self.digest = tensor_digest(weight.dtype, weight.shape, hasher.leaves())


def _saved_faults(adapter: Adapter, homes: Mapping[str, StoredTensor]) -> Iterator[Violation]:
    """Violations of R31 by saved tensors that the base's dtype cannot hold."""
    scratch = Scratch()
    for name, saved in adapter.saved.items():
        if name not in homes or saved.dtype not in FLOATS:
            continue
        target = FLOATS[homes[name].dtype]
        try:
            for part in _chunks(saved, _CHUNK):
                cast_rows(part, target, np.empty(part.shape, target), scratch)
        except NonFiniteError as error:
            yield Violation.of("R31", f"{name!r}: {error.message}", adapter.weights)


def _fault(message: str, weight: StoredTensor) -> Violation:
    return Violation.of("R31", message, weight.path)


def _chunks(tensor: Tensor, elements: int) -> Iterator[NDArray[Any]]:
    """A floating tensor's values, flat, at most so many at a time."""
    if not isinstance(tensor, StoredTensor):
        flat = tensor.array.reshape(-1)
        yield from (flat[start : start + elements] for start in range(0, flat.size, elements))
        return
    dtype = FLOATS[tensor.dtype]
    count = tensor.nbytes // dtype.itemsize
    with Reader(tensor.path) as reader:
        for start in range(0, count, elements):
            part: NDArray[Any] = np.empty(min(elements, count - start), dtype)
            reader.read_into(byte_view(part), tensor.offset + start * dtype.itemsize)
            yield part
