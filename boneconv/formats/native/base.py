"""An adapter held against its base: rules R28 to R30, and the base's digests (section 9)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from boneconv.adapter import Adapter, Block
from boneconv.digest import stored_digest
from boneconv.dtypes import FLOATS
from boneconv.errors import listing
from boneconv.formats.native.rules import StageFailed, Violation, fail_on, first_error
from boneconv.formats.native.tensors import block_fits
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.files import Reader
from boneconv.io.safetensors import StoredTensor, Tensor
from boneconv.names import disk_name, resolve, tied_names, trained_on

__all__ = [
    "BaseTensor",
    "check_homes",
    "find_homes",
    "fingerprint",
    "home_faults",
    "mismatch",
    "shape_faults",
    "weight_faults",
]


@dataclass(frozen=True)
class BaseTensor:
    """An adapted weight of the base: its safetensors dtype, shape and digest."""

    dtype: str
    shape: tuple[int, ...]
    digest: str


def find_homes(adapter: Adapter, checkpoint: Checkpoint) -> dict[str, StoredTensor]:
    """The base's tensors that an adapter names, by its names; a tied one's is the other's.

    Names without a home are left out.

    Raises:
        NameMatchError, MissingExtraError: As `boneconv.names.resolve`.
    """
    config = checkpoint.config
    classes = trained_on(adapter.config.task_type, adapter.config.auto_mapping)
    wanted = {*_weights(adapter), *adapter.saved}
    optional = [name for name in adapter.saved if _may_be_added(adapter, name)]
    on_disk = checkpoint.tensors
    found = resolve(wanted, on_disk.keys(), config, optional=optional, architectures=classes)
    homes = {name: on_disk[home] for name, home in found.found.items()}
    if config is None or not found.missing:
        return homes
    ties = tied_names(config, architectures=classes)
    for name in found.missing:
        if name in ties:
            source = disk_name(ties[name], on_disk.keys(), config, architectures=classes)
            if source in on_disk:
                homes[name] = on_disk[source]
    return homes


def fingerprint(checkpoint: Checkpoint, adapter: Adapter) -> dict[str, BaseTensor]:
    """Digests of the weights that an adapter adapts; reads these weights and nothing else.

    Args:
        checkpoint: The base that the adapter was trained on.
        adapter: The adapter, of any format.

    Returns:
        The adapted modules by name.

    Raises:
        NameMatchError: An adapted weight is not in the base.
        FormatError, MachineError: The base cannot be read.
    """
    homes = find_homes(adapter, checkpoint)
    faults = [v for v in home_faults(adapter, homes) if v.rule == "R28"]
    if faults:
        raise first_error(StageFailed(faults))
    found = {}
    for module in adapter.blocks:
        stored = homes[f"{module}.weight"]
        with Reader(stored.path) as reader:
            digest = stored_digest(stored, reader)
        found[module] = BaseTensor(stored.dtype, stored.shape, digest)
    return found


def check_homes(adapter: Adapter, homes: Mapping[str, StoredTensor]) -> None:
    """Raises the first violation of R28 or R29 that headers show."""
    try:
        fail_on(home_faults(adapter, homes))
        fail_on(shape_faults(adapter, homes))
        fail_on(weight_faults(adapter, homes))
    except StageFailed as failed:
        raise first_error(failed) from failed


def home_faults(adapter: Adapter, homes: Mapping[str, StoredTensor]) -> Iterator[Violation]:
    """Violations of R28."""
    lost = [name for name in _weights(adapter) if name not in homes]
    lost += [n for n in adapter.saved if n not in homes and not _may_be_added(adapter, n)]
    for name in sorted(lost):
        yield Violation.of(
            "R28",
            f"{name!r} is not in the base",
            adapter.weights,
            hint="Is this the base that the adapter was trained on?",
        )


def shape_faults(adapter: Adapter, homes: Mapping[str, StoredTensor]) -> Iterator[Violation]:
    """Violations of R29 by shapes, and by the dtypes of saved tensors."""
    for block in adapter.blocks.values():
        yield from _block_faults(adapter, block, homes[f"{block.module}.weight"])
    for name, saved in adapter.saved.items():
        if name in homes:
            yield from _saved_faults(adapter, name, saved, homes[name])


def weight_faults(adapter: Adapter, homes: Mapping[str, StoredTensor]) -> Iterator[Violation]:
    """Violations of R29 by the dtypes of adapted weights."""
    for name in _weights(adapter):
        stored = homes[name]
        if stored.dtype not in FLOATS:
            yield Violation.of(
                "R29",
                f"the weight {stored.name!r} has a dtype that cannot be merged into",
                stored.path,
                expected=", ".join(FLOATS),
                found=stored.dtype,
                hint="Is the base quantised? Take the weights that it was quantised from",
            )


def mismatch(adapter: Adapter, digests: Mapping[str, str]) -> Violation | None:
    """The violation of R30 where digests of the base differ from those that an adapter names.

    Args:
        adapter: The adapter.
        digests: Digests of the base's tensors, by the adapter's names.
    """
    wanted = adapter.base_digests
    differ = [name for name, digest in wanted.items() if digests.get(name, digest) != digest]
    if not differ:
        return None
    return Violation.of(
        "R30",
        f"{len(differ)} of {len(wanted)} weights are not those of the base that the adapter was "
        f"made for: {listing(differ)}",
        adapter.weights,
        hint="Take that base, or give --allow-base-mismatch to go on",
    )


def _weights(adapter: Adapter) -> list[str]:
    return [f"{module}.weight" for module in adapter.blocks]


def _may_be_added(adapter: Adapter, name: str) -> bool:
    """Whether a saved tensor lies in a module that the base need not have."""
    if adapter.is_native:
        return any(name.startswith(f"{module}.") for module in adapter.may_add)
    return any(f".{module}." in f".{name}" for module in adapter.may_add)


def _block_faults(adapter: Adapter, block: Block, stored: StoredTensor) -> Iterator[Violation]:
    shape = stored.shape
    is_matrix = len(shape) == 2
    if adapter.is_native and block.base_shape is not None:
        is_matrix, expected = shape == block.base_shape, str(list(block.base_shape))
    elif adapter.is_native:
        expected = "[out, in]"
    else:
        is_matrix, expected = is_matrix or shape[2:] == (1, 1), "[out, in] or [out, in, 1, 1]"
    if not is_matrix:
        message = f"the weight {stored.name!r} has a shape that {block.module!r} cannot have"
        yield Violation.of("R29", message, stored.path, expected=expected, found=list(shape))
        return
    fault = block_fits(
        block.axis, block.variant, block.rank, block.mini_rank, block.tensor.shape, shape
    )
    if fault is not None:
        yield Violation.of(
            "R29",
            f"the {block.variant} block of {block.module!r} does not fit its weight {list(shape)}",
            stored.path,
            expected=fault,
            found=list(block.tensor.shape),
            hint="The adapter was made for another base, or as another variant",
        )


def _saved_faults(
    adapter: Adapter, name: str, saved: Tensor, stored: StoredTensor
) -> Iterator[Violation]:
    if (saved.dtype in FLOATS) != (stored.dtype in FLOATS):
        message = f"{name!r} replaces a tensor of another kind"
        yield Violation.of(
            "R29", message, adapter.weights, expected=stored.dtype, found=saved.dtype
        )
    rows = adapter.vocab_size if adapter.is_native else (*saved.shape, 0)[0]
    if saved.shape not in (stored.shape, (rows, *stored.shape[1:])):
        yield Violation.of(
            "R29",
            f"{name!r} does not fit the base",
            adapter.weights,
            expected=list(stored.shape),
            found=list(saved.shape),
            hint="The adapter was made for another base",
        )
