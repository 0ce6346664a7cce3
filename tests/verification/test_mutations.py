"""Ways to spoil a merged checkpoint: each is caught, and named where a diagnosis is promised."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import boneconv
from boneconv.verification import Report, verify
from boneconv.verification.report import Severity, Status
from tests.builders import BF16, F16, F32, F64, Array
from tests.verification import models
from tests.verification.models import DOWN, UP, Case, Q, make_case, rewrite, to, weight_name

FILES = {"tokenizer.json": '{"model": {}}', "tokenizer_config.json": "{}"}
CONFIG = {"model_type": "x", "vocab_size": models.VOCABULARY, "tie_word_embeddings": False}
Q1 = weight_name(1, Q)
UP1 = weight_name(1, UP)


@dataclass(frozen=True)
class Mutation:
    """A way to spoil a merge.

    Attributes:
        spoil: Makes the spoiled candidate.
        code: The finding that must name it; None where being caught is enough.
        tensors: The tensors that must fail, all and only these; None where files alone fail.
        variant: The adapter's variant.
        dtype: The base's dtype.
        text: What the report must say of one of the tensors.
    """

    spoil: Callable[[Case], Path]
    code: str | None = None
    tensors: tuple[str, ...] | None = None
    variant: str = "bat"
    dtype: Any = BF16
    text: str = ""


def spoiled(change: Callable[[dict[str, Array], Case], None]) -> Callable[[Case], Path]:
    """A candidate whose tensors were changed."""

    def spoil(case: Case) -> Path:
        tensors = {name: tensor.copy() for name, tensor in case.merged().items()}
        change(tensors, case)
        return case.write(tensors)

    return spoil


def canonical(change: Callable[[Path], None]) -> Callable[[Case], Path]:
    """A real merge with its record, changed on disk."""

    def spoil(case: Case) -> Path:
        place = case.root / "merged"
        boneconv.merge(case.base, case.adapter, place)
        change(place)
        return place

    return spoil


def on_disk(change: Callable[[Path], None]) -> Callable[[Case], Path]:
    """Another tool's honest merge, with the base's files, changed on disk."""

    def spoil(case: Case) -> Path:
        place = case.write(case.merged(), files=FILES, config=CONFIG)
        change(place)
        return place

    return spoil


def bump(array: Array, index: int) -> None:
    """One element to the next number away from zero."""
    bits = array.view(f"u{array.dtype.itemsize}").reshape(-1)
    bits[index] += 1


def safe_index(case: Case, name: str) -> int:
    """An element whose exact value is nowhere near a midpoint: a quarter ULP from the rounded."""
    exact = models.merged(
        case.weights[name], case.blocks[name.removesuffix(".weight")], case.variant
    )
    nearest = to(exact, case.dtype)
    above = nearest.copy()
    above.view(f"u{nearest.dtype.itemsize}")[...] += 1
    ulp = np.abs(above.astype(F64) - nearest.astype(F64))
    distance = np.abs(exact - nearest.astype(F64)) / ulp
    return int(np.argmin(distance.reshape(-1)))


def one_ulp(tensors: dict[str, Array], case: Case) -> None:
    bump(tensors[Q1], safe_index(case, Q1))


def of_all(merge: Callable[[Case, Array, Array], Array]) -> Callable[[Case], Path]:
    """A candidate all of whose merged weights come from another computation, in float64."""
    return lambda case: case.write(case.each(lambda w, b: to(merge(case, w, b), case.dtype)))


def of_one(merge: Callable[[Case, Array, Array], Array], name: str = Q1) -> Callable[[Case], Path]:
    def change(tensors: dict[str, Array], case: Case) -> None:
        block = case.blocks[name.removesuffix(".weight")]
        tensors[name] = to(merge(case, case.weights[name], block), case.dtype)

    return spoiled(change)


def wide(case: Case, weight: Array, block: Array, scale: float = 1.0) -> Array:
    return models.merged(weight, block, case.variant, scale)


def twice(case: Case, weight: Array, block: Array) -> Array:
    once = wide(case, weight, block)
    return models.merged(once, block, case.variant)


def other_axis(case: Case, weight: Array, block: Array) -> Array:
    if weight.shape[0] != weight.shape[1]:
        return wide(case, weight, block)
    w = weight.astype(F64)
    return np.asarray(w + models.bat_delta(w, block.astype(F64), "in"))


def cut_rank(case: Case, weight: Array, block: Array) -> Array:
    kept = block.copy()
    if case.variant == "bat":
        kept[:, 5:] = 0
    else:
        kept[5:] = 0
    return wide(case, weight, kept)


def peft(case: Case, weight: Array, block: Array) -> Array:
    """As PEFT does on a CPU: the update in float32, rounded, then added and rounded."""
    w = weight.astype(F32)
    update = models.delta(w, block.astype(F32), case.variant).astype(case.dtype)
    return np.asarray((w + update.astype(F32)).astype(case.dtype).astype(F64))


def without_product(case: Case, weight: Array, block: Array) -> Array:
    zero = np.zeros_like(weight, F64)
    return np.asarray(weight.astype(F64) + models.delta(zero, block.astype(F64), "bat"))


def stale_rows(tensors: dict[str, Array], case: Case) -> None:
    tensors[UP1][32:] = case.weights[UP1][32:]


def exchange(tensors: dict[str, Array], case: Case) -> None:
    names = weight_name(0, Q), weight_name(2, Q)
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]


def drop_layer(tensors: dict[str, Array], case: Case) -> None:
    for name in list(tensors):
        if name.startswith("model.layers.2."):
            del tensors[name]


def old_layer(tensors: dict[str, Array], case: Case) -> None:
    for module in models.SHAPES:
        tensors[weight_name(1, module)] = case.weights[weight_name(1, module)]


def put(name: str, value: Callable[[Array], Array]) -> Callable[[Case], Path]:
    return spoiled(lambda tensors, case: tensors.update({name: value(tensors[name])}))


def not_a_number(array: Array) -> Array:
    array[3, 3] = np.nan
    return array


def bumped(array: Array) -> Array:
    bump(array, 5)
    return array


def renamed(tensors: dict[str, Array], case: Case) -> None:
    tensors["model.layers.1.self_attn.query.weight"] = tensors.pop(Q1)


def stale_shard(case: Case) -> Path:
    place = case.write(case.merged())
    name = "model-00002-of-00002.safetensors"
    shutil.copyfile(case.base / name, place / name)
    return place


def other_base(case: Case) -> Path:
    other = models.base_tensors(case.dtype, seed=99)
    tensors = dict(other)
    for module, block in case.blocks.items():
        name = f"{module}.weight"
        tensors[name] = to(models.merged(other[name], block, case.variant), case.dtype)
    tensors["model.position_ids"] = case.weights["model.position_ids"]
    return case.write(tensors)


def other_adapter(case: Case) -> Path:
    other = models.adapter_blocks(case.variant, seed=99)
    tensors = dict(case.weights)
    for module, block in other.items():
        name = f"{module}.weight"
        tensors[name] = to(models.merged(case.weights[name], block, case.variant), case.dtype)
    return case.write(tensors)


def rounded_block(case: Case, weight: Array, block: Array) -> Array:
    return wide(case, weight, block.astype(case.dtype))


def through_half(case: Case, weight: Array, block: Array) -> Array:
    return wide(case, weight, block).astype(F16).astype(F64)


def delete(name: str) -> Callable[[Path], None]:
    return lambda place: (place / name).unlink()


def delete_tokenizer(place: Path) -> None:
    for name in FILES:
        (place / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def change(place: Path) -> None:
        (place / name).write_text(text)

    return change


def stale_file(place: Path) -> None:
    shutil.copyfile(place / "model-00001-of-00002.safetensors", place / "model.safetensors")


def truncate(place: Path) -> None:
    file = place / "model-00001-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def wrong_index(place: Path) -> None:
    path = place / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"][Q1] = "model-00002-of-00002.safetensors"
    index["weight_map"][weight_name(2, DOWN)] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))


def negative_zero(place: Path) -> None:
    file = place / "model-00002-of-00002.safetensors"

    def change(tensors: dict[str, Array]) -> None:
        bits = tensors[weight_name(2, Q)].view(np.uint16).reshape(-1)
        bits[0] ^= 1

    rewrite(file, change)


MERGED = tuple(weight_name(layer, m) for layer in range(models.LAYERS) for m in models.SHAPES)
SQUARE = tuple(weight_name(layer, Q) for layer in range(models.LAYERS))
LAYER1 = tuple(weight_name(1, module) for module in models.SHAPES)

TABLE = {
    "one element by one ULP": Mutation(spoiled(one_ulp), "elements-differ", (Q1,)),
    "one element by one ULP, Bone": Mutation(
        spoiled(one_ulp), "elements-differ", (Q1,), variant="bone"
    ),
    "one element by one ULP, float16": Mutation(
        spoiled(one_ulp), "elements-differ", (Q1,), dtype=F16
    ),
    "one bit of a canonical merge": Mutation(
        canonical(negative_zero), "elements-differ", (weight_name(2, Q),)
    ),
    "one weight not merged": Mutation(
        of_one(lambda case, w, b: w.astype(F64)), "not-applied", (Q1,), text="equals the base"
    ),
    "nothing merged": Mutation(
        lambda case: case.write(case.weights), "not-applied", MERGED, text="equals the base"
    ),
    "a layer not merged": Mutation(spoiled(old_layer), "not-applied", LAYER1),
    "applied twice": Mutation(of_all(twice), "applied-twice", MERGED),
    "applied twice, Bone": Mutation(of_all(twice), "applied-twice", MERGED, variant="bone"),
    "over the wrong axis": Mutation(of_all(other_axis), "wrong-axis", SQUARE),
    "another base": Mutation(other_base, "wrong-base"),
    "another base, Bone": Mutation(other_base, "wrong-base", variant="bone"),
    "another adapter": Mutation(other_adapter, "wrong-adapter", MERGED),
    "another adapter, Bone": Mutation(other_adapter, "wrong-adapter", MERGED, variant="bone"),
    "a layer missing": Mutation(spoiled(drop_layer), "layer-missing"),
    "a tensor missing": Mutation(
        spoiled(lambda tensors, case: tensors.pop(Q1) is None), "tensor-missing", (Q1,)
    ),
    "a tensor under another name": Mutation(spoiled(renamed), "tensor-extra"),
    "a tensor too many": Mutation(
        spoiled(lambda t, case: t.update({"extra.weight": t[Q1]})), "tensor-extra"
    ),
    "transposed, square": Mutation(
        put(Q1, lambda a: np.ascontiguousarray(a.T)), "transposed", (Q1,)
    ),
    "transposed, not square": Mutation(
        put(UP1, lambda a: np.ascontiguousarray(a.T)), "transposed", (UP1,)
    ),
    "a truncated rank, Bone": Mutation(
        of_all(cut_rank), "truncated-rank", MERGED, variant="bone", text="from 8 to 5"
    ),
    "a truncated rank, BAT": Mutation(
        of_all(cut_rank), "truncated-rank", MERGED, text="from 8 to 5"
    ),
    "a truncated rank, mini": Mutation(
        of_all(cut_rank), "truncated-rank", MERGED, variant="mini", text="from 8 to 5"
    ),
    "a stale shard": Mutation(stale_shard, "stale-shard"),
    "half the strength": Mutation(
        of_all(lambda case, w, b: wide(case, w, b, 0.5)), "wrong-scale", MERGED, text="scale 0.5"
    ),
    "subtracted": Mutation(
        of_all(lambda case, w, b: wide(case, w, b, -1.0)), "wrong-scale", MERGED, text="scale -1"
    ),
    "BAT without its product": Mutation(of_all(without_product), "wrong-variant", MERGED),
    "blocks transposed": Mutation(
        of_all(lambda case, w, b: wide(case, w, b.transpose(0, 2, 1))), "transposed-block", MERGED
    ),
    "PEFT's double rounding": Mutation(of_all(peft), "double-rounding", MERGED, text="PEFT"),
    "PEFT's double rounding, float16": Mutation(
        of_all(peft), "double-rounding", MERGED, dtype=F16, text="PEFT"
    ),
    "the adapter rounded first": Mutation(
        of_all(rounded_block), "double-rounding", variant="bone", text="PEFT"
    ),
    "through float16": Mutation(
        of_all(through_half), "double-rounding", MERGED, dtype=F32, text="float16 on the way"
    ),
    "two weights exchanged": Mutation(
        spoiled(exchange), "swapped", (weight_name(0, Q), weight_name(2, Q)), text="layers."
    ),
    "a part not merged": Mutation(spoiled(stale_rows), "partly-applied", (UP1,)),
    "a weight of zeros": Mutation(put(Q1, np.zeros_like), "zeroed", (Q1,)),
    "a NaN": Mutation(put(Q1, not_a_number), "not-finite", (Q1,)),
    "another dtype": Mutation(put(Q1, lambda a: a.astype(F16)), None, (Q1,)),
    "an untouched tensor by one ULP": Mutation(
        put("model.norm.weight", bumped), None, ("model.norm.weight",)
    ),
    "an untouched tensor of integers": Mutation(
        put("model.position_ids", bumped), None, ("model.position_ids",)
    ),
    "an index that points to the wrong shards": Mutation(on_disk(wrong_index)),
    "a shard missing": Mutation(on_disk(delete("model-00002-of-00002.safetensors"))),
    "a truncated shard": Mutation(on_disk(truncate)),
    "a stale file of weights": Mutation(on_disk(stale_file)),
    "an adapter_config.json left behind": Mutation(on_disk(write("adapter_config.json", "{}"))),
    "no tokenizer": Mutation(on_disk(delete_tokenizer)),
    "another tokenizer": Mutation(on_disk(write("tokenizer.json", '{"model": 1}'))),
    "a configuration that ties again": Mutation(
        on_disk(lambda place: models.edit_json(place / "config.json", tie_word_embeddings=True))
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_a_spoiled_checkpoint_is_caught_and_named(name: str, tmp_path: Path) -> None:
    mutation = TABLE[name]
    case = make_case(tmp_path, mutation.variant, mutation.dtype, files=FILES, config=CONFIG)
    candidate = mutation.spoil(case)
    if not (candidate / "config.json").exists():
        for file in ("config.json", *FILES):
            shutil.copyfile(case.base / file, candidate / file)
    report = verify(case.base, case.adapter, candidate, workers=1)
    assert not report.passed
    if mutation.code is not None:
        assert mutation.code in {f.code for f in report.findings if f.severity is Severity.ERROR}
        assert any(mutation.text in (t.diagnosis or "") for t in report.failures) or (
            not mutation.text
        )
        _check_named(report, mutation)
    if mutation.tensors is not None:
        assert {tensor.name for tensor in report.failures} == set(mutation.tensors)
    elif mutation.code is None:
        assert any(file.status is Status.FAIL and file.reason for file in report.files)


def _check_named(report: Report, mutation: Mutation) -> None:
    """The finding is about the tensors that fail, and no other diagnosis contradicts it."""
    finding = next(f for f in report.findings if f.code == mutation.code)
    assert finding.message
    assert set(finding.tensors) <= {tensor.name for tensor in report.failures}
    if mutation.tensors is not None:
        assert set(finding.tensors) == set(mutation.tensors)
        assert {f.code for f in report.findings if f.severity is Severity.ERROR} == {mutation.code}


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 40


def test_the_honest_merge_passes(tmp_path: Path) -> None:
    """What the table spoils is right before."""
    for number, (variant, dtype) in enumerate(
        (variant, dtype) for variant in ("bone", "bat", "mini") for dtype in (BF16, F16, F32)
    ):
        case = make_case(tmp_path / str(number), variant, dtype, files=FILES, config=CONFIG)
        candidate = case.write(case.merged(), files=FILES, config=CONFIG)
        report = verify(case.base, case.adapter, candidate, workers=1)
        assert report.passed, report.findings
        assert report.totals.share_correct == 1.0


def test_pefts_rounding_passes_when_it_is_allowed(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    candidate = case.write(case.each(lambda w, b: to(peft(case, w, b), case.dtype)))
    assert not verify(case.base, case.adapter, candidate, workers=1).passed
    report = verify(case.base, case.adapter, candidate, tolerance="peft", workers=1)
    assert report.passed
    assert report.totals.share_correct is not None
    assert 0.6 < report.totals.share_correct < 0.9
    for tensor in report.tensors:  # a few ULP of the largest numbers: nearer zero, ULPs are smaller
        assert tensor.relative_frobenius is None or tensor.relative_frobenius < 2**-7


def test_pefts_tolerance_lets_no_other_mistake_pass(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    tensors = case.each(lambda w, b: to(peft(case, w, b), case.dtype))
    bits = tensors[Q1].view(np.uint16).reshape(-1)
    bits[safe_index(case, Q1)] += 3
    report = verify(case.base, case.adapter, case.write(tensors), tolerance="peft", workers=1)
    assert [tensor.name for tensor in report.failures] == [Q1]


def test_several_adapters_all_count_and_in_their_order(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    other = models.adapter_blocks("bat", seed=5)
    second = models.make_adapter(tmp_path / "second", "bat", rank=models.RANK, blocks=other)
    boneconv.merge(case.base, case.adapter, tmp_path / "both", more=[second])
    boneconv.merge(case.base, second, tmp_path / "reversed", more=[case.adapter])
    boneconv.merge(case.base, case.adapter, tmp_path / "first")
    for name, code in (("both", None), ("reversed", "wrong-order"), ("first", "adapter-missing")):
        (tmp_path / name / "boneconv.json").unlink()
        report = verify(case.base, case.adapter, tmp_path / name, more=[second], workers=1)
        codes = {finding.code for finding in report.findings}
        assert codes == ({code} if code else set())
        assert report.passed == (code is None)


def test_a_saved_module_that_was_not_put_in_place(tmp_path: Path) -> None:
    embedding = models.values(np.random.default_rng(4), (models.VOCABULARY, models.HIDDEN), 1, F32)
    name = "model.embed_tokens.weight"
    case = make_case(tmp_path, saved={name: embedding})
    tensors = case.merged() | {name: case.weights[name]}
    report = verify(case.base, case.adapter, case.write(tensors), workers=1)
    (failure,) = report.failures
    assert (failure.name, failure.code) == (name, "not-replaced")
    tensors[name] = embedding.astype(BF16)
    assert verify(case.base, case.adapter, case.write(tensors), workers=1).passed


def test_ml_dtypes_rounds_as_the_reference_does() -> None:
    """The table's own rounding, against single steps of the library."""
    exact = np.array([1 + 2**-8, 1 + 2**-8 + 2**-40, 1 + 3 * 2**-8, -1 - 2**-8])
    assert to(exact, BF16).astype(F64).tolist() == [1.0, 1 + 2**-7, 1 + 2**-6, -1.0]
    assert np.dtype(ml_dtypes.bfloat16) == BF16
