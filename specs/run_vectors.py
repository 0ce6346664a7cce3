# Checks the Bone Adapter 1.0 vectors by the text alone: python specs/run_vectors.py [--json]
import json
import re
import sys
from collections import namedtuple
from fractions import Fraction
from pathlib import Path

import numpy as np
from blake3 import blake3

NUMPY = dict(F64="<f8", F32="<f4", F16="<f2", BF16="<u2", I64="<i8", I32="<i4", U8="u1", BOOL="u1")
BITS = dict(F64=(53, -1074, 1024), F32=(24, -149, 128), F16=(11, -24, 16), BF16=(8, -133, 128))
N, S, L = r"[1-9]\d{0,8}", r'"(?:[^"\\]|\\.)*"', r'\["(?:[^"\\]|\\.)*"(?:,"(?:[^"\\]|\\.)*")*\]'
TOP = dict(variant='"(bone|bat|mini)"', modules=r"\{.+\}", axis='"(out|in)"', info=r"\{.*\}",
           fingerprint='"blake3-1m:[0-9a-f]{64}"', replaced=rf"\{{{S}:{L}(,{S}:{L})*\}}", added=L,
           scale=r"-?[0-9.]+", vocab_size=N)
MODULE = dict(rank=N, mini_rank=N, bias="true|false", base_shape=rf"\[{N},{N}(,1,1)?\]",
              base_dtype='"(F64|F32|F16|BF16)"', base_digest='"[0-9a-f]{64}"')  # JSON patterns
ENTRY = r'\{"data_offsets":\[\d+,\d+\],"dtype":"\w+","shape":\[(\d+(,\d+)*)?\]\}'
NAME = r"((?!(_orig_mod|_fsdp_wrapped_module|base_layer)(\.|$))[^.\x00-\x1f\x7f-\x9f]+(\.(?!$)|$))+"
FREE = dict(auto_mapping=r"null|\{.*\}", inference_mode="true|false",
            **dict.fromkeys(("base_model_name_or_path", "revision", "task_type"), f"null|{S}"))
HEADS = {"classifier", "score", "qa_outputs"}
PREFIX, Tensor = "base_model.model.", namedtuple("Tensor", "dtype shape data")
Broken, exact = type("Broken", (Exception,), {}), np.frompyfunc(Fraction, 1, 1)
dump = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode

def check(*rules):
    if broken := {rule for rule, holds in rules if not holds}:
        raise Broken(" ".join(sorted(broken)))

def parse(text, rule):  # strict JSON
    bare = re.sub(rb'"(?:[^"\\]|\\.)*"|[^][{}"]', b"", text)
    deep = np.cumsum([1 if c in b"[{" else -1 for c in bare]).max(initial=0)
    check((rule, text[:1] == b"{" and deep <= 16))
    try:
        value = json.loads(
            text.decode(), parse_constant=lambda _: check((rule, False)),
            object_pairs_hook=lambda p: check((rule, len(dict(p)) == len(p))) or dict(p),
            parse_int=lambda t: check((rule, abs(int(t)) < 2**53)) or int(t),
            parse_float=lambda t: check((rule, "e" not in t.lower() and float(t) % 1)) or float(t))
        return dump(value).encode() and value  # a lone surrogate is a ValueError
    except ValueError as error:
        raise Broken(rule) from error

def read(data):  # a safetensors file
    size, tensors, spans = int.from_bytes(data[:8], "little"), {}, []
    check(("R01", len(data) >= 8 and size <= min(100_000_000, len(data) - 8)))
    header, body = parse(data[8 : 8 + size], "R02"), data[8 + size :]
    texts = header.pop("__metadata__", {})
    check(("R03", type(texts) is dict and {*map(type, texts.values())} <= {str}))
    for name, entry in header.items():
        check(("R03", re.fullmatch(ENTRY, dump(entry)) and entry["dtype"] in NUMPY))
        (begin, end), shape, dtype = entry["data_offsets"], tuple(entry["shape"]), entry["dtype"]
        check(("R03", end - begin == np.prod(shape, dtype=object) * int(NUMPY[dtype][-1])))
        tensors[name], spans = Tensor(dtype, shape, body[begin:end]), sorted([*spans, (begin, end)])
    check(("R04", [0, *(end for _, end in spans)] == [*(begin for begin, _ in spans), len(body)]))
    return tensors, texts

def faults(value, fields, *required):
    value = value if type(value) is dict else dict.fromkeys(fields)
    yield from (("R10", name in value) for name in required)
    yield from (("R11", re.fullmatch(fields[n], dump(value[n]), 16)) for n in value if n in fields)

