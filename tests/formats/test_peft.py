"""Adapter folders as PEFT 0.14 to 0.18 saved them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from boneconv.config import Variant
from boneconv.errors import (
    ConfigError,
    FormatError,
    MissingPathError,
    NotABoneAdapterError,
    ShapeError,
)
from boneconv.formats import load_adapter, read_adapter
from tests.builders import (
    BF16,
    F16,
    F32,
    HIDDEN,
    LAYERS,
    RANK,
    Raw,
    adapter_config,
    block_for,
    blocks_for_all,
    grid,
    make_adapter,
    make_base,
    pack,
    same_bits,
)


def _write(folder: Path, tensors: dict[str, Any], **config: Any) -> Path:
    """An adapter whose tensors have exactly these names."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(adapter_config() | config))
    (folder / "adapter_model.safetensors").write_bytes(pack(tensors))
    return folder


@pytest.mark.parametrize("variant", ["bone", "bat", "mini"])
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
def test_blocks_of_every_variant_and_dtype(tmp_path: Path, variant: str, dtype: Any) -> None:
    blocks = blocks_for_all(variant, dtype=dtype)
    adapter = read_adapter(make_adapter(tmp_path / "a", variant, blocks=blocks))
    assert adapter.format == "peft"
    assert adapter.config.variant == variant
    assert set(adapter.blocks) == set(blocks)
    assert len(adapter.blocks) == 3 * LAYERS
    for name, block in adapter.blocks.items():
        assert same_bits(block.tensor.read(), blocks[name])
        assert block.variant is Variant(variant)
        assert block.rank == RANK
    assert adapter.saved == {}


def test_what_is_no_block_is_a_whole_parameter(tmp_path: Path) -> None:
    saved = {
        "classifier.weight": grid((3, HIDDEN)),
        "classifier.bias": grid((3,)),
        "model.layers.0.self_attn.q_proj.bias": grid((HIDDEN,)),
    }
    folder = make_adapter(tmp_path / "a", saved=saved, modules_to_save=["classifier"])
    adapter = read_adapter(folder)
    assert set(adapter.saved) == set(saved)
    assert all(same_bits(adapter.saved[name].read(), saved[name]) for name in saved)
    assert len(adapter.blocks) == 3 * LAYERS


def test_wrappers_and_the_adapter_s_name_are_stripped(tmp_path: Path) -> None:
    block = block_for("bone", (HIDDEN, HIDDEN))
    folder = _write(tmp_path / "a", {"_orig_mod.base_model.model.m.q.bone_block.default": block})
    assert set(read_adapter(folder).blocks) == {"m.q"}


def test_tensors_stay_on_disk_until_they_are_read(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    adapter = read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingPathError):
        next(iter(adapter.blocks.values())).tensor.read()


