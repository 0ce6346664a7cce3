"""The floating dtypes that boneconv computes with, under the names that each neighbour gives them.

One table: the name in a safetensors header, numpy's (or ml_dtypes') dtype, and the name that
config.json and the command line use. Tensors of any other dtype are copied byte for byte and never
interpreted; `SIZES` knows how long they are.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

__all__ = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "FLOAT8S",
    "FLOATS",
    "SIZES",
    "by_cli_name",
    "cli_name",
    "name_of",
]

F64 = np.dtype(np.float64)
F32 = np.dtype(np.float32)
F16 = np.dtype(np.float16)
BF16 = np.dtype(ml_dtypes.bfloat16)

#: safetensors name -> numpy dtype, for the dtypes that a merge may read or write.
FLOATS: dict[str, np.dtype[Any]] = {"F64": F64, "F32": F32, "F16": F16, "BF16": BF16}

#: safetensors name -> numpy dtype, for the dtypes of quantised weights that a merge may read.
FLOAT8S: dict[str, np.dtype[Any]] = {
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
}

#: Bits of one element, for every dtype that the safetensors format knows.
SIZES: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}

_CLI = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def by_cli_name(name: str) -> str:
    """The safetensors name of ``float32`` and its like."""
    return _CLI[name]


def cli_name(name: str) -> str:
    """The name that config.json and the command line give a safetensors dtype."""
    return next(cli for cli, stored in _CLI.items() if stored == name)


def name_of(dtype: np.dtype[Any]) -> str:
    """The safetensors name of a numpy floating dtype."""
    return next(name for name, known in FLOATS.items() if known == dtype)
