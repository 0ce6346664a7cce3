"""The canonical merge through torch, on a CUDA device (or torch's CPU, where tests run it).

The bulk is computed on the device: Bone exactly (the rounding error of a float64 addition is itself
a float64), BAT in float64 within the error bound of `boneconv.kernels.bat`; devices that are slow
in float64 are still far faster than any disk. What the bound leaves in doubt comes back and is
settled by the same exact arithmetic as on the CPU, so that the bytes are those of `RowMerger`.
Anything but a single block of at most float32 is left to `RowMerger` itself.

The only module of the kernels that imports torch.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from boneconv.config import Axis
from boneconv.dtypes import BF16, F16, F32
from boneconv.kernels.additive import AdditiveMerger
from boneconv.kernels.bat import BatMerger
from boneconv.kernels.narrow import widen
from boneconv.kernels.rounding import largest_magnitude
from boneconv.kernels.rows import RowMerger
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Array, Stage, rank_of, row_update

__all__ = ["TorchRowMerger"]

_TORCH = {BF16: torch.bfloat16, F16: torch.float16, F32: torch.float32}
_SIGNED: dict[int, np.dtype[Any]] = {2: np.dtype(np.int16), 4: np.dtype(np.int32)}
_UP = 1 + 2.0**-10


class TorchRowMerger(RowMerger):
    """`RowMerger` with its arithmetic on a torch device: the same bytes. Threads may share one.

    Args:
        stages: The adapters' updates, in order.
        shape: The weight's ``(out, in)``.
        source: The dtype of the rows that come.
        target: The dtype of the rows that go.
        device: A torch device.

    Raises:
        ConfigError: A dtype that cannot be merged, or a scale that is not finite.
        ShapeError: A block does not fit the shape.
        NonFiniteError: A block holds NaN or infinity.
    """

    chunk = 1 << 22

    def __init__(
        self,
        stages: Sequence[Stage],
        shape: tuple[int, int],
        source: np.dtype[Any],
        target: np.dtype[Any],
        *,
        device: str | torch.device = "cuda",
    ) -> None:
        super().__init__(stages, shape, source, target)
        self._device = torch.device(device)
        self._block: torch.Tensor | None = None
        if isinstance(self._fast, BatMerger):
            stage = self._stages[0]
            block = stage.block.astype(np.float64) * stage.scale
            self._block = torch.from_numpy(block).to(self._device)
        self._staging = _Staging(self._device)

    def _merge(self, rows: Array, first_row: int, out: Array, scratch: Scratch) -> None:
        largest = largest_magnitude(rows)
        fits = isinstance(self._fast, AdditiveMerger | BatMerger)
        if self._fast is None or not fits or not self._fast.reach(largest) < self._safe:
            self._in_small_chunks(rows, first_row, out, scratch)
            return
        weights = self._staging.upload(rows).double()
        if isinstance(self._fast, AdditiveMerger):
            self._add(weights, first_row, out)
        else:
            self._multiply(weights, rows, first_row, out, largest, scratch)

    def _in_small_chunks(self, rows: Array, first_row: int, out: Array, scratch: Scratch) -> None:
        step = self._step(RowMerger.chunk)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            super()._merge(rows[part], first_row + start, out[part], scratch)

    def _add(self, weights: torch.Tensor, first_row: int, out: Array) -> None:
        """Bone or mini: the exact sum, rounded once."""
        assert isinstance(self._fast, AdditiveMerger)
        tile = row_update(self._fast.stage, first_row, len(weights)).astype(np.float64)
        addend = torch.from_numpy(np.ascontiguousarray(tile)).to(self._device)
        repeats = -(-weights.shape[1] // addend.shape[1])
        addend = addend.repeat(1, repeats)[:, : weights.shape[1]]
        total = weights + addend
        part = total - weights
        rest = (weights - (total - part)) + (addend - part)
        self._staging.download(_round(_to_odd(total + 0.0, rest), self._target), out)

    def _multiply(
        self,
        weights: torch.Tensor,
        rows: Array,
        first_row: int,
        out: Array,
        largest: float,
        scratch: Scratch,
    ) -> None:
        """BAT: float64 within a bound, and the exact path for what that leaves in doubt."""
        assert isinstance(self._fast, BatMerger)
        change, product, addend = self._change(weights, first_row)
        total = weights + change
        r = rank_of(self._stages[0])
        bound = (r + 6) * 2.0**-53 * _UP * (product + 2 * addend) + 2.0**-51 * (
            self._fast.reach(largest)
        )
        below = _round(total - bound, self._target)
        above = _round(total + bound, self._target)
        doubtful = torch.nonzero((below != above).reshape(-1)).reshape(-1).cpu().numpy()
        self._staging.download(below, out)
        if len(doubtful):
            size = product * _UP + largest + addend
            self._fast.recheck.settle(widen(rows, scratch), first_row, doubtful, size, out, scratch)

    def _change(self, weights: torch.Tensor, first_row: int) -> tuple[torch.Tensor, float, float]:
        """W @ B + B by tiles; the largest product of a row's and a column's norm; the largest B."""
        assert self._block is not None
        count, columns = weights.shape
        r = self._block.shape[-1]
        tiles = weights.reshape(count, columns // r, r)
        index = torch.arange(first_row, first_row + count, device=self._device)
        if self._stages[0].axis is Axis.IN:
            blocks = self._block  # [b, r, r]
            change = torch.bmm(tiles.transpose(0, 1), blocks).transpose(0, 1)
            change = change + blocks[:, index % r].transpose(0, 1)
        else:
            first = first_row // r
            blocks = self._block[first : (first_row + count - 1) // r + 1]
            parts = [
                tiles[max(0, a * r - first_row) : (a + 1) * r - first_row] @ blocks[a - first]
                for a in range(first, first + len(blocks))
            ]
            change = torch.cat(parts)
            change = change + blocks[index // r - first, index % r][:, None, :]
        product = tiles.norm(dim=-1).max() * blocks.norm(dim=-2).max()
        return change.reshape(count, columns), float(product), float(blocks.abs().max())


class _Staging:
    """Host buffers that transfers go through, per thread; pinned for a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._local = threading.local()

    def _buffer(self, nbytes: int) -> torch.Tensor:
        held: torch.Tensor | None = getattr(self._local, "held", None)
        if held is None or held.numel() < nbytes:
            pinned = self._device.type == "cuda"
            held = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
            self._local.held = held
        return held[:nbytes]

    def upload(self, rows: Array) -> torch.Tensor:
        """Rows of a numpy array as a tensor on the device."""
        buffer = self._buffer(rows.nbytes)
        buffer.numpy()[...] = rows.view(np.uint8).reshape(-1)
        tensor = buffer.view(_TORCH[rows.dtype]).reshape(rows.shape)
        return tensor.to(self._device, copy=True)

    def download(self, bits: torch.Tensor, out: Array) -> None:
        """A tensor of the result's bits (as signed integers) into a numpy array."""
        buffer = self._buffer(out.nbytes).view(bits.dtype).reshape(bits.shape)
        buffer.copy_(bits)
        out.view(_SIGNED[out.dtype.itemsize])[...] = buffer.numpy()


def _to_odd(total: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Total + rest (its rounding error) as float64, rounded to odd."""
    inexact = rest != 0
    too_far = inexact & (torch.signbit(rest) != torch.signbit(total))
    bits = total.view(torch.int64) - too_far.long()
    return torch.where(inexact, bits | 1, bits).view(torch.float64)


def _round(values: torch.Tensor, target: np.dtype[Any]) -> torch.Tensor:
    """Float64 to the target's bits with a single rounding to nearest even."""
    nearest = values.float()
    if target == F32:
        return nearest.view(torch.int32)
    back = nearest.double()
    inexact = back != values
    too_far = inexact & (back.abs() > values.abs())
    bits = nearest.view(torch.int32) - too_far.int()
    bits = torch.where(inexact, bits | 1, bits)
    if target == F16:
        return bits.view(torch.float32).half().view(torch.int16)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(torch.int16)
