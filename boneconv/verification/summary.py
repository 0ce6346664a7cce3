"""What single tensors' failures add up to: the findings about the candidate as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from boneconv.engine.plan import PlannedTensor
from boneconv.errors import listing
from boneconv.verification.measures import Measures
from boneconv.verification.report import (
    Finding,
    Severity,
    Status,
    TensorAction,
    TensorReport,
    Totals,
)

__all__ = ["findings_of", "ordered_findings", "totals_of"]

_COPIED = (TensorAction.COPY, TensorAction.CAST)
_CHANGED = (TensorAction.MERGE, TensorAction.REPLACE, TensorAction.ADD)
_MOSTLY = 0.5

#: What each diagnosis says of all tensors that share it; ``{n}`` and ``{names}`` are filled in.
_TEXTS = {
    "not-applied": "the adapter was not applied to {n}: {names}",
    "applied-twice": "the adapter was applied twice to {n}: {names}",
    "wrong-axis": "BAT was applied over the wrong axis to {n}: {names}",
    "wrong-scale": "the adapter was applied at another scale to {n}: {names}",
    "wrong-variant": "another formula than the adapter's was applied to {n}: {names}",
    "truncated-rank": "a part of the adapter's rank is missing in {n}: {names}",
    "transposed": "{n} transposed: {names}",
    "double-rounding": "{n} rounded more than once: {names}",
    "swapped": "{n} hold another tensor's values: {names}",
    "not-replaced": "the adapter's own tensors were not put in place of {n}: {names}",
    "not-finite": "NaN or infinity in {n}: {names}",
}


def findings_of(
    tensors: Sequence[TensorReport],
    planned: Mapping[str, PlannedTensor],
    rule: str,
    *,
    by_file: bool = False,
) -> list[Finding]:
    """The findings that follow from the tensors' reports.

    Args:
        tensors: The reports.
        planned: What they were held against.
        rule: The rule that they were held to.
        by_file: Whether their places are files, each of which may be stale as a whole.
    """
    failed = [tensor for tensor in tensors if tensor.status is Status.FAIL]
    if not failed:
        return []
    found = [*_wrong_inputs(tensors), *_missing(failed, planned)]
    found += _stale_files(tensors) if by_file else []
    for code in dict.fromkeys(tensor.code for tensor in failed if tensor.code is not None):
        mine = [tensor for tensor in failed if tensor.code == code]
        text = _TEXTS.get(code, "{n}: {names}")
        message = text.format(n=_count(mine, tensors), names=_names(mine))
        if code not in _TEXTS:
            message = f"{mine[0].diagnosis}: {_names(mine)}"
        if code == "double-rounding" and rule == "default" and _is_peft(mine):
            message += "; --tolerance peft accepts that"
        found.append(_error(code, message, mine))
    return found


def _is_peft(tensors: Iterable[TensorReport]) -> bool:
    return all("PEFT" in (tensor.diagnosis or "") for tensor in tensors)


def _wrong_inputs(tensors: Sequence[TensorReport]) -> list[Finding]:
    """Merged weights that are mostly others, and no mistake explains them.

    If untouched tensors are another model's too, so is the base; if they are all the base's, the
    adapter is another one; if there are none, either may be.
    """
    merged = [t for t in tensors if t.action is TensorAction.MERGE]
    far = [
        t
        for t in merged
        if t.status is Status.FAIL
        and t.diagnosis is None
        and t.share_correct is not None
        and t.share_correct < _MOSTLY
    ]
    if not merged or len(far) < max(1, _MOSTLY * len(merged)):
        return []
    copied = [t for t in tensors if t.action in _COPIED and t.elements > 1]
    strange = [t for t in copied if t.status is Status.FAIL and t.diagnosis is None]
    count = f"{len(far)} of {len(merged)} merged weights"
    if strange:
        also = f"{len(strange)} of {len(copied)} untouched tensors"
        text = f"it was made from another base: {count} and {also} are another model's"
        return [_error("wrong-base", text, [*far, *strange])]
    if copied:
        text = f"it was made with another adapter: {count} are others, what it leaves alone is not"
        return [_error("wrong-adapter", text, far)]
    text = f"it was made from another base or with another adapter: {count} are others"
    return [_error("wrong-base", text, far)]


def _stale_files(tensors: Sequence[TensorReport]) -> list[Finding]:
    """Files all of whose adapted tensors equal the base, beside others that were merged."""
    by_file: dict[str, list[TensorReport]] = {}
    for tensor in tensors:
        if tensor.place is not None and tensor.action in _CHANGED:
            by_file.setdefault(tensor.place, []).append(tensor)
    stale = {
        file: held
        for file, held in by_file.items()
        if all(tensor.code in ("not-applied", "not-replaced") for tensor in held)
    }
    if not stale or len(stale) == len(by_file):
        return []
    return [
        _error("stale-shard", f"{listing([file])} is the base's: it was not merged", held)
        for file, held in stale.items()
    ]


def _missing(failed: Sequence[TensorReport], planned: Mapping[str, PlannedTensor]) -> list[Finding]:
    """Layers that are absent as a whole, then all other absent tensors."""
    missing = [tensor for tensor in failed if tensor.action is TensorAction.MISSING]
    names = {tensor.name for tensor in missing}
    layers: dict[str, list[str]] = {}
    for name in planned:
        prefix = _layer_prefix(name)
        if prefix is not None:
            layers.setdefault(prefix, []).append(name)
    found, told = [], set()
    for prefix, own in layers.items():
        if names.issuperset(own) and len(layers) > 1:
            mine = [tensor for tensor in missing if tensor.name in own]
            text = f"{listing([prefix])} is missing: none of its {len(own)} tensors is there"
            found.append(_error("layer-missing", text, mine))
            told.update(own)
    rest = [tensor for tensor in missing if tensor.name not in told]
    if rest:
        text = f"{_count(rest, None)} missing: {_names(rest)}"
        found.append(_error("tensor-missing", text, rest))
    extra = [tensor for tensor in failed if tensor.action is TensorAction.EXTRA]
    if extra:
        text = f"{_count(extra, None)} that neither base nor adapter has: {_names(extra)}"
        found.append(_error("tensor-extra", text, extra))
    return found


def _layer_prefix(name: str) -> str | None:
    """``model.layers.3`` of one of its tensors."""
    parts = name.split(".")
    for place, part in enumerate(parts[:-1]):
        if part.isdecimal():
            return ".".join(parts[: place + 1])
    return None


def _count(mine: Sequence[TensorReport], whole: Sequence[TensorReport] | None) -> str:
    if whole is None:
        return "1 tensor" if len(mine) == 1 else f"{len(mine)} tensors"
    kinds = {tensor.action for tensor in mine}
    of = [tensor for tensor in whole if tensor.action in kinds]
    if len(mine) == len(of) > 1:
        return f"all {len(of)} tensors"
    return f"{len(mine)} of {len(of)} tensors"


def _names(tensors: Sequence[TensorReport]) -> str:
    return listing([tensor.name for tensor in tensors])


def _error(code: str, message: str, tensors: Iterable[TensorReport]) -> Finding:
    return Finding(Severity.ERROR, code, message, tuple(tensor.name for tensor in tensors))


def ordered_findings(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then warnings, then notes."""
    order = list(Severity)
    return tuple(sorted(findings, key=lambda finding: order.index(finding.severity)))


def totals_of(tensors: Sequence[TensorReport], measures: Iterable[Measures]) -> Totals:
    """Sums over the tensors.

    Args:
        tensors: Their reports.
        measures: The measures of those that the adapter changes.
    """
    passed = sum(tensor.status is Status.PASS for tensor in tensors)
    measured = [tensor.max_ulp for tensor in tensors if tensor.max_ulp is not None]
    total = sum(measures, Measures())
    norm = math.sqrt(total.update / total.base) if total.base > 0 else None
    return Totals(
        tensors=len(tensors),
        passed=passed,
        failed=len(tensors) - passed,
        identical=sum(tensor.identical for tensor in tensors),
        adapted=sum(tensor.action in _CHANGED for tensor in tensors),
        elements=sum(tensor.elements for tensor in tensors),
        share_correct=total.share_correct if total.elements else None,
        max_ulp=max(measured, default=None),
        update_norm=norm,
    )
