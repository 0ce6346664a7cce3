"""Components of a diffusers pipeline: merged as checkpoints of their own, all else as it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from boneconv.errors import (
    BoneconvError,
    FormatError,
)
from boneconv.merging import merge
from tests.builders import (
    BF16,
    F32,
    HIDDEN,
    base_tensors,
    grid,
    make_adapter,
    merged,
    same_bits,
    snapshot,
    tree_digest,
    unpack,
)
from tests.merging.components import (
    Q0,
    UNET_FILE,
    pipeline,
    text_adapter,
    unet_adapter,
    unet_tensors,
    write_files,
)

__all__ = ["pipeline", "text_adapter", "unet_adapter"]


# --- what is written --------------------------------------------------------------------------


def test_the_component_is_merged_and_all_else_is_copied(
    pipeline: Path, unet_adapter: Path, tmp_path: Path
) -> None:
    before = snapshot(pipeline)
    result = merge(pipeline, unet_adapter, tmp_path / "out", component="unet")
    found = snapshot(tmp_path / "out")
    assert set(found) == {*before, "boneconv.json"}
    changed = {name for name in before if found[name] != before[name]}
    assert changed == {"README.md", f"unet/{UNET_FILE}"}
    assert result.left_out == result.notes == ()
    assert result.counts == {"copy": 2, "cast": 0, "merge": 1, "replace": 0, "add": 0}
    assert result.nbytes == sum(map(len, found.values()))
    assert snapshot(pipeline) == before


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_a_1x1_convolution_is_a_linear_weight(pipeline: Path, tmp_path: Path, variant: str) -> None:
    shape = {"bone": (4, HIDDEN), "bat": (HIDDEN // 4, 4, 4)}[variant]
    block = grid(shape, F32, 7)
    adapter = make_adapter(tmp_path / "a", variant, blocks={"mid.proj_in": block})
    merge(pipeline, adapter, tmp_path / "out", component="unet")
    found = unpack(tmp_path / "out" / "unet" / UNET_FILE)
    expected = unet_tensors() | {
        "mid.proj_in.weight": merged(unet_tensors()["mid.proj_in.weight"], block, variant)
    }
    assert found.keys() == expected.keys()
    assert all(same_bits(found[name], expected[name]) for name in found)


def test_a_wider_convolution_is_none(pipeline: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", blocks={"conv_in": grid((4, 8), F32)})
    with pytest.raises(BoneconvError, match=r"'conv_in.weight' is no linear weight"):
        merge(pipeline, adapter, tmp_path / "out", component="unet")


@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": "float32"}, {"max_shard_size": "1kB"}, {"scale": 0.5}, {"workers": 1}],
    ids=str,
)
def test_the_bytes_are_those_of_merging_the_components_alone(
    pipeline: Path, unet_adapter: Path, text_adapter: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    adapters = {"unet": unet_adapter, "text_encoder": text_adapter, "text_encoder_2": text_adapter}
    others = {name: path for name, path in adapters.items() if name != "unet"}
    out = tmp_path / "out"
    merge(pipeline, unet_adapter, out, component="unet", components=others, **options)
    record = json.loads((out / "boneconv.json").read_text())
    for name, adapter in adapters.items():
        alone = merge(pipeline / name, adapter, tmp_path / name, card=False, **options)
        found = snapshot(alone.out)
        del found["boneconv.json"]
        assert snapshot(out / name) == found
        tensors = json.loads(alone.record.read_text())["tensors"]
        prefix = f"{name}/"
        assert tensors == {
            tensor.removeprefix(prefix): entry
            for tensor, entry in record["tensors"].items()
            if tensor.startswith(prefix)
        }


def test_adapters_of_one_component_are_stacked_in_order(
    pipeline: Path, text_adapter: Path, tmp_path: Path
) -> None:
    bone = make_adapter(tmp_path / "bone")
    merge(
        pipeline,
        text_adapter,
        tmp_path / "out",
        component="text_encoder",
        more=[bone],
        components={"text_encoder_2": [bone, text_adapter]},
    )
    for name, order in (
        ("text_encoder", [text_adapter, bone]),
        ("text_encoder_2", [bone, text_adapter]),
    ):
        merge(pipeline / name, order[0], tmp_path / name, more=order[1:], card=False)
        alone = snapshot(tmp_path / name)
        assert {**snapshot(tmp_path / "out" / name), "boneconv.json": b""} == {
            **alone,
            "boneconv.json": b"",
        }


# --- the record -------------------------------------------------------------------------------


def test_the_record_tells_tensors_of_one_name_apart(
    pipeline: Path, text_adapter: Path, tmp_path: Path
) -> None:
    merge(
        pipeline,
        text_adapter,
        tmp_path / "out",
        component="text_encoder_2",
        components={"text_encoder": make_adapter(tmp_path / "bone")},
    )
    record = json.loads((tmp_path / "out" / "boneconv.json").read_text())
    names = [
        f"{folder}/{name}"
        for folder in ("text_encoder", "text_encoder_2")
        for name in base_tensors()
    ]
    assert sorted(record["tensors"]) == sorted(names)
    assert record["tensors"][f"text_encoder_2/{Q0}"] == {
        "action": "merge",
        "base_digest": tree_digest("F32", base_tensors(F32, seed=5)[Q0]),  # type: ignore[arg-type]
        "digest": tree_digest(
            "F32", unpack(tmp_path / "out" / "text_encoder_2" / "model.safetensors")[Q0]
        ),
    }
    one = record["tensors"][f"text_encoder/{Q0}"]
    assert one["base_digest"] == tree_digest("BF16", base_tensors(BF16)[Q0])  # type: ignore[arg-type]
    said = [(entry["component"], entry["variant"]) for entry in record["adapters"]]
    assert said == [("text_encoder_2", "bat"), ("text_encoder", "bone")]
    assert record["left_out"] == []
    assert record["record_version"] == 1


def test_the_card_says_what_went_where(
    pipeline: Path, unet_adapter: Path, text_adapter: Path, tmp_path: Path
) -> None:
    components = {"text_encoder": text_adapter}
    merge(pipeline, unet_adapter, tmp_path / "out", component="unet", components=components)
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n")
    assert "| local adapter 1 (unet) | bone | 4 | 1 |" in card
    assert "| local adapter 2 (text_encoder) | bat | 4 | 1 |" in card
    merge(pipeline, unet_adapter, tmp_path / "none", component="unet", card=False)
    name = "README.md"
    assert (tmp_path / "none" / name).read_bytes() == (pipeline / name).read_bytes()


# --- other files ------------------------------------------------------------------------------


def test_stale_copies_are_left_out_and_listed_and_no_others(
    pipeline: Path, unet_adapter: Path, tmp_path: Path
) -> None:
    stale = [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/model.onnx",
        "v1-5-pruned.ckpt",
        "v1-5-pruned.safetensors",
        "onnx/unet/config.json",
    ]
    kept = ["vae/model.onnx", "text_encoder/pytorch_model.bin", "vae_1_0/x.safetensors", "x/y.py"]
    write_files(pipeline, dict.fromkeys([*stale, *kept, ".gitattributes", ".cache/x"], "x"))
    result = merge(pipeline, unet_adapter, tmp_path / "out", component="unet")
    assert set(result.left_out) == set(stale)
    (note,) = result.notes
    assert note.startswith("left out: ")
    record = json.loads((tmp_path / "out" / "boneconv.json").read_text())
    assert set(record["left_out"]) == set(stale)
    hidden = {".gitattributes", ".cache/x"}
    expected = {*snapshot(pipeline), "boneconv.json"} - set(stale) - hidden
    assert set(snapshot(tmp_path / "out")) == expected


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege there")
def test_links(pipeline: Path, unet_adapter: Path, tmp_path: Path) -> None:
    """Those of a component are followed inside the pipeline; others are listed, or refused."""
    (pipeline / "vae").rename(pipeline / "shared")
    (pipeline / "vae").symlink_to("shared")
    (pipeline / "more").symlink_to("scheduler")
    result = merge(pipeline, unet_adapter, tmp_path / "out", component="unet")
    assert result.left_out == ("more",)
    assert snapshot(tmp_path / "out" / "vae") == snapshot(pipeline / "vae")
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    (pipeline / "tokenizer" / "stolen").symlink_to(tmp_path / "for-unet" / "adapter_config.json")
    with pytest.raises(FormatError, match="a link leads out of its folder"):
        merge(pipeline, unet_adapter, tmp_path / "again", component="unet")
    (pipeline / "tokenizer" / "stolen").unlink()
    (pipeline / "unet").rename(tmp_path / "unet")
    (pipeline / "unet").symlink_to(tmp_path / "unet")
    with pytest.raises(FormatError, match="a link leads out of its folder"):
        merge(pipeline, unet_adapter, tmp_path / "again", component="unet")


def test_the_pipeline_s_tokenizer_stays(pipeline: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "a", files={"tokenizer.json": "{}"})
    result = merge(pipeline, adapter, tmp_path / "out", component="text_encoder")
    assert not (tmp_path / "out" / "text_encoder" / "tokenizer.json").exists()
    assert result.notes == (
        f"{adapter}: left out, since the pipeline keeps its own tokenizer: tokenizer.json",
    )


def test_the_dtype_is_that_of_the_merged_components(
    pipeline: Path, unet_adapter: Path, tmp_path: Path
) -> None:
    before = snapshot(pipeline)
    result = merge(pipeline, unet_adapter, tmp_path / "out", component="unet", dtype="bfloat16")
    found = snapshot(tmp_path / "out")
    assert {t.dtype for t in unpack(tmp_path / "out" / "unet" / UNET_FILE).values()} == {BF16}
    changed = {name for name in before if found[name] != before[name]}
    assert changed == {"README.md", f"unet/{UNET_FILE}"}  # unet/config.json speaks of no dtype
    assert result.notes == ("the dtype is that of unet; all else of the pipeline keeps its own",)


# --- variants ---------------------------------------------------------------------------------


def test_a_component_that_is_there_as_a_variant_alone_stays_one(
    pipeline: Path, unet_adapter: Path, tmp_path: Path
) -> None:
    variant = "diffusion_pytorch_model.fp16.safetensors"
    (pipeline / "unet" / UNET_FILE).rename(pipeline / "unet" / variant)
    merge(pipeline, unet_adapter, tmp_path / "one", component="unet")
    assert set(snapshot(tmp_path / "one" / "unet")) == {"config.json", variant}
    merge(pipeline, unet_adapter, tmp_path / "many", component="unet", max_shard_size="250B")
    index = "diffusion_pytorch_model.safetensors.index.fp16.json"
    shards = [f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert set(snapshot(tmp_path / "many" / "unet")) == {"config.json", index, *shards}
    second = make_adapter(tmp_path / "a", blocks={"mid.proj_in": grid((4, HIDDEN), F32, 8)})
    merge(tmp_path / "many", second, tmp_path / "again", component="unet")
    assert set(snapshot(tmp_path / "again" / "unet")) == {"config.json", index, *shards}
