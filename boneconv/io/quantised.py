"""Weights that are quantised, told by the tensors that the methods keep beside or instead of them.

A quantised base is refused with the way out, here and where config.json names the method; only FP8
weights can be merged into, since their values are exact (`boneconv.planning.quantised`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from boneconv.errors import FormatError
from boneconv.io.safetensors import StoredTensor

__all__ = ["quantised_by", "refusal", "refuse_quantised_tensors"]

#: How the names of a method's own tensors end. GPTQ and AWQ differ in what they pack, not in names.
_ENDINGS: dict[str, tuple[str, ...]] = {
    "bitsandbytes": (
        ".weight.absmax",
        ".weight.quant_map",
        ".weight.nested_absmax",
        ".weight.quant_state.bitsandbytes__nf4",
        ".weight.quant_state.bitsandbytes__fp4",
        ".SCB",
    ),
    "gptq or awq": (".qweight", ".qzeros"),
    "hqq": (".W_q",),
    "compressed-tensors": (".weight_packed", ".weight_zero_point", ".weight_global_scale"),
    "nvfp4": (".weight_scale_2",),
}
_INTEGERS = ("I8", "U8", "I32")

_WAY_OUT = (
    "Merge into the full-precision checkpoint that it was quantised from, then quantise the "
    "result; an adapter trained on the quantised weights, as QLoRA does, belongs into their "
    "dequantised values: load the base with transformers, call model.dequantize(), save it, and "
    "merge into that"
)
_FROM_GGUF = (
    "Merge into the safetensors checkpoint that it was converted from, then convert the result"
)


def quantised_by(tensors: Mapping[str, StoredTensor]) -> str | None:
    """The method that a checkpoint's tensors tell of; None where nothing does, or it is FP8."""
    for method, endings in _ENDINGS.items():
        if any(name.endswith(endings) for name in tensors):
            return method
    for name, tensor in tensors.items():
        if name.endswith("_blocks") and tensor.dtype == "U8":
            scales = tensors.get(f"{name.removesuffix('_blocks')}_scales")
            if scales is not None and scales.dtype == "U8":
                return "mxfp4"
        if tensor.dtype in _INTEGERS and f"{name}_scale" in tensors:
            return "scaled integers"
    return None


def refuse_quantised_tensors(tensors: Mapping[str, StoredTensor], path: Path) -> None:
    """Raises FormatError where tensors tell of a method whose weights cannot be merged into."""
    method = quantised_by(tensors)
    if method is not None:
        raise refusal(method, path)


def refusal(method: str, path: Path) -> FormatError:
    """The error for a base that is quantised by a method."""
    return FormatError(
        f"the base is quantised ({method!r}): adapters merge into floating weights",
        path=path,
        hint=_FROM_GGUF if method == "gguf" else _WAY_OUT,
    )
