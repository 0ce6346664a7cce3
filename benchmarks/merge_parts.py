"""One merge with parts of it switched off, to show what each part costs. For benchmarks only.

python benchmarks/merge_parts.py BASE ADAPTER OUT [--no-flush] [--no-digests] [--plain]
"""

from __future__ import annotations

import argparse
import os
from functools import partial

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import boneconv
from boneconv.digest import LeafHasher
from boneconv.engine import station
from boneconv.io.files import Writer
from boneconv.kernels import RowMerger

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("base")
parser.add_argument("adapter")
parser.add_argument("out")
parser.add_argument("--no-flush", action="store_true", help="leave out fsync")
parser.add_argument("--no-digests", action="store_true", help="hash nothing")
parser.add_argument("--plain", action="store_true", help="round float32 sums as they are")
options = parser.parse_args()

if options.no_flush:
    Writer.sync = lambda self: None  # type: ignore[method-assign]
if options.no_digests:
    LeafHasher.update = lambda self, data: None  # type: ignore[method-assign]
if options.plain:
    station.RowMerger = partial(RowMerger, canonical=False)  # type: ignore[misc,assignment]
boneconv.merge(options.base, options.adapter, options.out)
