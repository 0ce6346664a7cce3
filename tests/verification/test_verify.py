"""`verify` on checkpoints and files: what is assumed, what is said, which files count."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import boneconv
from boneconv.errors import FormatError, MissingPathError, NonFiniteError, UsageError
from boneconv.verification import verify
from boneconv.verification.report import CandidateKind, Severity, Status, TensorAction
from tests.builders import BF16, F16, F32, make_adapter, make_base, pack
from tests.progress import Told
from tests.verification import models
from tests.verification.models import edit_json, make_case, rewrite, to, weight_name

Q1 = weight_name(1, models.Q)
CONFIG = {
    "model_type": "x",
    "architectures": ["X"],
    "vocab_size": models.VOCABULARY,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "rope": {"theta": 1.0},
}
FILES = {
    "tokenizer.json": '{"model": {}}',
    "tokenizer_config.json": "{}",
    "generation_config.json": "{}",
    "special_tokens_map.json": "{}",
    "modeling_x.py": "x = 1\n",
    "README.md": "# base\n",
}


def test_a_canonical_merge_passes_and_is_known_as_one(tmp_path: Path) -> None:
    case = make_case(tmp_path, files=FILES, config=CONFIG)
    boneconv.merge(case.base, case.adapter, tmp_path / "out")
    report = verify(case.base, case.adapter, tmp_path / "out", workers=1)
    assert report.passed
    assert (report.kind, report.numerics, report.tolerance) == (
        CandidateKind.CHECKPOINT,
        "canonical",
        "canonical",
    )
    assert report.totals.identical == report.totals.tensors == len(report.tensors)
    assert report.findings == ()
    assert {file.name for file in report.files} == {
        *(FILES.keys() - {"README.md"}),
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    }


def test_every_tensor_says_where_it_stands_and_how_far_it_moved(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    report = verify(case.base, case.adapter, case.write(case.merged()), workers=1)
    tensor = next(tensor for tensor in report.tensors if tensor.name == Q1)
    old, new = case.weights[Q1].astype(F32), case.merged()[Q1].astype(F32)
    assert tensor.update_norm == pytest.approx(
        np.linalg.norm(new - old) / np.linalg.norm(old), rel=1e-4
    )
    assert (tensor.action, tensor.module, tensor.layer, tensor.kind) == (
        TensorAction.MERGE,
        "model.layers.1.self_attn.q_proj",
        1,
        "q_proj",
    )
    assert (tensor.share_correct, tensor.max_ulp, tensor.cosine) == (1.0, 0.0, 1.0)


def test_the_numbers_are_those_of_the_arrays(tmp_path: Path) -> None:
    case = make_case(tmp_path, dtype=F32)
    right = case.merged()
    wrong = {name: tensor.copy() for name, tensor in right.items()}
    wrong[Q1] += (0.001 * np.random.default_rng(0).standard_normal(wrong[Q1].shape)).astype(F32)
    report = verify(case.base, case.adapter, case.write(wrong), workers=1)
    (found,) = report.failures
    k, c, w = (t[Q1].astype(float) for t in (right, wrong, case.weights))
    steps = np.abs(_order(wrong[Q1]) - _order(right[Q1]))
    assert found.max_abs == np.abs(c - k).max()
    assert found.relative_frobenius == pytest.approx(np.linalg.norm(c - k) / np.linalg.norm(k))
    assert found.cosine == pytest.approx(
        np.sum((c - w) * (k - w)) / np.linalg.norm(c - w) / np.linalg.norm(k - w)
    )
    assert (found.max_ulp, found.mean_ulp) == (steps.max(), pytest.approx(steps.mean()))
    assert found.share_correct == np.mean(steps == 0)


def _order(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.int32).astype(np.int64)
    return np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


def test_the_number_of_workers_changes_nothing(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    tensors = case.merged() | {Q1: case.weights[Q1]}
    candidate = case.write(tensors)
    assert verify(case.base, case.adapter, candidate, workers=1) == verify(
        case.base, case.adapter, candidate, workers=3
    )


def test_the_scale_is_taken_from_the_record_and_said(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    boneconv.merge(case.base, case.adapter, tmp_path / "out", scale=0.5)
    report = verify(case.base, case.adapter, tmp_path / "out", workers=1)
    assert report.passed
    assert report.scale == 0.5
    assert [(f.severity, f.code) for f in report.findings] == [(Severity.NOTE, "assumed-scale")]
    told = verify(case.base, case.adapter, tmp_path / "out", scale=1.0, workers=1)
    assert {finding.code for finding in told.findings} == {"record-differs", "wrong-scale"}


def test_a_record_of_another_adapter_is_told(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    boneconv.merge(case.base, case.adapter, tmp_path / "out")
    edit = json.loads((tmp_path / "out" / "boneconv.json").read_text())
    edit["adapters"][0]["blake3"] = "0" * 64
    (tmp_path / "out" / "boneconv.json").write_text(json.dumps(edit))
    report = verify(case.base, case.adapter, tmp_path / "out", workers=1)
    assert [finding.code for finding in report.findings] == ["record-differs"]
    assert report.passed


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_dtype_is_taken_from_the_candidate_and_said(dtype: str, tmp_path: Path) -> None:
    case = make_case(tmp_path, config=CONFIG)
    boneconv.merge(case.base, case.adapter, tmp_path / "out", dtype=dtype)
    (tmp_path / "out" / "boneconv.json").unlink()
    report = verify(case.base, case.adapter, tmp_path / "out", workers=1)
    assert report.passed
    assert report.dtype == dtype
    assert [finding.code for finding in report.findings] == ["assumed-dtype"]
    kept = verify(case.base, case.adapter, tmp_path / "out", dtype="keep", workers=1)
    assert len(kept.failures) == sum(t.dtype != "I64" for t in kept.tensors)


def test_a_promise_outweighs_the_tolerance(tmp_path: Path) -> None:
    """A record that says canonical: a number that another merge might have is not canonical."""
    case = make_case(tmp_path, dtype=F32)
    boneconv.merge(case.base, case.adapter, tmp_path / "out")

    def change(tensors: dict[str, np.ndarray]) -> None:
        name = weight_name(2, models.Q)
        tensors[name].view(np.uint32)[0, 0] ^= 1

    rewrite(tmp_path / "out" / "model-00002-of-00002.safetensors", change)
    for tolerance in ("default", "peft"):
        report = verify(case.base, case.adapter, tmp_path / "out", tolerance=tolerance, workers=1)
        assert not report.passed
    (tmp_path / "out" / "boneconv.json").unlink()
    assert verify(case.base, case.adapter, tmp_path / "out", workers=1).passed
    strict = verify(case.base, case.adapter, tmp_path / "out", tolerance="canonical", workers=1)
    assert not strict.passed


def test_files_that_were_saved_anew_pass(tmp_path: Path) -> None:
    """As transformers saves: settings in another order, a newer name of the dtype, fewer files."""
    case = make_case(tmp_path, files=FILES, config=CONFIG)
    files = {name: FILES[name] for name in ("tokenizer.json", "tokenizer_config.json")}
    config = {key: CONFIG[key] for key in reversed(CONFIG) if key != "torch_dtype"}
    config |= {"dtype": "bfloat16", "transformers_version": "9", "new": 1}
    files |= {"modeling_x.py": FILES["modeling_x.py"]}
    candidate = case.write(case.merged(), shards=1, files=files, config=config)
    report = verify(case.base, case.adapter, candidate, workers=1)
    assert report.passed, [file for file in report.files if file.status is Status.FAIL]
    reasons = {file.name: file.reason for file in report.files if file.reason}
    assert "no harm" in (reasons["special_tokens_map.json"] or "")


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 7},
        {"dtype": "float32"},
        {"rope": {"theta": 2.0}},
        {"quantization_config": {}},
        {"architectures": ["Y"]},
    ],
)
def test_a_configuration_that_means_something_else_fails(
    change: dict[str, object], tmp_path: Path
) -> None:
    case = make_case(tmp_path, files=FILES, config=CONFIG)
    candidate = case.write(case.merged(), files=FILES, config=CONFIG)
    edit_json(candidate / "config.json", **change)
    report = verify(case.base, case.adapter, candidate, workers=1)
    (wrong,) = [file for file in report.files if file.status is Status.FAIL]
    assert wrong.name == "config.json"


def test_code_that_is_missing_fails(tmp_path: Path) -> None:
    case = make_case(tmp_path, files=FILES, config=CONFIG)
    candidate = case.write(case.merged(), files=FILES, config=CONFIG)
    (candidate / "modeling_x.py").unlink()
    assert not verify(case.base, case.adapter, candidate, workers=1).passed


def test_one_file_against_one_file(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    base = tmp_path / "base.safetensors"
    base.write_bytes(pack(case.weights))
    for name in ("out.safetensors", "out.pth"):
        boneconv.merge(base, case.adapter, tmp_path / name)
        report = verify(base, case.adapter, tmp_path / name, workers=1)
        assert report.passed
        assert (report.kind, report.numerics) == (CandidateKind.FILE, "canonical")


def test_a_tied_head_that_was_not_untied(tmp_path: Path) -> None:
    """The adapter trains the head; a candidate without one goes on with the embedding."""
    embedding = models.values(np.random.default_rng(0), (24, 16), 1.0, F32)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 24}
    config |= {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    tensors = {"model.embed_tokens.weight": embedding, "model.norm.weight": embedding[0]}
    base = make_base(tmp_path / "base", tensors, config=config)
    blocks = {"lm_head": models.values(np.random.default_rng(1), (4, 24), 0.1, F32)}
    adapter = make_adapter(tmp_path / "adapter", "bone", blocks=blocks, target_modules=["lm_head"])
    boneconv.merge(base, adapter, tmp_path / "right")
    assert verify(base, adapter, tmp_path / "right", workers=1).passed
    shutil.copytree(base, tmp_path / "wrong")
    report = verify(base, adapter, tmp_path / "wrong", workers=1)
    (failure,) = report.failures
    assert (failure.name, failure.action) == ("lm_head.weight", TensorAction.MISSING)
    assert "unties" in (failure.reason or "")
    assert [file.name for file in report.files if file.status is Status.FAIL] == ["config.json"]


def test_a_tied_head_may_be_written_once_or_twice(tmp_path: Path) -> None:
    """With the embedding's values it says nothing new; with others it does."""
    case = make_case(tmp_path)
    name, head = "model.embed_tokens.weight", "lm_head.weight"
    tensors = case.merged()
    twice = case.write(tensors | {head: tensors[name]})
    assert verify(case.base, case.adapter, twice, workers=1).passed
    other = case.write(tensors | {head: tensors[name][::-1].copy()})
    assert not verify(case.base, case.adapter, other, workers=1).passed
    base = make_base(tmp_path / "twice", case.weights | {head: case.weights[name]})
    assert verify(base, case.adapter, case.write(tensors), workers=1).passed
    trained = make_base(tmp_path / "other", case.weights | {head: case.weights[name][::-1].copy()})
    report = verify(trained, case.adapter, case.write(tensors), workers=1)
    assert [tensor.name for tensor in report.failures] == [head]


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    told = Told()
    verify(case.base, case.adapter, case.write(case.merged()), workers=1, progress=told)
    assert told.total == sum(told.done) > 0


