"""A verification as JUnit XML, which CI systems show: a test case for each tensor and file."""

from __future__ import annotations

from collections.abc import Iterator

from junitparser import Failure, JUnitXml, TestCase, TestSuite

from boneconv import __version__
from boneconv.behaviour.report import BehaviourReport
from boneconv.reporting.behaviour import behaviour_facts, behaviour_verdict
from boneconv.reporting.summary import errors, headline
from boneconv.reporting.text import cosine, number, percent, plain, shape
from boneconv.verification.report import FileReport, Report, Status, TensorReport

__all__ = ["verify_junit"]


def verify_junit(report: Report) -> str:
    """The XML: a suite for weights, files, findings, behaviour; totals are properties."""
    suites = [
        ("weights", [_tensor(tensor) for tensor in report.tensors]),
        ("files", [_file(file) for file in report.files]),
        ("findings", list(_findings(report))),
    ]
    if report.behaviour is not None:
        suites.append(("behaviour", list(_behaviour(report.behaviour))))
    xml = JUnitXml("boneconv verify")
    for name, cases in suites:
        suite = TestSuite(name)
        if name == "weights":
            for key, value in _properties(report):
                suite.add_property(key, plain(value))
        suite.add_testcases(cases)
        xml.add_testsuite(suite)
    xml.update_statistics()
    return str(xml.tostring().decode())


def _properties(report: Report) -> Iterator[tuple[str, str]]:
    totals = report.totals
    yield "boneconv", __version__
    yield "verdict", headline(report)
    yield "base", report.base
    yield from (("adapter", adapter) for adapter in report.adapters)
    yield "candidate", report.candidate
    yield "kind", str(report.kind)
    yield "tolerance", report.tolerance
    yield "tensors", str(totals.tensors)
    yield "adapted", str(totals.adapted)
    yield "identical", str(totals.identical)
    yield "failed", str(totals.failed)
    yield "share correctly rounded", percent(totals.share_correct)
    yield "max error in ULP", number(totals.max_ulp)
    yield "update norm", number(totals.update_norm)


def _case(name: str, group: str, failure: str | None, detail: str, code: str | None) -> TestCase:
    case = TestCase(plain(name), classname=f"boneconv.{group}")
    if failure is not None:
        result = Failure(plain(failure), code or "mismatch")
        result.text = "\n".join(map(plain, detail.split("\n")))
        case.result = [result]
    return case


def _tensor(tensor: TensorReport) -> TestCase:
    if tensor.status is Status.PASS:
        return _case(tensor.name, "weights", None, "", None)
    told = [tensor.diagnosis, tensor.reason]
    message = "; ".join(text for text in told if text) or "not what it should be"
    return _case(tensor.name, "weights", message, _measures(tensor), tensor.code)


def _measures(tensor: TensorReport) -> str:
    return (
        f"{tensor.action} {tensor.dtype} {shape(tensor.shape)}, "
        f"correctly rounded {percent(tensor.share_correct)}, "
        f"max ULP {number(tensor.max_ulp)}, mean ULP {number(tensor.mean_ulp)}, "
        f"max abs {number(tensor.max_abs)}, "
        f"relative error {number(tensor.relative_frobenius)}, cosine {cosine(tensor.cosine)}, "
        f"update {number(tensor.update_norm)}"
    )


def _file(file: FileReport) -> TestCase:
    failed = file.status is Status.FAIL
    reason = (file.reason or "not what it should be") if failed else None
    return _case(file.name, "files", reason, "", None)


def _behaviour(report: BehaviourReport) -> Iterator[TestCase]:
    """A case for the whole, and one for each kind of inputs that counts."""
    detail = "\n".join(f"{title}: {text}" for title, text in behaviour_facts(report))
    failure = None if report.passed else behaviour_verdict(report)
    yield _case(report.output, "behaviour", failure, detail, str(report.status))
    for each in report.deciding if report.rms_limit is not None else ():
        message = (
            f"RMS error {number(each.rms_ratio)} times float32's, "
            f"largest error {number(each.max_ratio)} times"
        )
        name = f"{report.output} on {each.name}"
        yield _case(name, "behaviour", None if each.passed else message, "", "behaviour-differs")


def _findings(report: Report) -> Iterator[TestCase]:
    for finding in errors(report):
        tensors = ", ".join(finding.tensors)
        yield _case(finding.code, "findings", finding.message, tensors, finding.code)
