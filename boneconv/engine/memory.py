"""How much memory a plan will need: the interpreter, and for each worker its chunks and blocks.

The constants are measured (Linux, numpy 2.4, Python 3.11); `tests/merging/test_resources.py` holds
the prediction to within a fifth of what a merge takes.
"""

from __future__ import annotations

from boneconv.config import Variant
from boneconv.dtypes import FLOAT8S, FLOATS, SIZES
from boneconv.engine.plan import Plan, PlannedTensor
from boneconv.io.safetensors import ArrayTensor

__all__ = ["predict_peak"]

#: Resident memory of an interpreter with numpy, ml_dtypes, click and boneconv, before any work.
_INTERPRETER = 40_000_000
_HEADER_PER_TENSOR = 2_000
#: What a worker is about to write; what a process of its own does not share; the work space of
#: matrix products.
_WORKER = 2_000_000
_PROCESS = 3_000_000
_PRODUCTS = 3_000_000
#: Elements that are computed at a time, and the kernels' bytes for each.
_CHUNK = 1 << 17
_SUM_SCRATCH, _PRODUCT_SCRATCH = 22, 34
#: A chunk of a float8 weight, as float64 and float32 and on its way to 16 bits; where it is merged,
#: what the general kernel makes of it too.
_DEQUANTISED = (1 << 16) * 24
_GENERAL = (1 << 15) * 160


def predict_peak(plan: Plan, workers: int) -> int:
    """Predicted peak of resident memory on the CPU, in bytes, of all processes together.

    Every worker holds chunks of the base and of the output, float images of them, and the blocks
    of the weight it is at, as stored and as the kernel prepares them.
    """
    merged = [_merge_bytes(tensor) for tensor in plan.tensors if tensor.updates]
    merged += [_DEQUANTISED for tensor in plan.tensors if tensor.kernel and not tensor.updates]
    in_memory = sum(
        tensor.source.nbytes for tensor in plan.tensors if isinstance(tensor.source, ArrayTensor)
    )
    worker = _WORKER + (_PROCESS if workers > 1 else 0)
    headers = len(plan.tensors) * _HEADER_PER_TENSOR
    busiest = sum(sorted(merged, reverse=True)[:workers])
    return _INTERPRETER + workers * worker + busiest + in_memory + headers


def _merge_bytes(tensor: PlannedTensor) -> int:
    """What a worker needs to merge a tensor."""
    multiplies = any(update.block.variant is Variant.BAT for update in tensor.updates)
    whole_rows = max(update.block.rank if multiplies else 1 for update in tensor.updates)
    in_chunk = max(_CHUNK, whole_rows * tensor.matrix_shape[1])
    stored = (SIZES[tensor.source.dtype] + SIZES[tensor.dtype]) // 8
    scratch = _CHUNK * (_PRODUCT_SCRATCH if multiplies else _SUM_SCRATCH)
    if tensor.source.dtype in FLOAT8S:
        scratch += _DEQUANTISED + _GENERAL
    return in_chunk * stored + scratch + (_PRODUCTS if multiplies else 0) + _blocks(tensor)


def _blocks(tensor: PlannedTensor) -> int:
    """Bytes of a weight's blocks as they are read, and as the kernel prepares them."""
    stored = sum(update.block.tensor.nbytes for update in tensor.updates)
    elements = sum(
        update.block.tensor.nbytes // FLOATS[update.block.tensor.dtype].itemsize
        for update in tensor.updates
    )
    return stored + 4 * elements
