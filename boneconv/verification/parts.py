"""Verifying a merged pipeline: its merged components, each as a checkpoint, and all other files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from boneconv.engine.plan import Plan
from boneconv.engine.progress import Progress
from boneconv.planning.part import Part
from boneconv.planning.plan import MergePlan
from boneconv.verification.candidate import open_candidate
from boneconv.verification.checkpoint import Outcome, verify_checkpoint
from boneconv.verification.files import check_file
from boneconv.verification.report import CandidateKind, FileReport, Finding

__all__ = ["verify_pipeline"]


def verify_pipeline(
    planned: MergePlan,
    candidate: Path,
    record: Mapping[str, Any],
    rule: str,
    *,
    workers: int | None,
    progress: Progress | None,
) -> Outcome:
    """Holds a pipeline's folder against a plan; raises as `verify_checkpoint`.

    Names in the outcome begin with the component's: ``unet/conv_in.weight``.
    """
    if progress is not None:
        progress.start(sum(t.nbytes for part in planned.parts for t in part.plan.tensors))
    outcomes = []
    for part in planned.parts:
        name = part.component or "."
        opened = open_candidate(candidate / name, CandidateKind.CHECKPOINT)
        opened = replace(opened, record=record)
        own = replace(planned, parts=(part,), plan=_outside(part.plan, name))
        inner = None if progress is None else _Inner(progress)
        outcome = verify_checkpoint(own, opened, rule, workers=workers, progress=inner)
        outcomes.append(_inside(outcome, name))
    return Outcome(
        tensors=tuple(tensor for outcome in outcomes for tensor in outcome.tensors),
        files=(
            *(file for outcome in outcomes for file in outcome.files),
            *_other_files(planned, candidate, exact=record.get("numerics") == "canonical"),
        ),
        findings=tuple(finding for outcome in outcomes for finding in outcome.findings),
        found={name: found for outcome in outcomes for name, found in outcome.found.items()},
    )


@dataclass(frozen=True)
class _Inner:
    """Passes a component's progress on to the whole's."""

    progress: Progress

    def start(self, total: int) -> None:
        """The whole has started already."""

    def advance(self, nbytes: int) -> None:
        """As the whole's."""
        self.progress.advance(nbytes)


def _outside(plan: Plan, folder: str) -> Plan:
    """A component's plan as that of a checkpoint; the reverse of `Plan.inside`."""
    return Plan(
        shards=tuple(
            replace(shard, name=shard.name.removeprefix(f"{folder}/")) for shard in plan.shards
        ),
        copies={name.relative_to(folder): path for name, path in plan.copies.items()},
        texts={name.relative_to(folder): text for name, text in plan.texts.items()},
    )


def _inside(outcome: Outcome, folder: str) -> Outcome:
    """What was found of a component, under the names of the pipeline."""

    def named(finding: Finding) -> Finding:
        tensors = tuple(f"{folder}/{name}" for name in finding.tensors)
        return replace(finding, message=f"{folder}: {finding.message}", tensors=tensors)

    return Outcome(
        tensors=tuple(
            replace(
                tensor,
                name=f"{folder}/{tensor.name}",
                place=None if tensor.place is None else f"{folder}/{tensor.place}",
            )
            for tensor in outcome.tensors
        ),
        files=tuple(replace(file, name=f"{folder}/{file.name}") for file in outcome.files),
        findings=tuple(map(named, outcome.findings)),
        found={f"{folder}/{name}": found for name, found in outcome.found.items()},
    )


def _other_files(planned: MergePlan, candidate: Path, *, exact: bool) -> list[FileReport]:
    """The files of everything that is not merged into."""
    own: set[PurePosixPath] = {name for part in planned.parts for name in _files(part)}
    expected: dict[PurePosixPath, Path | bytes] = {**planned.plan.copies, **planned.plan.texts}
    rest = {name: content for name, content in expected.items() if name not in own}
    return [
        check_file(candidate, name, content, exact=exact)
        for name, content in sorted(rest.items())
        if str(name) != "README.md"
    ]


def _files(part: Part) -> set[PurePosixPath]:
    return {*part.plan.copies, *part.plan.texts}
