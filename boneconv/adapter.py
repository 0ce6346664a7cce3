"""`Adapter`: a configuration and its tensors, whatever format they were read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from boneconv.config import Axis, BoneConfig, Variant
from boneconv.dtypes import FLOATS
from boneconv.errors import FormatError, ShapeError
from boneconv.io.safetensors import Tensor

__all__ = ["NATIVE", "Adapter", "Block"]

#: `Adapter.format` of the Bone Adapter Format. Its saved tensors may be integers.
NATIVE = "native"


@dataclass(frozen=True)
class Block:
    """The trained matrix of one module.

    Attributes:
        module: The module's name in the model.
        variant: How the block updates the module's weight.
        axis: The axis that BAT's blocks run along.
        tensor: Bone ``[r, out]``, mini ``[r, mini_rank]``, BAT ``[out / r, r, r]`` (axis out) or
            ``[in / r, r, r]`` (axis in); any float dtype.
        rank: The rank r that the configuration gives it.
        mini_rank: The width of a mini block that the configuration gives it.
        base_shape: The shape of the weight that it was made for, where the adapter says so.
    """

    module: str
    variant: Variant
    axis: Axis
    tensor: Tensor
    rank: int
    mini_rank: int = 1
    base_shape: tuple[int, ...] | None = None

    @property
    def parameters(self) -> int:
        """How many numbers the block holds."""
        return self.tensor.nbytes // FLOATS[self.tensor.dtype].itemsize


@dataclass(frozen=True)
class Adapter:
    """An adapter that has been read and is consistent in itself.

    Attributes:
        path: The folder or file it came from.
        weights: The file that holds its tensors.
        format: The format it was read from, such as ``peft``.
        config: Its configuration.
        blocks: A block for each adapted module, by the module's name in the model.
        saved: Tensors that replace the base's (``modules_to_save``, embeddings, biases), by their
            name in the model.
        side_files: Tokenizer and chat template files that were saved with it.
        scale: The strength that the adapter itself asks for.
        may_add: Modules whose saved tensors the base need not have.
        vocab_size: Rows that saved embeddings have in place of the base's, where the adapter says.
        fingerprint: The root over the base's digests, such as ``blake3-1m:<hex>``.
        base_digests: The digests of the base's tensors that it was made for, by their name in the
            model; empty where it does not say.
    """

    path: Path
    weights: Path
    format: str
    config: BoneConfig
    blocks: Mapping[str, Block]
    saved: Mapping[str, Tensor]
    side_files: tuple[Path, ...] = ()
    scale: float = 1.0
    may_add: tuple[str, ...] = ()
    vocab_size: int | None = None
    fingerprint: str | None = None
    base_digests: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.blocks and not self.saved:
            raise FormatError("the adapter holds no tensors", path=self.weights)
        for block in self.blocks.values():
            self._check_block(block)
        for name, tensor in self.saved.items():
            if not self.is_native:
                self._check_dtype(name, tensor)

    @property
    def is_native(self) -> bool:
        """Whether it was read from the Bone Adapter Format, whose rules are exact."""
        return self.format == NATIVE

    def _check_block(self, block: Block) -> None:
        self._check_dtype(block.module, block.tensor)
        shape, r = block.tensor.shape, block.rank
        expected = {
            Variant.BONE: f"[{r}, out]",
            Variant.MINI: f"[{r}, {block.mini_rank}]",
            Variant.BAT: f"[n, {r}, {r}]",
        }[block.variant]
        fits = {
            Variant.BONE: len(shape) == 2 and shape[0] == r,
            Variant.MINI: shape == (r, block.mini_rank),
            Variant.BAT: len(shape) == 3 and shape[1:] == (r, r),
        }[block.variant]
        if not fits or 0 in shape:
            raise ShapeError(
                f"the block of {block.module!r} is no {block.variant} block of rank {r}",
                path=self.weights,
                expected=expected,
                found=list(shape),
                hint="Its config must name the variant and rank that it was trained with",
            )

    def _check_dtype(self, name: str, tensor: Tensor) -> None:
        if tensor.dtype not in FLOATS:
            raise FormatError(
                f"{name!r} has a dtype that cannot be merged",
                path=self.weights,
                expected=", ".join(FLOATS),
                found=tensor.dtype,
            )
