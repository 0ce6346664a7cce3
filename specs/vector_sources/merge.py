"""The merge, from the equations."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from vector_sources.cases import Case
from vector_sources.tensors import FORMS, WIDTHS, Tensor, encode, tensor


def updated(meta: dict[str, Any], entry: dict[str, Any], w: list[list[Fraction]], block: Tensor):
    """U(W) of section 7, as rows."""
    rank, numbers = entry["rank"], block.numbers
    if meta["variant"] != "bat":
        width = block.shape[1]
        return [
            [numbers[(j % rank) * width + i % width] for j in range(len(row))]
            for i, row in enumerate(w)
        ]
    return [
        [_bat(meta["axis"], rank, numbers, w, i, j) for j in range(len(row))]
        for i, row in enumerate(w)
    ]


def _bat(axis: str, rank: int, b: list[Fraction], w: list[list[Fraction]], i: int, j: int):
    n = (i if axis == "out" else j) // rank
    p, q, first = i % rank, j % rank, j - j % rank
    total = b[(n * rank + p) * rank + q]
    for k in range(rank):
        total += w[i][first + k] * b[(n * rank + k) * rank + q]
    return total


def merged(case: Case) -> dict[str, Tensor]:
    """The canonical merge (section 8.3)."""
    start = case.base | {alias: case.base[name] for alias, name in case.ties.items()}
    state: dict[str, Tensor | list[list[Fraction]]] = dict(start)
    for adapter in case.adapters:
        scale = Fraction(adapter.meta.get("scale", 1)) * Fraction(adapter.strength)
        blocks = {f"{m}.bone_block" for m in adapter.meta["modules"]}
        for module, entry in adapter.meta["modules"].items():
            rows = _rows(state[f"{module}.weight"])
            block = adapter.tensors[f"{module}.bone_block"]
            change = updated(adapter.meta, entry, rows, block)
            state[f"{module}.weight"] = [
                [x + scale * u for x, u in zip(row, step, strict=True)]
                for row, step in zip(rows, change, strict=True)
            ]
        state |= {name: t for name, t in adapter.tensors.items() if name not in blocks}
    out = {name: _rounded(name, value, start, case.dtype) for name, value in state.items()}
    return {n: t for n, t in out.items() if n not in case.ties or t != out[case.ties[n]]}


def _rows(value: Tensor | list[list[Fraction]]) -> list[list[Fraction]]:
    if isinstance(value, list):
        return value
    numbers, width = value.numbers, value.shape[1]
    return [numbers[i : i + width] for i in range(0, len(numbers), width)]


def _rounded(name: str, value: Any, start: dict[str, Tensor], cast: str | None) -> Tensor:
    dtype = cast or start.get(name, value).dtype
    if isinstance(value, list):
        return tensor(dtype, start[name].shape, (x for row in value for x in row))
    if value.dtype == dtype or value.dtype not in FORMS:
        return value
    signs = [bits >> 8 * WIDTHS[value.dtype] - 1 for bits in value.bits]
    pairs = zip(value.numbers, signs, strict=True)
    bits = tuple(encode(x, dtype, negative=bool(sign)) for x, sign in pairs)
    return Tensor(dtype, value.shape, bits)
