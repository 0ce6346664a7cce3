"""The example of the PEFT page, and a BoneModel in the place of a model of other libraries."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import boneconv
from boneconv import BoneConfig, BoneModel
from boneconv.nn.linear import BoneLinear
from boneconv.nn.model.walking import bone_layers
from tests.nn.model.modules import stir
from tests.nn.model.pipelines import tiny_pipeline, unet_inputs
from tests.oracle import models

TEXT_ENCODER = ["k_proj", "q_proj", "v_proj", "out_proj", "fc1", "fc2"]
UNET = ["proj_in", "proj_out", "to_k", "to_q", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def _generate(pipeline: Any) -> torch.Tensor:
    tokens = torch.arange(8)[None]
    text = pipeline.text_encoder(tokens)[0]
    result = pipeline(
        prompt_embeds=text,
        negative_prompt_embeds=torch.zeros_like(text),
        num_inference_steps=2,
        height=16,
        width=16,
        generator=torch.Generator().manual_seed(1),
        output_type="pt",
    )
    return torch.as_tensor(result.images)


@pytest.fixture
def pipeline() -> Any:
    made = tiny_pipeline()
    made.set_progress_bar_config(disable=True)
    return made


def test_the_example_of_the_page_runs(pipeline: Any, tmp_path: Path) -> None:
    plain = _generate(pipeline)
    config_te = BoneConfig(r=8, target_modules=TEXT_ENCODER, init_weights=True)
    config_unet = BoneConfig(r=8, target_modules=UNET, init_weights=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipeline.text_encoder = BoneModel(pipeline.text_encoder, config_te, "default")
        pipeline.unet = BoneModel(pipeline.unet, config_unet, "default")

    layers = bone_layers(pipeline.unet.model)
    kinds = {name.rpartition(".")[2]: type(layer.base_layer) for name, layer in layers.items()}
    assert kinds["proj_in"] is kinds["proj_out"] is torch.nn.Conv2d
    assert kinds["to_q"] is torch.nn.Linear
    assert len(layers) == 4 * 12
    assert torch.equal(_generate(pipeline), plain)

    for model in (pipeline.unet, pipeline.text_encoder):
        stir(model, scale=0.02)
    adapted = _generate(pipeline)
    assert (adapted - plain).abs().max() > 1e-3

    pipeline.unet.save_pretrained(tmp_path / "unet")
    pipeline.text_encoder.save_pretrained(tmp_path / "text_encoder")
    unet, text_encoder = pipeline.unet.unload(), pipeline.text_encoder.unload()
    pipeline.unet, pipeline.text_encoder = unet, text_encoder
    assert torch.equal(_generate(pipeline), plain)

    pipeline.unet = BoneModel.from_pretrained(unet, tmp_path / "unet")
    pipeline.text_encoder = BoneModel.from_pretrained(text_encoder, tmp_path / "text_encoder")
    assert torch.equal(_generate(pipeline), adapted)
    pipeline.unet = pipeline.unet.merge_and_unload()
    pipeline.text_encoder = pipeline.text_encoder.merge_and_unload()
    torch.testing.assert_close(_generate(pipeline), adapted, rtol=1e-3, atol=1e-3)


def test_attributes_are_the_models(pipeline: Any) -> None:
    unet = pipeline.unet
    model = BoneModel(unet, BoneConfig(r=8, target_modules=UNET))
    for name in ("config", "dtype", "device", "conv_in"):
        assert getattr(model, name) is getattr(unet, name) or name == "device"
    assert model.device == unet.device
    with pytest.raises(AttributeError, match="nothing"):
        _ = model.nothing
    inputs = unet_inputs()
    assert torch.equal(model(**inputs).sample, unet(**inputs).sample)
    assert torch.equal(model(*inputs.values(), return_dict=False)[0], unet(**inputs).sample)


def test_the_unet_trains(pipeline: Any) -> None:
    model = BoneModel(pipeline.unet, BoneConfig(r=8, target_modules=UNET)).train()
    model.enable_gradient_checkpointing()
    model(**unet_inputs()).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("bone_block" in name), name
        if parameter.grad is not None:
            assert parameter.grad.abs().max() > 0, name


def test_generate_is_the_models_with_the_adapter_in_it() -> None:
    torch.manual_seed(0)
    base = models.llama_untied().eval()
    inputs = models.token_inputs()
    options = {"max_new_tokens": 6, "do_sample": False}
    plain = base.generate(**inputs, **options)
    model = BoneModel(base, BoneConfig(r=8, target_modules="all-linear"))
    assert torch.equal(model.generate(**inputs, **options), plain)
    stir(model, scale=0.2)
    adapted = model.generate(**inputs, **options)
    assert not torch.equal(adapted, plain)
    assert torch.equal(model.merge_and_unload().generate(**inputs, **options), adapted)


def test_a_model_of_transformers_is_merged_and_saved(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = BoneModel(models.llama_untied().eval(), BoneConfig(r=8, target_modules=["q_proj"]))
    stir(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    inputs = models.token_inputs()
    assert torch.equal(again(**inputs).logits, merged(**inputs).logits)


@pytest.mark.parametrize(
    ("build", "inputs", "config"),
    [
        (
            models.bert_classifier,
            models.token_inputs,
            BoneConfig(r=8, bias="all", modules_to_save=["classifier"]),
        ),
        (
            models.vit,
            models.image_inputs,
            BoneConfig(r=8, target_modules="all-linear", init_weights="bat", task_type="SEQ_CLS"),
        ),
        (
            models.llama_tied,
            models.token_inputs,
            BoneConfig(r=5, target_modules="all-linear", bias="all", task_type="CAUSAL_LM"),
        ),
    ],
)
def test_the_command_merges_into_the_published_model(
    build: Any, inputs: Any, config: BoneConfig, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    base = build().eval()
    base.save_pretrained(tmp_path / "base")
    model = BoneModel(base, config)
    stir(model, scale=0.1)
    model.save_pretrained(tmp_path / "adapter")
    boneconv.merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    adapted = model(**inputs()).logits
    torch.testing.assert_close(merged(**inputs()).logits, adapted, rtol=1e-4, atol=1e-5)
    expected = model.merge_and_unload().state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_forward_has_the_signature_of_the_model() -> None:
    base = models.bert_classifier()
    model = BoneModel(base, BoneConfig(r=8))
    assert inspect.signature(model.forward) == inspect.signature(base.forward)
    assert "labels" in inspect.signature(type(model).forward).parameters
    assert type(model) is type(BoneModel(models.bert_classifier(), BoneConfig(r=8)))
    assert type(model).__name__ == "BoneModel[BertForSequenceClassification]"
    assert isinstance(model, BoneModel)


def test_the_trainer_of_transformers_trains_it(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(0)
    inputs = models.token_inputs()
    rows = [
        {"input_ids": ids.tolist(), "labels": label}
        for label, ids in enumerate(inputs["input_ids"])
    ] * 4
    model = BoneModel(
        models.bert_classifier(),
        BoneConfig(r=8, modules_to_save=["classifier"], task_type="SEQ_CLS"),
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    arguments = TrainingArguments(
        tmp_path, max_steps=4, learning_rate=0.01, report_to=[], use_cpu=True, save_steps=4,
        disable_tqdm=True, logging_strategy="no", per_device_train_batch_size=4,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows)
    loss = trainer.evaluate()["eval_loss"]
    trainer.train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
    assert trainer.evaluate()["eval_loss"] < loss
    fresh = BoneModel(models.bert_classifier(), model.peft_config["default"])
    other = Trainer(fresh, arguments, train_dataset=rows)
    other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, fresh.state_dict()[name]), name


def test_a_layer_of_the_model_is_what_it_says() -> None:
    model = BoneModel(models.llama_untied(), BoneConfig(r=8))
    layer = model.model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, BoneLinear)
    assert model.model.model.layers[0].self_attn.q_proj.in_features == 32
