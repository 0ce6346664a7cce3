"""Vectors that break a rule only with their base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vector_sources.adapters import Adapter, made
from vector_sources.cases import Bad
from vector_sources.digests import marked
from vector_sources.files import file_of, packed
from vector_sources.tensors import Tensor, noise, tensor


def bases() -> dict[str, Bad]:
    """Rules R28 to R31: the base, and the merge."""

    def changed(
        rule: str,
        title: str,
        edit: Callable[..., Any],
        *args: Any,
        mark: bool = False,
        strength: float = 1,
        **options: Any,
    ) -> Bad:
        adapter, base = made(
            "bad", *(args or ("bone", {"q": (2, 4, 6), "k": (2, 4, 6)})), **options
        )
        adapter.meta = marked(adapter.meta, base) if mark else adapter.meta
        edit(adapter, base)
        return Bad(rule, title, packed(*file_of(adapter)), None, base, strength)

    def weight(dtype: str, *shape: int) -> Callable[..., Any]:
        return lambda adapter, base: base.update({"q.weight": noise("w", dtype, *shape)})

    def one(name: str, dtype: str, first: int) -> Callable[..., Any]:
        def edit(adapter: Adapter, base: dict[str, Tensor]) -> None:
            target = adapter.tensors if name.endswith("block") else base
            old = target[name]
            target[name] = Tensor(dtype, old.shape, (first, *[0] * (len(old.bits) - 1)))

        return edit

    def brink(adapter: Adapter, base: dict[str, Tensor]) -> None:
        one("q.weight", "F16", 0x7BFF)(adapter, base)
        adapter.tensors["q.bone_block"] = tensor("F32", (2, 4), [16.0] + [0.0] * 7)

    def renamed(adapter: Adapter, base: dict[str, Tensor]) -> None:
        base["model.q.weight"] = base.pop("q.weight")

    def saved(new: Tensor, old: Tensor | None) -> Callable[..., Any]:
        def edit(adapter: Adapter, base: dict[str, Tensor]) -> None:
            adapter.meta["replaced"] = {"head": ["weight"]}
            adapter.tensors["head.weight"] = new
            if old:
                base["head.weight"] = old

        return edit

    def biased(adapter: Adapter, base: dict[str, Tensor]) -> None:
        adapter.meta["modules"]["q"] |= {"bias": True, "base_shape": [4, 6]}
        adapter.tensors["q.bias"] = noise("s", "F32", 4)

    def flipped(adapter: Adapter, base: dict[str, Tensor]) -> None:
        old = base["q.weight"]
        base["q.weight"] = Tensor(old.dtype, old.shape, (old.bits[0] ^ 1, *old.bits[1:]))

    def recast(adapter: Adapter, base: dict[str, Tensor]) -> None:
        base["q.weight"] = Tensor("BF16", base["q.weight"].shape, base["q.weight"].bits)

    bat, mini = ("bat", {"q": (2, 4, 6)}), ("mini", {"q": (2, 4, 6)})
    head, wider = noise("s", "F32", 3, 4), noise("t", "F32", 3, 5)
    return {
        "base-without-weight": changed("R28", "an adapted weight under another name", renamed),
        "base-without-bias": changed("R28", "a bias that the base does not have", biased),
        "base-without-replaced": changed(
            "R28", "a replaced tensor that is neither there nor added", saved(head, None)
        ),
        "base-out": changed("R29", "other out-features", weight("F32", 5, 6)),
        "base-one-dimension": changed("R29", "a weight of one dimension", weight("F32", 4)),
        "base-conv": changed(
            "R29", "a convolution that base_shape does not announce", weight("F32", 4, 6, 1, 1)
        ),
        "base-other-shape": changed(
            "R29", "another shape than base_shape", weight("F32", 4, 8), shapes=True
        ),
        "base-bat-ragged": changed(
            "R29",
            "in-features that the rank does not divide",
            weight("F32", 4, 5),
            *bat,
            axis="out",
        ),
        "base-bat-axis": changed(
            "R29", "blocks for the other axis", weight("F32", 6, 4), *bat, axis="out"
        ),
        "base-mini": changed(
            "R29", "out-features that mini_rank does not divide", weight("F32", 5, 6), *mini, mini=2
        ),
        "base-integer": changed(
            "R29",
            "a base of integers",
            lambda a, b: b.update({"q.weight": Tensor("U8", (4, 6), (0,) * 24)}),
        ),
        "base-replaced-shape": changed(
            "R29", "a replaced tensor of another shape", saved(head, wider)
        ),
        "base-replaced-rows": changed(
            "R29", "more rows, without vocab_size", saved(noise("u", "F32", 5, 4), head)
        ),
        "base-one-bit": changed(
            "R30",
            "one bit of one weight differs",
            flipped,
            "bone",
            {"q": (2, 4, 6)},
            "BF16 BF16",
            mark=True,
        ),
        "base-dtype": changed(
            "R30",
            "the same bits, another dtype",
            recast,
            "bone",
            {"q": (2, 4, 6)},
            "BF16 F16",
            mark=True,
        ),
        "base-nan": changed("R31", "NaN in an adapted weight", one("q.weight", "F32", 0x7FC00000)),
        "base-infinity": changed(
            "R31", "infinity in an adapted weight", one("q.weight", "BF16", 0xFF80)
        ),
        "overflow-f16": changed("R31", "a tie at the end of float16 overflows", brink),
        "overflow-strength": changed(
            "R31", "a strength that overflows", lambda *_: None, strength=1e300
        ),
    }