def test_a_weights_file_finds_its_configuration(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    other = folder / "checkpoint-7.safetensors"
    shutil.move(folder / "adapter_model.safetensors", other)
    adapter = read_adapter(other)
    assert adapter.weights == other
    assert len(adapter.blocks) == 3 * LAYERS


def test_tokenizer_files_and_templates_belong_to_it_and_nothing_else(tmp_path: Path) -> None:
    wanted = [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ]
    other = ["README.md", "training_args.bin", "my_tokenizer.json", "trainer_state.json"]
    folder = make_adapter(tmp_path / "a", files=dict.fromkeys([*wanted, *other], "x"))
    found = {path.relative_to(folder).as_posix() for path in read_adapter(folder).side_files}
    assert found == set(wanted)


# --- what is refused --------------------------------------------------------------------------


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(MissingPathError, match="nowhere"):
        read_adapter(tmp_path / "nowhere")


def test_a_base_is_no_adapter(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    for path in (base, base / "model.safetensors"):
        with pytest.raises(NotABoneAdapterError, match=r"BASE comes first, ADAPTER second"):
            load_adapter(path)


def test_the_weights_are_missing(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(MissingPathError, match=r"weights are missing.*adapter_model\.safetensors"):
        read_adapter(folder)


def test_a_lora_adapter(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", peft_type="LORA")
    with pytest.raises(NotABoneAdapterError, match="found peft_type 'LORA'"):
        read_adapter(folder)


@pytest.mark.parametrize(("peft_type", "suffix"), [("BONE", "miss_block"), ("MISS", "bone_block")])
def test_blocks_of_the_other_type(tmp_path: Path, peft_type: str, suffix: str) -> None:
    block = block_for("bone", (HIDDEN, HIDDEN))
    folder = _write(tmp_path / "a", {f"base_model.model.m.{suffix}": block}, peft_type=peft_type)
    with pytest.raises(FormatError, match=f"do not belong to peft_type {peft_type}"):
        read_adapter(folder)


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_blocks_of_the_other_variant(tmp_path: Path, variant: str) -> None:
    blocks = blocks_for_all("bat" if variant == "bone" else "bone")
    folder = make_adapter(tmp_path / "a", variant, blocks=blocks)
    with pytest.raises(ShapeError, match=f"is no {variant} block of rank {RANK}"):
        read_adapter(folder)


def test_another_rank_than_the_config_s(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", rank=8, blocks=blocks_for_all(rank=4))
    with pytest.raises(ShapeError, match="is no bone block of rank 8"):
        read_adapter(folder)


def test_two_tensors_for_one_module(tmp_path: Path) -> None:
    block = block_for("bone", (HIDDEN, HIDDEN))
    names = ["base_model.model.m.q.bone_block", "base_model.model.m.q.bone_block.default"]
    with pytest.raises(FormatError, match=r"two tensors for 'm\.q'"):
        read_adapter(_write(tmp_path / "a", dict.fromkeys(names, block)))
    saved = ["base_model.model.h.weight", "base_model.model.h.base_layer.weight"]
    with pytest.raises(FormatError, match=r"two tensors for 'h\.weight'"):
        read_adapter(_write(tmp_path / "b", dict.fromkeys(saved, grid((2, 2)))))


def test_integers_in_an_adapter(tmp_path: Path) -> None:
    raw = Raw("I8", (RANK, HIDDEN), bytes(RANK * HIDDEN))
    folder = _write(tmp_path / "a", {"base_model.model.m.q.bone_block": raw})
    with pytest.raises(FormatError, match="dtype that cannot be merged"):
        read_adapter(folder)


def test_an_empty_adapter(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no tensors"):
        read_adapter(_write(tmp_path / "a", {}))


def test_errors_of_the_configuration_name_its_file(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a", r=-1)
    with pytest.raises(ConfigError) as caught:
        read_adapter(folder)
    assert caught.value.path == str(folder / "adapter_config.json")


# --- adapter_model.bin ------------------------------------------------------------------------


class _Evil:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


def _to_bin(folder: Path, content: Any) -> Path:
    import torch

    (folder / "adapter_model.safetensors").unlink()
    torch.save(content, folder / "adapter_model.bin")
    return folder


def test_a_torch_file_gives_the_same_adapter(tmp_path: Path) -> None:
    import torch

    blocks = blocks_for_all("bat", dtype=F16)
    folder = make_adapter(tmp_path / "a", "bat", blocks=blocks)
    content = {
        f"base_model.model.{name}.bone_block": torch.from_numpy(block)
        for name, block in blocks.items()
    }
    adapter = read_adapter(_to_bin(folder, content))
    assert adapter.weights.name == "adapter_model.bin"
    assert all(same_bits(adapter.blocks[name].tensor.read(), blocks[name]) for name in blocks)


def test_bfloat16_from_a_torch_file(tmp_path: Path) -> None:
    import torch

    block = block_for("bone", (HIDDEN, HIDDEN), dtype=BF16)
    tensor = torch.from_numpy(block.astype(F32)).to(torch.bfloat16)
    folder = _to_bin(make_adapter(tmp_path / "a"), {"base_model.model.m.q.bone_block": tensor})
    assert same_bits(read_adapter(folder).blocks["m.q"].tensor.read(), block)


def test_safetensors_win_over_a_torch_file(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / "adapter_model.bin").write_bytes(b"not read")
    assert read_adapter(folder).weights.name == "adapter_model.safetensors"


def test_code_in_a_torch_file_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    folder = _to_bin(make_adapter(tmp_path / "a"), {"x": _Evil(marker)})
    with pytest.raises(FormatError, match="refused: the file holds more than tensors"):
        read_adapter(folder)
    assert not marker.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 and no archive"])
def test_a_damaged_torch_file(tmp_path: Path, content: bytes) -> None:
    folder = make_adapter(tmp_path / "a")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.bin").write_bytes(content)
    with pytest.raises(FormatError, match=r"adapter_model\.bin: "):
        read_adapter(folder)


def test_a_truncated_torch_file(tmp_path: Path) -> None:
    import torch

    folder = _to_bin(make_adapter(tmp_path / "a"), {"m.bone_block": torch.zeros(4, 4000)})
    path = folder / "adapter_model.bin"
    path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(FormatError, match="damaged"):
        read_adapter(folder)


def test_what_else_a_torch_file_may_hold(tmp_path: Path) -> None:
    import torch

    cases: dict[str, tuple[Any, str]] = {
        "list": ([torch.zeros(1)], "holds no state dict"),
        "nested": ({"m.bone_block": {"inner": torch.zeros(1)}}, "expected a tensor"),
        "integers": ({"m.bone_block": torch.zeros(4, 4, dtype=torch.int64)}, "cannot be merged"),
        "complex": ({"m.bone_block": torch.zeros(4, 4, dtype=torch.complex64)}, "cannot be"),
        "sparse": ({"m.bone_block": torch.eye(4).to_sparse()}, "more than tensors"),
        "meta": ({"m.bone_block": torch.zeros(4, 4, device="meta")}, "more than tensors"),
    }
    for name, (content, says) in cases.items():
        folder = _to_bin(make_adapter(tmp_path / name), content)
        with pytest.raises(FormatError, match=says):
            read_adapter(folder)
