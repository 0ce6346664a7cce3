"""Vectors whose tensors are not those that the metadata announce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vector_sources.adapters import Adapter, made
from vector_sources.cases import Bad
from vector_sources.files import file_of, packed
from vector_sources.invalid.small_adapter import header_of
from vector_sources.tensors import Tensor, noise


def tensors() -> dict[str, Bad]:
    """Rules R17 to R23: the tensors."""

    def changed(
        rule: str, title: str, edit: Callable[[Adapter], Any], *args: Any, **options: Any
    ) -> Bad:
        adapter, _ = made("bad", *(args or ("bone", {"q": (2, 4, 6), "k": (2, 4, 6)})), **options)
        edit(adapter)
        return Bad(rule, title, packed(*file_of(adapter)))

    def block(dtype: str, *shape: int) -> Callable[[Adapter], Any]:
        return lambda a: a.tensors.update({"q.bone_block": noise("b", dtype, *shape)})

    def special(name: str, dtype: str, bits: int) -> Callable[[Adapter], Any]:
        def edit(adapter: Adapter) -> None:
            old = adapter.tensors[name]
            adapter.tensors[name] = Tensor(dtype, old.shape, (bits, *[0] * (len(old.bits) - 1)))

        return edit

    def biased(*shape: int) -> Callable[[Adapter], Any]:
        def edit(adapter: Adapter) -> None:
            adapter.meta["modules"]["q"] |= {"bias": True, "base_shape": [4, 6]}
            adapter.tensors["q.bias"] = noise("s", "F32", *shape)

        return edit

    def resized(adapter: Adapter) -> None:
        adapter.meta |= {"vocab_size": 5, "replaced": {"embed": ["weight"]}}
        adapter.tensors["embed.weight"] = noise("s", "F32", 6, 4)

    def replaced_nan(adapter: Adapter) -> None:
        adapter.meta["replaced"] = {"norm": ["weight"]}
        adapter.tensors["norm.weight"] = Tensor("F64", (1,), (0x7FF8 << 48,))

    def unprefixed(adapter: Adapter) -> Any:
        return adapter.tensors.pop("k.bone_block")

    def shape(*sizes: int) -> Callable[[Adapter], Any]:
        return lambda a: a.meta["modules"]["q"].update(base_shape=list(sizes))

    bat, mini = ("bat", {"q": (2, 4, 6)}), ("mini", {"q": (2, 4, 6)})
    cases = {
        "block-missing": changed("R17", "a module without its block", unprefixed),
        "bias-missing": changed(
            "R17",
            "a bias that is announced and absent",
            lambda a: (biased(4)(a), a.tensors.pop("q.bias")),
        ),
        "replaced-missing": changed(
            "R17",
            "a replaced tensor that is absent",
            lambda a: a.meta.update(replaced={"n": ["weight"]}),
        ),
        "block-unannounced": changed(
            "R18", "a block of no module", lambda a: a.meta["modules"].pop("k")
        ),
        "tensor-unannounced": changed(
            "R18",
            "a tensor that nothing announces",
            lambda a: a.tensors.update({"v.bias": noise("s", "F32", 4)}),
        ),
        "tensor-lora": changed(
            "R18",
            "a LoRA tensor beside the blocks",
            lambda a: a.tensors.update({"q.lora_A.weight": noise("s", "F32", 2, 6)}),
        ),
        "block-float64": changed("R19", "a block in float64", block("F64", 2, 4)),
        "block-integer": changed(
            "R19",
            "a block of integers",
            lambda a: a.tensors.update({"q.bone_block": Tensor("I32", (2, 4), (0,) * 8)}),
        ),
        "block-rank": changed("R20", "a block of another rank than announced", block("F32", 3, 4)),
        "block-dimensions": changed(
            "R20", "a Bone block of three dimensions", block("F32", 1, 2, 4)
        ),
        "block-empty": changed("R20", "a block without columns", block("F32", 2, 0)),
        "block-out": changed("R20", "a block that does not fit base_shape", shape(5, 6)),
        "block-bat-square": changed(
            "R20", "BAT blocks that are not square", block("F32", 2, 2, 3), *bat, axis="out"
        ),
        "block-bat-flat": changed(
            "R20", "a BAT adapter with a Bone block", block("F32", 2, 4), *bat, axis="out"
        ),
        "block-bat-none": changed(
            "R20", "no BAT block at all", block("F32", 0, 2, 2), *bat, axis="out"
        ),
        "block-bat-axis": changed(
            "R20", "BAT blocks for the other axis of base_shape", shape(6, 4), *bat, axis="out"
        ),
        "block-bat-ragged": changed(
            "R20", "a rank that does not divide the in-features", shape(4, 5), *bat, axis="out"
        ),
        "block-mini-width": changed(
            "R20", "a mini block of another width than announced", block("F32", 2, 4), *mini, mini=2
        ),
        "block-mini-out": changed(
            "R20", "a mini_rank that does not divide the out-features", shape(5, 6), *mini, mini=2
        ),
        "bias-shape": changed("R21", "a bias of another length than out", biased(5)),
        "bias-dimensions": changed("R21", "a bias of two dimensions", biased(4, 1)),
        "vocab-rows": changed("R22", "a vocab_size that no replaced tensor has", resized),
        "block-nan": changed("R23", "NaN in a block", special("q.bone_block", "F32", 0x7FC00000)),
        "block-infinity-bf16": changed(
            "R23", "infinity in a bfloat16 block", special("q.bone_block", "BF16", 0x7F80)
        ),
        "block-infinity-f16": changed(
            "R23", "infinity in a float16 block", special("q.bone_block", "F16", 0xFC00)
        ),
        "replaced-nan": changed("R23", "NaN in a replaced tensor", replaced_nan),
    }
    header, data = header_of()
    end = len(data)
    header["q.weight"] = {"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}
    cases["tensor-prefix"] = Bad(
        "R18", "a tensor without the prefix", packed(header, data + bytes(4))
    )
    return cases
