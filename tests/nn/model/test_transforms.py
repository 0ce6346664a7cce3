"""Whole models under torch.compile, torch.export, checkpointed activations and autocast."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from boneconv import BoneConfig, BoneModel
from tests.nn.model.causal import CONFIGS, TARGETS, causal, tokens, trainable
from tests.nn.model.modules import stir
from tests.oracle import models

KINDS = {
    **CONFIGS,
    "mini": BoneConfig(
        peft_type="MISS", r=4, target_modules=TARGETS, init_weights="mini", mini_r=4
    ),
    "bat in": BoneConfig(r=16, target_modules=TARGETS, init_weights="bat", axis="in"),
}
#: Adapters by name, all of them active, in this order.
STACKS = {kind: {"default": config} for kind, config in KINDS.items()} | {
    "bone, bat": {"one": KINDS["bone"], "two": KINDS["bat"]}
}


def _model(stack: str, base: torch.nn.Module | None = None) -> BoneModel:
    """A model in training mode with adapters that do something."""
    configs = STACKS[stack]
    model = BoneModel(causal() if base is None else base, configs, next(iter(configs)))
    model.set_adapter(list(configs))
    for name in configs:
        stir(model, name, scale=0.05)
    return model.train()


def _loss(model: Any) -> torch.Tensor:
    batch = tokens(2)
    loss: torch.Tensor = model(input_ids=batch, labels=batch).loss
    return loss


def _gradients(model: BoneModel, run: Any = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients of what trains, which are taken off the model."""
    loss = _loss(model if run is None else run)
    loss.backward()
    found = {}
    for name, parameter in trainable(model).items():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad, None
    assert all(p.grad is None for p in model.parameters())
    return loss.detach(), found


def _close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerance: float
) -> None:
    assert set(found) == set(expected)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(found[name], gradient, **tolerance)


# torch.compile


def _compiles(backend: str, stack: str) -> None:
    torch.compiler.reset()
    model = _model(stack, causal(layers=1))
    loss, gradients = _gradients(model)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    compiled_loss, found = _gradients(model, compiled)
    torch.testing.assert_close(compiled_loss, loss, rtol=1e-5, atol=1e-5)
    _close(found, gradients, rtol=1e-3, atol=1e-5)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(
            compiled(tokens(3)).logits, model(tokens(3)).logits, rtol=1e-4, atol=1e-4
        )


@pytest.mark.slow
def test_a_model_compiles_as_one_graph() -> None:
    _compiles("aot_eager", "bone, bat")


@pytest.mark.slow
@pytest.mark.parametrize("stack", KINDS)
def test_a_model_with_one_adapter_compiles_as_one_graph(stack: str) -> None:
    _compiles("aot_eager", stack)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("stack", ["bone", "bat"])
def test_a_model_compiles_to_machine_code(stack: str) -> None:
    _compiles("inductor", stack)


