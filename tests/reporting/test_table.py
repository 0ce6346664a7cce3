"""Reports as text for a terminal."""

from __future__ import annotations

import pytest

from boneconv.reporting.diff_table import diff_headline, diff_table
from boneconv.reporting.table import verify_table
from boneconv.verification.report import CandidateKind, DiffReport
from tests.reporting.reports import (
    NOT_APPLIED,
    different,
    distance,
    failed,
    hostile,
    report,
    same,
    spoilt,
)


def test_a_report_in_full() -> None:
    assert verify_table(spoilt()).splitlines() == [
        "FAIL: 5 of 7 tensors are not what base and adapter mean: "
        "the adapter is missing in 2 weights",
        "",
        "base       HuggingFaceTB/SmolLM2-135M-Instruct@main",
        "adapter    ./adapter",
        "candidate  ./merged (checkpoint)",
        "held to    canonical: every weight is the exact value rounded once",
        "tensors    7: 5 adapted, 2 the exact bytes, 5 failed",
        "rounding   62.50 % correct, worst 212 ULP",
        "control    the adapter moves the weights by 2.31 % of their norm",
        "",
        "error: the adapter is missing in 2 weights: those of q_proj [not-applied]",
        "note: the base is taken on trust [no-fingerprint]",
        "",
        "1 tensor: 1 of 331,776 elements is off, by 1 ULP",
        "  model.layers.2.mlp.down_proj.weight",
        "1 tensor: it is not there [missing]",
        "  model.layers.1.mlp.up_proj.weight",
        "1 tensor: neither base nor adapter has it [extra]",
        "  old.weight",
        "",
        "file tokenizer.json: differs from the base's",
        "",
        "tensors                                     failed       correct  max ULP  rel. error  "
        "update",
        "model.layers.*.self_attn.q_proj.weight  x3       2       50.00 %      212      0.0271  "
        "  0.03",
        "model.layers.2.mlp.down_proj.weight     x1       1  99.9999999 %        1      0.0271  "
        "  0.03",
        "model.layers.1.mlp.up_proj.weight       x1       1             -        -           -  "
        "     -",
        "old.weight                              x1       1             -        -           -  "
        "     -",
    ]


def test_every_tensor_with_verbose() -> None:
    text = verify_table(spoilt(), verbose=True)
    listed = text[text.index("tensor  ") :].splitlines()[1:]
    assert [line.split()[0] for line in listed] == [
        "model.layers.1.mlp.up_proj.weight",
        "old.weight",
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.0.input_layernorm.weight",
    ]
    assert "fail (missing)" in listed[0]
    assert "pass (copy)" in listed[-1]


def test_many_failures_are_counted_rather_than_listed() -> None:
    causes = [failed(i, diagnosis=f"cause {chr(97 + i)}", code=f"c{i}") for i in range(15)]
    many = [failed(i) for i in range(200)]
    text = verify_table(report((*causes, *many)))
    assert f"200 tensors: {NOT_APPLIED} [not-applied]" in text
    assert "  and 196 more" in text
    assert "\nand 4 more\n" in text
    assert len(text.splitlines()) < 60


@pytest.mark.parametrize("verbose", [False, True])
def test_names_cannot_move_the_cursor_or_forge_a_line(verbose: bool) -> None:
    lines = verify_table(hostile(), verbose=verbose).split("\n")
    assert all(line.isprintable() or not line for line in lines)
    assert not any(line.startswith(("# heading", "[link]")) for line in lines)


def test_two_equal_sides() -> None:
    assert diff_table(same()).splitlines() == [
        "SAME: 2 tensors, every byte equal",
        "",
        "A     a",
        "B     b",
        "kind  checkpoint",
    ]


def test_two_different_sides_the_farthest_first() -> None:
    lines = diff_table(different()).splitlines()
    assert lines[0] == "DIFFERENT: 4 differ, 1 only in A, 1 only in B of 7 tensors; 1 setting"
    assert "setting r: 4 -> 8" in lines
    rows = lines[lines.index("setting r: 4 -> 8") + 3 :]
    assert [row.split("  ")[0] for row in rows] == [
        "only a",
        "only b",
        "shape",
        "dtype",
        "far",
        "near",
    ]
    assert "shape 4x8 -> 8x4" in rows[2]
    assert "dtype BF16 -> F32" in rows[3]
    assert rows[5].split() == ["near", "values", "3.12", "%", "1", "2e-07", "1e-07", "0.999999"]


def test_verbose_lists_equal_tensors_too() -> None:
    assert diff_table(different(), verbose=True).splitlines()[-1].startswith("same")


def test_a_long_comparison_is_cut_and_says_so() -> None:
    tensors = tuple(distance(f"t{i}", identical=False, differing=0) for i in range(100))
    report = DiffReport("a", "b", CandidateKind.CHECKPOINT, tensors)
    assert diff_headline(report) == "DIFFERENT: 100 differ of 100 tensors"
    assert diff_table(report).splitlines()[-1] == "and 60 more; -v lists them all"
    assert "bytes alone" in diff_table(report, verbose=True)
    assert "more; -v" not in diff_table(report, verbose=True)
