"""One checkpoint of an output and what is merged into it: a whole base, or a component of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from boneconv.dtypes import cli_name
from boneconv.engine.plan import Plan
from boneconv.errors import listing
from boneconv.formats import read_adapter
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.hub import ADAPTER, Source, locate
from boneconv.planning.accounts import Accounts, Strength, settle
from boneconv.planning.config_edits import ConfigEdits
from boneconv.planning.files import plan_files, tokenizer_files
from boneconv.planning.options import Options, PathLike
from boneconv.planning.quantised import Dequantised, plan_dequantisation
from boneconv.planning.shards import plan_shards

__all__ = ["Part", "plan_part"]


@dataclass(frozen=True)
class Part:
    """A checkpoint and what is merged into it.

    Attributes:
        component: The component of a pipeline that it is; None where it is the whole base.
        checkpoint: What is merged into.
        adapters: Where each adapter came from, in order.
        strengths: The adapters, and how strongly each is applied.
        accounts: What happens to each tensor, and why.
        dequantised: What is known of its FP8 weights.
        plan: Its tensors and files, named as the output has them.
    """

    component: str | None
    checkpoint: Checkpoint
    adapters: tuple[Source, ...]
    strengths: tuple[Strength, ...]
    accounts: Accounts
    dequantised: Dequantised
    plan: Plan

    def notes(self) -> Iterator[str]:
        """What the user should know."""
        dequantised = self.dequantised.note()
        own = [*_written_anew(self.checkpoint), *([] if dequantised is None else [dequantised])]
        for text in (*own, *self.accounts.notes):
            yield text if self.component is None else f"{self.component}: {text}"
        for source, strength in zip(self.adapters, self.strengths, strict=True):
            if unknown := strength.adapter.config.unknown:
                fields = ", ".join(sorted(unknown))
                yield f"{source.given}: unknown configuration fields kept: {fields}"
            if self.component is not None and (files := tokenizer_files([strength])):
                yield (
                    f"{source.given}: left out, since the pipeline keeps its own tokenizer: "
                    f"{', '.join(map(str, files))}"
                )


def plan_part(
    checkpoint: Checkpoint,
    adapters: Sequence[PathLike],
    options: Options,
    component: str | None = None,
) -> Part:
    """What adapters mean for a checkpoint, from headers alone; no model card is planned yet.

    Raises:
        InputError: One of its kinds: an adapter that is not there, is malformed or does not fit.
    """
    sources = tuple(locate(given, ADAPTER) for given in adapters)
    strengths = tuple(Strength(read_adapter(source.path), options.scale) for source in sources)
    config = _config(checkpoint)
    dequantised = plan_dequantisation(checkpoint, config, options.dtype)
    accounts = settle(checkpoint, config, strengths, dequantised, options.dtype)
    shards = plan_shards(
        checkpoint,
        accounts,
        dequantised,
        dtype=options.dtype,
        max_shard_size=options.max_shard_size,
    )
    _edit_config(config, accounts, options)
    if component is not None:
        plan = plan_files(checkpoint, shards, config, {}).inside(component)
    else:
        plan = plan_files(checkpoint, shards, config, tokenizer_files(strengths))
    return Part(component, checkpoint, sources, strengths, accounts, dequantised, plan)


def _config(base: Checkpoint) -> ConfigEdits | None:
    if base.config is None or base.single_file:
        return None
    return ConfigEdits(base.config)


def _written_anew(base: Checkpoint) -> Iterator[str]:
    """What becomes of a folder of torch's files."""
    torch = [name for name in base.shards if base.written_name(name) != name]
    if not torch:
        return
    yield f"written as safetensors: {listing(torch)}"
    places: dict[tuple[Path, int, int], list[str]] = {}
    for tensor in base.tensors.values():
        if tensor.nbytes:
            places.setdefault((tensor.path, tensor.offset, tensor.nbytes), []).append(tensor.name)
    shared = [", ".join(names) for names in places.values() if len(names) > 1]
    if shared:
        yield f"written under each of their names, which share one tensor: {listing(shared)}"


def _edit_config(config: ConfigEdits | None, accounts: Accounts, options: Options) -> None:
    if config is None:
        return
    if options.dtype is not None:
        config.set_dtype(cli_name(options.dtype))
    if accounts.untied:
        config.untie()
    for old, new in accounts.resized:
        config.resize_vocabulary(old, new)
