"""The files beside the weights: copied, edited, written anew, or left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from boneconv.engine.plan import Plan, PlannedShard
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.weight_files import index_of
from boneconv.planning.accounts import Strength
from boneconv.planning.config_edits import ConfigEdits
from boneconv.planning.record import RECORD_NAME
from boneconv.planning.shards import encode_index

__all__ = ["plan_files", "tokenizer_files"]


def tokenizer_files(strengths: Sequence[Strength]) -> dict[PurePosixPath, Path]:
    """The tokenizer and chat template that were saved with adapters; a later one's win."""
    return {
        PurePosixPath(path.relative_to(strength.adapter.path).as_posix()): path
        for strength in strengths
        for path in strength.adapter.side_files
    }


def plan_files(
    base: Checkpoint,
    shards: tuple[PlannedShard, ...],
    config: ConfigEdits | None,
    overlay: Mapping[PurePosixPath, Path],
) -> Plan:
    """The plan of a checkpoint's files: shards, side files, edited configuration and index.

    The base's side files are copied as they are, but for an edited config.json.

    Args:
        base: The checkpoint.
        shards: Its planned weight files.
        config: Its configuration after all edits.
        overlay: Files that win over the base's.
    """
    if base.single_file:
        return Plan(shards, {}, {})
    copies = {path: base.root / path for path in base.side_files} | dict(overlay)
    texts: dict[PurePosixPath, bytes] = {}
    if config is not None and config.changed:
        texts[PurePosixPath("config.json")] = config.encode()
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
    own_names = {base.written_name(name) for name in base.shards}
    kept_index = base.index_name is not None and shards[0].name in own_names
    if len(shards) == 1 and not kept_index:
        return
    content = encode_index(base, shards)
    if content is None and base.index_name is not None:
        copies[PurePosixPath(base.index_name)] = base.root / base.index_name
    elif content is not None:
        name = base.index_name or index_of(base.written_name(next(iter(base.shards))))
        texts[PurePosixPath(base.written_name(name))] = content