def fits(meta, entry, block, out=0, inside=0, *_):  # 0: not known
    rank, width = entry["rank"], entry.get("mini_rank", out or (*block, 0, 0)[1])
    if meta["variant"] == "bat":
        along, across = (out, inside) if meta["axis"] == "out" else (inside, out)
        return block[1:] == (rank, rank) and along in (0, block[0] * rank) and across % rank == 0
    return block == (rank, width) and out % width == 0

def load(folder):  # each check is a stage: the first one with broken rules ends the validation
    file, texts = read((folder / "adapter_model.safetensors").read_bytes())
    check(("R05", "bone_adapter" in texts))
    meta = parse(texts["bone_adapter"].encode(), "R06")
    check(("R07", dump(meta) == texts["bone_adapter"]))
    check(("R08", re.fullmatch(r'"1\.(0|[1-9][0-9]{0,8})"', dump(meta.get("version")))),
          ("R09", meta.get("required_features", []) == []))  # 1.0 knows no feature
    check(*faults(meta, TOP, "variant", "modules"))
    variant, modules, added = meta["variant"], meta["modules"], {*meta.get("added", ())}
    entries, replaced = modules.values(), meta.get("replaced", {})
    check(*(fault for entry in entries for fault in faults(entry, MODULE, "rank")))
    leaves = [f"{m}.{leaf}" for m in replaced for leaf in replaced[m]]
    taken = {m + leaf for m in modules for leaf in (".weight", ".bias", ".bone_block")}
    keys, marked = ("base_dtype", "base_shape", "base_digest"), "fingerprint" in meta
    full = all({*keys} <= e.keys() if marked else keys[2] not in e for e in entries)
    lines = dump(sorted([f"{m}.weight", *map(e.get, keys)] for m, e in modules.items()))
    root = "blake3-1m:" + blake3(f"bone-adapter root 1\n{lines}".encode()).hexdigest()
    check(("R12", ("axis" in meta) == (variant == "bat")),
          ("R12", all(("mini_rank" in e) == (variant == "mini") for e in entries)),
          ("R13", all(re.fullmatch(NAME, n) and len(n) <= 512 for n in [*modules, *leaves])),
          ("R14", len({*leaves} - taken) == len(leaves) and added <= {*replaced}),
          ("R15", full), ("R16", not (marked and full) or meta["fingerprint"] == root))
    blocks = {f"{PREFIX}{m}.bone_block": e for m, e in modules.items()}
    biases = {f"{PREFIX}{m}.bias": e for m, e in modules.items() if e.get("bias")}
    own, saved = {**blocks, **biases}, {PREFIX + leaf for leaf in leaves}
    rows = [(*file[name].shape, 0)[0] for name in saved & {*file}]
    rules = [("R17", {*own} | saved <= {*file}), ("R18", {*own} | saved >= {*file}),
             ("R22", meta.get("vocab_size", 0) in [0, *rows])]
    for name, (dtype, shape, _) in file.items():
        e, size = own.get(name, {}), own.get(name, {}).get("base_shape", ())
        rules += [("R19", dtype in [*BITS][name in blocks :] or name not in own),
                  ("R20", name not in blocks or (0 not in shape and fits(meta, e, shape, *size))),
                  ("R21", name not in biases or [*shape] == size[:1]),
                  ("R23", dtype not in BITS or np.isfinite(values(file[name])).all())]
    if (path := folder / "adapter_config.json").exists():
        config, ranks = parse(path.read_bytes(), "R24"), sorted({e["rank"] for e in entries})
        kind, task = config.pop("peft_type", None), config.get("task_type")
        check(("R25", kind in ("BONE", "BONE_ADAPTER")))
        says = {**dict.fromkeys(("exclude_modules", "layers_pattern", "layers_to_transform")),
                "target_modules": sorted(modules), "modules_to_save": sorted(replaced) or None,
                "init_weights": variant == "bone" or variant, "r": ranks[-1], "bias": "none"}
        names = {*replaced} | (HEADS if task in ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS") else set())
        wrong = [{variant, meta.get("axis")} & {"mini", "in"}, meta.get("scale", 1) != 1, ranks[1:],
                 *(e.get("bias") or len(e.get("base_shape", ())) == 4 for e in entries),
                 *("bone_" in name.removesuffix("bone_block") for name in file),
                 *(sum(map(name.count, names)) != (name in saved) for name in file),
                 *(f".{m}." in f".{leaf}" for m in modules for leaf in leaves)]
        bound = {name: config[name] for name in config.keys() - FREE.keys()}
        rules += [("R26", dump(bound) == dump(says if kind == "BONE" else {})),
                  *(("R26", holds) for _, holds in faults(config, FREE)),
                  ("R27", kind != "BONE" or not any(wrong))]
    check(*rules)
    return meta, {name.removeprefix(PREFIX): tensor for name, tensor in file.items()}

def digest(dtype, shape, data):
    leaves = [blake3(data[at : at + 2**20]).digest() for at in range(0, len(data), 2**20)]
    head = f"bone-adapter tensor 1\n{dtype}\n{dump(shape)}\n{len(leaves)}\n"
    return blake3(head.encode() + b"".join(leaves)).hexdigest()

def values(tensor):  # as float64, exactly
    raw = np.frombuffer(tensor.data, NUMPY[tensor.dtype]).reshape(tensor.shape)
    return ((raw.astype("u4") << 16).view("f4") if tensor.dtype == "BF16" else raw).astype("f8")

def rounded(x, dtype):
    (bits, least, top), size = BITS[dtype], abs(Fraction(x))  # the table of section 8.1
    power = size.numerator.bit_length() - size.denominator.bit_length()
    unit = Fraction(2) ** max(power - (size < Fraction(2) ** power) - bits + 1, least)
    result = round(size / unit) * unit  # halves to even
    return check(("R31", result < 2**top)) or np.copysign(float(result), float(x))

def stored(t, dtype):
    if isinstance(t, Tensor) and (dtype == t.dtype or t.dtype not in BITS):
        return t
    flat = [rounded(x, dtype) for x in (values(t) if isinstance(t, Tensor) else t).flat]
    flat = np.array(flat).astype("f4").view("u4") >> 16 if dtype == "BF16" else np.array(flat)
    return Tensor(dtype, t.shape, flat.astype(NUMPY[dtype]).tobytes())

def merge(base, adapters, ties, cast):
    state = dict(start := base | {alias: base[name] for alias, name in ties.items()})
    for (meta, tensors), strength in adapters:
        scale, modules = Fraction(meta.get("scale", 1)) * Fraction(strength), meta["modules"]
        added = {f"{m}.{leaf}" for m in meta.get("added", ()) for leaf in meta["replaced"][m]}
        copied = tensors.keys() - {f"{m}.bone_block" for m in modules}
        check(("R28", {f"{m}.weight" for m in modules} | copied - added <= start.keys()))
        for new, old in ((tensors[name], start[name]) for name in copied & start.keys()):
            check(("R29", new.shape in (old.shape, (meta.get("vocab_size"), *old.shape[1:]))),
                  ("R29", (new.dtype in BITS) == (old.dtype in BITS)))
        for m, e in modules.items():
            w, block, r = start[f"{m}.weight"], tensors[f"{m}.bone_block"], e["rank"]
            size = e.get("base_shape", [*w.shape[:2]])
            check(("R29", [*w.shape] == size and size[1:] and fits(meta, e, block.shape, *size)))
            check(("R29", w.dtype in BITS), ("R30", e.get("base_digest") in (None, digest(*w))),
                  ("R31", np.isfinite(values(w)).all()))
            w, b, (out, inside) = state[f"{m}.weight"], exact(values(block)), size[:2]
            w = exact(values(w)) if isinstance(w, Tensor) else w
            if meta["variant"] == "bat":
                tiles = w.reshape(out // r, r, inside // r, r).swapaxes(1, 2)
                b = b[:, None] if meta["axis"] == "out" else b
                change = (tiles @ b + b).swapaxes(1, 2)
            else:
                change = b[np.arange(inside) % r][:, np.arange(out) % b.shape[1]].T
            state[f"{m}.weight"] = w + scale * change.reshape(w.shape)
        state |= {name: tensors[name] for name in copied}
    result = {n: stored(t, cast or start.get(n, t).dtype) for n, t in state.items()}
    return {n: t for n, t in result.items() if n not in ties or t != result[ties[n]]}

def main():
    folder, results = Path(__file__).parent / "vectors", {}
    for path in sorted(folder.glob("*/*/case.json")):
        case, name = json.loads(path.read_bytes()), str(path.parent.relative_to(folder))
        files = [path.parent / case[key] for key in ("base", "expected") if key in case]
        try:
            adapters = [(load(path.parent / a["path"]), a["strength"]) for a in case["adapters"]]
            base, *expected = [read(file.read_bytes())[0] for file in files] or [None]
            merged = base and merge(base, adapters, case.get("ties", {}), case.get("dtype"))
            results[name] = "rule" not in case and [merged] == expected
        except Broken as broken:
            results[name] = str(broken) == case.get("rule")
    for case in json.loads((folder / "digests.json").read_bytes()):
        data = bytes(i % 251 for i in range(case["bytes"]))
        results[case["name"]] = digest(case["dtype"], case["shape"], data) == case["digest"]
    text = "\n".join(f"{'ok  ' if good else 'FAIL'} {name}" for name, good in results.items())
    count = f"{sum(results.values())} of {len(results)} passed"
    print(dump(results) if "--json" in sys.argv else f"{text}\n{count}")
    return not all(results.values())

if __name__ == "__main__":
    sys.exit(main())
