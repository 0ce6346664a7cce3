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
  ``train()``, ``eval()``, moving or casting the layer, merging, or ``cache_weight = True``.
- Memory that torch cannot clone lazily (of a numpy array, a mapped file, shared between processes)
  is never trusted: W' is not kept, and each call computes from the tensors as they are. So it is
  where a process group is initialized: FSDP frees storages by resizing them, which torch 2.13
  cannot do with lazily cloned ones. Dropping W' gives the sources ordinary memory again.

What remains is an address taken *before* W' was formed, such as an older numpy view of the weight,
and written to later without torch: call ``drop_cache()`` after such a write.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor

__all__ = ["WeightCache", "own_memory"]


class _State(Enum):
    SAME = "same"
    CHANGED = "changed"
    EXPOSED = "exposed"


class WeightCache:
    """One tensor, and what it was formed from.

    Attributes:
        enabled: Whether anything is kept.
    """

    def __init__(self) -> None:
        self.enabled = False
        self._suspended = False
        self._kept: tuple[Hashable, list[_Watch], Tensor] | None = None

    def drop(self) -> None:
        """Forget the tensor, and trust its sources again."""
        self._forget()
        self._suspended = False

    def _forget(self) -> None:
        if self._kept is not None:
            for watch in self._kept[1]:
                watch.release()
        self._kept = None

    def get(
        self, sources: Sequence[Tensor], key: Hashable, form: Callable[[], Tensor]
    ) -> Tensor | None:
        """The tensor formed from these sources.

        Args:
            sources: Everything that ``form`` reads.
            key: What else it depends on.
            form: Forms the tensor; called where none is kept, or a source or the key has changed.

        Returns:
            The tensor; nothing where it must not be kept, and the caller computes without it.
        """
        if self._kept is not None:
            known, watches, tensor = self._kept
            states = {_State.CHANGED}
            if known == key and len(watches) == len(sources):
                pairs = zip(watches, sources, strict=True)
                states = {watch.state(source) for watch, source in pairs}
            if states == {_State.SAME}:
                return tensor
            self._forget()
            self._suspended = _State.EXPOSED in states
        if self._suspended or _is_distributed():
            return None
        watches = [watch for source in sources if (watch := _Watch.of(source)) is not None]
        if len(watches) < len(sources):
            for watch in watches:
                watch.release()
            self._suspended = True
            return None
        tensor = form()
        self._kept = key, watches, tensor
        return tensor

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


class _Watch:
    """One source, and a lazy clone of it as it was."""

    def __init__(self, source: Tensor, clone: Tensor) -> None:
        self._source = source
        self._clone: Tensor | None = clone
        self._version = _version(source)

    @classmethod
    def of(cls, source: Tensor) -> _Watch | None:
        """A watch; nothing where torch cannot clone the tensor lazily."""
        try:
            clone = torch._lazy_clone(source.detach())
        except (AttributeError, NotImplementedError, RuntimeError):
            return None
        watch = cls(source, clone)
        return watch if watch.state(source) is _State.SAME else None

    def state(self, source: Tensor) -> _State:
        clone = self._clone
        if clone is None or self._source is not source or _layout(source) != _layout(clone):
            return _State.CHANGED
        shares = _is_lazy(source) and _address(source) == _address(clone)
        if _version(source) != self._version:
            return _State.CHANGED
        return _State.SAME if shares else _State.EXPOSED

    def release(self) -> None:
        """Give the source ordinary memory again, at the same address, and end the watch."""
        self._clone = None
        if _is_lazy(self._source):
            self._source.data_ptr()


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
