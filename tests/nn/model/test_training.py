"""Training under transformers' Trainer and under accelerate: what trains, what is saved, resuming.

An interrupted run ends by an exception, in the middle of the step after a checkpoint or later; all
of it is then built anew, from the base and the checkpoint.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import Trainer, TrainerCallback, TrainingArguments

from boneconv import BoneConfig, BoneModel
from boneconv.nn.model.walking import bone_layers
from tests.nn.model.causal import CONFIGS, TARGETS, adapted, causal, tokens, trainable

STEPS = 8
#: Both variants, and one whose own dropout draws random numbers.
RUNS = CONFIGS | {
    "miss": BoneConfig(peft_type="MISS", r=4, target_modules=TARGETS, miss_dropout=0.2)
}


class InterruptedRunError(Exception):
    """What ends a run from outside."""


class Stop(TrainerCallback):
    """Ends a run at the beginning of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if state.global_step == self.step:
            raise InterruptedRunError


def _rows() -> list[dict[str, list[int]]]:
    return [{"input_ids": row, "labels": row} for row in tokens(20).tolist()]


def _model(run: str) -> BoneModel:
    return BoneModel(causal(dropout=0.1), RUNS[run], "default")


def _trainer(folder: Path, model: torch.nn.Module, *callbacks: Any, **options: Any) -> Trainer:
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "save_steps": 3,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    arguments = TrainingArguments(folder, **settings | options)
    rows = _rows()
    return Trainer(
        model, arguments, train_dataset=rows, eval_dataset=rows, callbacks=list(callbacks)
    )


def _curve(trainer: Trainer) -> list[tuple[float, float, float]]:
    return [
        (each["loss"], each["grad_norm"], each["learning_rate"])
        for each in trainer.state.log_history
        if "loss" in each
    ]


def _disturb() -> None:
    """Random numbers of another process."""
    random.seed(99)
    np.random.seed(99)
    torch.manual_seed(99)


# transformers


@pytest.mark.parametrize("run", CONFIGS)
def test_trainer_trains_new_parameters_alone_and_the_loss_falls(run: str, tmp_path: Path) -> None:
    model = _model(run)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = _trainer(tmp_path, model)
    assert trainer.label_names == ["labels"]
    trainer.train()
    curve = _curve(trainer)
    assert len(curve) == STEPS
    assert curve[-1][0] < curve[0][0] - 0.2
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert moved == set(trainable(model)) == {n for n in before if ".bone_block." in n}


@pytest.mark.parametrize("run", [*CONFIGS, pytest.param("miss", marks=pytest.mark.slow)])
def test_a_run_of_trainer_interrupted_and_resumed_gives_the_curve_of_a_whole_one(
    run: str, tmp_path: Path
) -> None:
    whole = _trainer(tmp_path / "whole", _model(run))
    whole.train()

    first = _trainer(tmp_path / "parts", _model(run), Stop(5))
    with pytest.raises(InterruptedRunError):
        first.train()
    assert len(_curve(first)) == 5
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["checkpoint-3"]

    _disturb()
    second = _trainer(tmp_path / "parts", _model(run))
    second.train(resume_from_checkpoint=True)
    assert _curve(second) == _curve(whole)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


@pytest.mark.slow
def test_runs_with_one_seed_are_one_run(tmp_path: Path) -> None:
    curves = []
    for part in ("a", "b"):
        _disturb()
        trainer = _trainer(tmp_path / part, _model("bone"), save_strategy="no", max_steps=3)
        trainer.train()
        curves.append(_curve(trainer))
    assert curves[0] == curves[1]
    other = _trainer(tmp_path / "c", _model("bone"), save_strategy="no", max_steps=3, seed=1)
    other.train()
    assert _curve(other) != curves[0]


def _names(checkpoint: Path) -> set[str]:
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_checkpoint_of_trainer_holds_the_state_dict(tmp_path: Path) -> None:
    model = _model("bone")
    _trainer(tmp_path, model, max_steps=3).train()
    assert _names(tmp_path / "checkpoint-3") == set(model.state_dict())
    assert "model.model.embed_tokens.weight" in model.state_dict()


@pytest.mark.parametrize("run", CONFIGS)
def test_checkpoints_without_the_base_resume_too(run: str, tmp_path: Path) -> None:
    def small() -> BoneModel:
        model = _model(run)
        model.base_in_state_dict = False
        return model

    whole = _trainer(tmp_path / "whole", _model(run))
    whole.train()
    with pytest.raises(InterruptedRunError):
        _trainer(tmp_path / "parts", small(), Stop(4)).train()
    assert _names(tmp_path / "parts" / "checkpoint-3") == set(trainable(small()))
    _disturb()
    second = _trainer(tmp_path / "parts", small())
    second.train(resume_from_checkpoint=True)
    assert _curve(second) == _curve(whole)


