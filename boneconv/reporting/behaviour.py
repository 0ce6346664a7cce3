"""The comparison of answers in words and rows, for every report that is read by people."""

from __future__ import annotations

from boneconv.behaviour.report import BehaviourReport, BehaviourStatus, Greedy, InputSet
from boneconv.reporting.text import count, number, percent

__all__ = ["HEAD", "behaviour_facts", "behaviour_rows", "behaviour_verdict"]

#: What the columns of `behaviour_rows` are.
HEAD = (
    "inputs",
    "positions",
    "RMS error",
    "x float32",
    "max error",
    "x float32",
    "mean error",
    "KL",
    "top-1",
    "control RMS",
    "control KL",
    "control top-1",
)


def behaviour_verdict(report: BehaviourReport) -> str:
    """What it came to, in one sentence."""
    if report.status in (BehaviourStatus.FAIL, BehaviourStatus.INCONCLUSIVE):
        return f"{report.output}: {report.reasons[0]}"
    worst = max((each.rms_ratio for each in report.deciding), default=0.0)
    text = f"{report.output} within {number(worst)} times the error of float32"
    if report.status is BehaviourStatus.MEASURED:
        return f"{text}, held to no limit as the candidate is an approximation by its own record"
    return text


def behaviour_facts(report: BehaviourReport) -> list[tuple[str, str]]:
    """What was compared and how, as titles and texts."""
    facts = [
        ("status", str(report.status)),
        ("compared", f"{report.output} of {report.model}, run by {report.runtime}"),
        ("reference", _reference(report)),
        ("limits", _limits(report)),
    ]
    if report.greedy is not None:
        facts.append(("greedy", _greedy(report.greedy)))
    facts += [("control", _control(each)) for each in report.sets if each.decides]
    facts += [("reason", reason) for reason in report.reasons]
    facts += [("note", note) for note in report.notes]
    return facts


def behaviour_rows(report: BehaviourReport) -> list[tuple[str, ...]]:
    """A row for each kind of inputs, under `HEAD`."""
    return [
        (
            f"{each.name} ({each.inputs})"
            if each.decides
            else f"{each.name} ({each.inputs}, aside)",
            f"{each.positions:,}",
            number(each.candidate.rms),
            number(each.rms_ratio),
            number(each.candidate.max_abs),
            number(each.max_ratio),
            number(each.candidate.mean_abs),
            number(each.candidate.kl),
            percent(each.candidate.top1),
            number(each.control.rms),
            number(each.control.kl),
            percent(each.control.top1),
        )
        for each in report.sets
    ]


def _reference(report: BehaviourReport) -> str:
    half = [name for name in report.weights if name in ("float16", "bfloat16")]
    rounded = f", weights rounded once to {' and '.join(half)}" if half else ""
    text = {"built-in": "built-in prompts", "file": "the given prompts"}.get(report.prompts)
    return f"base and adapter in {report.reference}{rounded}{f'; {text}' if text else ''}"


def _limits(report: BehaviourReport) -> str:
    if report.rms_limit is None:
        return "none"
    return (
        f"RMS error {report.rms_limit:g} times, largest error {report.max_limit:g} times "
        "what float32 torch is off by"
    )


def _greedy(greedy: Greedy) -> str:
    asked = f"{count(greedy.tokens, 'token')} after {count(greedy.prompts, 'prompt')}"
    if not greedy.divergences:
        return f"{asked}, all the same"
    first = greedy.divergences[0]
    tie = ", a near tie" if first.near_tie else ""
    return (
        f"{asked}; first divergent at token {first.token + 1} after prompt {first.prompt + 1}: "
        f"{first.found} for {first.expected}, which leads by {number(first.gap)}{tie}"
    )


def _control(each: InputSet) -> str:
    moved = f"the adapter moves the answers on {each.name} by {number(each.control.rms)} (RMS)"
    if each.control.top1 is None:
        return moved
    return (
        f"{moved}, {number(each.control.kl)} nats of KL, and the best token at "
        f"{percent(1 - each.control.top1)} of positions"
    )
