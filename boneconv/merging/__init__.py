"""Merging adapters into a checkpoint: a plan, carried out in one pass over the base.

`run` has the engine write what `boneconv.planning` says, `native_rules` says which rule of the
native format an error breaks, `kept_delta` keeps what restores the base.
"""

from __future__ import annotations

from boneconv.merging.run import MergeResult, Progress, merge

__all__ = ["MergeResult", "Progress", "merge"]
