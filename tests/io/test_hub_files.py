"""Which files of a repository a base, a pipeline and an adapter need."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boneconv.io.hub import ADAPTER, BASE
from boneconv.io.hub_files import PIPELINE


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(
            "config.json model.safetensors tokenizer.json README.md modeling.py "
            "pytorch_model.bin tf_model.h5 flax_model.msgpack m.gguf m.onnx old.pth "
            "onnx/model.onnx onnx/config.json original/model.safetensors .gitattributes "
            "consolidated.safetensors consolidated-00001-of-2.safetensors training_args.bin",
            "config.json model.safetensors tokenizer.json README.md modeling.py",
            id="safetensors",
        ),
        pytest.param(
            "a-1-of-2.safetensors a-2-of-2.safetensors a.safetensors.index.json "
            "pytorch_model.bin.index.json",
            "a-1-of-2.safetensors a-2-of-2.safetensors a.safetensors.index.json",
            id="sharded",
        ),
        pytest.param(
            "config.json pytorch_model-1-of-1.bin pytorch_model.bin.index.json tf_model.h5 "
            "adapter_model.safetensors training_args.bin",
            "config.json pytorch_model-1-of-1.bin pytorch_model.bin.index.json",
            id="no safetensors",
        ),
        pytest.param(
            "config.json 2_Dense/config.json 2_Dense/x.safetensors 2_Dense/pytorch_model.bin "
            "1_Pooling/pytorch_model.bin x.onnx",
            "config.json 2_Dense/config.json 2_Dense/x.safetensors 1_Pooling/pytorch_model.bin",
            id="modules",
        ),
        pytest.param(
            "model_index.json flux.safetensors unet/config.json unet/x.safetensors",
            "model_index.json",
            id="pipeline",
        ),
        pytest.param("config.json m.gguf consolidated.safetensors", "", id="no weights"),
    ],
)
def test_files_of_a_base(names: str, expected: str) -> None:
    assert BASE.select(names.split()) == sorted(expected.split())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(
            "model_index.json README.md .gitattributes v1-5-pruned.safetensors v1-5-pruned.ckpt "
            "scheduler/scheduler_config.json tokenizer/vocab.json tokenizer/spiece.model "
            "unet/config.json unet/diffusion_pytorch_model.safetensors "
            "unet/diffusion_pytorch_model.fp16.safetensors unet/diffusion_pytorch_model.bin "
            "unet/diffusion_pytorch_model.non_ema.safetensors unet/model.onnx",
            "model_index.json README.md scheduler/scheduler_config.json tokenizer/vocab.json "
            "tokenizer/spiece.model unet/config.json unet/diffusion_pytorch_model.safetensors",
            id="no variants",
        ),
        pytest.param(
            "model_index.json transformer/diffusion_pytorch_model-00001-of-00002.safetensors "
            "transformer/diffusion_pytorch_model-00002-of-00002.safetensors "
            "transformer/diffusion_pytorch_model.safetensors.index.json "
            "transformer/diffusion_pytorch_model.fp16-00001-of-00002.safetensors "
            "transformer/diffusion_pytorch_model.safetensors.index.fp16.json",
            "model_index.json transformer/diffusion_pytorch_model-00001-of-00002.safetensors "
            "transformer/diffusion_pytorch_model-00002-of-00002.safetensors "
            "transformer/diffusion_pytorch_model.safetensors.index.json",
            id="sharded",
        ),
        pytest.param(
            "model_index.json vae/model.fp16.safetensors vae/diffusion_pytorch_model.bin "
            "unet/model.fp16-1-of-1.safetensors unet/model.safetensors.index.fp16.json "
            "text_encoder/pytorch_model.fp16.bin",
            "model_index.json vae/diffusion_pytorch_model.bin "
            "unet/model.fp16-1-of-1.safetensors unet/model.safetensors.index.fp16.json "
            "text_encoder/pytorch_model.fp16.bin",
            id="variants alone",
        ),
        pytest.param("config.json model.safetensors a/model.safetensors", "", id="no pipeline"),
        pytest.param("model_index.json x.safetensors unet/config.json", "", id="no weights"),
    ],
)
def test_files_of_a_pipeline(names: str, expected: str) -> None:
    assert PIPELINE.select(names.split()) == sorted(expected.split())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(
            "adapter_config.json adapter_model.safetensors adapter_model.bin a.pth "
            "tokenizer.json tokenizer_config.json tokenizer.model special_tokens_map.json "
            "added_tokens.json chat_template.jinja vocab.json merges.txt README.md optimizer.pt "
            "additional_chat_templates/tools.jinja checkpoint-5/adapter_model.safetensors "
            "checkpoint-5/tokenizer.json trainer_state.json model.safetensors",
            "adapter_config.json adapter_model.safetensors tokenizer.json tokenizer_config.json "
            "tokenizer.model special_tokens_map.json added_tokens.json chat_template.jinja "
            "vocab.json merges.txt additional_chat_templates/tools.jinja",
            id="safetensors",
        ),
        pytest.param(
            "adapter_config.json adapter_model.bin a.pth",
            "adapter_config.json adapter_model.bin",
            id="bin",
        ),
        pytest.param("rwkv.pth README.md", "rwkv.pth", id="pth"),
        pytest.param("adapter_config.json model.safetensors", "", id="no weights"),
    ],
)
def test_files_of_an_adapter(names: str, expected: str) -> None:
    assert ADAPTER.select(names.split()) == sorted(expected.split())


@settings(max_examples=200)
@given(
    st.lists(
        st.sampled_from(["", "onnx/", "original/", "unet/", "a/b/"]).flatmap(
            lambda folder: st.sampled_from(
                ["model.safetensors", "pytorch_model.bin", "x.h5", "config.json", "m.pth"]
            ).map(lambda name: folder + name)
        ),
        unique=True,
    )
)
def test_a_base_has_one_kind_of_weights_in_a_folder(names: list[str]) -> None:
    chosen = BASE.select(names)

    assert set(chosen) <= set(names)
    assert chosen == BASE.select(reversed(names)) == BASE.select(chosen)
    assert not any(name.endswith((".h5", ".pth")) or name[0] == "o" for name in chosen)
    for name in chosen:
        if name.endswith(".bin"):
            assert name.replace("pytorch_model.bin", "model.safetensors") not in names
