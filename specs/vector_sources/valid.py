"""The valid vectors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vector_sources.adapters import Adapter, config_of, made
from vector_sources.cases import Case
from vector_sources.digests import marked
from vector_sources.tensors import Tensor, noise, tensor


def variants() -> dict[str, Case]:
    """The variants, dtypes, ranks and axes."""
    cases = {}

    def add(name: str, title: str, sections: str, *args: Any, **options: Any) -> None:
        adapter, base = made(name.replace("bat-in-square", "bat-out-square"), *args, **options)
        loads = adapter.config is not None and adapter.config["peft_type"] == "BONE"
        cases[name] = Case(title, sections, [adapter], base, "loads" if loads else "refuses")

    pair = {"layers.0.q": (4, 8, 12), "layers.0.v": (4, 6, 8)}
    square, native = {"layers.0.q": (4, 8, 8)}, {"peft": False}
    add("bone-f32", "Bone, float32 blocks and base", "7.2", "bone", pair)
    add("bone-bf16", "Bone, bfloat16 blocks and base", "7.2 8", "bone", pair, "BF16 BF16")
    add("bone-f16", "Bone, float16 blocks and base", "7.2 8", "bone", pair, "F16 F16")
    add("bone-f64-base", "Bone, float32 blocks, float64 base", "7.2 8", "bone", pair, "F32 F64")
    add("bone-f32-on-bf16", "Bone, float32 blocks, bfloat16 base", "8.3", "bone", pair, "F32 BF16")
    add("bone-f16-on-bf16", "Bone, float16 blocks, bfloat16 base", "8.3", "bone", pair, "F16 BF16")
    add("bone-bf16-on-f32", "Bone, bfloat16 blocks, float32 base", "8.3", "bone", pair, "BF16 F32")
    ragged = {"layers.0.q": (4, 8, 10), "layers.0.v": (4, 5, 7)}
    add("bone-ragged", "in-features that are no multiple of the rank", "7.2", "bone", ragged)
    add("bone-rank-one", "rank 1", "7.2", "bone", {"q": (1, 3, 5)})
    add("bone-rank-above-in", "a rank above the in-features", "7.2", "bone", {"q": (7, 6, 5)})
    ranks = {"layers.0.q": (4, 8, 8), "layers.1.q": (3, 8, 8)}
    add("bone-ranks", "a rank for each module", "5.4 10.3", "bone", ranks, **native)
    title = "BAT over the output axis, square"
    add("bat-out-square", title, "7.3", "bat", square, axis="out")
    title = "BAT over the input axis: the blocks and base of bat-out-square, another result"
    add("bat-in-square", title, "7.4 10.3", "bat", square, axis="in", **native)
    wide, tall = {"layers.0.up": (4, 8, 16)}, {"layers.0.down": (4, 16, 8)}
    add("bat-out-wide-bf16", "BAT, out", "7.3 8.3", "bat", wide, "BF16 BF16", axis="out")
    add("bat-out-tall-f16", "BAT, out", "7.3 8.3", "bat", tall, "F16 F16", axis="out")
    add("bat-in-wide-f16", "BAT, in", "7.4 8.3", "bat", wide, "F16 F16", axis="in", **native)
    add("bat-in-tall-bf16", "BAT, in", "7.4 8.3", "bat", tall, "BF16 BF16", axis="in", **native)
    add("bat-out-f64-base", "BAT, float64 base", "7.3 8.3", "bat", square, "F32 F64", axis="out")
    bat_ranks = {"layers.0.q": (4, 8, 8), "layers.1.q": (2, 8, 6)}
    title = "BAT, a rank for each module"
    add("bat-ranks", title, "5.4 7.3 10.3", "bat", bat_ranks, axis="out", **native)
    add("mini-f32", "mini", "7.5 10.3", "mini", pair, mini=2, **native)
    title = "mini, ragged, bfloat16"
    add("mini-ragged", title, "7.5", "mini", {"q": (4, 6, 10)}, "BF16 BF16", mini=3, **native)
    return cases


def modules() -> dict[str, Case]:
    """Convolutions, biases, replaced tensors, ties."""
    cases = {}
    for name, variant, axis in (("bone", "bone", None), ("bat", "bat", "out")):
        adapter, base = made(f"conv-{name}", variant, {"proj": (4, 8, 8)}, axis=axis, peft=False)
        adapter.meta["modules"]["proj"]["base_shape"] = [8, 8, 1, 1]
        base["proj.weight"] = replace(base["proj.weight"], shape=(8, 8, 1, 1))
        title = f"a 1x1 convolution counts as linear ({variant})"
        cases[f"conv-{name}"] = Case(title, "7.6 10.3", [adapter], base, "refuses")

    adapter, base = made("bias", "bone", {"q": (4, 6, 8), "k": (4, 6, 8)}, peft=False, shapes=True)
    adapter.meta["modules"]["q"]["bias"] = True
    adapter.tensors["q.bias"] = noise("bias/new", "F32", 6)
    base |= {f"{m}.bias": noise(f"bias/{m}", "F32", 6) for m in "qk"}
    cases["bias"] = Case("a trained bias", "7.7 10.3", [adapter], base, "refuses")

    def headed(label: str, heads: dict[str, list[str]], **options: Any):
        adapter, base = made(label, "bone", {"layers.0.q": (4, 6, 8)}, peft=False, **options)
        adapter.meta["replaced"] = heads
        for module, leaves in heads.items():
            for leaf in leaves:
                shape = (3,) if leaf.endswith("bias") else (3, 6)
                name = f"{module}.{leaf}"
                adapter.tensors[name] = noise(f"{label}/{name}/new", "F32", *shape)
                base[name] = noise(f"{label}/{name}", options.get("dtypes", "F32 F32")[-3:], *shape)
        adapter.config = config_of(adapter.meta, True)
        return adapter, base

    adapter, base = headed("replaced", {"classifier": ["bias", "weight"]})
    adapter.config = config_of(adapter.meta, True, task_type="SEQ_CLS")
    cases["replaced"] = Case("a replaced classifier", "7.7", [adapter], base, "loads")
    heads = {"classifier": ["dense.bias", "dense.weight", "out.weight"]}
    adapter, base = headed("replaced-nested", heads)
    cases["replaced-nested"] = Case("a replaced module of two", "7.7", [adapter], base, "loads")

    adapter, base = made("replaced-rounded", "bone", {"q": (4, 6, 8)}, "F32 BF16", peft=False)
    adapter.meta["replaced"] = {"head": ["count", "weight"]}
    values = [0.1, -0.0, 2.0**-134, -(2.0**-135), 1 + 2.0**-8, 1 + 3 * 2.0**-8]
    adapter.tensors["head.weight"] = tensor("F32", (2, 3), values)
    adapter.tensors["head.count"] = Tensor("I64", (1,), (7,))
    base |= {"head.weight": noise("h", "BF16", 2, 3), "head.count": Tensor("I64", (1,), (3,))}
    adapter.config = config_of(adapter.meta, True)
    title = "replaced tensors take the base's dtype, rounded once; integers are copied"
    cases["replaced-rounded"] = Case(title, "7.7 8.4", [adapter], base, "loads")

    adapter, base = headed("replaced-added", {"score": ["weight"]})
    del base["score.weight"]
    adapter.meta["added"] = ["score"]
    title = "a new head that the base does not have"
    cases["replaced-added"] = Case(title, "7.7", [adapter], base, "loads")
    return cases | tied()


def tied() -> dict[str, Case]:
    """Embeddings, heads, and the ties between them."""
    cases, ties = {}, {"lm_head.weight": "embed.weight"}

    def add(name: str, title: str, new: dict[str, Tensor], extra: dict[str, Any], tie: bool):
        adapter, base = made(name, "bone", {"layers.0.q": (4, 6, 6)}, "F32 BF16", peft=False)
        replaced = {key.rpartition(".")[0]: ["weight"] for key in new}
        adapter.meta |= ({"replaced": replaced} if new else {}) | extra
        adapter.tensors |= new
        base["embed.weight"] = noise(f"{name}/embed", "BF16", 5, 6)
        if not tie:
            base["lm_head.weight"] = noise(f"{name}/head", "BF16", 5, 6)
        adapter.config = config_of(adapter.meta, True)
        used = ties if tie else {}
        cases[name] = Case(title, "7.7 7.8", [adapter], base, "loads", used)

    grown, one = noise("grown", "F32", 7, 6), noise("one", "BF16", 5, 6)
    rows = {"vocab_size": 7}
    both = {"embed.weight": grown, "lm_head.weight": noise("grown/head", "F32", 7, 6)}
    add("resized", "a resized embedding and its untied head", both, rows, False)
    both = {"embed.weight": grown, "lm_head.weight": grown}
    add("resized-tied", "embedding and head replaced by equal tensors stay tied", both, rows, True)
    title = "a replaced head is untied from the embedding"
    add("tied-head", title, {"lm_head.weight": one}, {}, True)
    title = "a replaced embedding alone leaves the head as it was: untied"
    add("tied-embedding", title, {"embed.weight": one}, {}, True)
    add("tied-untouched", "a tie that the adapter does not touch stays", {}, {}, True)

    adapter, base = made("tied-block", "bone", {"lm_head": (4, 8, 6)}, "F32 F32")
    base["embed.weight"] = base.pop("lm_head.weight")
    title = "a block on a tied head: the head is untied, the embedding stays"
    cases["tied-block"] = Case(title, "7.8", [adapter], base, "loads", ties)
    return cases


def strengths() -> dict[str, Case]:
    """Strength, stacking, output dtypes."""
    cases = {}
    wide = {"layers.0.q": (4, 8, 8)}
    for name, variant, axis in (("bone", "bone", None), ("bat", "bat", "out")):
        adapter, base = made(f"scale-{name}", variant, wide, axis=axis, peft=False)
        adapter.meta["scale"] = 0.1
        title = f"scale 0.1, the binary64 number ({variant})"
        cases[f"scale-{name}"] = Case(title, "4.3 5.6 7.9", [adapter], base, "refuses")
        adapter, base = made(f"strength-{name}", variant, wide, "BF16 BF16", axis=axis)
        adapter.strength = -0.75
        title = f"the caller's strength -0.75 ({variant})"
        cases[f"strength-{name}"] = Case(title, "7.9", [adapter], base, "loads")
    adapter, base = made("scale-strength", "bone", {"q": (4, 6, 8)}, peft=False, shapes=True)
    adapter.meta |= {"scale": 0.3, "replaced": {"head": ["weight"]}}
    adapter.meta["modules"]["q"]["bias"] = True
    adapter.tensors |= {"q.bias": noise("sb", "F32", 6), "head.weight": noise("sh", "F32", 2, 6)}
    base |= {"q.bias": noise("bb", "F32", 6), "head.weight": noise("bh", "F32", 2, 6)}
    adapter.strength = 0.7
    title = "scale times strength, exactly; biases and replaced tensors are not scaled"
    cases["scale-strength"] = Case(title, "7.9", [adapter], base, "refuses")

    for name, order in (("bone-bat", (0, 1)), ("bat-bone", (1, 0))):
        bone, base = made("stack", "bone", wide, "BF16 BF16")
        bat, _ = made("stack2", "bat", wide, "BF16 BF16", axis="out")
        chosen = [(bone, bat)[index] for index in order]
        title = f"a stack of two: {name.replace('-', ', then ')}; rounded once, at the end"
        cases[f"stack-{name}"] = Case(title, "7.10 8.3", chosen, base, "loads")
    first, base = made("stack-replaced", "bone", {"q": (4, 6, 8)}, "F32 BF16", peft=False)
    first.meta["replaced"] = {"gate": ["weight"]}
    first.tensors["gate.weight"] = noise("stack-replaced/gate/new", "F32", 6, 8)
    first.config = config_of(first.meta, True)
    base["gate.weight"] = noise("stack-replaced/gate", "BF16", 6, 8)
    second, _ = made("stack-replaced2", "bone", {"gate": (2, 6, 8)}, "F32 BF16")
    second.strength = 0.5
    title = "the second adapts what the first replaced, before any rounding"
    cases["stack-replaced"] = Case(title, "7.10 8.3", [first, second], base, "loads")

    for name, dtypes, cast in (
        ("f32-to-bf16", "F32 F32", "BF16"),
        ("bf16-to-f32", "BF16 BF16", "F32"),
    ):
        adapter, base = made(name, "bat", wide, dtypes, axis="out")
        base["position"] = Tensor("I64", (3,), (0, 1, 2))
        title = "another output dtype: every floating tensor, rounded once"
        cases[f"output-{name}"] = Case(title, "8.4", [adapter], base, "loads", dtype=cast)
    return cases


def roundings() -> dict[str, Case]:
    """Where rounding goes wrong when it is not done once and exactly."""
    cases = {}
    big = 2.0**127 * (2 - 2.0**-7)
    pairs = {
        "BF16": [
            (1.0, 2.0**-8),
            (1 + 2.0**-7, 2.0**-8),
            (1.0, 2.0**-8 + 2.0**-30),
            (-1.0, -(2.0**-8)),
            (1.5, -1.5),
            (-0.0, 0.0),
            (-1.0, 1.0),
            (2.0**-133, 2.0**-134),
            (2.0**-133, -(2.0**-134)),
            (2.0**-133, 2.0**-134 + 2.0**-149),
            (-(2.0**-133), 2.0**-134 + 2.0**-149),
            (big, 2.0**118),
            (2.0**-126, -(2.0**-133)),
            (3.0, 2.0**-40),
        ],
        "F16": [
            (1.0, 2.0**-11),
            (1 + 2.0**-10, 2.0**-11),
            (1.0, 2.0**-11 + 2.0**-34),
            (0.5, -0.5),
            (65504.0, 15.9990234375),
            (2.0**-24, 2.0**-25),
            (2.0**-24, -(2.0**-25)),
            (-(2.0**-24), 2.0**-25 + 2.0**-48),
            (2.0**-14, -(2.0**-24)),
            (-0.0, -0.0),
        ],
    }
    for dtype, rows in pairs.items():
        weights, blocks = zip(*rows, strict=True)
        meta = {"version": "1.0", "variant": "bone", "modules": {"q": {"rank": 1}}}
        tensors = {"q.bone_block": tensor("F32", (1, len(rows)), blocks)}
        base = {"q.weight": tensor(dtype, (len(rows), 1), weights)}
        title = "ties to even, subnormals, exact zeros, the brink of overflow"
        adapter = Adapter(meta, tensors, config_of(meta, True))
        cases[f"rounding-{dtype.lower()}"] = Case(title, "8.1 8.3", [adapter], base, "loads")
    meta = {"version": "1.0", "variant": "bat", "axis": "out", "modules": {"q": {"rank": 2}}}
    for dtype, half in (("BF16", 2.0**-9), ("F32", 2.0**-25)):
        blocks = [half, 2.0**30, 2.0**-35, -(2.0**31), half, 2.0**30, 2.0**-60, -(2.0**31)]
        block = tensor("F32", (2, 2, 2), blocks)
        weights = [1.0, 1.0, 1.0, -1.0] * 2
        base = {"q.weight": tensor(dtype, (4, 2), weights)}
        title = "a sum that float32, and float64 with two roundings, put on the wrong side"
        adapter = Adapter(meta, {"q.bone_block": block}, config_of(meta, True))
        cases[f"rounding-bat-{dtype.lower()}"] = Case(title, "8.3", [adapter], base, "loads")
    return cases


def formats() -> dict[str, Case]:
    """Fingerprints, names, optional fields, versions, files that others wrote."""
    cases = {}
    for name, variant, dtypes in (("bone", "bone", "BF16 BF16"), ("bat", "bat", "F32 F16")):
        axis = "out" if variant == "bat" else None
        pair = {"layers.1.q": (4, 8, 8), "layers.0.q": (4, 8, 8)}
        adapter, base = made(f"fingerprint-{name}", variant, pair, dtypes, axis=axis)
        adapter.meta = marked(adapter.meta, base)
        title = "the fingerprint of the base"
        cases[f"fingerprint-{name}"] = Case(title, "9", [adapter], base, "loads")

    names = ['слой.0."q"', "層.k\\v", "a b.c-d_e", "z.\U0001f9b4", "z.\uffee", "m.a/b"]
    adapter, base = made("names", "bone", dict.fromkeys(names, (2, 3, 4)))
    adapter.meta = marked(adapter.meta, base)
    title = "names of any printable characters, escaped and sorted by code points"
    cases["names"] = Case(title, "4.3 6.1 9", [adapter], base, "loads")
    for name, module in (("module", "neck.bone_proj"), ("replaced", "layers.0.q")):
        adapter, base = made(f"prefix-{name}", "bone", {module: (2, 4, 4)}, peft=False)
        if name == "replaced":
            adapter.meta["replaced"] = {"backbone_norm": ["weight"]}
            adapter.tensors["backbone_norm.weight"] = noise("pr", "F32", 4)
            base["backbone_norm.weight"] = noise("pb", "F32", 4)
        title = "a name with bone_ inside, on which PEFT's key rewriting stumbles"
        cases[f"peft-prefix-{name}"] = Case(title, "10.3", [adapter], base, "refuses")
    adapter, base = made("substring", "bone", {"layers.0.score_proj": (2, 4, 4)}, peft=False)
    adapter.config = config_of(adapter.meta, False, task_type="SEQ_CLS")
    title = "a module whose name holds one that PEFT saves whole for the task"
    cases["peft-substring-task"] = Case(title, "10.3", [adapter], base, "refuses")
    adapter, base = made("inside", "bone", {"head.q": (2, 4, 4)}, peft=False)
    adapter.meta["replaced"] = {"head": ["norm.weight"]}
    adapter.tensors["head.norm.weight"] = noise("in", "F32", 4)
    base["head.norm.weight"] = noise("ib", "F32", 4)
    title = "an adapted module inside a replaced one"
    cases["peft-substring-replaced"] = Case(title, "10.3", [adapter], base, "refuses")

    adapter, base = made("file-alone", "bat", {"q": (2, 4, 4)}, axis="in")
    adapter.config = None
    cases["file-alone"] = Case("the file without a folder", "4.1", [adapter], base, "no config")
    adapter, base = made("optional", "bone", {"q": (2, 4, 6)}, shapes=True)
    adapter.meta |= {"scale": 1, "required_features": [], "x-maker": [0.5, -2, 1e-4, None, {}]}
    adapter.meta["modules"]["q"] |= {"bias": False, "x-maker": "ignored", "base_dtype": "F32"}
    adapter.meta["info"] = {"producer": "make_vectors", "training": {"bias": "none", "r": 2}}
    adapter.config = config_of(adapter.meta, True, base_model_name_or_path="owner/name")
    title = "optional fields, defaults written out, and unknown fields to be ignored"
    cases["optional-fields"] = Case(title, "5 12", [adapter], base, "loads")
    adapter, base = made("minor", "bone", {"q": (2, 4, 6)})
    adapter.meta |= {"version": "1.7", "hindsight": True}
    title = "a higher minor version that requires no feature"
    cases["higher-minor"] = Case(title, "12", [adapter], base, "loads")
    adapter, base = made("other-writer", "bone", {"q": (2, 4, 6), "k": (2, 4, 6)})
    adapter.texts = {"format": "pt"}
    title = "metadata of another writer beside ours"
    cases["other-metadata"] = Case(title, "4.4", [adapter], base, "loads")
    return cases
