"""`measure_behaviour`: the reference, the yardstick, the control and the candidate, in turn.

One model is in memory at a time; of each, only its answers are kept, or compared at once.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from boneconv.adapter import Adapter
from boneconv.behaviour import tolerance, torch_runner
from boneconv.behaviour.candidates import Candidate, TorchRunner, open_candidate
from boneconv.behaviour.loading import (
    Loaded,
    check_complete,
    classes_of,
    load_model,
    load_tokenizer,
    require_torch,
)
from boneconv.behaviour.measures import Answers, compare
from boneconv.behaviour.memory import available_memory, predict_memory
from boneconv.behaviour.prompts import Prompts, Question, read_prompts
from boneconv.behaviour.questions import make_questions
from boneconv.behaviour.reference import attach, form, resize, round_weights
from boneconv.behaviour.report import BehaviourReport, Distance, InputSet
from boneconv.behaviour.verdict import conclude, first_divergences
from boneconv.engine.progress import Progress
from boneconv.errors import InputError, UsageError
from boneconv.formats import load_adapter
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.hub import BASE, locate

__all__ = ["measure_behaviour"]

PathLike = str | os.PathLike[str]
Note = Callable[[str], None]

#: Greedy generation: after how many prompts, and how many tokens each.
GREEDY_PROMPTS, GREEDY_TOKENS = 2, 12


def measure_behaviour(
    base: PathLike,
    adapters: Sequence[PathLike],
    candidate: PathLike,
    *,
    prompts: PathLike | None = None,
    kind: str = "auto",
    scale: float = 1.0,
    tolerance_rule: str = "default",
    runtime_adapter: PathLike | None = None,
    note: Note | None = None,
    progress: Progress | None = None,
) -> BehaviourReport:
    """Compares a candidate's answers with those of the base with its adapters.

    Args:
        base: A folder with a config.json, or a Hub id ``owner/name[@revision]``.
        adapters: The adapters, in order: folders, files or Hub ids.
        candidate: A merged folder, an ONNX graph or its folder, a LoRA or another adapter.
        prompts: A file of prompts, see `boneconv.behaviour.prompts.read_prompts`; by default a
            small built-in set.
        kind: ``checkpoint``, ``onnx``, ``lora``, ``adapter``, or ``auto``.
        scale: S in ``W + S (W' - W)``.
        tolerance_rule: ``peft`` accepts half precision that was rounded twice.
        runtime_adapter: The ``.onnx_adapter`` file that a graph is run with.
        note: Is told the memory that will be taken, before it is.
        progress: Is told how many bytes of answers there will be, and how many there are.

    Returns:
        The report; a candidate that cannot be run fails in it.

    Raises:
        MissingExtraError: torch, transformers, or for a graph ONNX Runtime, is not installed.
        UsageError: The base has no config.json, or the prompts are of no use to the model.
        InputError: One of its kinds, for every fault of base, adapters and prompts.
        MachineError: Reading failed.
    """
    opened = open_candidate(
        Path(candidate), kind, None if runtime_adapter is None else Path(runtime_adapter)
    )
    require_torch(*(["onnxruntime"] if opened.kind == "onnx" else []))
    texts = read_prompts(None if prompts is None else Path(prompts))
    folder = locate(base, BASE).path
    loaded = [load_adapter(adapter) for adapter in adapters]
    run = _Run(folder, loaded, opened, texts, scale, tolerance_rule, note, progress)
    return run.report()


@dataclass
class _Kept:
    """What is kept of the reference.

    Attributes:
        questions: The questions, with what was generated after some.
        output: The output that is compared.
        logits: Whether its numbers are logits.
        exact: The answers of the unrounded reference.
        target: The answers that the candidate is held to: the rounded reference's, or the same.
        adapted: How many weights the adapters change.
    """

    questions: list[Question]
    output: str
    logits: bool
    exact: list[Answers] = field(default_factory=list)
    target: list[Answers] = field(default_factory=list)
    adapted: int = 0


class _Run:
    """One comparison."""

    def __init__(
        self,
        base: Path,
        adapters: Sequence[Adapter],
        candidate: Candidate,
        prompts: Prompts,
        scale: float,
        rule: str,
        note: Note | None,
        progress: Progress | None,
    ) -> None:
        self._base, self._adapters, self._candidate = base, adapters, candidate
        self._prompts, self._scale, self._rule = prompts, scale, rule
        self._note, self._progress = note, progress
        self._notes: list[str] = []
        self._half: dict[str, str] = {}
        self._class_name = ""
        self._numbers = 0
        self._memory, self._dtype = self._choose_dtype()

    def report(self) -> BehaviourReport:
        """Runs everything."""
        kept = self._reference()
        gc.collect()
        yardsticks, controls = self._yardstick(kept)
        gc.collect()
        distances, runtime, fault = self._measure(kept)
        rounding = self._by_kind(kept, kept.exact, kept.target) if self._half else {}
        sets = self._sets(kept, distances[0], yardsticks, controls, rounding)
        greedy = first_divergences(kept.questions, kept.target, distances[1], sets)
        return conclude(
            fault=fault,
            exact=self._candidate.exact,
            sets=sets,
            greedy=greedy,
            facts={
                "output": kept.output,
                "model": self._class_name,
                "runtime": runtime,
                "reference": self._dtype,
                "weights": self._candidate.weights,
                "prompts": self._prompts.origin if _has_text(kept.questions) else "none",
                "memory": self._memory,
                "notes": tuple(self._notes),
            },
        )

    # The reference

    def _choose_dtype(self) -> tuple[int, str]:
        """The memory that the comparison takes, and the dtype of the reference that fits."""
        tensors = [
            t
            for t in open_checkpoint(self._base).tensors.values()
            if t.dtype.endswith(("16", "32", "64"))
        ]
        sizes = [int(np.prod(tensor.shape)) for tensor in tensors]
        widest = max((t.shape[0] for t in tensors if len(t.shape) == 2), default=1)
        answers = 2 * 1024 * widest
        counts = sum(sizes), max(sizes, default=0), answers
        needed, there = predict_memory(*counts, 8), available_memory()
        dtype = "float64"
        if needed > there:
            dtype, wide = "float32", needed
            needed = predict_memory(*counts, 4)
            self._notes.append(
                f"the reference is float32: float64 needs {wide / 1e9:.1f} GB, "
                f"{there / 1e9:.1f} GB are free"
            )
        if self._note is not None:
            self._note(f"comparing logits needs about {needed / 1e9:.1f} GB of memory")
        return needed, dtype

    def _reference(self) -> _Kept:
        """The reference's answers, and the questions with what it says after them."""
        bone, kept = self._attached(self._dtype)
        kept.adapted = form(bone)
        self._half = self._candidate.half_weights(type(bone.model).__name__)
        if self._generates(bone.model, kept):
            kept.questions = _continued(bone.model, kept.questions)
        runner = TorchRunner(bone)
        kept.exact = list(runner.answers(kept.questions, kept.output))
        kept.target = kept.exact
        self._numbers = sum(answer.size for answer in kept.exact)
        if self._progress is not None:
            self._progress.start((4 + bool(self._half)) * 8 * self._numbers)
            self._progress.advance(8 * self._numbers)
        if self._half:
            round_weights(bone.model, self._half)
            kept.target = self._all(runner.answers(kept.questions, kept.output))
        return kept

    def _attached(self, dtype: str) -> tuple[Any, _Kept]:
        """The base as a class that the adapters fit, with them attached; and what it is asked."""
        failure: InputError | None = None
        for name in classes_of(self._base, self._adapters):
            try:
                found = load_model(self._base, name, dtype)
                if found is None:
                    continue
                bone = attach(found.model, self._adapters, self._scale)
            except InputError as error:
                failure = failure or error
                continue
            kept = self._asked(found, bone)
            if kept is not None:
                self._class_name = type(found.model).__name__
                return bone, kept
            failure = _nothing_to_compare(self._base, self._candidate)
            break
        raise failure or _nothing_to_compare(self._base, self._candidate)

    def _asked(self, found: Loaded, bone: Any) -> _Kept | None:
        model = found.model
        brought = {key for adapter in self._adapters for key in adapter.saved}
        check_complete(_needed(found), tuple(brought), self._base)
        tokenizer = load_tokenizer(self._candidate.path, self._candidate.path.parent, self._base)
        questions, notes = make_questions(model, self._base, tokenizer, self._prompts)
        wanted = self._candidate.outputs
        output = torch_runner.find_output(bone, questions[0], wanted)
        if output is None and wanted and model.base_model is not model:
            output = torch_runner.find_output(bone.base_model, questions[0], wanted)
        if output is None:
            return None
        self._notes += [text for text in notes if text not in self._notes]
        return _Kept(questions, output, logits=output.endswith("logits"))

    def _generates(self, model: Any, kept: _Kept) -> bool:
        config = model.config
        return (
            kept.output == "logits"
            and not getattr(config, "is_encoder_decoder", False)
            and bool(getattr(model, "can_generate", lambda: False)())
        )

    # The others

    def _yardstick(self, kept: _Kept) -> tuple[dict[str, Distance], dict[str, Distance]]:
        """float32 torch against the reference; and the base against it."""
        found = load_model(self._base, self._class_name, "float32")
        assert found is not None
        resize(found.model, self._adapters)
        answers = self._answers(TorchRunner(found.model), kept)
        controls = self._by_kind(kept, kept.exact, answers, shared=True)
        del answers
        bone = attach(found.model, self._adapters, self._scale)
        unmeasured = self._dtype == "float32"
        if unmeasured:
            against = kept.exact
            _keep_apart(bone)
        else:
            against = kept.target
            form(bone)
            round_weights(bone.model, self._half)
        answers = self._answers(TorchRunner(bone), kept)
        measured = self._by_kind(kept, against, answers)
        rounding = self._by_kind(kept, kept.exact, kept.target) if self._half else {}
        return {
            name: tolerance.allowed(
                distance,
                rounding.get(name),
                kept.adapted,
                twice=self._rule == "peft",
                unmeasured=unmeasured,
                graph=self._candidate.kind == "onnx",
            )
            for name, distance in measured.items()
        }, controls

    def _measure(
        self, kept: _Kept
    ) -> tuple[tuple[dict[str, Distance], list[Answers]], str, str | None]:
        """The candidate against the reference: distances, its answers, what ran it, what failed."""
        runtime = "torch" if self._candidate.kind != "onnx" else "ONNX Runtime"
        try:
            runner = self._candidate.load(self._base, self._class_name, self._scale)
            runtime = runner.name
            answers = self._answers(runner, kept)
            return (self._by_kind(kept, kept.target, answers), answers), runtime, None
        except ValueError as error:
            if isinstance(error, InputError):
                raise
            return ({}, []), runtime, str(error)

    def _answers(self, runner: Any, kept: _Kept) -> list[Answers]:
        return self._all(runner.answers(kept.questions, kept.output))

    def _all(self, answers: Any) -> list[Answers]:
        found = []
        for each in answers:
            found.append(each)
            if self._progress is not None:
                self._progress.advance(8 * each.size)
        return found

    def _by_kind(
        self,
        kept: _Kept,
        reference: Sequence[Answers],
        others: Sequence[Answers],
        *,
        shared: bool = False,
    ) -> dict[str, Distance]:
        """The distance for each kind of question."""
        found = {}
        for kind in dict.fromkeys(question.kind for question in kept.questions):
            at = [i for i, question in enumerate(kept.questions) if question.kind == kind]
            found[kind] = compare(
                [reference[i] for i in at],
                [others[i] for i in at],
                logits=kept.logits,
                shared=shared,
            )
        return found

    def _sets(
        self,
        kept: _Kept,
        candidate: dict[str, Distance],
        yardsticks: dict[str, Distance],
        controls: dict[str, Distance],
        rounding: dict[str, Distance],
    ) -> tuple[InputSet, ...]:
        sets = []
        for kind, distance in candidate.items():
            at = [i for i, question in enumerate(kept.questions) if question.kind == kind]
            counts = len(at), sum(len(kept.target[i]) for i in at)
            decides = kind != "random" or "text" not in candidate
            sets.append(
                tolerance.judged(
                    kind,
                    decides,
                    counts,
                    distance,
                    yardsticks[kind],
                    controls[kind],
                    rounding.get(kind),
                )
            )
        return tuple(sets)


def _nothing_to_compare(base: Path, candidate: Candidate) -> UsageError:
    return UsageError(
        "the base gives nothing that can be compared with the candidate",
        path=base,
        expected=", ".join(candidate.outputs) or "logits or a last hidden state",
    )


def _continued(model: Any, questions: Sequence[Question]) -> list[Question]:
    """The questions, the first of text (or else random ones) with what the model says after it."""
    kind = questions[0].kind
    chosen = [i for i, question in enumerate(questions) if question.kind == kind][:GREEDY_PROMPTS]
    return [
        torch_runner.extend(q, torch_runner.greedy_tokens(model, q, GREEDY_TOKENS))
        if i in chosen
        else q
        for i, q in enumerate(questions)
    ]


def _has_text(questions: Sequence[Question]) -> bool:
    return any(question.kind == "text" for question in questions)


def _needed(found: Loaded) -> tuple[str, ...]:
    """What a checkpoint lacks of what the model's answer depends on: a pooler never is asked."""
    return tuple(name for name in found.missing if ".pooler." not in f".{name}")


def _keep_apart(bone: Any) -> None:
    """Makes the layers compute base and update apart, not by a weight that is formed and kept."""
    for module in bone.modules():
        if hasattr(module, "bone_block"):
            module.cache_weight = False
