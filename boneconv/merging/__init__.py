"""Merging adapters into a checkpoint: plan from headers alone, then stream.

`accounts` finds a home for every adapter tensor, `shards` lays the result out in files, `plan` puts
both together and stops before anything is written, `run` has the engine write it.
"""

from __future__ import annotations

from boneconv.merging.plan import MergePlan, plan_merge
from boneconv.merging.run import MergeResult, Progress, merge

__all__ = ["MergePlan", "MergeResult", "Progress", "merge", "plan_merge"]
