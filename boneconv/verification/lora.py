"""A LoRA, as PEFT stores it, against the exact update of the adapter that it stands for.

``alpha / R * lora_B @ lora_A`` (``alpha / sqrt(R)`` with rsLoRA) is recomputed in float64. Where
boneconv.json beside it records each module's error, that is what it may be off by; elsewhere Bone
and mini must be exact to their factors' dtype, and BAT may be off by 5 %, which `boneconv convert`
allows by default.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from boneconv.config import CONFIG_NAME, Variant
from boneconv.dtypes import FLOATS
from boneconv.engine.plan import PlannedTensor
from boneconv.engine.station import stages_of
from boneconv.errors import FormatError, NotABoneAdapterError, UsageError, listing
from boneconv.io.safetensors import StoredTensor, read_header
from boneconv.kernels.stage import Array
from boneconv.names import module_key
from boneconv.strict_json import read_object
from boneconv.verification.bands import Band, compare_updates
from boneconv.verification.candidate import read_record
from boneconv.verification.diagnosis import Diagnosis
from boneconv.verification.measures import Measures
from boneconv.verification.places import kind_of, layer_of
from boneconv.verification.report import Status, TensorAction, TensorReport

__all__ = ["Lora", "LoraModule", "allowed_error", "judge_lora", "open_lora"]

_WEIGHTS = "adapter_model.safetensors"
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.default)?(?:\.weight)?")
_BAT_ERROR = 0.05
_EXACT = {"F64": 1e-9, "F32": 1e-6, "F16": 2.0**-10, "BF16": 2.0**-7}
#: How much of the squared error a mistake may leave unexplained.
_EXPLAINED = 0.02
#: What the four digits of a recorded error leave open, and the float64 of its computation.
_DIGITS, _ROUNDING = 5e-4, 1e-9


@dataclass(frozen=True)
class LoraModule:
    """The factors of one module: ``lora_A [R, in]``, ``lora_B [out, R]``, and alpha / R."""

    lora_a: StoredTensor
    lora_b: StoredTensor
    strength: float

    def update(self) -> _Factors:
        """The factors, read."""
        a, b = self.lora_a.read(), self.lora_b.read()
        return _Factors(
            a.reshape(len(a), -1).astype(np.float64),
            b.reshape(len(b), -1).astype(np.float64) * self.strength,
        )


@dataclass(frozen=True)
class _Factors:
    a: Array
    b: Array

    def __call__(self, band: Band) -> Array:
        return np.asarray(self.b[band.place] @ self.a)


@dataclass(frozen=True)
class Lora:
    """A LoRA adapter; only headers have been read.

    Attributes:
        modules: Its modules, by their name in the model.
        saved: The tensors that it replaces, by their name in the model.
        errors: The recorded error of each module; empty without a record.
    """

    modules: Mapping[str, LoraModule]
    saved: Mapping[str, StoredTensor]
    errors: Mapping[str, float]


def open_lora(path: Path) -> Lora:
    """Reads a LoRA's configuration and header.

    Raises:
        NotABoneAdapterError: It is a DoRA, or has an option that changes what its factors mean.
        FormatError: A module lacks a factor, or the files are malformed.
    """
    folder = path if path.is_dir() else path.parent
    weights = path / _WEIGHTS if path.is_dir() else path
    config = read_object(folder / CONFIG_NAME)
    if config.get("use_dora"):
        raise NotABoneAdapterError("a DoRA is more than its factors", path=folder)
    factors: dict[str, dict[str, StoredTensor]] = {}
    saved = {}
    for name, tensor in read_header(weights).tensors.items():
        match = _FACTOR.fullmatch(module_key(name))
        if match is None:
            saved[module_key(name).replace(".base_layer.", ".")] = tensor
        else:
            factors.setdefault(match["module"], {})[match["side"]] = tensor
    halves = [module for module, sides in factors.items() if len(sides) != 2]
    if halves:
        raise FormatError(f"modules with one factor only: {listing(halves)}", path=weights)
    modules = {
        module: LoraModule(sides["A"], sides["B"], _strength(config, module, sides["A"].shape[0]))
        for module, sides in factors.items()
    }
    return Lora(modules, saved, _recorded(read_record(path)))


def _strength(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern") or {}
    for pattern, value in patterns.items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    if not isinstance(alpha, int | float):
        raise UsageError("the LoRA's alpha is no number", found=alpha)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _recorded(record: Mapping[str, Any]) -> dict[str, float]:
    modules = record.get("modules")
    if not isinstance(modules, dict):
        return {}
    errors = {module: entry.get("error") for module, entry in modules.items()}
    return {module: float(e) for module, e in errors.items() if isinstance(e, int | float)}


def allowed_error(lora: Lora, module: str, planned: PlannedTensor) -> float:
    """How far a module's update may be off, relative to the exact one."""
    recorded = lora.errors.get(module)
    if recorded is not None:
        return recorded * (1 + _DIGITS) + _ROUNDING
    if any(update.block.variant is Variant.BAT for update in planned.updates):
        return _BAT_ERROR
    return _EXACT[lora.modules[module].lora_a.dtype]


