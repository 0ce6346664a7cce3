"""What a comparison of answers found: frozen values, which print nothing themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["BehaviourReport", "BehaviourStatus", "Distance", "Divergence", "Greedy", "InputSet"]


class BehaviourStatus(StrEnum):
    """What a comparison came to.

    ``inconclusive``: the base without the adapter would pass as well, so that agreement proves
    nothing. ``measured``: the candidate is an approximation by its own record, so that no limit can
    be derived; the numbers are reported.
    """

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"
    MEASURED = "measured"


@dataclass(frozen=True)
class Distance:
    """How far two models' answers are apart, over all positions of a set of inputs.

    Attributes:
        rms: Root of the mean squared difference of the answers' numbers.
        max_abs: The largest difference.
        mean_abs: The mean of the absolute differences.
        kl: The mean Kullback-Leibler divergence from the reference's distribution to the other's,
            in nats; None where the answers are no logits.
        top1: The share of positions where both have the same best logit; None likewise.
    """

    rms: float
    max_abs: float
    mean_abs: float
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class InputSet:
    """One kind of inputs: text, random token ids, or images.

    Attributes:
        name: ``text``, ``random`` or ``images``.
        decides: Whether it counts for the verdict: random ids do only where there is no text.
        inputs: How many inputs there are.
        positions: How many answers were compared: tokens, or inputs where there is one for each.
        candidate: The candidate against the reference.
        yardstick: float32 torch against the reference: what an honest candidate may be off.
        control: The base without the adapters against the reference: how far they move it.
        rounding: What rounding the weights to the candidate's dtype does by itself; None where they
            are not rounded.
        rms_ratio: ``candidate.rms / yardstick.rms``.
        max_ratio: ``candidate.max_abs / yardstick.max_abs``.
        passed: Whether both ratios are within their limits.
    """

    name: str
    decides: bool
    inputs: int
    positions: int
    candidate: Distance
    yardstick: Distance
    control: Distance
    rounding: Distance | None
    rms_ratio: float
    max_ratio: float
    passed: bool


@dataclass(frozen=True)
class Divergence:
    """Where greedy generation takes another token.

    Attributes:
        prompt: The number of the prompt, from 0.
        token: The number of the generated token, from 0.
        expected: The reference's token id.
        found: The candidate's.
        gap: How far the reference's best logit lies above its second best there.
        near_tie: Whether the gap is so small that the difference means nothing.
    """

    prompt: int
    token: int
    expected: int
    found: int
    gap: float
    near_tie: bool


@dataclass(frozen=True)
class Greedy:
    """Greedy generation after some of the prompts.

    Attributes:
        prompts: How many.
        tokens: How many tokens were generated in all.
        divergences: For each prompt where the candidate takes another token, the first such place.
    """

    prompts: int
    tokens: int
    divergences: tuple[Divergence, ...]


@dataclass(frozen=True)
class BehaviourReport:
    """What a comparison of answers found.

    Attributes:
        status: What it came to.
        reasons: Why it did not pass, each a sentence.
        output: What was compared: ``logits``, ``last_hidden_state`` and the like.
        model: The class of transformers that the reference is.
        runtime: What ran the candidate, such as ``torch 2.13.0, float32``.
        reference: The dtype that the reference was computed in.
        weights: The dtypes of the candidate's floating weights.
        prompts: Where the text came from: ``built-in``, ``file`` or ``none``.
        rms_limit: The most that ``rms_ratio`` may be; None where nothing is held to a limit.
        max_limit: The most that ``max_ratio`` may be, likewise.
        sets: The inputs, kind by kind.
        greedy: Greedy generation; None for models that do not generate.
        memory: Bytes of memory that were predicted.
        notes: What the reader should know.
    """

    status: BehaviourStatus
    reasons: tuple[str, ...]
    output: str
    model: str
    runtime: str
    reference: str
    weights: tuple[str, ...]
    prompts: str
    rms_limit: float | None
    max_limit: float | None
    sets: tuple[InputSet, ...]
    greedy: Greedy | None
    memory: int
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether a pipeline may go on: an inconclusive comparison is none."""
        return self.status in (BehaviourStatus.PASS, BehaviourStatus.MEASURED)

    @property
    def deciding(self) -> Sequence[InputSet]:
        """The sets that count for the verdict."""
        return [each for each in self.sets if each.decides]
