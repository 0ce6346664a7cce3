"""Whether a converted adapter, read back, is the one that was converted."""

from __future__ import annotations

from boneconv.adapter import Adapter, Block
from boneconv.config import Variant
from boneconv.digest import same_values
from boneconv.errors import CheckFailedError, listing

__all__ = ["check_same"]


def check_same(adapter: Adapter, again: Adapter) -> None:
    """Compares what two adapters do, every tensor byte for byte; formats may differ.

    Raises:
        CheckFailedError: They differ.
    """
    wrong = [
        name
        for name in adapter.blocks.keys() | again.blocks.keys()
        if not _same_block(adapter.blocks.get(name), again.blocks.get(name))
    ]
    for name in adapter.saved.keys() | again.saved.keys():
        one, other = adapter.saved.get(name), again.saved.get(name)
        if one is None or other is None or not same_values(one, other):
            wrong.append(name)
    if adapter.scale != again.scale:
        wrong.append("its strength")
    if wrong:
        raise CheckFailedError(
            f"what was written is not what was to be converted: {listing(wrong)}",
            path=again.path,
        )


def _same_block(one: Block | None, other: Block | None) -> bool:
    if one is None or other is None:
        return False
    same_axis = one.variant is not Variant.BAT or one.axis is other.axis
    return (
        (one.variant, one.rank) == (other.variant, other.rank)
        and same_axis
        and same_values(one.tensor, other.tensor)
    )
