"""What the numbers come to: the first divergent tokens, the status, and the reasons for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from boneconv.behaviour.measures import Answers
from boneconv.behaviour.prompts import Question
from boneconv.behaviour.report import (
    BehaviourReport,
    BehaviourStatus,
    Divergence,
    Greedy,
    InputSet,
)
from boneconv.behaviour.tolerance import MAX_LIMIT, RMS_LIMIT, is_near_tie, proves

__all__ = ["conclude", "first_divergences"]


def first_divergences(
    questions: Sequence[Question],
    reference: Sequence[Answers],
    candidate: Sequence[Answers],
    sets: Sequence[InputSet],
) -> Greedy | None:
    """Where the candidate's greedy generation leaves the reference's.

    Both are asked for the best token after every token that the reference generated, so that the
    first difference is where a generation by the candidate itself would leave it.

    Args:
        questions: The questions; those with a prompt end in what was generated.
        reference: The reference's logits.
        candidate: The candidate's; empty where it could not be run.
        sets: The sets of questions, with their yardsticks.

    Returns:
        None where nothing was generated.
    """
    yardsticks = {each.name: each.yardstick for each in sets}
    asked = [i for i, question in enumerate(questions) if question.prompt]
    if not asked or not candidate:
        return None
    found = []
    for number, i in enumerate(asked):
        start = questions[i].prompt - 1
        mine, theirs = reference[i][start:-1], candidate[i][start:-1]
        differing = np.flatnonzero(mine.argmax(-1) != theirs.argmax(-1))
        if not differing.size:
            continue
        token = int(differing[0])
        second, first = np.sort(mine[token])[-2:]
        gap = float(first - second)
        found.append(
            Divergence(
                prompt=number,
                token=token,
                expected=int(mine[token].argmax()),
                found=int(theirs[token].argmax()),
                gap=gap,
                near_tie=is_near_tie(gap, yardsticks[questions[i].kind]),
            )
        )
    tokens = sum(questions[i].length - questions[i].prompt for i in asked)
    return Greedy(len(asked), tokens, tuple(found))


def conclude(
    *,
    fault: str | None,
    exact: bool,
    sets: Sequence[InputSet],
    greedy: Greedy | None,
    facts: dict[str, Any],
) -> BehaviourReport:
    """The report.

    Args:
        fault: Why the candidate could not be run; None where it could.
        exact: Whether it claims to be the merge, and is held to the limits.
        sets: The sets of questions.
        greedy: Greedy generation.
        facts: The report's other fields.
    """
    deciding = [each for each in sets if each.decides]
    reasons = [fault] if fault is not None else []
    if exact:
        reasons += [_reason(each) for each in deciding if not each.passed]
        reasons += _departures(greedy)
    status = BehaviourStatus.FAIL if reasons else BehaviourStatus.PASS
    if not reasons and not proves(deciding):
        status = BehaviourStatus.INCONCLUSIVE
        reasons = ["the base without the adapter would pass too, so that agreement proves nothing"]
    elif not reasons and not exact:
        status = BehaviourStatus.MEASURED
    return BehaviourReport(
        status=status,
        reasons=tuple(reasons),
        rms_limit=RMS_LIMIT if exact else None,
        max_limit=MAX_LIMIT if exact else None,
        sets=tuple(sets),
        greedy=greedy,
        **facts,
    )


def _reason(each: InputSet) -> str:
    if not np.isfinite(each.rms_ratio):
        return f"on {each.name}, the candidate's answers are not finite"
    return (
        f"on {each.name}, the candidate is off by {each.rms_ratio:,.3g} times the RMS error of "
        f"float32 (at most {RMS_LIMIT:g}), its largest error {each.max_ratio:,.3g} times "
        f"(at most {MAX_LIMIT:g})"
    )


def _departures(greedy: Greedy | None) -> list[str]:
    if greedy is None:
        return []
    return [
        f"generating greedily after prompt {each.prompt + 1}, it takes another token at "
        f"{each.token + 1}, where the best leads by {each.gap:.3g}"
        for each in greedy.divergences
        if not each.near_tie
    ]
