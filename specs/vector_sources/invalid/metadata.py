"""Vectors whose metadata break a rule, alone or among each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vector_sources.adapters import Adapter, made
from vector_sources.cases import Bad
from vector_sources.digests import marked
from vector_sources.files import file_of, packed
from vector_sources.invalid.small_adapter import Edit, broken, header_of
from vector_sources.tensors import noise


def metadata() -> dict[str, Bad]:
    """Rules R05 to R16: the metadata."""
    header, data = header_of()
    text = header["__metadata__"]["bone_adapter"]

    def spelled(rule: str, title: str, text: str) -> Bad:
        return Bad(rule, title, packed(header | {"__metadata__": {"bone_adapter": text}}, data))

    def edited(rule: str, title: str, edit: Edit, *args: Any, **options: Any) -> Bad:
        return Bad(rule, title, broken(edit, *args, **options))

    def module(**changes: Any) -> Edit:
        return lambda meta: meta["modules"]["q"].update(changes)

    def top(**changes: Any) -> Edit:
        return lambda meta: meta.update(changes)

    no_metadata = {name: entry for name, entry in header.items() if name != "__metadata__"}
    bat, mini = ("bat", {"q": (2, 4, 6)}), ("mini", {"q": (2, 4, 6)})
    add = text[:-1]
    cases = {
        "no-metadata": Bad("R05", "no metadata at all", packed(no_metadata, data)),
        "other-format": Bad(
            "R05",
            "an adapter of another tool",
            packed(header | {"__metadata__": {"format": "pt"}}, data),
        ),
        "metadata-not-json": spelled("R06", "metadata that is not JSON", text[:-1]),
        "metadata-array": spelled("R06", "metadata that is an array", "[]"),
        "metadata-duplicate": spelled(
            "R06", "a field given twice", '{"axis":"in","axis":"in"' + "," + text[1:]
        ),
        "metadata-deep": spelled(
            "R06", "seventeen levels", add + ',"x":' + "[" * 16 + "]" * 16 + "}"
        ),
        "metadata-nan": spelled("R06", "NaN", add + ',"x":NaN}'),
        "metadata-large-integer": spelled(
            "R06", "an integer of 2^53", add + ',"x":9007199254740992}'
        ),
        "metadata-exponent": spelled("R06", "a number with an exponent", add + ',"x":1e-3}'),
        "metadata-surrogate": spelled("R06", "a lone surrogate", add + ',"x":"\\ud800"}'),
        "metadata-unsorted": spelled(
            "R07",
            "fields out of order",
            '{"version":"1.0",' + text[1:].replace(',"version":"1.0"', ""),
        ),
        "metadata-spaces": spelled("R07", "spaces between tokens", text.replace(":", ": ", 1)),
        "metadata-escapes": spelled(
            "R07", "an escape that is not needed", text.replace("bone", "b\\u006fne")
        ),
        "metadata-integral": spelled("R06", "an integer written 2.0", add + ',"x":2.0}'),
        "metadata-small-number": spelled("R07", "a fraction below 0.0001", add + ',"x":0.00001}'),
        "metadata-long-number": spelled("R07", "more digits than are needed", add + ',"x":0.10}'),
        "version-missing": edited("R08", "no version", lambda meta: meta.pop("version")),
        "version-number": edited("R08", "a version that is a number", top(version=1)),
        "version-malformed": edited("R08", "a malformed version", top(version="1.00")),
        "version-major": edited("R08", "a higher major version", top(version="2.0")),
        "feature-unknown": edited(
            "R09",
            "a feature that 1.0 does not know",
            top(version="1.1", required_features=["sparse"]),
        ),
        "feature-not-list": edited(
            "R09", "features that are not a list", top(required_features="none")
        ),
        "no-variant": edited("R10", "no variant", lambda meta: meta.pop("variant")),
        "no-modules": edited("R10", "no modules", lambda meta: meta.pop("modules")),
        "no-rank": edited(
            "R10", "a module without a rank", lambda meta: meta["modules"]["q"].pop("rank")
        ),
        "variant-unknown": edited("R11", "an unknown variant", top(variant="lora")),
        "variant-case": edited("R11", "a variant in capitals", top(variant="BONE")),
        "modules-empty": edited("R11", "no module in modules", top(modules={})),
        "modules-list": edited("R11", "modules as a list", top(modules=["q"])),
        "rank-zero": edited("R11", "rank 0", module(rank=0)),
        "rank-fraction": edited("R11", "a rank that is no integer", module(rank=2.5)),
        "rank-text": edited("R11", "a rank that is text", module(rank="2")),
        "rank-true": edited("R11", "a rank that is a boolean", module(rank=True)),
        "axis-unknown": edited("R11", "an unknown axis", top(axis="both"), *bat, axis="out"),
        "scale-text": edited("R11", "a scale that is text", top(scale="1")),
        "bias-text": edited("R11", "a bias that is text", module(bias="none")),
        "base-shape-one": edited("R11", "a base shape of one size", module(base_shape=[4])),
        "base-shape-kernel": edited(
            "R11", "a convolution that is not 1x1", module(base_shape=[4, 6, 3, 3])
        ),
        "base-dtype-integer": edited(
            "R11", "a base dtype that is no float", module(base_dtype="I8")
        ),
        "replaced-empty": edited(
            "R11", "a replaced module without tensors", top(replaced={"k": []})
        ),
        "replaced-true": edited("R11", "replaced modules as a list", top(replaced=["k"])),
        "vocab-zero": edited("R11", "no rows", top(vocab_size=0)),
        "fingerprint-algorithm": edited(
            "R11", "an unknown algorithm", top(fingerprint="md5:" + "0" * 32)
        ),
        "axis-missing": edited(
            "R12", "BAT without an axis", lambda meta: meta.pop("axis"), *bat, axis="out"
        ),
        "axis-on-bone": edited("R12", "Bone with an axis", top(axis="out")),
        "mini-rank-missing": edited(
            "R12",
            "mini without mini_rank",
            lambda meta: meta["modules"]["q"].pop("mini_rank"),
            *mini,
            mini=2,
        ),
        "mini-rank-on-bone": edited("R12", "Bone with mini_rank", module(mini_rank=4)),
    }
    return cases | relations()


def relations() -> dict[str, Bad]:
    """Rules R13 to R16: names, collisions, the fingerprint."""

    def named(title: str, module: str) -> Bad:
        adapter, _ = made("bad", "bone", {module: (2, 4, 6)})
        return Bad("R13", title, packed(*file_of(adapter)))

    def changed(rule: str, title: str, edit: Callable[[Adapter], Any], mark: bool = False) -> Bad:
        adapter, base = made("bad", "bone", {"q": (2, 4, 6), "k": (2, 4, 6)})
        adapter.meta = marked(adapter.meta, base) if mark else adapter.meta
        edit(adapter)
        return Bad(rule, title, packed(*file_of(adapter)))

    def saved(*leaves: str, module: str = "q") -> Callable[[Adapter], Any]:
        def edit(adapter: Adapter) -> None:
            adapter.meta["replaced"] = {module: list(leaves)}
            adapter.tensors |= {f"{module}.{leaf}": noise("s", "F32", 4) for leaf in leaves}

        return edit

    def biased(adapter: Adapter) -> None:
        adapter.meta["modules"]["q"] |= {"bias": True}
        adapter.tensors["q.bias"] = noise("s", "F32", 4)

    def crossed(adapter: Adapter) -> None:
        adapter.meta["replaced"] = {"a": ["b.weight"], "a.b": ["weight"]}
        adapter.tensors["a.b.weight"] = noise("s", "F32", 4)

    zeros = "blake3-1m:" + "0" * 64
    return {
        "bias-without-shape": changed("R21", "a bias without base_shape", biased),
        "name-empty-part": named("an empty part", "layers..q"),
        "name-leading-dot": named("a leading dot", ".q"),
        "name-control": named("a terminal escape in a name", "q\x1b[2J"),
        "name-newline": named("a newline in a name", "q\nk"),
        "name-delete": named("a C1 control in a name", "q\x9b"),
        "name-wrapper": named("a wrapper's prefix that was not removed", "_orig_mod.layers.0.q"),
        "name-base-layer": named("PEFT's base_layer that was not removed", "layers.0.q.base_layer"),
        "name-long": named("a name of 513 characters", "q" * 513),
        "replaced-adapted": changed("R14", "a weight both adapted and replaced", saved("weight")),
        "replaced-bias": changed(
            "R14", "an adapted module's bias as a replaced tensor", saved("bias")
        ),
        "replaced-twice": changed("R14", "a tensor listed by two replaced modules", crossed),
        "replaced-repeated": changed("R14", "a tensor listed twice", repeated),
        "added-unknown": changed(
            "R14", "an added module that is not replaced", lambda a: a.meta.update(added=["k"])
        ),
        "fingerprint-partial": changed(
            "R15",
            "a module without its digest",
            lambda a: a.meta["modules"]["k"].pop("base_digest"),
            True,
        ),
        "fingerprint-no-shape": changed(
            "R15",
            "a digest without a shape",
            lambda a: a.meta["modules"]["k"].pop("base_shape"),
            True,
        ),
        "fingerprint-no-root": changed(
            "R15", "digests without a fingerprint", lambda a: a.meta.pop("fingerprint"), True
        ),
        "fingerprint-root": changed(
            "R16",
            "a root that is not that of the digests",
            lambda a: a.meta.update(fingerprint=zeros),
            True,
        ),
    }


def repeated(adapter: Adapter) -> None:
    """A replaced tensor listed twice."""
    adapter.meta["replaced"] = {"norm": ["weight", "weight"]}
    adapter.tensors["norm.weight"] = noise("s", "F32", 4)