@pytest.mark.parametrize("run", CONFIGS)
def test_the_adapter_is_saved_and_loaded_after_training(run: str, tmp_path: Path) -> None:
    model = _model(run)
    trainer = _trainer(tmp_path / "run", model, save_strategy="no", max_steps=3)
    trainer.train()
    trainer.model.save_pretrained(tmp_path / "adapter")
    again = BoneModel.from_pretrained(causal(), tmp_path / "adapter")
    inputs = tokens(2)
    assert torch.equal(again(inputs).logits, model.eval()(inputs).logits)


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path: Path) -> None:
    trainer = _trainer(
        tmp_path, _model("bone"), max_steps=6, save_steps=2, eval_steps=2, eval_strategy="steps",
        load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer.train()
    losses = [each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each]
    assert max(losses) == losses[0] > losses[-1]
    assert trainer.evaluate()["eval_loss"] == losses[0]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("run", CONFIGS)
def test_checkpointed_activations_give_the_same_curve(
    run: str, reentrant: bool, tmp_path: Path
) -> None:
    curves = []
    calls: list[int] = []
    for checkpointing in (False, True):
        model = BoneModel(causal(), CONFIGS[run])
        layer = next(iter(bone_layers(model).values()))
        count = [0]
        layer.register_forward_pre_hook(lambda *_, count=count: count.__setitem__(0, count[0] + 1))
        trainer = _trainer(
            tmp_path / str(checkpointing), model, save_strategy="no", max_steps=3,
            gradient_checkpointing=checkpointing,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        )  # fmt: skip
        trainer.train()
        curves.append(_curve(trainer))
        calls.append(count[0])
    assert calls == [3, 6]
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)


def test_gradients_are_accumulated_and_clipped(tmp_path: Path) -> None:
    curves = []
    for size, times in ((4, 1), (2, 2)):
        trainer = _trainer(
            tmp_path / str(size), BoneModel(causal(), CONFIGS["bone"]), save_strategy="no",
            max_steps=3, per_device_train_batch_size=size, gradient_accumulation_steps=times,
            max_grad_norm=0.5,
        )  # fmt: skip
        trainer.train()
        curves.append(_curve(trainer))
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


@pytest.mark.parametrize("run", CONFIGS)
def test_trainer_trains_in_bfloat16_autocast(run: str, tmp_path: Path) -> None:
    model = BoneModel(causal(), CONFIGS[run])
    trainer = _trainer(tmp_path, model, save_strategy="no", bf16=True)
    trainer.train()
    curve = _curve(trainer)
    assert curve[-1][0] < curve[0][0] - 0.2
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


# accelerate


@pytest.fixture
def accelerator() -> Iterator[Any]:
    """Makes accelerators; none of what they share is left behind."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    def reset() -> None:
        for state in (AcceleratorState, PartialState, GradientState):
            state._reset_state()

    def make() -> Accelerator:
        reset()
        return Accelerator(cpu=True)

    yield make
    reset()


class Loop:
    """A training loop as accelerate's documentation has it."""

    def __init__(self, accelerator: Any, run: str) -> None:
        model = _model(run).train()
        optimizer = torch.optim.AdamW(list(trainable(model).values()), lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
        self.accelerator = accelerator
        self.model, self.optimizer, self.scheduler = accelerator.prepare(
            model, optimizer, scheduler
        )

    def steps(self, first: int, last: int) -> list[float]:
        losses = []
        for step in range(first, last):
            batch = tokens(4, seed=step)
            loss = self.model(input_ids=batch, labels=batch).loss
            self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


@pytest.mark.parametrize("run", RUNS)
def test_accelerate_saves_and_resumes_exactly(run: str, accelerator: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = Loop(accelerator(), run)
    torch.manual_seed(4)
    expected = whole.steps(0, STEPS)
    assert len(set(expected)) == STEPS

    first = Loop(accelerator(), run)
    torch.manual_seed(4)
    before = first.steps(0, 3)
    first.accelerator.save_state(str(tmp_path / "state"))
    first.steps(3, 5)

    _disturb()
    second = Loop(accelerator(), run)
    second.accelerator.load_state(str(tmp_path / "state"))
    assert before + second.steps(3, STEPS) == expected
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_accelerate_unwraps_the_model_for_saving(accelerator: Any, tmp_path: Path) -> None:
    made = accelerator()
    loop = Loop(made, "bone")
    loop.steps(0, 2)
    model = made.unwrap_model(loop.model)
    assert isinstance(model, BoneModel)
    model.save_pretrained(tmp_path, state_dict=made.get_state_dict(loop.model))
    again = BoneModel.from_pretrained(causal(), tmp_path)
    inputs = tokens(2)
    assert torch.equal(again(inputs).logits, model.eval()(inputs).logits)


def test_a_model_made_by_a_function_with_adapters_trains(tmp_path: Path) -> None:
    arguments = TrainingArguments(
        tmp_path, max_steps=2, use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True
    )
    trainer = Trainer(
        args=arguments, train_dataset=_rows(), model_init=lambda: adapted("bone", dropout=0.1)
    )
    trainer.train()
    assert all(value.abs().max() > 0 for value in trainable(trainer.model).values())