def test_a_merge_that_has_no_record_yet(tmp_path: Path) -> None:
    """As `merge --verify` does, before it publishes."""
    case = make_case(tmp_path, files=FILES, config=CONFIG)
    boneconv.merge(case.base, case.adapter, tmp_path / "out")
    (tmp_path / "out" / "boneconv.json").unlink()
    told = {"tolerance": "canonical", "workers": 1}
    assert verify(case.base, case.adapter, tmp_path / "out", **told).passed
    name = "model-00002-of-00002.safetensors"
    shutil.copyfile(case.base / name, tmp_path / "out" / name)
    report = verify(case.base, case.adapter, tmp_path / "out", **told)
    assert {f.code for f in report.findings} == {"stale-shard", "not-applied"}


def test_what_cannot_be_verified_is_refused(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    with pytest.raises(MissingPathError):
        verify(case.base, case.adapter, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FormatError):
        verify(case.base, case.adapter, tmp_path / "empty")
    with pytest.raises(UsageError):
        verify(case.base, case.adapter, case.base, tolerance="lenient")
    with pytest.raises(UsageError):
        verify(case.base, case.adapter, case.base, scale=float("nan"))


def test_a_base_that_is_not_finite_is_an_error_of_the_input(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    candidate = case.write(case.merged())

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[weight_name(2, models.Q)][0, 0] = np.inf

    rewrite(case.base / "model-00002-of-00002.safetensors", change)
    with pytest.raises(NonFiniteError, match=r"layers\.2"):
        verify(case.base, case.adapter, candidate, workers=1)


@pytest.mark.parametrize("dtype", [BF16, F16])
def test_a_number_near_a_midpoint_may_round_either_way(dtype: np.dtype, tmp_path: Path) -> None:
    """And nowhere else: the rule, on one weight whose exact values are chosen."""
    unit = float(np.finfo(np.float32).eps) * 4
    ulp = 2.0**-7 if dtype == BF16 else 2.0**-10
    base = tmp_path / "base.safetensors"
    weight = np.full((2, 2), 1.0).astype(dtype)
    base.write_bytes(pack({"linear.weight": weight}))
    near, far = ulp / 2 + unit / 8, ulp / 2 + 2**10 * unit
    block = np.array([[near, far]], F32)  # Bone of rank 1: row 0 gets `near`, row 1 `far`
    adapter = make_adapter(
        tmp_path / "adapter", "bone", rank=1, blocks={"linear": block}, target_modules=["linear"]
    )
    exact = 1.0 + np.array([[near, near], [far, far]])
    right = to(exact, dtype)
    for row, passes in ((0, True), (1, False)):
        down = right.copy()
        down[row, 0] = 1.0
        candidate = tmp_path / f"candidate{row}.safetensors"
        candidate.write_bytes(pack({"linear.weight": down}))
        assert verify(base, adapter, candidate, workers=1).passed == passes
