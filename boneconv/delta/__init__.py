"""Delta files: what a merge lost of its base, so that `unmerge` restores every byte.

A delta file is one safetensors file. Its metadata say ``format: boneconv-delta`` and
``version: 1``; its tensors are

    document            U8: JSON, see `boneconv.delta.document`
    head/SHARD          U8: the first bytes of a weight file of the base: header length and header
    file/NAME           U8, deflated: a file of the base that the merge changed or did not copy
    correction/TENSOR   U8: what the restored tensor lacks, see `boneconv.delta.correction`
    base/TENSOR         a tensor of the base as it is, which the merge replaced

For most tensors the merged weight and the adapter say nearly all of the base's: `boneconv.kernels`
computes an element from them, the same on every machine, and the delta file holds the difference
from the base's element in units in the last place, mostly zero. Version 1 rests on the bits of
that computation (`boneconv.kernels.inverse`): a change of them takes a new version.
"""

from boneconv.delta.describe import DeltaJob
from boneconv.delta.document import Document, StoredFile, TensorEntry, UpdateEntry
from boneconv.delta.read import DeltaFile, open_delta
from boneconv.delta.restore import Restoration, inversion
from boneconv.delta.write import check_delta_base, delta_work, write_delta

__all__ = [
    "DeltaFile",
    "DeltaJob",
    "Document",
    "Restoration",
    "StoredFile",
    "TensorEntry",
    "UpdateEntry",
    "check_delta_base",
    "delta_work",
    "inversion",
    "open_delta",
    "write_delta",
]
