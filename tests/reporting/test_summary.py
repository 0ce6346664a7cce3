"""The verdict, failures by cause, and the worst first."""

from __future__ import annotations

import pytest

from boneconv.reporting.summary import (
    by_kind,
    control,
    failure_groups,
    headline,
    notices,
    worst_first,
)
from boneconv.verification.report import (
    CandidateKind,
    FileReport,
    Finding,
    Report,
    Severity,
    Status,
)
from tests.reporting.reports import (
    NOT_APPLIED,
    failed,
    honest,
    lora,
    norm,
    not_finite,
    report,
    spoilt,
    weight,
)

NEAR = {"identical": False, "share_correct": 0.9999, "max_ulp": 1.0}


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (
            honest(30),
            "PASS: 210 weights, every one the exact value rounded once; "
            "30 other tensors byte for byte",
        ),
        (report((weight(0),)), "PASS: 1 weight, it is the exact value rounded once"),
        (
            report((weight(0, **NEAR), weight(1))),
            "PASS: 2 weights, 99.995 % of their elements correctly rounded, "
            "none further off than 1 ULP",
        ),
        (report((norm(0),)), "PASS: 1 tensor as they should be; the adapter changes none of them"),
        (
            lora(),
            "PASS: 3 weights, the update of each within the error that the candidate records, "
            "0.03 at most",
        ),
        (
            report((weight(0),), kind=CandidateKind.LORA),
            "PASS: 1 weight, the update of each exactly the adapter's",
        ),
        (
            spoilt(),
            "FAIL: 5 of 7 tensors are not what base and adapter mean: "
            "the adapter is missing in 2 weights",
        ),
        (
            report((failed(0), weight(1))),
            "FAIL: 1 of 2 tensors is not what base and adapter mean",
        ),
        (
            report((weight(0),), files=(FileReport("tokenizer.json", Status.FAIL, "differs"),)),
            "FAIL: the weights agree, but not 1 file: tokenizer.json",
        ),
        (
            report((weight(0),), findings=(Finding(Severity.ERROR, "wrong-base", "another base"),)),
            "FAIL: another base",
        ),
    ],
)
def test_the_verdict_in_a_sentence(found: Report, text: str) -> None:
    assert headline(found) == text


def test_the_control_says_when_agreement_proves_nothing() -> None:
    assert control(honest()) == "the adapter moves the weights by 2.31 % of their norm"
    assert "says nothing" in control(report((norm(0),)))


def test_failures_are_grouped_by_cause_without_those_that_an_error_lists() -> None:
    groups = failure_groups(spoilt())
    assert [(group.code, group.text, len(group.tensors)) for group in groups] == [
        (None, "1 of 331,776 elements is off, by 1 ULP", 1),
        ("missing", "it is not there", 1),
        ("extra", "neither base nor adapter has it", 1),
    ]


def test_one_cause_with_several_numbers_is_one_group() -> None:
    tensors = [
        failed(i, code=None, diagnosis=None, reason=f"off by up to {i}.5e-0{i} ULP")
        for i in range(3)
    ]
    (group,) = failure_groups(report(tuple(tensors)))
    assert group.tensors == tuple(tensors)
    assert group.text.endswith(" (the worst)")


def test_the_largest_group_comes_first() -> None:
    tensors = (failed(0, code="b", diagnosis="one"), failed(1), failed(2))
    assert [group.text for group in failure_groups(report(tensors))] == [NOT_APPLIED, "one"]


def test_the_worst_come_first() -> None:
    names = [(t.action, t.max_ulp) for t in worst_first(spoilt().tensors)]
    assert names == [
        ("missing", None),
        ("extra", None),
        ("merge", 212.0),
        ("merge", 212.0),
        ("merge", 1.0),
        ("merge", 0.0),
        ("copy", None),
    ]


def test_what_is_not_finite_is_worst() -> None:
    tensors = (failed(0), *not_finite().tensors)
    assert [t.layer for t in worst_first(tensors)] == [0, 1, 0, 2]


def test_kinds_hold_the_worst_of_their_weights() -> None:
    near = weight(1, **NEAR, relative_frobenius=0.002, update_norm=0.5)
    (kind,) = by_kind([weight(0), near, failed(2), norm(0)])
    assert kind.name == "model.layers.*.self_attn.q_proj.weight"
    assert (kind.tensors, kind.failed, kind.identical) == (3, 1, 1)
    assert kind.share_correct == pytest.approx((1 + 0.9999 + 0.25) / 3)
    assert (kind.max_ulp, kind.relative_frobenius, kind.update_norm) == (212.0, 0.0271, 0.5)


def test_notices_are_what_fails_nothing() -> None:
    assert [finding.code for finding in notices(spoilt())] == ["no-fingerprint"]
