"""What a verification or a comparison found: frozen values, which print nothing themselves.

Numbers are measured against the *canonical* tensor: the exact values, rounded once to the
candidate's dtype. The exact values themselves decide what passes. A number is None where it has no
meaning: the ULP error of integers, the cosine of an update that is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from boneconv.behaviour.report import BehaviourReport

__all__ = [
    "CandidateKind",
    "DiffReport",
    "FileReport",
    "Finding",
    "Presence",
    "Report",
    "Severity",
    "Status",
    "TensorAction",
    "TensorDiff",
    "TensorReport",
    "Totals",
]


class Status(StrEnum):
    """Whether a check held."""

    PASS = "pass"
    FAIL = "fail"


class Severity(StrEnum):
    """How much a finding matters: only errors fail a verification."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class CandidateKind(StrEnum):
    """What was verified."""

    CHECKPOINT = "checkpoint"
    FILE = "file"
    ONNX = "onnx"
    LORA = "lora"
    ADAPTER = "adapter"


class TensorAction(StrEnum):
    """What a tensor of the candidate should be, or that it should not be there at all."""

    MERGE = "merge"
    REPLACE = "replace"
    ADD = "add"
    CAST = "cast"
    COPY = "copy"
    EXTRA = "extra"
    MISSING = "missing"


@dataclass(frozen=True)
class TensorReport:
    """One tensor.

    Attributes:
        name: Its name in the checkpoint; for ONNX and adapters, the checkpoint's name of the weight
            that it stands for.
        action: What it should be: ``extra`` if it should not be there, ``missing`` if it is not.
        status: Whether it is what it should be.
        dtype: Its safetensors dtype in the candidate (the expected one where it is missing).
        shape: Its shape in the candidate (the expected one where it is missing).
        elements: How many elements it has.
        identical: Whether every byte is the canonical one.
        module: The adapter's name of the adapted module; None for other tensors.
        layer: The number of its layer, the first number in its name.
        kind: What it is within its layer, such as ``q_proj``.
        share_correct: The share of elements that are correctly rounded, 0 to 1.
        max_ulp: The largest error in units in the last place of the candidate's dtype: how many
            numbers of that dtype lie between the candidate's and the correctly rounded one.
        mean_ulp: The mean of the same over all elements.
        max_abs: The largest absolute error.
        relative_frobenius: ``||candidate - canonical||_F / ||canonical||_F``; of a LoRA, the error
            of its update against the exact one.
        cosine: Of the angle between the candidate's update and the canonical one; None where either
            is zero.
        update_norm: ``||W' - W||_F / ||W||_F``, how far the adapter moves the weight.
        reason: Why it failed, as one sentence; None if it passed.
        diagnosis: What it is instead, where that could be told, such as ``equals the base: the
            adapter was not applied there``.
        code: The finding's code that belongs to the diagnosis, such as ``not-applied``.
        place: Where it was found in the candidate: a file's name, or an ONNX initializer's.
    """

    name: str
    action: TensorAction
    status: Status
    dtype: str
    shape: tuple[int, ...]
    elements: int
    identical: bool
    module: str | None = None
    layer: int | None = None
    kind: str | None = None
    share_correct: float | None = None
    max_ulp: float | None = None
    mean_ulp: float | None = None
    max_abs: float | None = None
    relative_frobenius: float | None = None
    cosine: float | None = None
    update_norm: float | None = None
    reason: str | None = None
    diagnosis: str | None = None
    code: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class FileReport:
    """One file beside the weights, or one weight file as such.

    Attributes:
        name: Its name, relative to the candidate's folder.
        status: Whether it is as it should be.
        reason: Why not, as one sentence; where it passes, a difference that does no harm.
    """

    name: str
    status: Status
    reason: str | None = None


@dataclass(frozen=True)
class Finding:
    """What is wrong with the candidate as a whole, or what was assumed about it.

    Attributes:
        severity: Whether it fails the verification.
        code: A short name that stays the same, such as ``applied-twice``.
        message: One sentence for people.
        tensors: The tensors that it is about.
    """

    severity: Severity
    code: str
    message: str
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Totals:
    """Sums over the tensors.

    Attributes:
        tensors: Tensors of the candidate that were compared, and expected ones that are missing.
        passed: How many passed.
        failed: How many failed.
        identical: How many are the canonical ones, byte for byte.
        adapted: How many the adapter changes (merged, replaced or added).
        elements: Elements of all compared tensors.
        share_correct: The share of the adapted tensors' elements that are correctly rounded; None
            if no adapted tensor was compared.
        max_ulp: The largest error of all, in ULP; None where nothing was measured in ULP.
        update_norm: ``||W' - W||_F / ||W||_F`` over all merged weights; None if there are none.
    """

    tensors: int
    passed: int
    failed: int
    identical: int
    adapted: int
    elements: int
    share_correct: float | None = None
    max_ulp: float | None = None
    update_norm: float | None = None


