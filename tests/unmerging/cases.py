"""What the tests of unmerging draw: bases, adapters and options of a merge."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from tests.builders import BF16, F16, F32, F64, Array, Raw, base_tensors, blocks_for_all
from tests.kernels.cases import KINDS, values

RECORD = "boneconv.json"


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Array | Raw], list[tuple[str, Any]], dict[str, Any]]:
    """A base's tensors, the blocks of one or two adapters, and options of the merge."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    dtype = draw(st.sampled_from([BF16, F16, F32, F64]))
    kinds = [kind for kind in KINDS if kind != "huge"]
    tensors: dict[str, Array | Raw] = {
        name: tensor
        if isinstance(tensor, Raw) or tensor.dtype == np.int64
        else values(draw(st.sampled_from(kinds)), tensor.shape, dtype, rng)
        for name, tensor in base_tensors(layers=1).items()
    }
    adapters = []
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        variant = draw(st.sampled_from(["bone", "bat", "mini"]))
        rank = draw(st.sampled_from([4, 2] if variant == "bat" else [4, 5, 3]))
        kind = draw(st.sampled_from(["normal", "few bits", "mixed", "zero"]))
        blocks = {
            name: values(kind, block.shape, F32, rng)
            for name, block in blocks_for_all(variant, rank=rank).items()
            if ".0." in name
        }
        adapters.append((variant, rank, blocks))
    options = {
        "scale": draw(st.sampled_from([1.0, 0.3, -2.0])),
        "dtype": draw(st.sampled_from(["keep", "keep", "keep", "float32", "bfloat16"])),
        "max_shard_size": draw(st.sampled_from([None, "1kB"])),
        "workers": 1,
    }
    return tensors, adapters, options
