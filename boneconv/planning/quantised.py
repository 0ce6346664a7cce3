"""A base whose weights are quantised: FP8 weights are dequantised, all others are refused.

FP8 checkpoints keep a scale beside each weight, by which its elements are multiplied: one for every
128 x 128 elements (``weight_scale_inv``, as DeepSeek-V3 has them), one for each row or one in all
(``weight_scale``, as compressed-tensors, FBGEMM and ModelOpt write them). Whether a weight has
scales is told by its name and by shapes that fit; what cannot be told is refused.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from boneconv.dtypes import FLOAT8S
from boneconv.engine.dequantise import SCALES, Dequantisation
from boneconv.errors import FormatError, listing
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.quantised import refusal, refuse_quantised_tensors
from boneconv.io.safetensors import StoredTensor
from boneconv.planning.config_edits import ConfigEdits

__all__ = ["Dequantised", "plan_dequantisation"]

#: Methods of config.json whose weights may be FP8.
_METHODS = ("fp8", "compressed-tensors", "fbgemm_fp8", "modelopt")
_SUFFIXES = ("_scale_inv", "_scale")
#: Scales of activations and caches: they say nothing of the weights.
_OF_ACTIVATIONS = (
    "input_scale",
    "activation_scale",
    "input_scale_ub",
    "output_scale",
    "q_scale",
    "k_scale",
    "v_scale",
    "kv_scale",
)
_USUAL_BLOCK = (128, 128)


@dataclass(frozen=True)
class Dequantised:
    """What is known of a base's FP8 weights; empty where it has none, or they stay as they are.

    Attributes:
        weights: How each is dequantised, by name.
        dropped: The tensors that the dequantised checkpoint does not have: the scales.
    """

    weights: Mapping[str, Dequantisation] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()

    def note(self) -> str | None:
        """What the user should know."""
        if not self.weights:
            return None
        bare = sum(each.scale is None for each in self.weights.values())
        text = f"{len(self.weights)} FP8 weights are dequantised"
        if self.dropped:
            text += f", and {len(self.dropped)} tensors of their scales are left out"
        if bare:
            text += f"; {bare} of the weights have no scale and are their own values"
        return text


def plan_dequantisation(
    base: Checkpoint, config: ConfigEdits | None, dtype: str | None
) -> Dequantised:
    """Finds the scale of every FP8 weight; reads headers only.

    Args:
        base: The base.
        config: Its configuration; its quantization_config is removed where weights are dequantised.
        dtype: The safetensors dtype of the output's tensors; None to keep each one's own.

    Raises:
        FormatError: The base is quantised by another method, or no dtype is given to dequantise to,
            or it cannot be told how a weight is scaled.
    """
    place = base.root if config is None else config.path
    refuse_quantised_tensors(base.tensors, place)
    if config is not None:
        config.refuse_quantised(_METHODS)
    settings = None if config is None else config.quantisation()
    eights = {name: t for name, t in base.tensors.items() if t.dtype in FLOAT8S}
    if settings is not None and not eights:
        raise refusal(str(settings.get("quant_method", "an unnamed method")), place)
    scales = {name: scale for name in eights if (scale := _scale_of(name, base)) is not None}
    if dtype is None:
        if settings is not None or scales:
            raise _needs_dtype(place, settings)
        return Dequantised()
    block = _block(settings)
    weights = {
        name: _dequantisation(tensor, scales.get(name), block, base)
        for name, tensor in eights.items()
    }
    if settings is not None:
        _refuse_bare(weights, base, "its quantization_config says that it is quantised")
    dropped = {each.name for each in scales.values()}
    if eights:
        dropped |= {name for name in base.tensors if name.split(".")[-1] in _OF_ACTIVATIONS}
    _refuse_bare(_near_scales(weights, base.tensors.keys() - dropped), base, "it has scales")
    _refuse_left(base, dropped)
    if config is not None and eights:
        config.remove_quantisation()
    return Dequantised(weights, tuple(name for name in base.tensors if name in dropped))


def _needs_dtype(place: Any, settings: Mapping[str, Any] | None) -> FormatError:
    method = "fp8" if settings is None else settings.get("quant_method", "fp8")
    return FormatError(
        f"the base's weights are FP8 with scales ({method!r}): merged weights have no such scales",
        path=place,
        expected="a dtype to dequantise to",
        hint="Give --dtype bfloat16: every FP8 weight is dequantised exactly, merged and rounded "
        "once; or merge into the full-precision checkpoint that it was quantised from",
    )


def _scale_of(name: str, base: Checkpoint) -> StoredTensor | None:
    """The scales that go with a weight, by name."""
    found = [base.tensors[name + suffix] for suffix in _SUFFIXES if name + suffix in base.tensors]
    if len(found) > 1:
        raise FormatError(
            f"two scales for the FP8 weight {name!r}: {listing([t.name for t in found])}",
            path=found[0].path,
        )
    return found[0] if found else None


def _block(settings: Mapping[str, Any] | None) -> tuple[int, int]:
    """The configured size of a block; 128 x 128 where nothing is said."""
    given = (settings or {}).get("weight_block_size")
    if isinstance(given, list) and len(given) == 2:
        down, across = given
        if all(isinstance(each, int) and each > 0 for each in given):
            return down, across
    return _USUAL_BLOCK


def _dequantisation(
    weight: StoredTensor, scale: StoredTensor | None, block: tuple[int, int], base: Checkpoint
) -> Dequantisation:
    """How a weight's scale, if any, lies over it."""
    shape = weight.shape
    rows, columns = (shape[-2], shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)
    whole = (max(1, rows), max(1, columns))
    if not shape:
        raise _unclear(weight, scale, block)
    if scale is None:
        return Dequantisation(None, whole)
    if scale.dtype not in SCALES:
        raise FormatError(
            f"the scale {scale.name!r} has a dtype whose products are not exact",
            path=scale.path,
            expected=", ".join(SCALES),
            found=scale.dtype,
        )
    if math.prod(scale.shape) == 1:
        return Dequantisation(scale, whole)
    stacked = shape[:-2]
    if len(shape) in (2, 3):
        if scale.shape in ((*stacked, rows), (*stacked, rows, 1)):
            return Dequantisation(scale, (1, whole[1]))
        if scale.shape == (*stacked, 1, 1):
            return Dequantisation(scale, whole)
        if scale.shape == (*stacked, math.ceil(rows / block[0]), math.ceil(columns / block[1])):
            return Dequantisation(scale, block)
    raise _unclear(weight, scale, block)


