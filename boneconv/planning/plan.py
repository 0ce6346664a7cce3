"""What a merge would do, from headers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from boneconv.engine.memory import predict_peak
from boneconv.engine.plan import Action, Plan
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.hub import BASE, Source, Wanted, locate
from boneconv.io.hub_files import PIPELINE
from boneconv.io.pipeline import Pipeline, open_pipeline
from boneconv.planning.accounts import Accounts, Strength
from boneconv.planning.card import README, card_of
from boneconv.planning.options import Components, Options, PathLike, Stacks, stacks
from boneconv.planning.part import Part, plan_part
from boneconv.planning.record import RECORD_NAME, adapter_entry, record_size, source_entry

__all__ = [
    "Components",
    "MergePlan",
    "Options",
    "PathLike",
    "plan_located",
    "plan_merge",
    "stacks",
    "wanted_of",
]


@dataclass(frozen=True)
class MergePlan:
    """What a merge would do.

    Attributes:
        base: Where the base came from.
        parts: The checkpoints that are merged into: the base, or components of a pipeline, the one
            of the first adapter first.
        plan: Every tensor and file to write.
        peak_memory: Predicted peak of resident memory, in bytes.
        dtype_note: What the user should know of the dtypes.
    """

    base: Source
    parts: tuple[Part, ...]
    plan: Plan
    peak_memory: int
    dtype_note: str | None = None

    @property
    def adapters(self) -> tuple[Source, ...]:
        """Where each adapter came from, part by part."""
        return tuple(source for part in self.parts for source in part.adapters)

    @property
    def strengths(self) -> tuple[Strength, ...]:
        """The adapters and how strongly each is applied, part by part."""
        return tuple(strength for part in self.parts for strength in part.strengths)

    @property
    def accounts(self) -> Accounts:
        """What happens to each tensor of the first part, and why."""
        return self.parts[0].accounts

    @property
    def is_pipeline(self) -> bool:
        """Whether the base is a pipeline, some of whose components are merged into."""
        return self.parts[0].component is not None

    @property
    def matched_by(self) -> list[str]:
        """How names were matched, sorted."""
        return sorted({how for part in self.parts for how in part.accounts.matched_by})

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors of the parts have each action."""
        return {str(action): len(self.plan.by_action(action)) for action in Action}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        left_out = self.plan.left_out
        stale = [f"left out: {', '.join(map(str, left_out))}"] if left_out else []
        dtypes = [self.dtype_note] if self.dtype_note is not None else []
        return (*(text for part in self.parts for text in part.notes()), *dtypes, *stale)

    def adapter_entries(self, digests: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The record's entries of the adapters.

        Args:
            digests: The digests of their weight files; without them, entries of the same length.
        """
        pairs = [(part, i) for part in self.parts for i in range(len(part.adapters))]
        return [
            adapter_entry(
                part.strengths[i],
                part.adapters[i],
                component=part.component,
                **({} if digests is None else {"digest": digests[number]}),
            )
            for number, (part, i) in enumerate(pairs)
        ]


def plan_merge(
    base: PathLike,
    adapter: PathLike,
    *,
    more: Sequence[PathLike] = (),
    component: str | None = None,
    components: Components | None = None,
    scale: float = 1.0,
    dtype: str = "keep",
    max_shard_size: str | None = None,
    workers: int | None = None,
    card: bool = True,
) -> MergePlan:
    """What `merge` would do, from headers alone; the arguments and errors are its own."""
    options = Options.parse(
        scale=scale, dtype=dtype, max_shard_size=max_shard_size, card=card, workers=workers
    )
    wanted = stacks(adapter, more, component, components)
    return plan_located(locate(base, wanted_of(component)), wanted, options)


def wanted_of(component: str | None) -> Wanted:
    """What has to be fetched of a base: a pipeline where a component of it is named."""
    return BASE if component is None else PIPELINE


def plan_located(base: Source, adapters: Stacks, options: Options) -> MergePlan:
    """The plan of an output from a base that has been found; raises as `plan_merge`."""
    if None in adapters:
        part = plan_part(open_checkpoint(base.path), adapters[None], options)
        return _complete(base, (part,), part.plan, options)
    pipeline = open_pipeline(base.path)
    opened = {name: pipeline.open(name) for name in adapters if name is not None}
    parts = tuple(plan_part(opened[name], adapters[name], options, name) for name in opened)
    return _complete(base, parts, _with_the_rest(pipeline, parts), options)


def _with_the_rest(pipeline: Pipeline, parts: Sequence[Part]) -> Plan:
    """The components' plans side by side, and all other files of the pipeline as they are."""
    names = [part.component for part in parts if part.component is not None]
    files, left_out = pipeline.other_files(names)
    plans = [part.plan for part in parts]
    return Plan(
        shards=tuple(shard for plan in plans for shard in plan.shards),
        copies={name: path for plan in plans for name, path in plan.copies.items()}
        | {name: pipeline.root / name for name in files},
        texts={name: content for plan in plans for name, content in plan.texts.items()},
        left_out=(*(name for plan in plans for name in plan.left_out), *left_out),
    )


def _complete(base: Source, parts: tuple[Part, ...], plan: Plan, options: Options) -> MergePlan:
    """The whole plan: with its card, its record's size, and the memory that it takes."""
    whole = MergePlan(base, parts, _with_card(base, parts, plan, options), 0, _note(parts, options))
    recorded = record_size(
        whole.plan,
        base=source_entry(base),
        adapters=whole.adapter_entries(),
        options=options.record(),
    )
    plan = replace(whole.plan, record_bytes=recorded)
    return replace(whole, plan=plan, peak_memory=predict_peak(plan, options.workers))


def _with_card(base: Source, parts: Sequence[Part], plan: Plan, options: Options) -> Plan:
    if parts[0].checkpoint.single_file:
        return plan
    texts = dict(plan.texts)
    if options.card:
        texts[README] = card_of(base, [(p.component, p.adapters, p.strengths) for p in parts])
    written = {*texts, PurePosixPath(RECORD_NAME)}
    copies: dict[PurePosixPath, Path] = {
        name: path for name, path in plan.copies.items() if name not in written
    }
    return replace(plan, copies=copies, texts=texts)


def _note(parts: Sequence[Part], options: Options) -> str | None:
    """Whom the dtype reaches, where that is not all."""
    if options.dtype is None or parts[0].component is None:
        return None
    names = ", ".join(str(part.component) for part in parts)
    return f"the dtype is that of {names}; all else of the pipeline keeps its own"
