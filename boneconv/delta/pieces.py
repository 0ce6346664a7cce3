"""Computing corrections, a piece at a time, by any worker."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from boneconv.config import Axis, Variant
from boneconv.delta.correction import pack
from boneconv.delta.restore import inverse_merger
from boneconv.dtypes import FLOATS
from boneconv.engine.plan import Update
from boneconv.engine.workers import Place
from boneconv.errors import InputError, NonFiniteError
from boneconv.io.open_files import OpenFiles
from boneconv.io.safetensors import StoredTensor, byte_view
from boneconv.kernels import Scratch
from boneconv.kernels.inverse import InverseMerger

__all__ = ["Piece", "PieceWorker", "Subject", "pieces_of", "rows_per_piece"]

_ELEMENTS = 1 << 18


@dataclass(frozen=True)
class Subject:
    """A tensor that is corrected.

    Attributes:
        base: The base's.
        merged: The merged one, of the same shape.
        updates: What was merged, in order; none where the tensor was only cast.
    """

    base: StoredTensor
    merged: StoredTensor
    updates: tuple[Update, ...]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape as ``[out, in]``."""
        return self.base.shape[0], math.prod(self.base.shape[1:])


@dataclass(frozen=True)
class Piece:
    """Consecutive rows of a subject."""

    subject: Subject
    first_row: int
    rows: int

    @property
    def nbytes(self) -> int:
        """Bytes of the base."""
        return self.subject.base.nbytes // self.subject.matrix_shape[0] * self.rows


def rows_per_piece(subject: Subject) -> int:
    """Whole blocks, and about a quarter of a million elements."""
    multiple = math.lcm(
        *(
            u.block.rank
            for u in subject.updates
            if u.block.variant is Variant.BAT and u.block.axis is Axis.OUT
        )
    )
    return multiple * max(1, _ELEMENTS // (multiple * subject.matrix_shape[1]))


def pieces_of(subject: Subject) -> list[Piece]:
    """A subject's pieces, in order."""
    total, step = subject.matrix_shape[0], rows_per_piece(subject)
    return [Piece(subject, first, min(step, total - first)) for first in range(0, total, step)]


class PieceWorker(OpenFiles):
    """Packs pieces, one after the other; a context manager."""

    def __init__(self, queues: Sequence[Sequence[Piece]]) -> None:
        super().__init__()
        self._queues = queues
        self._scratch = Scratch()
        self._merger: tuple[Subject, InverseMerger | None] | None = None

    def __call__(self, place: Place) -> bytes:
        """A packed piece: where the prediction fails, one that does without."""
        piece = self._queues[place[0]][place[1]]
        elements = self._read(piece.subject.base, piece)
        return pack(elements, self._predict(piece, elements.dtype))

    def _predict(self, piece: Piece, target: np.dtype[Any]) -> NDArray[Any] | None:
        merger = self._merger_of(piece.subject)
        if merger is None:
            return None
        rows = self._read(piece.subject.merged, piece)
        predicted = np.empty(rows.shape, target)
        try:
            merger.merge(rows, piece.first_row, predicted, self._scratch)
        except NonFiniteError:
            return None
        return predicted

    def _merger_of(self, subject: Subject) -> InverseMerger | None:
        """What undoes a subject's updates; None where a block is singular."""
        if self._merger is None or self._merger[0] is not subject:
            self._merger = None
            source, target = FLOATS[subject.merged.dtype], FLOATS[subject.base.dtype]
            try:
                merger = inverse_merger(
                    subject.base.name,
                    subject.updates,
                    subject.matrix_shape,
                    source,
                    target,
                    bounded=False,
                )
            except InputError:
                self._merger = subject, None
            else:
                self._merger = subject, merger
        return self._merger[1]

    def _read(self, tensor: StoredTensor, piece: Piece) -> NDArray[Any]:
        columns = piece.subject.matrix_shape[1]
        rows = np.empty((piece.rows, columns), FLOATS[tensor.dtype])
        offset = tensor.offset + piece.first_row * columns * rows.itemsize
        self.reader(tensor.path).read_into(byte_view(rows), offset)
        return rows
