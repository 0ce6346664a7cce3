"""Kernels that compute a base's tensor from the merged one: alone, and with a correction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boneconv.delta.correction import correct, is_blank, unpack
from boneconv.dtypes import FLOATS
from boneconv.engine.plan import PlannedTensor, Update
from boneconv.errors import FormatError, InputError
from boneconv.io.files import Reader
from boneconv.io.safetensors import StoredTensor
from boneconv.kernels import Scratch, Stage
from boneconv.kernels.inverse import InverseMerger, Measures

__all__ = ["Restoration", "inverse_merger", "inversion"]


def inversion(tensor: PlannedTensor) -> InverseMerger:
    """The kernel that undoes a planned tensor's updates and bounds the difference from the base."""
    return inverse_merger(
        tensor.name,
        tensor.updates,
        tensor.matrix_shape,
        FLOATS[tensor.source.dtype],
        FLOATS[tensor.dtype],
        bounded=True,
    )


def inverse_merger(
    name: str,
    updates: Sequence[Update],
    shape: tuple[int, int],
    source: np.dtype[Any],
    target: np.dtype[Any],
    *,
    bounded: bool,
) -> InverseMerger:
    """Reads the blocks of updates and prepares to undo them.

    Raises:
        InputError: A block cannot be inverted, does not fit or is not finite; it names the tensor.
    """
    stages = [
        Stage(u.block.variant, u.block.tensor.read(), u.block.axis, u.scale, u.residue)
        for u in updates
    ]
    try:
        return InverseMerger(stages, shape, source, target, bounded=bounded)
    except InputError as error:
        raise error.restated(f"{name!r}: {error.message}", None) from error


@dataclass(frozen=True)
class Restoration:
    """A kernel that undoes a planned tensor's updates and corrects the result.

    Attributes:
        correction: The correction in the delta file.
        rows: How many rows each of its pieces covers.
    """

    correction: StoredTensor
    rows: int

    def __call__(self, tensor: PlannedTensor) -> _Restorer:
        """What restores the tensor; raises FormatError where the correction is malformed."""
        return _Restorer(self, tensor)


class _Restorer:
    def __init__(self, restoration: Restoration, tensor: PlannedTensor) -> None:
        self._correction, self._rows = restoration.correction, restoration.rows
        self._tensor = tensor
        self._shape = tensor.matrix_shape
        self._target = FLOATS[tensor.dtype]
        self._ends = self._read_ends()
        self._merger: InverseMerger | None = None
        self._held: tuple[int, bool, NDArray[Any]] | None = None

    def preferred_rows(self) -> int:
        """Whole pieces, where they are large."""
        return self._rows

    def merge(
        self, rows: NDArray[Any], first_row: int, out: NDArray[Any], scratch: Scratch
    ) -> Measures:
        """Restores rows ``[n, in]``."""
        start, stop = first_row, first_row + len(rows)
        while start < stop:
            number = start // self._rows
            end = min(stop, (number + 1) * self._rows)
            part = slice(start - first_row, end - first_row)
            blank, steps = self._piece(number)
            if blank:
                out[part] = 0
            else:
                self._inverse().merge(rows[part], start, out[part], scratch)
            skipped = (start - number * self._rows) * self._shape[1]
            correct(steps[skipped : skipped + out[part].size], out[part])
            start = end
        return Measures(0.0, self._merger.condition if self._merger is not None else 0.0)

    def _inverse(self) -> InverseMerger:
        """Made when it is needed: a singular block has none, and blank pieces only."""
        if self._merger is None:
            tensor = self._tensor
            source = FLOATS[tensor.source.dtype]
            self._merger = inverse_merger(
                tensor.name, tensor.updates, self._shape, source, self._target, bounded=False
            )
        return self._merger

    def _piece(self, number: int) -> tuple[bool, NDArray[Any]]:
        """Whether a piece is blank, and its steps."""
        if self._held is None or self._held[0] != number:
            self._held = None
            piece = self._read(self._ends[number], self._ends[number + 1])
            rows = min(self._rows, self._shape[0] - number * self._rows)
            try:
                steps = unpack(piece, rows * self._shape[1], self._target)
            except FormatError as error:
                raise self._malformed() from error
            self._held = number, is_blank(piece), steps
        return self._held[1], self._held[2]

    def _read_ends(self) -> list[int]:
        """Where each piece ends, from the start of the correction; the first is where one begins.

        The correction begins with these numbers: unsigned, of 64 bits, little-endian.
        """
        count = -(-self._shape[0] // self._rows) + 1
        if self._correction.nbytes < 8 * count:
            raise self._malformed()
        ends = np.frombuffer(self._read(0, 8 * count), "<u8").tolist()
        if ends[0] != 8 * count or ends[-1] != self._correction.nbytes or ends != sorted(ends):
            raise self._malformed()
        return [int(end) for end in ends]

    def _read(self, start: int, end: int) -> bytes:
        content = bytearray(end - start)
        with Reader(self._correction.path) as reader:
            reader.read_into(memoryview(content), self._correction.offset + start)
        return bytes(content)

    def _malformed(self) -> FormatError:
        return FormatError(
            f"the correction of {self._tensor.name!r} is malformed",
            path=self._correction.path,
            hint="Copy the delta file again",
        )
