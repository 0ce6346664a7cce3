"""The math of the merge, once for arrays that stream (numpy and ml_dtypes; no torch).

`boneconv.kernels.reference` states the formulas, `boneconv.kernels.exact` the exact values;
`boneconv.kernels.torch_rows` is the same merge on a CUDA device.
"""

from boneconv.kernels.cast import cast_rows
from boneconv.kernels.rows import RowMerger
from boneconv.kernels.scratch import Scratch
from boneconv.kernels.stage import Stage

__all__ = ["RowMerger", "Scratch", "Stage", "cast_rows"]
