"""Merging adapters into a checkpoint: a plan, carried out in one pass over the base.

`run` has the engine write what `boneconv.planning` says, `native_rules` holds the digests that come
out of it against an adapter's fingerprint, `kept_delta` keeps what restores the base.
"""

from __future__ import annotations

from boneconv.merging.run import MergeResult, Progress, merge

__all__ = ["MergeResult", "Progress", "merge"]
