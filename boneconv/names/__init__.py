"""Names: from an adapter's tensors to the tensors of a checkpoint.

An adapter names modules as its library's model had them, a checkpoint as it was once published.
This package alone knows the prefixes that wrappers add and the renames that transformers applies
when it loads a checkpoint:

- `module_key` strips what PEFT, compilation and sharding put around a name;
- `resolve` matches wanted tensors one to one against those on disk;
- `disk_name` tells under which name a tensor has to be added to a checkpoint;
- `parameter_shapes` tells the shapes that a configuration alone gives to parameters;
- `tied_names` lists the parameters that share their values with another;
- `trained_on` reads from an adapter's configuration which classes it may have been trained on.

Names that match directly need neither torch nor transformers.
"""

from __future__ import annotations

from boneconv.names.architecture import trained_on
from boneconv.names.keys import module_key
from boneconv.names.matching import (
    DIRECT,
    Resolution,
    disk_name,
    parameter_shapes,
    resolve,
    tied_names,
)

__all__ = [
    "DIRECT",
    "Resolution",
    "disk_name",
    "module_key",
    "parameter_shapes",
    "resolve",
    "tied_names",
    "trained_on",
]
