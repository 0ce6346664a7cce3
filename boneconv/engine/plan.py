"""What a run will write: every output tensor, where its values come from, in which file it goes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from boneconv.adapter import Block
from boneconv.io.files import machine_errors
from boneconv.io.pth_layout import layout_pth
from boneconv.io.safetensors import SafetensorsFile, StoredTensor, Tensor, layout, tensor_nbytes

if TYPE_CHECKING:
    from boneconv.engine.compute import Merger

__all__ = ["RECORD_NAME", "Action", "Plan", "PlannedShard", "PlannedTensor", "Update"]


#: The record of what a workflow did, inside a folder; beside a file, its name follows the file's.
RECORD_NAME = "boneconv.json"


class Action(StrEnum):
    """Where an output tensor's values come from."""

    COPY = "copy"
    CAST = "cast"
    MERGE = "merge"
    REPLACE = "replace"
    ADD = "add"


@dataclass(frozen=True)
class Update:
    """One adapter's update of a weight.

    Attributes:
        block: The adapter's block.
        scale: S in ``W + S (W' - W)``.
        residue: What the scale lacks where it is a product: S is exactly ``scale + residue``.
    """

    block: Block
    scale: float = 1.0
    residue: float = 0.0


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to write.

    Attributes:
        name: Its name in the output.
        dtype: Its safetensors dtype in the output.
        action: Where its values come from.
        source: The base's tensor (copy, cast, merge) or the adapter's (replace, add).
        updates: The updates to apply to the source, in order (merge only).
        kernel: Makes what computes the tensor from its source, in place of merging the updates
            into it (merge, or a cast, replacement or addition whose source is dequantised).
        reads: What the kernel reads beside the source.
    """

    name: str
    dtype: str
    action: Action
    source: Tensor
    updates: tuple[Update, ...] = ()
    kernel: Callable[[PlannedTensor], Merger] | None = None
    reads: tuple[StoredTensor, ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape, which is the source's."""
        return self.source.shape

    @property
    def nbytes(self) -> int:
        """Bytes in the output."""
        return tensor_nbytes(self.dtype, self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Its shape as a weight ``[out, in]``: a 1x1 convolution's last axes are one wide."""
        return self.shape[0], math.prod(self.shape[1:])

    @property
    def kernel_shape(self) -> tuple[int, int]:
        """Its shape as a kernel gets it: as a weight, or with all axes but the last in one."""
        if self.action is Action.MERGE or len(self.shape) < 3:
            return self.matrix_shape
        return math.prod(self.shape[:-1]), self.shape[-1]


@dataclass(frozen=True)
class PlannedShard:
    """A file to write.

    Attributes:
        name: Its name, relative to the output: ``model.safetensors``, or
            ``unet/diffusion_pytorch_model.safetensors`` in a pipeline.
        tensors: Its tensors, in the order of their bytes.
        head: The file's first bytes: header length and header.
        offsets: Where each tensor starts, from the start of the file.
        size: The file's size in bytes.
        seal: Completes the file when every tensor is in its place, where its format asks for it.
    """

    name: str
    tensors: tuple[PlannedTensor, ...]
    head: bytes
    offsets: Mapping[str, int]
    size: int
    seal: Callable[[Path], None] | None = None

    def output_name(self, tensor: str) -> str:
        """What tells one of its tensors from all others of the output: ``unet/conv_in.weight``.

        It is the tensor's name after the file's folder: two components of a pipeline may have
        tensors of one name. In an output that is one checkpoint it is the tensor's name.
        """
        folder, slash, _ = self.name.rpartition("/")
        return f"{folder}{slash}{tensor}"

    @classmethod
    def lay_out(
        cls, name: str, tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]
    ) -> PlannedShard:
        """Plans a file whose header is made anew."""
        tensors = tuple(tensors)
        head, offsets, size = layout([(t.name, t.dtype, t.shape) for t in tensors], metadata)
        return cls(name, tensors, head, offsets, size)

    @classmethod
    def like(
        cls, file: SafetensorsFile, name: str, tensors: Iterable[PlannedTensor]
    ) -> PlannedShard:
        """Plans a file with another's layout and header, byte for byte."""
        offsets = {tensor.name: tensor.offset for tensor in file.tensors.values()}
        size = file.path.stat().st_size
        return cls(name, tuple(tensors), file.read_head(), offsets, size)

    @classmethod
    def lay_out_pth(cls, name: str, tensors: Iterable[PlannedTensor]) -> PlannedShard:
        """Plans a file as torch writes them; raises FormatError for a dtype it cannot hold."""
        tensors = tuple(tensors)
        plan = layout_pth([(t.name, t.dtype, t.shape) for t in tensors])
        return cls(name, tensors, plan.head, plan.offsets, plan.size, plan.seal)


@dataclass(frozen=True)
class Plan:
    """Everything that a run writes.

    Attributes:
        shards: The weight files.
        copies: Files to copy as they are: name in the output, and the file.
        texts: Files whose content the run makes: name in the output, and the bytes.
        left_out: Files of the base that the output will not have.
        record_bytes: Bytes of the record, which is written last.
    """

    shards: tuple[PlannedShard, ...]
    copies: Mapping[PurePosixPath, Path]
    texts: Mapping[PurePosixPath, bytes]
    left_out: tuple[PurePosixPath, ...] = ()
    record_bytes: int = 0

    @property
    def tensors(self) -> tuple[PlannedTensor, ...]:
        """All tensors of all shards."""
        return tuple(tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def named(self) -> dict[str, PlannedTensor]:
        """All tensors, by what tells them apart (`PlannedShard.output_name`)."""
        return {
            shard.output_name(tensor.name): tensor
            for shard in self.shards
            for tensor in shard.tensors
        }

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight files."""
        return sum(shard.size for shard in self.shards)

    @property
    def total_bytes(self) -> int:
        """Bytes of all files: the disk space that the output needs.

        Raises:
            MissingPathError: A file to copy is a link that leads nowhere.
        """
        written = sum(map(len, self.texts.values())) + self.record_bytes
        return self.weight_bytes + self.copied_bytes + written

    @property
    def copied_bytes(self) -> int:
        """Bytes of the files that are copied; raises as `total_bytes`."""
        copied = 0
        for path in self.copies.values():
            with machine_errors(path):
                copied += path.stat().st_size
        return copied

    @property
    def work_bytes(self) -> int:
        """Bytes of tensors and copies, by which progress advances; raises as `total_bytes`."""
        return sum(tensor.nbytes for tensor in self.tensors) + self.copied_bytes

    def by_action(self, action: Action) -> Sequence[PlannedTensor]:
        """The tensors with an action, in the order of the output."""
        return [tensor for tensor in self.tensors if tensor.action is action]

    def inside(self, folder: str) -> Plan:
        """The same files in a folder of the output."""
        return replace(
            self,
            shards=tuple(replace(shard, name=f"{folder}/{shard.name}") for shard in self.shards),
            copies={folder / name: path for name, path in self.copies.items()},
            texts={folder / name: content for name, content in self.texts.items()},
            left_out=tuple(folder / name for name in self.left_out),
        )

    def sources(self) -> Sequence[Path]:
        """The files that tensors are read from, each once."""
        paths = (
            tensor.path
            for planned in self.tensors
            for tensor in (
                planned.source,
                *planned.reads,
                *(u.block.tensor for u in planned.updates),
            )
            if isinstance(tensor, StoredTensor)
        )
        return list(dict.fromkeys(paths))
