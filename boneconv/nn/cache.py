"""When a W' that was formed before is still the W' that would be formed now.

Comparing tensors' ``_version`` does not tell: ``p.data.add_()``, ``p.data = ...`` and writes under
inference mode do not move it. What does is torch's copy-on-write: when W' is formed, each tensor it
was formed from is lazily cloned, which copies nothing; tensor and clone share their memory until
torch writes to it through any tensor that shares the storage, and then part. So W' holds exactly as
long as every source is the same object, still shares its clone's memory, and looks at it with the
same shape, strides and dtype.

Two more rules make that safe:

- A source that parted from its clone while its version stood still was written behind the version
  counter, or had its address taken (``numpy()``, ``data_ptr()``, a file writer), and who has the
  address may write again unseen. W' is then dropped and not kept again until `WeightCache.drop`:
  ``train()``, ``eval()``, moving or casting the layer, merging, activating other adapters, or
  ``cache_weight = True``.
- Memory that torch cannot clone lazily (of a numpy array, a mapped file, shared between processes)
  is never trusted: W' is not kept, and each call computes from the tensors as they are. So it is
  where a process group is initialized: FSDP frees storages by resizing them, which torch 2.13
  cannot do with lazily cloned ones. Dropping W' gives the sources ordinary memory again.

What remains is an address taken *before* W' was formed, such as an older numpy view of the weight,
and written to later without torch: call ``drop_cache()`` after such a write.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["WeightCache", "own_memory", "page_aligned"]

_PAGE = 4096  # bytes; larger pages of other systems hold whole ones of these


class WeightCache:
    """One tensor, and what it was formed from.

    Attributes:
        enabled: Whether anything may be kept.
        kept: The tensor, which may hold no longer (`held`).
    """

    def __init__(self) -> None:
        self.enabled = False
        self._suspended = False
        self._watches: list[_Watch] = []
        self.kept: Tensor | None = None

    def drop(self) -> None:
        """Forget the tensor, and trust its sources again."""
        self._forget()
        self._suspended = False

    def _forget(self) -> None:
        self.kept = None
        _release(self._watches)

    def held(self, sources: Sequence[Tensor | None]) -> Tensor | None:
        """The kept tensor, if it was formed from these sources and none of them has changed.

        One function that calls nothing of ours (so `_address` and `_version` stand here again) and
        creates nothing: after a product that swept a weight through the processor's caches, each
        piece of code costs microseconds of misses.
        """
        if self.kept is None or len(self._watches) != len(sources):
            return None
        for source, watch in zip(sources, self._watches, strict=True):
            known, _, view, dtype, address, version = watch
            if (
                source is not known
                or known.dtype is not dtype
                or not known.is_set_to(view)
                # no public call gives the address without taking it, as `Tensor.data_ptr` does
                or torch._C._data_address(known) != address  # type: ignore[attr-defined]
                or (version is not None and known._version != version)
            ):
                return None
        return self.kept

    def get(self, sources: Sequence[Tensor], form: Callable[[], Tensor]) -> Tensor | None:
        """The tensor formed from these sources.

        Args:
            sources: All tensors that ``form`` reads; `drop` when what else it depends on changes.
            form: Forms the tensor; called where none is kept, or a source has changed.

        Returns:
            The tensor; nothing where it must not be kept, and the caller computes without it.
        """
        held = self.held(sources)
        if held is not None:
            return held
        if self.kept is not None:
            pairs = zip(self._watches, sources, strict=False)
            self._suspended = any(watch.is_exposed(source) for watch, source in pairs)
            self._forget()
        if self._suspended or _is_distributed():
            return None
        watches = [watch for source in sources if (watch := _Watch.of(source)) is not None]
        if len(watches) < len(sources):
            _release(watches)
            self._suspended = True
            return None
        self._watches, self.kept = watches, form()
        return self.kept

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightCache:
        copy = WeightCache()
        copy.enabled = self.enabled
        return copy

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.enabled,)


def _restored(enabled: bool) -> WeightCache:
    cache = WeightCache()
    cache.enabled = enabled
    return cache


class _Watch(NamedTuple):
    """One source, a lazy clone of it as it was, and a view of the memory that it had then."""

    source: Tensor
    clone: Tensor
    view: Tensor
    dtype: torch.dtype
    address: int
    version: int | None

    @classmethod
    def of(cls, source: Tensor) -> _Watch | None:
        """A watch; nothing where torch cannot clone the tensor lazily."""
        try:
            clone, view = torch._lazy_clone(source.detach()), source.detach()
            watched = _is_lazy(source) and source.is_set_to(view)
            address = _address(source)
        except (AttributeError, NotImplementedError, RuntimeError):
            return None
        if not watched or address != _address(clone):
            return None
        return cls(source, clone, view, source.dtype, address, _version(source))

    def is_exposed(self, source: Tensor) -> bool:
        """Whether it was written behind the version counter, or its address was taken."""
        if source is not self.source or _layout(source) != _layout(self.clone):
            return False
        shares = _is_lazy(source) and _address(source) == self.address
        return not shares and _version(source) == self.version


def _release(watches: list[_Watch]) -> None:
    """End watches, and give their sources ordinary memory again, at the same addresses."""
    sources = [watch.source for watch in watches]
    watches.clear()
    for source in sources:
        if _is_lazy(source):
            source.data_ptr()


def own_memory(tensor: Tensor) -> None:
    """Let a tensor lie in memory that can be cloned lazily, with the same bits.

    Memory of a mapped file (what transformers loads) or of a numpy array is copied, and the tensor
    no longer shares it; memory shared between processes is left as it is.

    Args:
        tensor: Its ``data`` is replaced, where need be.
    """
    storage = tensor.untyped_storage()
    if not storage.resizable() and not storage.is_shared():
        tensor.data = tensor.data.clone()


def page_aligned(tensor: Tensor) -> Tensor:
    """A copy that starts at a page, where the tensor lies in the CPU's memory; else the tensor.

    One token's product with a weight of 2048 x 2048 takes 5 to 8 % longer where rows begin in the
    middle of pages, as they do in memory from the heap (measured, float32).
    """
    if tensor.device.type != "cpu":
        return tensor
    room = torch.empty(tensor.numel() + _PAGE, dtype=tensor.dtype)
    first = -room.data_ptr() % _PAGE // tensor.element_size()
    return room[first : first + tensor.numel()].view(tensor.shape).copy_(tensor)


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _layout(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.device


def _is_lazy(tensor: Tensor) -> bool:
    return bool(torch._C._is_cow_tensor(tensor))  # type: ignore[attr-defined]


def _address(tensor: Tensor) -> int:
    """The address, without taking it (which `Tensor.data_ptr` counts as)."""
    return int(torch._C._data_address(tensor))  # type: ignore[attr-defined]
