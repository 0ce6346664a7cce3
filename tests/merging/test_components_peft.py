"""Merged components against diffusers and PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from boneconv.merging import merge
from tests.builders import (
    F32,
    grid,
    make_adapter,
    merged,
    pack,
    snapshot,
    unpack,
)
from tests.merging.components import UNET_FILE
from tests.oracle.pipelines import (
    image_of,
    load_component,
    make_pipeline,
    make_pipeline_adapter,
    merged_by_peft,
    output_of,
)


@pytest.fixture(scope="module")
def diffusion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("diffusion") / "pipeline")


@pytest.fixture(scope="module")
def trained(diffusion: Path) -> Callable[[str, str], Path]:
    def adapter(component: str, variant: str) -> Path:
        folder = diffusion.with_name(f"{component}-{variant}")
        if not folder.exists():
            make_pipeline_adapter(diffusion, component, variant, folder)
        return folder

    return adapter


@pytest.mark.parametrize(("unet", "text"), [("bone", "bat"), ("bat", "bone")])
def test_components_equal_those_that_peft_merges(
    diffusion: Path, trained: Callable[[str, str], Path], tmp_path: Path, unet: str, text: str
) -> None:
    adapters = {"unet": trained("unet", unet), "text_encoder": trained("text_encoder", text)}
    out = tmp_path / "out"
    components = {"text_encoder": adapters["text_encoder"]}
    merge(diffusion, adapters["unet"], out, component="unet", components=components)
    before, after = snapshot(diffusion), snapshot(out)
    assert set(after) == {*before, "README.md", "boneconv.json"}
    assert {name for name in before if before[name] != after[name]} == {
        f"unet/{UNET_FILE}",
        "text_encoder/model.safetensors",
    }
    for component, adapter in adapters.items():
        found = output_of(component, load_component(out, component))
        expected = output_of(component, merged_by_peft(diffusion, component, adapter))
        unmerged = output_of(component, load_component(diffusion, component))
        assert (found - expected).abs().max() < 1e-5
        assert (found - unmerged).abs().max() > 1e-2
    merged_image, image = image_of(out), image_of(diffusion)
    assert np.isfinite(merged_image.numpy()).all()
    assert (merged_image - image).abs().max() > 1e-3


def test_the_convolutions_that_peft_refuses(diffusion: Path, tmp_path: Path) -> None:
    """The UNet of Stable Diffusion 1.5 has 1x1 convolutions for `proj_in` and `proj_out`."""
    blocks = {
        f"mid_block.attentions.0.{name}": grid((8, 16), F32, i) / 32
        for i, name in enumerate(("proj_in", "proj_out"))
    }
    adapter = make_adapter(tmp_path / "a", rank=8, blocks=blocks, target_modules=["proj_in"])
    merge(diffusion, adapter, tmp_path / "out", component="unet")
    before = load_component(diffusion, "unet").state_dict()
    after = load_component(tmp_path / "out", "unet").state_dict()
    for name, tensor in before.items():
        block = blocks.get(name.removesuffix(".weight"))
        if block is None:
            assert after[name].equal(tensor)
        else:
            expected = merged(tensor.numpy(), block, "bone")
            assert expected.shape == (16, 16, 1, 1)
            assert np.array_equal(after[name].numpy(), expected)
    assert not output_of("unet", load_component(tmp_path / "out", "unet")).equal(
        output_of("unet", load_component(diffusion, "unet"))
    )


def test_a_text_encoder_that_was_saved_under_older_names(
    diffusion: Path, trained: Callable[[str, str], Path], tmp_path: Path
) -> None:
    """transformers 5 drops ``text_model.`` from the names that Stable Diffusion 1.5 has on disk."""
    adapter, older = trained("text_encoder", "bone"), tmp_path / "older"
    shutil.copytree(diffusion, older)
    weights = older / "text_encoder" / "model.safetensors"
    tensors = {f"text_model.{name}": tensor for name, tensor in unpack(weights).items()}
    weights.chmod(0o600)
    weights.write_bytes(pack(tensors, {"format": "pt"}))
    merge(older, adapter, tmp_path / "out", component="text_encoder")
    found = unpack(tmp_path / "out" / "text_encoder" / "model.safetensors")
    assert found.keys() == tensors.keys()
    expected = output_of("text_encoder", merged_by_peft(diffusion, "text_encoder", adapter))
    made = output_of("text_encoder", load_component(tmp_path / "out", "text_encoder"))
    assert (made - expected).abs().max() < 1e-5


def test_a_component_in_shards_and_in_another_dtype_loads(
    diffusion: Path, trained: Callable[[str, str], Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge(
        diffusion,
        trained("unet", "bone"),
        out,
        component="unet",
        dtype="float16",
        max_shard_size="100kB",
    )
    index = json.loads((out / "unet" / f"{UNET_FILE}.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    found = output_of("unet", load_component(out, "unet"))
    expected = output_of("unet", merged_by_peft(diffusion, "unet", trained("unet", "bone")))
    assert (found - expected).abs().max() < 1e-2
