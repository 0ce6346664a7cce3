"""Writing a delta file beside a merge; the two are published together.

The merged checkpoint is read once more, with the base; corrections are computed in pieces by
several workers and laid out in the order of the base, so that the same merge gives the same file.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from boneconv.delta.describe import DeltaJob, describe, how_restored, read_head, subjects_of
from boneconv.delta.document import Document
from boneconv.delta.pieces import Piece, PieceWorker, Subject, pieces_of
from boneconv.delta.read import CORRECTION, DOCUMENT, FILE, FORMAT, HEAD, STORED, VERSION
from boneconv.engine.plan import Plan
from boneconv.engine.stream import ShardDigests
from boneconv.engine.workers import Place, can_fork, run_queues
from boneconv.errors import UsageError
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.files import Reader, Writer, machine_errors
from boneconv.io.pth import PTH_SUFFIXES
from boneconv.io.safetensors import StoredTensor, layout
from boneconv.io.staging import SPOOL, Staging

__all__ = ["check_delta_base", "delta_work", "write_delta"]

_COPY_BYTES = 1 << 20


def check_delta_base(base: Checkpoint) -> None:
    """Raises UsageError for a base whose files cannot be restored: torch's own archives."""
    for name in base.shards:
        if Path(name).suffix in PTH_SUFFIXES:
            raise UsageError(
                "a delta file restores safetensors files only",
                path=base.root / name,
                hint="Leave out --keep-delta, and keep the base",
            )


def delta_work(base: Checkpoint, plan: Plan) -> int:
    """Bytes of the base that corrections are computed for: a measure for progress."""
    return sum(
        base.tensors[t.name].nbytes for t in plan.tensors if how_restored(base, t) == "correct"
    )


def write_delta(
    staging: Staging,
    job: DeltaJob,
    merged: Path,
    digests: ShardDigests,
    *,
    workers: int,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> None:
    """Writes a delta file in its place of work, from which the caller publishes it.

    Args:
        staging: The place of work.
        job: What was merged.
        merged: The complete output of the merge.
        digests: The digests of its tensors.
        workers: How many workers compute.
        advance: Is told of how many bytes of the base the corrections are done.

    Raises:
        DiskFullError, MachineError: The file cannot be written.
    """
    subjects = subjects_of(job, merged)
    with machine_errors(staging.out), (staging.root / SPOOL).open("w+b") as spool:
        places = _compute(subjects, spool, workers, advance)
        document = describe(job, subjects, digests)
        _assemble(staging.target, job, document, subjects, places, spool)


Places = Mapping[str, Sequence[tuple[int, int]]]


def _compute(
    subjects: Mapping[str, Subject],
    spool: BinaryIO,
    workers: int,
    advance: Callable[[int], None],
) -> Places:
    """Spools the pieces of all corrections as they come; where each of them is and how long."""
    queues: list[list[Piece]] = [pieces_of(subject) for subject in subjects.values()]
    names = list(subjects)
    places: dict[str, list[tuple[int, int]]] = {
        name: [(0, 0)] * len(queue) for name, queue in zip(names, queues, strict=True)
    }

    def on_done(place: Place, packed: bytes) -> None:
        places[names[place[0]]][place[1]] = spool.tell(), len(packed)
        spool.write(packed)
        advance(queues[place[0]][place[1]].nbytes)

    run_queues(
        [len(queue) for queue in queues],
        lambda: PieceWorker(queues),
        on_done,
        workers,
        processes=can_fork(),
    )
    return places


def _assemble(
    target: Path,
    job: DeltaJob,
    document: Document,
    subjects: Mapping[str, Subject],
    places: Places,
    spool: BinaryIO,
) -> None:
    """Lays out the file and writes it."""
    texts = {DOCUMENT: document.encode()}
    texts |= {HEAD + name: read_head(shard.path) for name, shard in job.base.shards.items()}
    for name, file in document.files.items():
        if file.stored:
            texts[FILE + name] = _deflated(job.base.root / name)
    kept = [name for name, entry in document.tensors.items() if entry.how == "stored"]
    entries: list[tuple[str, str, tuple[int, ...]]]
    entries = [(name, "U8", (len(text),)) for name, text in texts.items()]
    entries += [(CORRECTION + name, "U8", (_table(places[name])[-1],)) for name in subjects]
    entries += [
        (STORED + name, job.base.tensors[name].dtype, job.base.tensors[name].shape) for name in kept
    ]
    head, offsets, size = layout(entries, {"format": FORMAT, "version": VERSION})
    with Writer(target, size) as writer:
        writer.write_at(head, 0)
        for name, text in texts.items():
            writer.write_at(text, offsets[name])
        for name in subjects:
            _write_correction(writer, offsets[CORRECTION + name], places[name], spool)
        for name in kept:
            _write_stored(writer, offsets[STORED + name], job.base.tensors[name])
        writer.sync()


def _table(places: Sequence[tuple[int, int]]) -> list[int]:
    """Where the pieces begin and the last one ends, from the start of the correction."""
    table = [8 * (len(places) + 1)]
    for _, length in places:
        table.append(table[-1] + length)
    return table


def _write_correction(
    writer: Writer, offset: int, places: Sequence[tuple[int, int]], spool: BinaryIO
) -> None:
    table = _table(places)
    writer.write_at(np.asarray(table, "<u8").tobytes(), offset)
    for (start, length), place in zip(places, table, strict=False):
        spool.seek(start)
        writer.write_at(spool.read(length), offset + place)


def _write_stored(writer: Writer, offset: int, tensor: StoredTensor) -> None:
    buffer = memoryview(bytearray(_COPY_BYTES))
    with Reader(tensor.path) as reader:
        for start in range(0, tensor.nbytes, _COPY_BYTES):
            part = buffer[: min(_COPY_BYTES, tensor.nbytes - start)]
            reader.read_into(part, tensor.offset + start)
            writer.write_at(part, offset + start)


def _deflated(path: Path) -> bytes:
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    with machine_errors(path):
        return packer.compress(path.read_bytes()) + packer.flush()