@pytest.mark.slow
def test_a_compiled_model_follows_its_adapters() -> None:
    torch.compiler.reset()
    model = _model("bone, bat", causal(layers=1)).eval()
    compiled = torch.compile(model, backend="eager")
    inputs = tokens(2)

    def check() -> torch.Tensor:
        with torch.no_grad():
            logits: torch.Tensor = compiled(inputs).logits
            torch.testing.assert_close(logits, model(inputs).logits, rtol=1e-5, atol=1e-5)
        return logits

    both = check()
    model.set_adapter("one")
    one = check()
    with model.disable_adapters():
        none = check()
        with torch.no_grad():
            torch.testing.assert_close(
                none, causal(layers=1).eval()(inputs).logits, rtol=1e-5, atol=1e-5
            )
    stir(model, "one", scale=0.05)
    other = check()
    model.merge_adapter()
    torch.testing.assert_close(check(), other, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    results = [both, one, none, other]
    assert all(not torch.equal(a, b) for i, a in enumerate(results) for b in results[:i])


@pytest.mark.slow
def test_a_compiled_model_trains_as_the_plain_one() -> None:
    torch.compiler.reset()
    curves = []
    for compiled in (False, True):
        model = BoneModel(causal(layers=1), CONFIGS["bat"]).train()
        run = torch.compile(model, backend="aot_eager") if compiled else model
        optimizer = torch.optim.AdamW(list(trainable(model).values()), lr=0.01)
        losses = []
        for _ in range(4):
            loss = _loss(run)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    assert curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


# torch.export


@pytest.mark.parametrize("stack", STACKS)
def test_a_model_is_exported(stack: str) -> None:
    model = _model(stack).eval()
    inputs = {"input_ids": tokens(2)}
    exported = torch.export.export(model, (), inputs, strict=False)
    again = exported.module()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)
    stored = set(exported.state_dict)
    assert set(trainable(model)) <= stored
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert not [name for name in called if "bone" in name.lower()]


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("stack", ["bone", "bat"])
def test_an_exported_model_takes_any_number_of_tokens(stack: str, strict: bool) -> None:
    model = _model(stack).eval()
    length = torch.export.Dim("length", min=4, max=24)
    exported = torch.export.export(
        model,
        (),
        {"input_ids": tokens(2)},
        dynamic_shapes={"input_ids": {1: length}},
        strict=strict,
    )
    for number in (4, 12, 24):  # BAT has another form for less than 16 tokens
        inputs = {"input_ids": tokens(2, number)}
        with torch.no_grad():
            torch.testing.assert_close(
                exported.module()(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-4
            )


# Checkpointed activations


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("stack", STACKS)
def test_checkpointed_activations_give_the_same_gradients(stack: str, reentrant: bool) -> None:
    model = _model(stack)
    loss, gradients = _gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = [0]
    layer = model.model.model.layers[0].mlp.up_proj
    layer.register_forward_pre_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    checkpointed, found = _gradients(model)
    assert calls == [2]
    assert torch.equal(checkpointed, loss)
    _close(found, gradients, rtol=0, atol=0)
    model.gradient_checkpointing_disable()
    _close(_gradients(model)[1], gradients, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("build", "inputs", "targets"),
    [
        (models.bert_classifier, models.token_inputs, ["query", "dense"]),
        (models.vit, models.image_inputs, ["q_proj", "fc1"]),
    ],
)
@pytest.mark.parametrize("kind", ["bone", "bat"])
def test_checkpointed_activations_of_other_models(
    build: Any, inputs: Any, targets: list[str], kind: str
) -> None:
    torch.manual_seed(0)
    init = "bat" if kind == "bat" else True
    model = BoneModel(build(), BoneConfig(r=8, target_modules=targets, init_weights=init))
    stir(model, scale=0.05)
    model.eval()  # no dropout
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                if hasattr(module, "dropout_prob"):
                    module.dropout_prob = 0.0
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**inputs()).logits.square().mean().backward()
        found.append({n: p.grad for n, p in trainable(model).items()})
        model.zero_grad()
    _close(found[1], found[0], rtol=1e-4, atol=1e-6)


# Autocast


@pytest.mark.parametrize("stack", STACKS)
def test_autocast_trains_in_bfloat16_near_float32(stack: str) -> None:
    model = _model(stack)
    loss, gradients = _gradients(model)
    with torch.autocast("cpu", torch.bfloat16):
        half = model(tokens(2)).logits
    assert half.dtype == torch.bfloat16

    def cast(**inputs: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs)

    half_loss, found = _gradients(model, cast)
    torch.testing.assert_close(half_loss.float(), loss, rtol=0.03, atol=0.03)
    for name, gradient in gradients.items():
        assert found[name].dtype == torch.float32
        angle = torch.cosine_similarity(found[name].flatten(), gradient.flatten(), dim=0)
        assert angle > 0.98, name


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["bone", "bat"])
def test_autocast_under_checkpointed_activations_and_a_compiler(stack: str) -> None:
    torch.compiler.reset()
    model = _model(stack, causal(layers=1))

    def losses(run: Any) -> Any:
        def cast(**inputs: torch.Tensor) -> Any:
            with torch.autocast("cpu", torch.bfloat16):
                return run(**inputs)

        return cast

    loss, gradients = _gradients(model, losses(model))
    compiled_loss, compiled = _gradients(
        model, losses(torch.compile(model, backend="aot_eager", fullgraph=True))
    )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    checkpointed_loss, checkpointed = _gradients(model, losses(model))
    assert torch.equal(checkpointed_loss, loss)
    _close(checkpointed, gradients, rtol=0, atol=0)
    torch.testing.assert_close(compiled_loss, loss, rtol=0.02, atol=0.02)
    for name, gradient in gradients.items():
        angle = torch.cosine_similarity(compiled[name].flatten(), gradient.flatten(), dim=0)
        assert angle > 0.98, name


@pytest.mark.parametrize("stack", STACKS)
def test_a_model_in_bfloat16_trains_with_blocks_in_float32(stack: str) -> None:
    base = causal().to(torch.bfloat16)
    configs = STACKS[stack]
    model = BoneModel(base, configs, next(iter(configs)), dtype=torch.float32)
    model.set_adapter(list(configs))
    assert {p.dtype for p in trainable(model).values()} == {torch.float32}
    optimizer = torch.optim.AdamW(list(trainable(model).values()), lr=0.01)
    losses = []
    for _ in range(5):
        loss = _loss(model.train())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert all(p.dtype == torch.bfloat16 for p in base.parameters() if not p.requires_grad)
