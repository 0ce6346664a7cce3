"""`verify`: whether a candidate is what base and adapters mean, in numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from boneconv.engine.progress import Progress
from boneconv.errors import UsageError
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.hub import Source, locate
from boneconv.planning.options import Stacks
from boneconv.planning.plan import (
    Components,
    MergePlan,
    Options,
    PathLike,
    plan_located,
    stacks,
    wanted_of,
)
from boneconv.verification.candidate import kind_of_candidate, open_candidate, read_record
from boneconv.verification.checkpoint import Outcome, verify_checkpoint
from boneconv.verification.fingerprints import check_base
from boneconv.verification.parts import verify_pipeline
from boneconv.verification.report import CandidateKind, Finding, Report, TensorAction
from boneconv.verification.settings import Settings, check_record, infer, rule_of
from boneconv.verification.summary import ordered_findings, totals_of

__all__ = ["verify"]

_CHANGED = (TensorAction.MERGE, TensorAction.REPLACE, TensorAction.ADD)
_CHECKPOINTS = (CandidateKind.CHECKPOINT, CandidateKind.FILE)


def verify(
    base: PathLike,
    adapter: PathLike,
    candidate: PathLike,
    *,
    more: Sequence[PathLike] = (),
    component: str | None = None,
    components: Components | None = None,
    scale: float | None = None,
    dtype: str | None = None,
    tolerance: str = "default",
    allow_base_mismatch: bool = False,
    logits: bool = False,
    prompts: PathLike | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Report:
    """Recomputes what a candidate should be and compares every tensor and file.

    Memory is bounded whatever the model's size. Bytes are compared first; where they differ, the
    exact values decide (`boneconv.verification.reach` states the rule).

    Args:
        base: A folder, a ``.safetensors`` or ``.pth`` file, or a Hub id ``owner/name[@revision]``.
        adapter: The same, for the adapter.
        candidate: A merged folder or file, an ONNX graph or its folder, a LoRA or another adapter.
        more: Further adapters, applied in order after the first.
        component: The component of a diffusers pipeline that ``adapter`` and ``more`` belong to;
            the candidate is a pipeline then.
        components: Further components, each with an adapter or several.
        scale: S in ``W + S (W' - W)``; by default what the candidate's record says, else 1.
        dtype: ``keep``, ``float32``, ``bfloat16`` or ``float16``; by default the candidate's.
        tolerance: ``default``: what a merge that accumulates in float32 may give; ``canonical``:
            every byte; ``peft``: also what PEFT's double rounding gives. A candidate whose record
            says that it is canonical is held to every byte.
        allow_base_mismatch: Whether it is a warning, not an error, that a native adapter's
            fingerprint says that it was made for another base. It is one where the candidate's
            record says that the merge was told to go on.
        logits: Whether to compare the candidate's answers too (`boneconv.behaviour`). It takes
            torch, transformers and the memory of the model in float64.
        prompts: A file of prompts to compare answers on: one a line, or a list in a ``.json`` file.
        workers: Workers that compute; by default one for each usable core.
        progress: Is told how far it is.
        note: Is told the memory that comparing answers takes, before it does.

    Returns:
        The report; its findings say what was assumed.

    Raises:
        UsageError: The options do not go together.
        MissingExtraError: Answers were asked for, and a library for them is not installed.
        InputError: One of its kinds, for every fault of base and adapters, and for a candidate that
            is nothing that can be verified.
        MachineError: Reading failed.
    """
    _check_logits(logits, prompts, component is not None or bool(components))
    report = _verify_weights(
        base,
        adapter,
        candidate,
        more=more,
        component=component,
        components=components,
        scale=scale,
        dtype=dtype,
        tolerance=tolerance,
        allow_base_mismatch=allow_base_mismatch,
        workers=workers,
        progress=progress,
    )
    if not logits:
        return report
    from boneconv.behaviour import measure_behaviour

    behaviour = measure_behaviour(
        base,
        (adapter, *more),
        candidate,
        prompts=prompts,
        scale=report.scale,
        tolerance_rule=report.tolerance,
        note=note,
        progress=progress,
    )
    return replace(report, behaviour=behaviour)


def _check_logits(logits: bool, prompts: PathLike | None, pipeline: bool) -> None:
    """Raises before any work is done."""
    if prompts is not None and not logits:
        raise UsageError("prompts are for comparing logits", hint="Add --logits")
    if not logits:
        return
    if pipeline:
        raise UsageError("logits of a diffusers pipeline cannot be compared")
    from boneconv.behaviour.loading import require_torch
    from boneconv.behaviour.prompts import read_prompts

    require_torch()
    read_prompts(None if prompts is None else Path(prompts))


def _verify_weights(
    base: PathLike,
    adapter: PathLike,
    candidate: PathLike,
    *,
    more: Sequence[PathLike],
    component: str | None,
    components: Components | None,
    scale: float | None,
    dtype: str | None,
    tolerance: str,
    allow_base_mismatch: bool,
    workers: int | None,
    progress: Progress | None,
) -> Report:
    """`verify` without the answers."""
    source = locate(base, wanted_of(component))
    place = Path(candidate)
    if component is not None or components:
        wanted = stacks(adapter, more, component, components)
        return _pipeline(
            source,
            wanted,
            place,
            scale,
            dtype,
            tolerance,
            allow_base_mismatch=allow_base_mismatch,
            workers=workers,
            progress=progress,
        )
    stored = open_checkpoint(source.path).tensors
    kind = kind_of_candidate(place, frozenset(stored))
    rule_of(tolerance, {})
    if kind is CandidateKind.ONNX:
        from boneconv.verification.onnx import verify_graph

        return verify_graph(
            source,
            (adapter, *more),
            place,
            scale=scale,
            tolerance=tolerance,
            allow_base_mismatch=allow_base_mismatch,
            workers=workers,
            progress=progress,
        )
    if kind not in _CHECKPOINTS:
        from boneconv.verification.converted import verify_converted

        if more:
            raise UsageError("a converted adapter stands for one adapter", path=place)
        return verify_converted(
            source,
            adapter,
            place,
            kind,
            scale=scale,
            allow_base_mismatch=allow_base_mismatch,
            progress=progress,
        )
    opened = open_candidate(place, kind)
    settings = infer(scale, dtype, opened.record, stored, opened.tensors)
    options = Options.parse(
        scale=settings.scale,
        dtype=settings.dtype,
        max_shard_size=None,
        card=False,
        workers=workers,
    )
    planned = plan_located(source, stacks(adapter, more, None, None), options)
    rule, numerics = rule_of(tolerance, opened.record)
    outcome = verify_checkpoint(planned, opened, rule, workers=workers, progress=progress)
    notes = check_record(planned, settings.scale, opened.record)
    notes += check_base(planned, outcome.found, opened.record, allowed=allow_base_mismatch)
    return _report(planned, place, kind, settings, (rule, numerics), outcome, notes)


def _pipeline(
    source: Source,
    adapters: Stacks,
    candidate: Path,
    scale: float | None,
    dtype: str | None,
    tolerance: str,
    *,
    allow_base_mismatch: bool,
    workers: int | None,
    progress: Progress | None,
) -> Report:
    """Verifies a pipeline; its dtype is not inferred."""
    record = read_record(candidate)
    rule, numerics = rule_of(tolerance, record)
    settings = infer(scale, dtype or "keep", record, {}, {})
    options = Options.parse(
        scale=settings.scale, dtype=settings.dtype, max_shard_size=None, card=False, workers=workers
    )
    planned = plan_located(source, adapters, options)
    outcome = verify_pipeline(planned, candidate, record, rule, workers=workers, progress=progress)
    notes = check_record(planned, settings.scale, record)
    notes += check_base(planned, outcome.found, record, allowed=allow_base_mismatch)
    kind = CandidateKind.CHECKPOINT
    return _report(planned, candidate, kind, settings, (rule, numerics), outcome, notes)


def _report(
    planned: MergePlan,
    candidate: Path,
    kind: CandidateKind,
    settings: Settings,
    rule: tuple[str, str | None],
    outcome: Outcome,
    notes: list[Finding],
) -> Report:
    changed = [
        outcome.found[tensor.name].measures
        for tensor in outcome.tensors
        if tensor.action in _CHANGED and tensor.name in outcome.found
    ]
    return Report(
        base=planned.base.given,
        adapters=tuple(source.given for source in planned.adapters),
        candidate=str(candidate),
        kind=kind,
        numerics=rule[1],
        tolerance=rule[0],
        scale=settings.scale,
        dtype=settings.dtype,
        tensors=outcome.tensors,
        files=outcome.files,
        findings=ordered_findings([*outcome.findings, *settings.findings, *notes]),
        totals=totals_of(outcome.tensors, changed),
    )
