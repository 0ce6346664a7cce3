"""The Bone Adapter Format 1.0 (specs/bone-adapter-1.0.md): reading, writing and checking it.

`canonical` knows the JSON, `container` the safetensors file, `fields` and `metadata` what stands in
its header, `tensors` and `peft_config` the rest; `rules` numbers what all of them check. `read` and
`write` put them together, `base` holds an adapter against its base.
"""

from __future__ import annotations

from boneconv.formats.native.base import (
    BaseTensor,
    check_homes,
    find_homes,
    fingerprint,
    home_faults,
    mismatch,
    shape_faults,
    weight_faults,
)
from boneconv.formats.native.content import NativeAdapter, to_adapter
from boneconv.formats.native.metadata import METADATA_KEY, Metadata, Module
from boneconv.formats.native.peft_config import NATIVE_TYPE
from boneconv.formats.native.read import WEIGHTS_NAME, open_native, read
from boneconv.formats.native.rules import RULES, Rule, StageFailed, Violation
from boneconv.formats.native.tensors import value_faults
from boneconv.formats.native.write import write_native

__all__ = [
    "METADATA_KEY",
    "NATIVE_TYPE",
    "RULES",
    "WEIGHTS_NAME",
    "BaseTensor",
    "Metadata",
    "Module",
    "NativeAdapter",
    "Rule",
    "StageFailed",
    "Violation",
    "check_homes",
    "find_homes",
    "fingerprint",
    "home_faults",
    "mismatch",
    "open_native",
    "read",
    "shape_faults",
    "to_adapter",
    "value_faults",
    "weight_faults",
    "write_native",
]
