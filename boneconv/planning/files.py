"""The files beside the weights: copied, edited, written anew, or left out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from boneconv.engine.plan import Plan, PlannedShard
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.hub import Source
from boneconv.planning.accounts import Strength
from boneconv.planning.card import hub_id, model_card
from boneconv.planning.config_edits import ConfigEdits
from boneconv.planning.record import RECORD_NAME
from boneconv.planning.shards import encode_index

__all__ = ["plan_files"]

_README = PurePosixPath("README.md")


def plan_files(
    base: Checkpoint,
    shards: tuple[PlannedShard, ...],
    config: ConfigEdits | None,
    strengths: Sequence[Strength],
    base_source: Source,
    sources: Sequence[Source],
    *,
    card: bool,
) -> Plan:
    """The plan of a merge: shards, side files, edited configuration, index and model card.

    The base's side files are copied as they are, but for an edited config.json; an adapter's own
    tokenizer and chat template win over the base's, a later adapter's over an earlier one's.
    """
    if base.single_file:
        return Plan(shards, {}, {})
    copies = {path: base.root / path for path in base.side_files}
    texts: dict[PurePosixPath, bytes] = {}
    for strength in strengths:
        for path in strength.adapter.side_files:
            relative = path.relative_to(strength.adapter.path).as_posix()
            copies[PurePosixPath(relative)] = path
    if config is not None and config.changed:
        texts[PurePosixPath("config.json")] = config.encode()
    if card:
        texts[_README] = model_card(
            base.root / _README, _base_name(base_source, strengths), strengths, _names(sources)
        )
    _plan_index(base, shards, copies, texts)
    for name in (*texts, PurePosixPath(RECORD_NAME)):
        copies.pop(name, None)
    return Plan(shards, copies, texts, base.left_out)


def _plan_index(
    base: Checkpoint,
    shards: tuple[PlannedShard, ...],
    copies: dict[PurePosixPath, Path],
    texts: dict[PurePosixPath, bytes],
) -> None:
    """An index for several files, or for one where the base had one."""
    kept_index = base.index_name is not None and shards[0].name in base.shards
    if len(shards) == 1 and not kept_index:
        return
    content = encode_index(base, shards)
    if content is None and base.index_name is not None:
        copies[PurePosixPath(base.index_name)] = base.root / base.index_name
    elif content is not None:
        name = base.index_name or f"{next(iter(base.shards))}.index.json"
        texts[PurePosixPath(name)] = content


def _base_name(base: Source, strengths: Sequence[Strength]) -> str | None:
    if base.repo is not None:
        return base.repo
    names = {hub_id(strength.adapter.config.base_model_name_or_path) for strength in strengths}
    return names.pop() if len(names) == 1 else None


def _names(sources: Sequence[Source]) -> list[str]:
    return [source.repo or f"local adapter {i + 1}" for i, source in enumerate(sources)]