def judge_lora(planned: PlannedTensor, lora: Lora, module: str) -> tuple[TensorReport, Measures]:
    """Measures a module's update and judges it."""
    mine = lora.modules[module]
    report = TensorReport(
        name=planned.name,
        action=TensorAction(planned.action),
        status=Status.FAIL,
        dtype=mine.lora_a.dtype,
        shape=planned.shape,
        elements=math.prod(planned.shape),
        identical=False,
        module=module,
        layer=layer_of(planned.name),
        kind=kind_of(planned.name),
        place=mine.lora_a.path.name,
    )
    rows, columns = planned.matrix_shape
    shapes = (mine.lora_a.shape[:2], mine.lora_b.shape[:2])
    rank = mine.lora_a.shape[0]
    if shapes != ((rank, columns), (rows, rank)):
        reason = f"its factors are {[list(s) for s in shapes]}, of a weight [{rows}, {columns}]"
        return replace(report, reason=reason), Measures()
    if not {mine.lora_a.dtype, mine.lora_b.dtype} <= FLOATS.keys():
        return replace(report, reason="its factors are no floating numbers"), Measures()
    found = compare_updates(planned, stages_of(planned), mine.update())
    allowed = allowed_error(lora, module, planned)
    error = found.relative_frobenius
    passes = error is not None and error <= allowed and not found.nonfinite
    diagnosis = None if passes else _diagnose(found)
    off = "where there should be none" if error is None else f"off by {error:.3g}"
    reason = f"its update is {off}, allowed is {allowed:.3g}"
    report = replace(
        report,
        status=Status.PASS if passes else Status.FAIL,
        identical=found.error == 0,
        max_abs=None if found.nonfinite else found.max_abs,
        relative_frobenius=error,
        cosine=found.cosine,
        update_norm=found.update_norm,
        reason=None if passes else reason,
        diagnosis=None if diagnosis is None else diagnosis.text,
        code=None if diagnosis is None else diagnosis.code,
    )
    return report, found


def _diagnose(found: Measures) -> Diagnosis | None:
    """What another LoRA may be, from its norm and its angle to the exact update."""
    own = found.update + 2 * found.cross + found.error
    if found.nonfinite:
        return Diagnosis("not-finite", "its factors hold NaN or infinity")
    if own <= 1e-24 * found.update:
        return Diagnosis("not-applied", "its update is zero")
    share = (found.update + found.cross) / found.update
    if own - share**2 * found.update < _EXPLAINED * found.error:
        return Diagnosis("wrong-scale", f"its update is {share:.3g} times the exact one")
    cosine = found.cosine or 0.0
    if 0 < own < found.update and abs(own - cosine * math.sqrt(own * found.update)) < 1e-3 * own:
        return Diagnosis("truncated-rank", "its update is a part of the exact one: the rank is cut")
    return None
