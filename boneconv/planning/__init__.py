"""What adapters mean for a base, from headers alone: all tensors and files of the merged one.

`accounts` finds a home for every adapter tensor, `shards` lays the result out in files, `files`
decides what lies beside them; `part` has all that for one checkpoint. `plan` makes the whole of it,
which for a diffusers pipeline is a part for each component that is merged into. Nothing is written
here: merging carries a plan out, verification holds a checkpoint against one, the ONNX exporters
take their weights from one.
"""

from __future__ import annotations

from boneconv.planning.plan import MergePlan, plan_merge

__all__ = ["MergePlan", "plan_merge"]
