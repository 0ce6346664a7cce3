"""What a merge was asked for: options, and which adapters go into which component."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from boneconv.dtypes import by_cli_name, cli_name
from boneconv.engine.workers import usable_cores
from boneconv.errors import UsageError
from boneconv.planning.shards import parse_size

__all__ = ["Components", "Options", "PathLike", "Stacks", "stacks"]

PathLike = str | os.PathLike[str]
#: Further components of a pipeline, each with an adapter, or several that are applied in order.
Components = Mapping[str, PathLike | Sequence[PathLike]]
#: The adapters of each component, in order; under None those of a base that is one checkpoint.
Stacks = Mapping[str | None, Sequence[PathLike]]


@dataclass(frozen=True)
class Options:
    """What determines an output beside base and adapters.

    Attributes:
        scale: S in ``W + S (W' - W)``, for every adapter.
        dtype: The safetensors dtype of every floating tensor; None to keep each one's own.
        max_shard_size: The most bytes of tensors in one file; None to keep the base's files.
        card: Whether to write a model card.
        workers: Threads or processes that compute.
    """

    scale: float
    dtype: str | None
    max_shard_size: int | None
    card: bool
    workers: int

    @classmethod
    def parse(
        cls,
        *,
        scale: float,
        dtype: str,
        max_shard_size: str | None,
        card: bool,
        workers: int | None,
    ) -> Options:
        """The options as `merge` takes them; raises UsageError."""
        if not math.isfinite(scale):
            raise UsageError("the scale is not finite", found=scale, hint="Give a number as 0.5")
        return cls(scale, _dtype(dtype), _size(max_shard_size), card, workers or usable_cores())

    def record(self) -> dict[str, Any]:
        """What the record says of them."""
        dtype = "keep" if self.dtype is None else cli_name(self.dtype)
        return {"dtype": dtype, "max_shard_size": self.max_shard_size}


def stacks(
    adapter: PathLike,
    more: Sequence[PathLike] = (),
    component: str | None = None,
    components: Components | None = None,
) -> Stacks:
    """Which adapters go where, as `merge` is given them.

    Raises:
        UsageError: Further components without a first, or the first one once more.
    """
    found: dict[str | None, Sequence[PathLike]] = {component: (adapter, *more)}
    for name, given in (components or {}).items():
        if component is None:
            raise UsageError(
                f"an adapter for the component {name!r}, but no component for the first adapter",
                hint="Pass --component NAME",
            )
        if name == component:
            raise UsageError(
                f"{name!r} is the component of the first adapter and is named once more",
                hint=f"Give further adapters of it without {name}=",
            )
        found[name] = (given,) if isinstance(given, (str, os.PathLike)) else tuple(given)
        if not found[name]:
            raise UsageError(f"no adapter for the component {name!r}")
    return found


def _dtype(name: str) -> str | None:
    if name == "keep":
        return None
    if name not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"unknown dtype {name!r}", expected="keep, float32, bfloat16 or float16")
    return by_cli_name(name)


def _size(text: str | None) -> int | None:
    return None if text is None else parse_size(text)
