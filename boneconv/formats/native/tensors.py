"""Rules R17 to R23: the tensors of a native adapter, held against its metadata."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from boneconv.config import Axis, Variant
from boneconv.dtypes import FLOATS
from boneconv.formats.native.metadata import Metadata
from boneconv.formats.native.rules import Violation
from boneconv.io.files import Reader
from boneconv.io.safetensors import StoredTensor, Tensor

__all__ = [
    "BLOCK",
    "BLOCK_DTYPES",
    "PREFIX",
    "block_fits",
    "tensor_faults",
    "value_faults",
]

#: Before the name of every tensor in the file.
PREFIX = "base_model.model."
#: After the name of an adapted module.
BLOCK = "bone_block"
BLOCK_DTYPES = ("F32", "F16", "BF16")

_CHUNK = 1024 * 1024


def tensor_faults(
    metadata: Metadata, tensors: Mapping[str, Tensor], path: Path
) -> Iterator[Violation]:
    """Violations of R17 to R22 by tensors under the names of the file."""
    blocks = {f"{PREFIX}{module}.{BLOCK}": module for module in metadata.modules}
    biases = {PREFIX + name: name.removesuffix(".bias") for name in metadata.biases}
    announced = [*blocks, *biases, *(PREFIX + name for name in metadata.replaced_names)]
    for name in sorted(set(announced) - set(tensors)):
        yield Violation.of("R17", f"the tensor {name!r} is announced and absent", path)
    for name in sorted(set(tensors) - set(announced)):
        yield Violation.of("R18", f"the tensor {name!r} is not announced", path)
    for name, tensor in tensors.items():
        if name in blocks:
            yield from _block_faults(metadata, blocks[name], tensor, path)
        elif name in biases:
            yield from _bias_faults(metadata, biases[name], tensor, path)
    yield from _vocabulary_faults(metadata, tensors, path)


def value_faults(tensors: Mapping[str, StoredTensor], path: Path) -> Iterator[Violation]:
    """Violations of R23; reads all floating tensors, a part at a time."""
    with Reader(path) as reader:
        for name, tensor in tensors.items():
            if tensor.dtype in FLOATS and not _is_finite(tensor, reader):
                yield Violation.of("R23", f"the tensor {name!r} holds NaN or infinity", path)


def block_fits(
    metadata_axis: Axis | None,
    variant: Variant,
    rank: int,
    mini_rank: int | None,
    block: Sequence[int],
    weight: Sequence[int] | None,
) -> str | None:
    """What a block's shape should be, where it is another; None where it fits (R20).

    Args:
        metadata_axis: The axis of BAT's blocks.
        variant: The variant.
        rank: r.
        mini_rank: The columns of a mini block.
        block: The block's shape.
        weight: The weight's shape ``[out, in, ...]``, where it is known.
    """
    r = rank
    if variant is Variant.BAT:
        expected = f"[n, {r}, {r}]"
        fits = len(block) == 3 and tuple(block[1:]) == (r, r) and block[0] > 0
        if fits and weight is not None:
            sizes = weight[:2] if metadata_axis is Axis.OUT else (weight[1], weight[0])
            expected = f"[{sizes[0]} / {r}, {r}, {r}], and {r} to divide {sizes[1]}"
            fits = sizes[0] == block[0] * r and sizes[1] % r == 0
        return None if fits else expected
    width = mini_rank if variant is Variant.MINI else weight[0] if weight is not None else None
    expected = f"[{r}, {'out' if width is None else width}]"
    fits = len(block) == 2 and block[0] == r and block[1] > 0 and width in (None, block[1])
    if fits and variant is Variant.MINI and weight is not None and weight[0] % block[1]:
        return f"{block[1]} to divide {weight[0]}"
    return None if fits else expected


def _block_faults(
    metadata: Metadata, module: str, tensor: Tensor, path: Path
) -> Iterator[Violation]:
    if tensor.dtype not in BLOCK_DTYPES:
        message = f"the block of {module!r} has a dtype that blocks do not have"
        expected = ", ".join(BLOCK_DTYPES)
        yield Violation.of("R19", message, path, expected=expected, found=tensor.dtype)
    entry = metadata.modules[module]
    fault = block_fits(
        metadata.axis,
        metadata.variant,
        entry.rank,
        entry.mini_rank,
        tensor.shape,
        entry.base_shape,
    )
    if fault is not None:
        message = f"the {metadata.variant} block of {module!r} does not fit"
        if entry.base_shape is not None:
            message += f" its weight {list(entry.base_shape)}"
        yield Violation.of("R20", message, path, expected=fault, found=list(tensor.shape))


def _bias_faults(
    metadata: Metadata, module: str, tensor: Tensor, path: Path
) -> Iterator[Violation]:
    if tensor.dtype not in FLOATS:
        message = f"the bias of {module!r} has a dtype that biases do not have"
        expected = ", ".join(FLOATS)
        yield Violation.of("R19", message, path, expected=expected, found=tensor.dtype)
    shape = metadata.modules[module].base_shape
    if shape is None:
        message = f"module {module!r} has a bias and no base_shape"
        yield Violation.of("R21", message, path, expected="base_shape")
    elif tensor.shape != shape[:1]:
        yield Violation.of(
            "R21",
            f"the bias of {module!r} is not as long as its module's output",
            path,
            expected=[shape[0]],
            found=list(tensor.shape),
        )


def _vocabulary_faults(
    metadata: Metadata, tensors: Mapping[str, Tensor], path: Path
) -> Iterator[Violation]:
    if metadata.vocab_size is None:
        return
    shapes = [
        tensors[PREFIX + name].shape for name in metadata.replaced_names if PREFIX + name in tensors
    ]
    if not any(shape[:1] == (metadata.vocab_size,) for shape in shapes):
        yield Violation.of(
            "R22",
            "no replaced tensor has vocab_size rows",
            path,
            expected=metadata.vocab_size,
            found=sorted({shape[0] for shape in shapes if shape}) or "no replaced tensor",
        )


def _is_finite(tensor: StoredTensor, reader: Reader) -> bool:
    dtype = FLOATS[tensor.dtype]
    buffer = bytearray(min(_CHUNK, tensor.nbytes))
    for start in range(0, tensor.nbytes, _CHUNK):
        part = memoryview(buffer)[: min(_CHUNK, tensor.nbytes - start)]
        reader.read_into(part, tensor.offset + start)
        if not np.isfinite(np.frombuffer(part, dtype)).all():
            return False
    return True
