"""What one worker holds while it works: open files, buffers, the merger of the weight it is at."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from boneconv.dtypes import FLOATS
from boneconv.engine.compute import Desk, Leaves, Merger, do_segment
from boneconv.engine.plan import PlannedTensor
from boneconv.engine.segments import Segment
from boneconv.engine.workers import Place
from boneconv.errors import NonFiniteError, ShapeError
from boneconv.io.files import Reader
from boneconv.io.open_files import OpenFiles
from boneconv.io.safetensors import StoredTensor
from boneconv.io.write_behind import WriteBehind
from boneconv.kernels import RowMerger, Scratch, Stage

__all__ = ["Station", "Task", "naming_block", "new_merger", "stages_of"]

#: A segment, and the number of the shard that it belongs to.
Task = tuple[int, Segment]


class Station(OpenFiles):
    """Does segments, one after the other; a context manager.

    Args:
        queues: The tasks of every queue.
        paths: The output file of every shard; it exists.
        device: ``cpu``, or a torch device.
    """

    def __init__(
        self, queues: Sequence[Sequence[Task]], paths: Sequence[Path], device: str
    ) -> None:
        super().__init__()
        self._queues, self._paths, self._device = queues, paths, device
        self._desk = Desk(Scratch(), self._files.enter_context(WriteBehind()))
        self._queue = -1
        self._mergers: dict[int, tuple[str, Merger]] = {}

    def __call__(self, place: Place) -> Leaves:
        """Does a segment; raises as `do_segment`."""
        if place[0] != self._queue:
            self._queue = place[0]
            self._mergers.clear()
        shard, segment = self._queues[place[0]][place[1]]
        return do_segment(
            segment,
            self._source_of(segment.tensor),
            self._paths[shard],
            self._merger_of(shard, segment.tensor),
            self._desk,
        )

    def _source_of(self, tensor: PlannedTensor) -> Reader | None:
        source = tensor.source
        return self.reader(source.path) if isinstance(source, StoredTensor) else None

    def _merger_of(self, shard: int, tensor: PlannedTensor) -> Merger | None:
        """The merger of the weight that a shard is at; the one before is dropped first."""
        if not tensor.updates and tensor.kernel is None:
            return None
        name, merger = self._mergers.pop(shard, ("", None))
        if merger is None or name != tensor.name:
            merger = None
            merger = new_merger(tensor, self._device)
        self._mergers[shard] = tensor.name, merger
        return merger


def new_merger(tensor: PlannedTensor, device: str = "cpu") -> Merger:
    """Reads the blocks of a planned tensor and prepares them.

    Raises:
        NonFiniteError: A block holds NaN or infinity.
        ShapeError: A block does not fit the weight.
    """
    if tensor.kernel is not None:
        return tensor.kernel(tensor)
    source, target = FLOATS[tensor.source.dtype], FLOATS[tensor.dtype]
    with naming_block(tensor):
        if device == "cpu":
            return RowMerger(stages_of(tensor), tensor.matrix_shape, source, target)
        from boneconv.kernels.torch_rows import TorchRowMerger

        return TorchRowMerger(stages_of(tensor), tensor.matrix_shape, source, target, device=device)


def stages_of(tensor: PlannedTensor) -> list[Stage]:
    """The updates of a planned tensor, their blocks read."""
    return [
        Stage(u.block.variant, u.block.tensor.read(), u.block.axis, u.scale, u.residue)
        for u in tensor.updates
    ]


@contextmanager
def naming_block(tensor: PlannedTensor) -> Iterator[None]:
    """Says whose block it is that an error speaks of."""
    try:
        yield
    except (NonFiniteError, ShapeError) as error:
        if not tensor.updates:
            raise
        block = tensor.updates[0].block.tensor
        path = block.path if isinstance(block, StoredTensor) else None
        raise error.restated(f"the block of {tensor.name!r}: {error.message}", path) from error