def _unclear(
    weight: StoredTensor, scale: StoredTensor | None, block: tuple[int, int]
) -> FormatError:
    return FormatError(
        f"it cannot be told how the FP8 weight {weight.name!r} {list(weight.shape)} is scaled",
        path=weight.path,
        expected=f"one scale, one for each row, or one for each block of {block[0]} x {block[1]}",
        found="no scale" if scale is None else f"{scale.name} {list(scale.shape)}",
        hint="Merge into the full-precision checkpoint that it was quantised from",
    )


def _refuse_bare(weights: Mapping[str, Dequantisation], base: Checkpoint, why: str) -> None:
    bare = [name for name, each in weights.items() if each.scale is None]
    if bare:
        raise FormatError(
            f"FP8 weights without a scale that is known, though {why}: {listing(bare)}",
            path=base.root,
            expected=" or ".join(f"{bare[0]}{suffix}" for suffix in _SUFFIXES),
            hint="Merge into the full-precision checkpoint that it was quantised from",
        )


def _near_scales(
    weights: Mapping[str, Dequantisation], others: Collection[str]
) -> dict[str, Dequantisation]:
    """The weights in whose modules something is called a scale that is not accounted for."""
    near = {name.rpartition(".")[0] for name in others if "scale" in name.rpartition(".")[2]}
    whole_file = any("scale" in name and "." not in name for name in others)
    return {n: each for n, each in weights.items() if whole_file or n.rpartition(".")[0] in near}


def _refuse_left(base: Checkpoint, dropped: Collection[str]) -> None:
    """Scales of weights that are no FP8 weights: nothing is known of what they scale."""
    left = [n for n in base.tensors if n.endswith(("weight_scale", "weight_scale_inv"))]
    left = [name for name in left if name not in dropped]
    if left:
        raise FormatError(
            f"scales of weights that are not FP8: {listing(left)}",
            path=base.root,
            hint="Merge into the full-precision checkpoint that it was quantised from",
        )
