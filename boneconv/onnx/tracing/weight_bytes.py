"""How large a checkpoint's weights are in a graph."""

from __future__ import annotations

from boneconv.dtypes import FLOATS, by_cli_name
from boneconv.io.checkpoint import Checkpoint

__all__ = ["weight_bytes"]


def weight_bytes(checkpoint: Checkpoint, dtype: str) -> int:
    """Bytes of all floating tensors of a checkpoint, cast.

    Args:
        checkpoint: The checkpoint.
        dtype: The dtype, by the command line's name.
    """
    width = FLOATS[by_cli_name(dtype)].itemsize
    floats = (tensor for tensor in checkpoint.tensors.values() if tensor.dtype in FLOATS)
    return sum(tensor.nbytes // FLOATS[tensor.dtype].itemsize * width for tensor in floats)
