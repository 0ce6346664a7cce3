"""Comparing answers: numbers over all positions, worked out input by input."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from boneconv.behaviour.report import Distance

__all__ = ["Answers", "compare"]

#: The answers to one input: ``[positions, width]``, floating.
Answers = np.ndarray[Any, Any]


def compare(
    reference: Iterable[Answers], others: Iterable[Answers], *, logits: bool, shared: bool = False
) -> Distance:
    """The distance of answers from the reference's.

    Args:
        reference: The reference's, an array ``[positions, width]`` for each input.
        others: The other's, in the same order.
        logits: Whether the numbers are logits, whose distributions can be compared.
        shared: Whether only the columns are compared that both have (a vocabulary that has grown).

    Raises:
        ValueError: The shapes differ.
    """
    sums = _Sums(logits)
    for mine, other in zip(reference, others, strict=True):
        if shared:
            width = min(mine.shape[-1], other.shape[-1])
            mine, other = mine[:, :width], other[:, :width]
        if mine.shape != other.shape:
            raise ValueError(f"answers of shape {list(other.shape)}, not {list(mine.shape)}")
        sums.add(mine.astype(np.float64), other.astype(np.float64))
    return sums.distance()


class _Sums:
    def __init__(self, logits: bool) -> None:
        self._logits = logits
        self._squares = self._absolute = self._largest = self._kl = 0.0
        self._numbers = self._positions = self._agree = 0

    def add(self, reference: Answers, other: Answers) -> None:
        with np.errstate(all="ignore"):
            difference = np.abs(other - reference)
            self._squares += float(np.square(difference).sum())
            self._absolute += float(difference.sum())
            self._largest = float(np.maximum(self._largest, difference.max(initial=0.0)))
            self._numbers += difference.size
            if self._logits:
                mine, theirs = _log_softmax(reference), _log_softmax(other)
                self._kl += float((np.exp(mine) * (mine - theirs)).sum())
                self._agree += int((reference.argmax(-1) == other.argmax(-1)).sum())
                self._positions += len(reference)

    def distance(self) -> Distance:
        numbers, positions = max(self._numbers, 1), max(self._positions, 1)
        return Distance(
            rms=math.sqrt(self._squares / numbers),
            max_abs=self._largest,
            mean_abs=self._absolute / numbers,
            kl=max(self._kl / positions, 0.0) if self._logits else None,
            top1=self._agree / positions if self._logits else None,
        )


def _log_softmax(logits: Answers) -> Answers:
    shifted = logits - logits.max(-1, keepdims=True)
    result: Answers = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
