"""The bytes of a merge do not depend on the BLAS: the same with Netlib's, Debian's libblas3."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from boneconv.config import Axis, Variant
from boneconv.dtypes import BF16, F16, F32
from boneconv.kernels import RowMerger, Scratch, Stage, products

LIBRARIES = sorted(Path("/usr/lib").glob("*/blas/libblas.so.3"))
Array = NDArray[Any]

pytestmark = pytest.mark.skipif(not LIBRARIES, reason="needs the Debian package libblas3")

_ROW_MAJOR, _AS_IS = 101, 111


def reference_matmul(library: ctypes.CDLL) -> Callable[..., Array]:
    """``np.matmul`` by the library's sgemm and dgemm, matrix by matrix."""

    def one(a: Array, b: Array, out: Array) -> None:
        a, b = np.ascontiguousarray(a), np.ascontiguousarray(b)
        result = np.zeros(out.shape, out.dtype)
        gemm, number = (
            (library.cblas_sgemm, ctypes.c_float)
            if out.dtype == F32
            else (library.cblas_dgemm, ctypes.c_double)
        )
        (m, k), n = a.shape, b.shape[1]
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in (a, b, result)]
        gemm(
            *(_ROW_MAJOR, _AS_IS, _AS_IS, m, n, k),
            *(number(1), pointers[0], k, pointers[1], n, number(0), pointers[2], n),
        )
        out[...] = result

    def matmul(a: Array, b: Array, out: Array) -> Array:
        assert a.dtype == b.dtype == out.dtype
        stack = out.shape[:-2]
        a, b = (np.broadcast_to(x, (*stack, *x.shape[-2:])) for x in (a, b))
        for place in np.ndindex(*stack):
            one(a[place], b[place], out[place])
        return out

    return matmul


class NumpyWith:
    """numpy, but for its matrix product."""

    def __init__(self, matmul: Callable[..., Array]) -> None:
        self.matmul = matmul

    def __getattr__(self, name: str) -> Any:
        return getattr(np, name)


def merge(stage: Stage, weight: Array, target: np.dtype[Any], *, canonical: bool) -> Array:
    merger = RowMerger([stage], weight.shape, weight.dtype, target, canonical=canonical)
    out, scratch, step = np.empty(weight.shape, target), Scratch(), merger.preferred_rows()
    for first in range(0, len(weight), step):
        merger.merge(weight[first : first + step], first, out[first : first + step], scratch)
    return out.view(np.uint16 if target != F32 else np.uint32)


@pytest.mark.parametrize("axis", list(Axis))
@pytest.mark.parametrize("target", [BF16, F16, F32], ids=str)
def test_reference_blas_gives_the_same_bytes(
    axis: Axis, target: np.dtype[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(5)
    out, inside, r = 768, 1024, 64
    weight = (rng.standard_normal((out, inside)) * 0.02).astype(target)
    shape = ((out if axis is Axis.OUT else inside) // r, r, r)
    block = (rng.standard_normal(shape) * 0.02).astype(np.float32)
    stage = Stage(Variant.BAT, block, axis)
    ours = merge(stage, weight, target, canonical=True)
    plain = merge(stage, weight, target, canonical=False)
    other = reference_matmul(ctypes.CDLL(str(LIBRARIES[0])))
    monkeypatch.setattr(products, "np", NumpyWith(other))
    assert np.array_equal(merge(stage, weight, target, canonical=True), ours)
    if target == F16:  # plain sums do differ: the comparison is not idle
        assert not np.array_equal(merge(stage, weight, target, canonical=False), plain)
