"""``boneconv verify`` and ``merge --verify``: texts, files, exit codes, and what is published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from junitparser import JUnitXml

from boneconv.cli import run
from boneconv.engine import commit
from tests.builders import base_tensors, make_adapter, make_base, snapshot

SCHEMA = json.loads(
    (Path(__file__).parents[2] / "specs" / "verify-report-1.0.schema.json").read_text()
)
PASSED = "PASS: 6 weights, every one the exact value rounded once; 4 other tensors byte for byte"


@pytest.fixture(autouse=True)
def no_summary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


@pytest.fixture
def merged(tmp_path: Path) -> Path:
    """A base, a BAT adapter, and the merge of the two, in one folder."""
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", "bat")
    assert run(["merge", str(base), str(adapter), str(tmp_path / "merged"), "-q"]) == 0
    return tmp_path


def call(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    capfd.readouterr()
    code = run(list(map(str, arguments)))
    out, err = capfd.readouterr()
    return code, out, err


def verify(
    capfd: pytest.CaptureFixture[str], folder: Path, candidate: Path, *options: str | Path
) -> tuple[int, str, str]:
    inputs = (folder / "base", folder / "adapter", candidate)
    return call(capfd, "verify", *inputs, *options)


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def test_an_honest_merge(merged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = verify(capfd, merged, merged / "merged")
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == PASSED
    assert "held to    canonical: every weight is the exact value rounded once" in out


def test_a_base_in_place_of_the_merge(merged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = verify(capfd, merged, merged / "base")
    assert (code, err) == (1, "")
    assert out.startswith("FAIL: 6 of 10 tensors are not what base and adapter mean")
    assert "[not-applied]" in out


def test_one_bit_of_an_untouched_tensor(merged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flip_last_bit(merged / "merged" / "model.safetensors")
    code, out, _ = verify(capfd, merged, merged / "merged", "-v")
    assert code == 1
    assert out.startswith("FAIL: 1 of 10 tensors is not what base and adapter mean")
    listed = out[out.index("\ntensor  ") :].splitlines()[2:]
    assert len(listed) == 10
    assert [line.split()[1] for line in listed] == ["fail"] + ["pass"] * 9


def test_json_conforms_to_its_schema(merged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for candidate, code in (("merged", 0), ("base", 1)):
        found, out, err = verify(capfd, merged, merged / candidate, "--json")
        assert (found, err) == (code, "")
        document = json.loads(out)
        jsonschema.validate(document, SCHEMA, cls=jsonschema.Draft202012Validator)
        assert document["passed"] is (code == 0)


def test_every_report_file_at_once(merged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    reports = merged / "reports"
    files = [reports / name for name in ("r.xml", "r.html", "r.md")]
    options = ("--junit", files[0], "--html", files[1], "--markdown", files[2])
    for candidate, code in (("merged", 0), ("base", 1)):
        found, _, err = verify(capfd, merged, merged / candidate, *options)
        assert found == code
        assert err.splitlines() == [f"wrote {path}" for path in files]
        assert sorted(path.name for path in reports.iterdir()) == ["r.html", "r.md", "r.xml"]
        assert JUnitXml.fromfile(str(files[0])).failures == (0 if code == 0 else 7)
        assert ("PASS" if code == 0 else "FAIL") in files[1].read_text(encoding="utf-8")
        assert ("PASS" if code == 0 else "FAIL") in files[2].read_text(encoding="utf-8")


def test_quiet_says_nothing_on_stderr(merged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = verify(capfd, merged, merged / "merged", "-q", "--junit", merged / "r.xml")
    assert (code, err) == (0, "")
    assert (merged / "r.xml").exists()


def test_the_summary_of_a_step_is_added_to(
    merged: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = merged / "summary.md"
    summary.write_text("# before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(summary))
    assert verify(capfd, merged, merged / "merged")[0] == 0
    assert verify(capfd, merged, merged / "base")[0] == 1
    lines = summary.read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        "# before",
        "### \N{WHITE HEAVY CHECK MARK} PASS · boneconv verify",
        "### \N{CROSS MARK} FAIL · boneconv verify",
    ]


def test_the_scale_is_held_to(merged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify(capfd, merged, merged / "merged", "--scale", "1")[0] == 0
    code, out, _ = verify(capfd, merged, merged / "merged", "--scale", "0.5")
    assert code == 1
    assert "FAIL" in out


def test_the_dtype_is_held_to(merged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert verify(capfd, merged, merged / "merged", "--dtype", "keep")[0] == 0
    assert verify(capfd, merged, merged / "merged", "--dtype", "float32")[0] == 1


def test_stacked_adapters_are_held_to_in_order(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = make_base(tmp_path / "base")
    one, other = make_adapter(tmp_path / "one"), make_adapter(tmp_path / "other", "bat")
    out = tmp_path / "out"
    assert call(capfd, "merge", base, one, out, "--adapter", other)[0] == 0
    assert call(capfd, "verify", base, one, out, "--adapter", other)[0] == 0
    assert call(capfd, "verify", base, other, out, "--adapter", one)[0] == 1
    assert call(capfd, "verify", base, one, out)[0] == 1


@pytest.mark.parametrize(
    "options",
    [
        ("--tolerance", "lenient"),
        ("--dtype", "int8"),
        ("--workers", "0"),
        ("--html", "base"),
        ("--html", "same", "--junit", "same"),
    ],
)
def test_bad_usage_is_refused_before_any_work(
    merged: Path,
    options: tuple[str, ...],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(merged)
    before = snapshot(merged)
    code, out, err = verify(capfd, merged, merged / "merged", *options)
    assert (code, out) == (2, "")
    assert err
    assert snapshot(merged) == before


def test_missing_input(merged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = verify(capfd, merged, merged / "nothing")
    assert (code, out) == (2, "")
    assert "nothing" in err


def test_a_report_that_cannot_be_written_is_the_machine(
    merged: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (merged / "file").write_text("")
    code, out, err = verify(capfd, merged, merged / "merged", "--html", merged / "file" / "r.html")
    assert code == 3
    assert out.splitlines()[0] == PASSED
    assert "r.html" in err


# --- merge --verify ---------------------------------------------------------------------------


def spoil_when_complete(monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    """Flips a bit of an output after its weights were written: what a bad disk may do."""
    honest = commit._write_folder

    def spoiled(plan: Any, target: Path, advance: Any) -> None:
        honest(plan, target, advance)
        if target.parent.name.startswith(out):
            flip_last_bit(target / "model.safetensors")

    monkeypatch.setattr(commit, "_write_folder", spoiled)


def test_a_merge_is_verified_before_it_is_published(
    merged: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    inputs = (merged / "base", merged / "adapter", merged / "out")
    code, out, err = call(capfd, "merge", *inputs, "--verify")
    assert code == 0
    assert err.splitlines()[-1] == f"verified: {PASSED}"
    assert snapshot(merged / "out") == snapshot(merged / "merged")
    code, out, err = call(capfd, "merge", *inputs, "--verify", "--force", "--json", "-q")
    assert (code, err) == (0, "")
    assert json.loads(out)["verified"] == [PASSED]


def test_a_merge_that_fails_is_not_published(
    merged: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(merged)
    spoil_when_complete(monkeypatch, "out")
    inputs = (merged / "base", merged / "adapter", merged / "out")
    code, out, err = call(capfd, "merge", *inputs, "--verify")
    assert (code, out) == (1, "")
    assert "FAIL: 1 of 10 tensors is not what base and adapter mean" in err
    assert err.splitlines()[-1].startswith("Error: the merged output failed its verification")
    assert snapshot(merged) == before


def test_a_failure_with_force_keeps_what_was_there(
    merged: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(merged)
    spoil_when_complete(monkeypatch, "merged")
    inputs = (merged / "base", merged / "adapter", merged / "merged")
    assert call(capfd, "merge", *inputs, "--verify", "--force")[0] == 1
    assert snapshot(merged) == before


def test_each_output_is_verified_against_its_own_adapter(
    merged: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bone = make_adapter(merged / "bone")
    inputs = (merged / "base", merged / "adapter", merged / "one")
    each = ("--each", f"{bone}={merged / 'two'}", "--verify")
    code, out, _ = call(capfd, "merge", *inputs, *each, "--json")
    assert code == 0
    assert json.loads(out)["verified"] == [PASSED, PASSED]
    for name in ("one", "two"):
        shutil.rmtree(merged / name)
    before = snapshot(merged)
    spoil_when_complete(monkeypatch, "two")
    assert call(capfd, "merge", *inputs, *each)[0] == 1
    assert snapshot(merged) == before


def test_files_stacks_scales_and_dtypes_are_verified(
    merged: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, out = merged / "base" / "model.safetensors", merged / "out.safetensors"
    stack = ("--adapter", make_adapter(merged / "bone"))
    options = ("--scale", "0.5", "--dtype", "float32", "--verify")
    code, _, err = call(capfd, "merge", base, merged / "adapter", out, *stack, *options)
    assert code == 0
    assert "verified: PASS: 6 weights, every one the exact value rounded once" in err
    assert out.exists()


def test_components_of_a_pipeline_are_verified(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tmp_path / "pipe"
    make_base(pipe / "unet")
    make_base(pipe / "text_encoder")
    index = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.35.0"}
    parts = {name: ["diffusers", "Model"] for name in ("unet", "text_encoder")}
    (pipe / "model_index.json").write_text(json.dumps(index | parts))
    inputs = (pipe, make_adapter(tmp_path / "bat", "bat"), tmp_path / "out")
    other = f"text_encoder={make_adapter(tmp_path / 'bone')}"
    options = ("--component", "unet", "--adapter", other)
    passed = PASSED.replace("6", "12").replace("4", "8")
    code, _, err = call(capfd, "merge", *inputs, *options, "--verify")
    assert code == 0
    assert [line for line in err.splitlines() if "PASS" in line] == [f"verified: {passed}"]
    code, out, err = call(capfd, "verify", *inputs, *options)
    assert (code, err, out.splitlines()[0]) == (0, "", passed)
    code, out, err = call(capfd, "verify", *inputs, "--component", "unet")
    assert code == 1
    assert "text_encoder/model.safetensors" in out
    flip_last_bit(tmp_path / "out" / "text_encoder" / "model.safetensors")
    code, out, _ = call(capfd, "verify", *inputs, *options)
    assert (code, out.splitlines()[0]) == (
        1,
        "FAIL: 1 of 20 tensors is not what base and adapter mean",
    )


def test_an_adapter_of_another_base(merged: Path, capfd: pytest.CaptureFixture[str]) -> None:
    other = make_base(merged / "other", base_tensors(seed=1))
    native = merged / "native"
    arguments = (merged / "adapter", native, "--to", "native", "--base", other)
    assert call(capfd, "convert", *arguments)[0] == 0
    inputs = (merged / "base", native, merged / "merged")
    code, out, _ = call(capfd, "verify", *inputs)
    assert code == 1
    assert out.splitlines()[0] == (
        "FAIL: 6 of 6 weights are not those of the base that the adapter was made for"
    )
    code, out, _ = call(capfd, "verify", *inputs, "--allow-base-mismatch")
    assert (code, out.splitlines()[0]) == (0, PASSED)
    assert "[base-mismatch]" in out
