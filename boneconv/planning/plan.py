"""What a merge would do, from headers alone."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from boneconv.dtypes import by_cli_name, cli_name
from boneconv.engine.memory import predict_peak
from boneconv.engine.plan import Action, Plan
from boneconv.engine.workers import usable_cores
from boneconv.errors import UsageError
from boneconv.formats import read_adapter
from boneconv.io.checkpoint import Checkpoint, open_checkpoint
from boneconv.io.hub import ADAPTER, BASE, Source, locate
from boneconv.planning.accounts import Accounts, Strength, settle
from boneconv.planning.config_edits import ConfigEdits
from boneconv.planning.files import plan_files
from boneconv.planning.record import adapter_entry, record_size, source_entry
from boneconv.planning.shards import parse_size, plan_shards

__all__ = ["MergePlan", "Options", "PathLike", "plan_located", "plan_merge"]

PathLike = str | os.PathLike[str]


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


@dataclass(frozen=True)
class MergePlan:
    """What a merge would do.

    Attributes:
        base: Where the base came from.
        adapters: Where each adapter came from.
        plan: Every tensor and file to write.
        accounts: What happens to each tensor, and why.
        peak_memory: Predicted peak of resident memory, in bytes.
    """

    base: Source
    adapters: tuple[Source, ...]
    strengths: tuple[Strength, ...]
    plan: Plan
    accounts: Accounts
    peak_memory: int

    @property
    def counts(self) -> dict[str, int]:
        """How many tensors have each action."""
        return {str(action): len(self.plan.by_action(action)) for action in Action}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        unknown = (
            f"{source.given}: unknown configuration fields kept: "
            f"{', '.join(sorted(strength.adapter.config.unknown))}"
            for source, strength in zip(self.adapters, self.strengths, strict=True)
            if strength.adapter.config.unknown
        )
        left_out = self.plan.left_out
        stale = [f"left out: {', '.join(map(str, left_out))}"] if left_out else []
        return (*self.accounts.notes, *unknown, *stale)


def plan_merge(
    base: PathLike,
    adapter: PathLike,
    *,
    more: Sequence[PathLike] = (),
    scale: float = 1.0,
    dtype: str = "keep",
    max_shard_size: str | None = None,
    workers: int | None = None,
    card: bool = True,
) -> MergePlan:
    """What `merge` would do, from headers alone; the arguments and errors are its own."""
    options = Options.parse(
        scale=scale, dtype=dtype, max_shard_size=max_shard_size, card=card, workers=workers
    )
    return plan_located(locate(base, BASE), (adapter, *more), options)


def plan_located(base: Source, adapters: Sequence[PathLike], options: Options) -> MergePlan:
    """The plan of an output from a base that has been found; raises as `plan_merge`."""
    sources = tuple(locate(given, ADAPTER) for given in adapters)
    strengths = tuple(Strength(read_adapter(source.path), options.scale) for source in sources)
    checkpoint = open_checkpoint(base.path)
    config = _config(checkpoint)
    accounts = settle(checkpoint, config, strengths)
    shards = plan_shards(
        checkpoint, accounts, dtype=options.dtype, max_shard_size=options.max_shard_size
    )
    _edit_config(config, accounts, options)
    plan = plan_files(checkpoint, shards, config, strengths, base, sources, card=options.card)
    recorded = record_size(
        plan,
        base=source_entry(base),
        adapters=[adapter_entry(*pair) for pair in zip(strengths, sources, strict=True)],
        options=options.record(),
    )
    plan = replace(plan, record_bytes=recorded)
    peak = predict_peak(plan, options.workers)
    return MergePlan(base, sources, strengths, plan, accounts, peak)


def _config(base: Checkpoint) -> ConfigEdits | None:
    if base.config is None or base.single_file:
        return None
    config = ConfigEdits(base.config)
    config.refuse_quantised()
    return config


def _edit_config(config: ConfigEdits | None, accounts: Accounts, options: Options) -> None:
    if config is None:
        return
    if options.dtype is not None:
        config.set_dtype(cli_name(options.dtype))
    if accounts.untied:
        config.untie()
    for old, new in accounts.resized:
        config.resize_vocabulary(old, new)


def _dtype(name: str) -> str | None:
    if name == "keep":
        return None
    if name not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"unknown dtype {name!r}", expected="keep, float32, bfloat16 or float16")
    return by_cli_name(name)


def _size(text: str | None) -> int | None:
    return None if text is None else parse_size(text)
