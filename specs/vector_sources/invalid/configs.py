"""Vectors whose adapter_config.json breaks a rule."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from vector_sources.adapters import Adapter, config_of, made
from vector_sources.cases import Bad
from vector_sources.files import file_of, packed
from vector_sources.invalid.small_adapter import Edit
from vector_sources.tensors import noise


def configs() -> dict[str, Bad]:
    """Rules R24 to R27: adapter_config.json."""
    pair = {"q": (2, 4, 6), "k": (2, 4, 6)}

    def spelled(rule: str, title: str, edit: Callable[[str], str]) -> Bad:
        adapter, _ = made("bad", "bone", pair)
        text = edit(json.dumps(adapter.config))
        return Bad(rule, title, packed(*file_of(adapter)), text.encode())

    def changed(rule: str, title: str, *without: str, **changes: Any) -> Bad:
        adapter, _ = made("bad", "bone", pair)
        config = {n: v for n, v in adapter.config.items() if n not in without} | changes
        return Bad(rule, title, packed(*file_of(adapter)), json.dumps(config).encode())

    def misread(title: str, *args: Any, edit: Edit | None = None, task: Any = None, **options: Any):
        adapter, _ = made("bad", *(args or ("bone", pair)), **options)
        if edit:
            edit(adapter)
        config = config_of(adapter.meta, True, task_type=task)
        return Bad("R27", title, packed(*file_of(adapter)), json.dumps(config).encode())

    def top(**changes: Any) -> Edit:
        return lambda adapter: adapter.meta.update(changes)

    def biased(adapter: Adapter) -> None:
        adapter.meta["modules"]["q"] |= {"bias": True, "base_shape": [4, 6]}
        adapter.tensors["q.bias"] = noise("s", "F32", 4)

    def conv(adapter: Adapter) -> None:
        adapter.meta["modules"]["q"]["base_shape"] = [4, 6, 1, 1]

    def saved(name: str) -> Edit:
        def edit(adapter: Adapter) -> None:
            module, _, leaf = name.rpartition(":")
            adapter.meta["replaced"] = {module: [leaf]}
            adapter.tensors[f"{module}.{leaf}"] = noise("s", "F32", 4)

        return edit

    says = "what the metadata does not say: "
    return {
        "config-not-json": spelled("R24", "a config that is not JSON", lambda text: text[:-1]),
        "config-array": spelled("R24", "a config that is an array", lambda text: f"[{text}]"),
        "config-duplicate": spelled(
            "R24", "peft_type given twice", lambda text: '{"peft_type":"LORA",' + text[1:]
        ),
        "config-lora": changed("R25", "another method", peft_type="LORA"),
        "config-no-type": changed("R25", "no peft_type", "peft_type"),
        "config-unknown-field": changed(
            "R26", "a field on which PEFT 0.14 falls back to rank 64", peft_version="0.18.1"
        ),
        "config-missing-field": changed("R26", "no rank, which PEFT takes for 64", "r"),
        "config-rank": changed("R26", says + "the rank", r=4),
        "config-rank-float": changed("R26", says + "the rank as a fraction", r=2.5),
        "config-init-weights": changed("R26", says + "BAT", init_weights="bat"),
        "config-targets": changed(
            "R26", says + "fewer modules, which PEFT drops silently", target_modules=["q"]
        ),
        "config-pattern": changed(
            "R26", says + "a pattern for the modules", target_modules=".*[qk]"
        ),
        "config-excluded": changed("R26", says + "an excluded module", exclude_modules=["q"]),
        "config-layers": changed("R26", says + "some layers only", layers_to_transform=[0]),
        "config-bias": changed("R26", says + "trained biases", bias="all"),
        "config-saved": changed("R26", says + "saved modules", modules_to_save=["head"]),
        "config-free-type": changed("R26", "a revision that is a number", revision=7),
        "config-native-rank": changed(
            "R26", "BONE_ADAPTER with PEFT's fields", peft_type="BONE_ADAPTER"
        ),
        "peft-axis-in": misread("BAT over the input axis", "bat", {"q": (2, 4, 4)}, axis="in"),
        "peft-mini": misread("mini", "mini", pair, mini=2),
        "peft-ranks": misread("a rank for each module", "bone", {"q": (2, 4, 6), "k": (3, 4, 6)}),
        "peft-scale": misread("a scale", edit=top(scale=0.5)),
        "peft-bias": misread("a bias", edit=biased),
        "peft-conv": misread("a convolution", edit=conv),
        "peft-prefix": misread("bone_ inside a name", "bone", {"neck.bone_q": (2, 4, 6)}),
        "peft-prefix-saved": misread(
            "bone_ inside a saved name", edit=saved("backbone_norm:weight")
        ),
        "peft-saved-inside": misread(
            "a saved name inside an adapted one", edit=saved("q:norm.weight")
        ),
        "peft-saved-letter": misread("a saved name inside every name", edit=saved("m:weight")),
        "peft-saved-suffix": misread(
            "an adapted name inside a saved module", edit=saved("neck:x.q.weight")
        ),
        "peft-task": misread(
            "a name that the task saves", "bone", {"score_q": (2, 4, 6)}, task="SEQ_CLS"
        ),
    }
