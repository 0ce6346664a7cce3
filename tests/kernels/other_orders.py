"""Matrix products whose terms are added in another order, as another BLAS would add them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest


def reversed_products(patch: pytest.MonkeyPatch) -> list[int]:
    """Makes numpy add products in the opposite order; counts the calls."""
    plain, calls = np.matmul, []

    def matmul(a: Any, b: Any, out: Any = None) -> Any:
        calls.append(1)
        result = plain(a[..., ::-1].copy(), b[..., ::-1, :].copy())
        if out is None:
            return result
        out[...] = result
        return out

    patch.setattr(np, "matmul", matmul)
    return calls
