"""`BoneLinear`: a linear layer with any number of Bone, BAT and mini adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from boneconv.config import Axis, Variant
from boneconv.errors import ConfigError, listing
from boneconv.nn.bone import bone_at_once
from boneconv.nn.cache import WeightCache, own_memory, page_aligned
from boneconv.nn.functional import apply_updates
from boneconv.nn.updates import Update, block_shape
from boneconv.nn.weights import compose, merged_weight
from boneconv.nn.wrapping import as_function, check_base

__all__ = ["BoneLinear"]


@dataclass(frozen=True)
class _Spec:
    """What an adapter's block does not say of itself."""

    variant: Variant
    axis: Axis
    dropout: float


class BoneLinear(nn.Module):
    """A frozen linear layer and the blocks that update it.

    Wraps `torch.nn.Linear` and its subclasses, and 1x1 `torch.nn.Conv2d` (stride 1, no padding, one
    group), which is a linear layer over the channels. State-dict keys are PEFT 0.18.1's:
    ``base_layer.weight``, ``bone_block.<adapter>``.

    Every ``forward`` gives ``x W''^T + bias``, where W'' is the base weight after the active
    adapters, in their order; the base layer is never written to. Where gradients are wanted, blocks
    get the gradients of that formula, and what autograd keeps is x and the parameters themselves.

    Args:
        base_layer: The layer to adapt; its parameters are frozen.

    Attributes:
        base_layer: The layer itself.
        bone_block: Adapter name -> block.
        cache_weight: Whether W'' is kept between calls in eval mode where no gradient is wanted: at
            most 1.05 times the plain layer's time, for the memory of a second weight. Off by
            default. See `boneconv.nn.cache` for when it is formed anew. Switching it on gives
            parameters that lie in a mapped file or a numpy array memory of their own.
        adapters_enabled: Whether ``forward`` applies anything at all.

    Raises:
        ConfigError: The layer is none of those.
    """

    _original: Tensor | None

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        check_base(base_layer)
        self.base_layer = base_layer
        self.bone_block = nn.ParameterDict()
        self.adapters_enabled = True
        self._specs: dict[str, _Spec] = {}
        self._active: tuple[str, ...] = ()
        self._merged: tuple[str, ...] = ()
        self._lone = ""  # the Bone adapter without dropout that is all there is to apply
        self._cache = WeightCache()
        self.register_buffer("_original", None, persistent=False)
        base_layer.requires_grad_(False)

    # What the layer is

    @property
    def weight(self) -> Tensor:
        """The base layer's weight (merged, while it is): ``[out, in]``, or a convolution's."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return self.base_layer.bias  # type: ignore[return-value]

    @property
    def out_features(self) -> int:
        """How many numbers come out (a convolution's channels)."""
        return self.weight.shape[0] if self._is_conv else int(self.base_layer.out_features)  # type: ignore[arg-type]

    @property
    def in_features(self) -> int:
        """How many numbers go in (a convolution's channels)."""
        return self.weight.shape[1] if self._is_conv else int(self.base_layer.in_features)  # type: ignore[arg-type]

    @property
    def active_adapters(self) -> tuple[str, ...]:
        """The adapters that are applied, in order; some may not be on this layer."""
        return self._active

    @property
    def merged_adapters(self) -> tuple[str, ...]:
        """The adapters that the base layer's weight holds now, in order."""
        return self._merged

    @property
    def cache_weight(self) -> bool:
        """Whether W'' may be kept between calls."""
        return self._cache.enabled

    @cache_weight.setter
    def cache_weight(self, enabled: bool) -> None:
        self._cache.enabled = bool(enabled)
        self._cache.drop()
        if enabled:
            for source in (self.weight, *self.bone_block.values()):
                own_memory(source)

    @property
    def _is_conv(self) -> bool:
        return isinstance(self.base_layer, nn.Conv2d)

    # Adapters

    def add_adapter(
        self,
        name: str,
        *,
        r: int,
        variant: Variant = Variant.BONE,
        axis: Axis = Axis.OUT,
        mini_r: int = 1,
        init_weights: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add a block. It is trainable; `set_adapter` makes it active.

        Args:
            name: The adapter's name; new to this layer, without a dot.
            r: The rank. BAT needs one that divides ``in`` and ``out``.
            variant: Which formula.
            axis: The axis of a BAT block; PEFT's is ``out``, RWKV-PEFT's ``in``.
            mini_r: The width of a mini block; divides ``out``.
            init_weights: Zeros, which change nothing; or, false, PEFT's uniform random numbers
                (`torch.nn.init.kaiming_uniform_` with a of sqrt 5), which is for tests.
            dropout: Probability of zeroing an input of a Bone or mini update in training (MiSS).
            device: Where the block lies, ``meta`` too; the weight's device by default.
            dtype: The block's; the weight's by default, float32 where that is not a floating one.

        Raises:
            ConfigError: The name is taken or cannot be; r, mini_r or dropout cannot be; BAT, and
                the weight is quantized.
            ShapeError: r or mini_r does not divide what it has to.
        """
        if not name or "." in name or name in self.bone_block or hasattr(nn.ParameterDict, name):
            raise ConfigError(
                "no name for a new adapter of this layer",
                expected=f"one without dots, other than: {listing(list(self.bone_block))}",
                found=repr(name),
            )
        if not 0.0 <= dropout < 1.0:
            raise ConfigError("dropout is no probability", expected="0 up to 1", found=dropout)
        shape = block_shape(variant, axis, r, mini_r, (self.out_features, self.in_features))
        weight = self.weight
        if variant is Variant.BAT and not weight.is_floating_point():
            raise ConfigError(
                "BAT multiplies the weight itself, which is quantized here",
                expected="a floating dtype",
                found=weight.dtype,
            )
        block = torch.zeros(
            shape,
            device=weight.device if device is None else device,
            dtype=dtype or (weight.dtype if weight.is_floating_point() else torch.float32),
        )
        if not init_weights:
            nn.init.kaiming_uniform_(block, a=math.sqrt(5))
        self.bone_block[name] = nn.Parameter(block)
        self._specs[name] = _Spec(Variant(variant), Axis(axis), float(dropout))
        self._note_change()

    def set_adapter(self, names: str | Iterable[str]) -> None:
        """Make adapters active, in the order that they are applied in.

        Names that this layer does not have are kept: an adapter need not be on every layer.

        Raises:
            ConfigError: A name stands twice.
        """
        wanted = (names,) if isinstance(names, str) else tuple(names)
        if len(set(wanted)) < len(wanted):
            raise ConfigError("an adapter is named twice", found=", ".join(wanted))
        if wanted != self._active:
            self._active = wanted
            self._note_change()

    def delete_adapter(self, name: str) -> None:
        """Remove an adapter; others that are active stay so.

        Raises:
            ConfigError: The layer has no such adapter, or the weight holds it (`unmerge` first).
        """
        self._check_known([name])
        if name in self._merged:
            raise ConfigError(
                "a merged adapter cannot be deleted", found=repr(name), hint="Unmerge it first"
            )
        del self.bone_block[name]
        del self._specs[name]
        self._active = tuple(other for other in self._active if other != name)
        self._note_change()

    def enable_adapters(self, enabled: bool = True) -> None:
        """Apply the active adapters, or the base layer alone (even while it is merged)."""
        self.adapters_enabled = bool(enabled)

    def disable_adapters(self) -> None:
        """Compute what the base layer alone would; `enable_adapters` ends it."""
        self.enable_adapters(False)

    def updates(self, names: str | Iterable[str] | None = None) -> list[Update]:
        """The updates of the named adapters (the active ones) that this layer has, in order."""
        return [self._update(name) for name in self._chosen(names) if name in self._specs]

    def _update(self, name: str) -> Update:
        spec = self._specs[name]
        dropout = spec.dropout if self.training else 0.0
        return Update(spec.variant, self.bone_block[name], spec.axis, dropout)

    def _note_change(self) -> None:
        """Another set of adapters is applied from now on."""
        self._cache.drop()
        self._lone = ""
        here = [name for name in self._active if name in self._specs]
        if len(here) == 1 and not self._merged:
            spec = self._specs[here[0]]
            if spec.variant is Variant.BONE and not spec.dropout:
                self._lone = here[0]

    def _chosen(self, names: str | Iterable[str] | None) -> tuple[str, ...]:
        """The active adapters, or the named ones, which must be there."""
        if names is None:
            return self._active
        chosen = (names,) if isinstance(names, str) else tuple(names)
        self._check_known(chosen)
        return chosen

    def _check_known(self, names: Iterable[str]) -> None:
        unknown = [name for name in names if name not in self.bone_block]
        if unknown:
            raise ConfigError(
                "no such adapter on this layer",
                expected=listing(list(self.bone_block)) or "none",
                found=listing(unknown),
            )

    # Merging

    def merged_weight(
        self, names: str | Iterable[str] | None = None, *, safe_merge: bool = False
    ) -> Tensor:
        """The weight after adapters, in order: computed exactly or wider, rounded once.

        On the CPU its bytes are those of ``boneconv merge`` (`boneconv.nn.weights`). Starts from
        the base layer's own weight, also while adapters are merged.

        Args:
            names: The adapters; the active ones by default.
            safe_merge: Refuse numbers that are not finite.

        Returns:
            ``[out, in]`` (a convolution's shape for a convolution), the weight's dtype and device.

        Raises:
            ConfigError: An adapter that the layer lacks, or a dtype that cannot be merged.
            NonFiniteError: ``safe_merge``, and the weight, a block or the result is not finite.
        """
        weight = self._unmerged()
        flat = weight.detach().reshape(self.out_features, -1)
        return merged_weight(flat, self.updates(names), finite=safe_merge).view(weight.shape)

    def _unmerged(self) -> Tensor:
        original = self._original
        return self.weight if original is None else original

    def merge(self, safe_merge: bool = False, names: str | Iterable[str] | None = None) -> None:
        """Put the updated weight into the base layer.

        The base layer gets a new parameter; the old one is kept as it is, to the bit, for
        `unmerge`: while merged, the layer takes the memory of two weights. Adapters merged before
        stay so and come first; the weight is formed from the original, so that several merges round
        once.

        Args:
            safe_merge: Check that everything is finite, before anything is changed.
            names: The adapters; the active ones by default. Those merged already are skipped.

        Raises:
            ConfigError: An adapter that the layer lacks, or a dtype that cannot be merged.
            NonFiniteError: As `merged_weight`; the layer is as it was.
        """
        chosen = self._chosen(names)
        new = tuple(n for n in chosen if n in self.bone_block and n not in self._merged)
        if not new:
            return
        merged = self.merged_weight(self._merged + new, safe_merge=safe_merge)
        original = self._unmerged()
        self.base_layer.weight = nn.Parameter(merged, requires_grad=self.weight.requires_grad)
        self._buffers["_original"] = original  # assigned, a parameter would become one of ours
        self._merged += new
        self._note_change()

    def unmerge(self) -> None:
        """Put the original weight back, the same parameter and the same bits, for all adapters."""
        original = self._original
        if original is None:
            return
        if not isinstance(original, nn.Parameter):  # moved or cast while merged
            original = nn.Parameter(original, requires_grad=self.weight.requires_grad)
        self.base_layer.weight = original
        self._buffers["_original"] = None
        self._merged = ()
        self._note_change()

    # Computing

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x W''^T + bias``.

        Args:
            x: ``[..., in]``; for a convolution ``[N, in, H, W]`` or ``[in, H, W]``.
            *args: For a base layer of another class, which takes more.
            **kwargs: The same.

        Returns:
            ``[..., out]`` (or the convolution's shape), in the base layer's dtype.

        Raises:
            ShapeError: x does not fit.
        """
        if not torch.is_grad_enabled() and (y := self._at_once(x)) is not None:
            return y
        if self._merged and not self.adapters_enabled:
            return self._linear(x, self._unmerged(), self.bias)
        updates = self._in_force()
        layer = self.base_layer
        if not updates:
            return layer(x, *args, **kwargs)  # type: ignore[no-any-return]
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        if self._cache.enabled and self._may_keep(x, weight, bias, updates):
            sources = [*(update.block for update in updates), weight]
            kept = self._cache.get(sources, lambda: self._form(updates))
            if kept is not None:
                return self._linear(x, kept, bias)
        base = as_function(layer, args, kwargs)
        if not isinstance(layer, nn.Conv2d):
            return apply_updates(x, weight, bias, updates, base)
        last = apply_updates(x.movedim(-3, -1), weight.flatten(1), bias, updates, base)
        return last.movedim(-1, -3)

    def _at_once(self, x: Tensor) -> Tensor | None:
        """The two short ways, by a W'' that still holds and of one Bone adapter; nothing elsewhere.

        Written flat: after a product that swept a weight through the processor's caches, each
        function and each object of ours costs microseconds of misses.
        """
        if torch.compiler.is_compiling() or not self.adapters_enabled:
            return None
        cache, layer, blocks = self._cache, self.base_layer, self.bone_block._parameters
        weight, bias = cast(Tensor, layer.weight), cast("Tensor | None", layer.bias)
        if cache.enabled:
            if cache.kept is None or self.training:
                return None
            held = cache.held((*map(blocks.get, self._active), weight))
            return None if held is None else self._linear(x, held, bias)
        block = blocks.get(self._lone) if self._lone else None
        if block is None or as_function(layer, (), {}) is not None:
            return None
        return bone_at_once(x, weight, bias, block)

    def _in_force(self) -> list[Update]:
        return self.updates() if self.adapters_enabled and not self._merged else []

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if isinstance(self.base_layer, nn.Conv2d):
            return F.conv2d(x, weight.view(*weight.shape[:2], 1, 1), bias)
        return F.linear(x, weight, bias)

    def _may_keep(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, updates: list[Update]
    ) -> bool:
        """Whether a kept W'' would do: in eval mode, where no gradient is wanted."""
        if self.training or torch.compiler.is_compiling():
            return False
        if not torch.is_grad_enabled():
            return True
        tensors = [x, weight, bias, *[update.block for update in updates]]
        return not any(tensor is not None and tensor.requires_grad for tensor in tensors)

    def _form(self, updates: list[Update]) -> Tensor:
        weight = self.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        formed = compose(weight.detach().flatten(1).to(wide), updates)
        return page_aligned(formed.to(weight.dtype).detach())

    def drop_cache(self) -> None:
        """Forget the kept W''; the next call forms it anew."""
        self._cache.drop()

    def train(self, mode: bool = True) -> Self:
        """As `torch.nn.Module.train`; drops the kept W''."""
        self._cache.drop()
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self._cache.drop()
        return cast(Self, super()._apply(fn, recurse))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        """The adapters, each with its variant and rank."""
        parts = [f"{name}={s.variant}" for name, s in self._specs.items()]
        return ", ".join([*parts, f"active={list(self._active)}", f"merged={list(self._merged)}"])