@dataclass(frozen=True)
class Report:
    """What a verification found.

    Attributes:
        base: The base, as it was given.
        adapters: The adapters, as they were given, in order.
        candidate: The candidate, as it was given.
        kind: What the candidate is.
        numerics: ``canonical`` where the candidate's record promises canonical bytes, else None.
        tolerance: The rule that tensors were held to: ``canonical``, ``default``, ``peft`` or
            ``recorded`` (a LoRA, held against its recorded error).
        scale: S in ``W + S (W' - W)`` that the candidate was held against.
        dtype: ``keep``, or the dtype that every floating tensor was expected in.
        tensors: Every tensor, in the candidate's order; missing ones last.
        files: Every file beside the weights that is checked.
        findings: Diagnoses of the whole and assumptions, errors first.
        totals: Sums over the tensors.
        behaviour: The comparison of answers; None where it was not asked for.
    """

    base: str
    adapters: tuple[str, ...]
    candidate: str
    kind: CandidateKind
    numerics: str | None
    tolerance: str
    scale: float
    dtype: str
    tensors: tuple[TensorReport, ...]
    files: tuple[FileReport, ...]
    findings: tuple[Finding, ...]
    totals: Totals
    behaviour: BehaviourReport | None = None

    @property
    def passed(self) -> bool:
        """Whether the candidate is what base and adapters mean, its answers too if compared."""
        return self.weights_passed and (self.behaviour is None or self.behaviour.passed)

    @property
    def weights_passed(self) -> bool:
        """Whether its weights and files are what base and adapters mean."""
        return (
            all(tensor.status is Status.PASS for tensor in self.tensors)
            and all(file.status is Status.PASS for file in self.files)
            and all(finding.severity is not Severity.ERROR for finding in self.findings)
        )

    @property
    def failures(self) -> Sequence[TensorReport]:
        """The tensors that failed, in order."""
        return [tensor for tensor in self.tensors if tensor.status is Status.FAIL]


class Presence(StrEnum):
    """On which sides of a comparison a tensor is."""

    BOTH = "both"
    ONLY_A = "only-a"
    ONLY_B = "only-b"


@dataclass(frozen=True)
class TensorDiff:
    """One tensor of two checkpoints or adapters.

    Attributes:
        name: Its name.
        presence: On which sides it is.
        dtype_a: Its safetensors dtype on side A; None if it is not there.
        dtype_b: The same on side B.
        shape_a: Its shape on side A; None if it is not there.
        shape_b: The same on side B.
        identical: Whether dtype, shape and every byte are equal.
        elements: How many elements it has (on side A where it is there).
        layer: The number of its layer.
        kind: What it is within its layer.
        differing: How many elements differ in value; None where they cannot be compared.
        max_ulp: The largest distance in ULP of the coarser dtype.
        max_abs: The largest absolute difference.
        relative_frobenius: ``||b - a||_F / ||a||_F``; None where a is zero.
        cosine: Of the angle between a and b; None where either is zero.
    """

    name: str
    presence: Presence
    dtype_a: str | None
    dtype_b: str | None
    shape_a: tuple[int, ...] | None
    shape_b: tuple[int, ...] | None
    identical: bool
    elements: int
    layer: int | None = None
    kind: str | None = None
    differing: int | None = None
    max_ulp: float | None = None
    max_abs: float | None = None
    relative_frobenius: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class DiffReport:
    """How two checkpoints or two adapters differ.

    Attributes:
        a: Side A, as it was given.
        b: Side B, as it was given.
        kind: ``checkpoint`` or ``adapter``.
        tensors: Every tensor of either side: A's order, then those that only B has.
        settings: Settings that differ, of adapters: name, A's value and B's value.
    """

    a: str
    b: str
    kind: CandidateKind
    tensors: tuple[TensorDiff, ...]
    settings: tuple[tuple[str, str, str], ...] = ()

    @property
    def identical(self) -> bool:
        """Whether nothing differs."""
        return not self.settings and all(tensor.identical for tensor in self.tensors)
