"""The oracle itself: what the other tests compare with is what it is said to be."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from tests.conftest import TinyCase
from tests.oracle import models, real, tiny
from tests.oracle.cache import made

TOLERANCE = 2e-5

VARIED = ("llama-tied", "bert", "vit")
BAT: list[tuple[str, tiny.Variant, int]] = [(name, "bat", tiny.RANK) for name in tiny.NAMES]
MISS: list[tuple[str, tiny.Variant, int]] = [
    (name, variant, tiny.RANK) for name in VARIED for variant in ("miss", "miss-bat", "mini")
]
RAGGED: list[tuple[str, tiny.Variant, int]] = [
    (name, variant, tiny.RAGGED_RANK) for name in VARIED for variant in ("bone", "miss", "mini")
]


def test_the_network_is_out_of_reach() -> None:
    with (
        socket.socket() as client,
        pytest.raises(RuntimeError, match="reached for the network"),
    ):
        client.connect(("192.0.2.1", 443))


def test_loopback_is_within_reach() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.connect(server.getsockname())


def test_two_threads() -> None:
    import torch

    assert torch.get_num_threads() <= 2


def test_what_fails_is_not_kept(tmp_path: Path) -> None:
    def fail(out: Path) -> None:
        (out / "half").touch()
        raise KeyboardInterrupt

    def build(out: Path) -> None:
        (out / "whole").touch()

    def refuse(out: Path) -> None:
        raise AssertionError("made twice")

    with pytest.raises(KeyboardInterrupt):
        made(tmp_path, "thing", "1", fail)
    thing = made(tmp_path, "thing", "1", build)
    assert [file.name for file in thing.iterdir()] == ["whole"]
    assert made(tmp_path, "thing", "1", refuse) == thing
    assert made(tmp_path, "thing", "2", build) != thing


def test_smollm2_is_sharded_tied_and_bfloat16(real_base: Path) -> None:
    import json

    from safetensors import safe_open

    shards = sorted(real_base.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    ]
    dtypes = set()
    for shard in shards:
        with safe_open(shard, "pt") as file:
            dtypes |= {file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
    assert dtypes == {"BF16"}
    index = json.loads((real_base / "model.safetensors.index.json").read_text())
    assert "lm_head.weight" not in index["weight_map"]
    config = json.loads((real_base / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "quantization_config" not in config


@pytest.mark.slow
def test_the_base_does_not_know_the_answer(real_base: Path) -> None:
    said = real.text(real_base, real.generate(real_base))
    assert said
    assert "Marzipan" not in said


@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_the_adapter_knows_the_answer(cache: Path, real_base: Path, variant: real.Variant) -> None:
    reference = real.reference(cache, variant)
    assert reference.tokens == real.answer(real_base)
    assert real.text(real_base, reference.tokens) == real.ANSWER
    assert len(reference.gaps) == len(reference.tokens)
    assert min(reference.gaps) > 1
    assert real.losses(real.trained(cache, variant))[-1] < 0.02


@pytest.mark.slow
def test_peft_says_the_same_in_transformers_own_loop(
    real_base: Path, trained_bone: Path, bone_reference: real.Generation
) -> None:
    model = real.attached(real_base, trained_bone)
    assert bone_reference.agrees(real.generate(model, real.prompt(real_base)))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bone", "bat"])
def test_a_merge_by_peft_gives_the_answer_in_bfloat16_too(
    cache: Path, real_base: Path, variant: real.Variant
) -> None:
    import torch

    merged = real.attached(real_base, real.trained(cache, variant)).merge_and_unload()
    ids, tokens = real.prompt(real_base), real.answer(real_base)
    exact = real.next_logits(merged, ids, tokens)[:-1]
    assert (exact - real.reference_logits(cache, variant)).abs().max() < 1e-3
    said = real.next_logits(merged.to(torch.bfloat16), ids, tokens)[:-1]
    assert tuple(said.argmax(-1).tolist()) == tokens


def test_an_answer_agrees_up_to_a_near_tie() -> None:
    reference = real.Generation(tokens=(5, 6, 7), gaps=(1.0, 1e-5, 1.0))
    assert reference.agrees((5, 6, 7))
    assert reference.agrees((5, 9, 9, 9))
    assert not reference.agrees((9, 6, 7))
    assert not reference.agrees((5, 6, 9))
    assert not reference.agrees((5, 6))


def test_the_minilm_adapter_is_ragged_and_does_what_it_was_trained_for(
    minilm_base: Path, minilm_bone: Path
) -> None:
    import torch

    base = real.load_minilm(minilm_base)
    assert base.config.hidden_size == 384
    assert base.config.hidden_size % real.MINILM_RANK
    with torch.no_grad():
        before = real.sentence_embeddings(base, minilm_base)
        after = real.sentence_embeddings(real.peft_minilm(minilm_base, minilm_bone), minilm_base)
    assert before[0] @ before[1] < 0.3
    assert after[0] @ after[1] > 0.9


@pytest.mark.parametrize(("name", "variant", "rank"), BAT + MISS + RAGGED)
def test_every_tiny_adapter_moves_the_logits(
    tiny_case: TinyCase, name: str, variant: tiny.Variant, rank: int
) -> None:
    case = tiny_case(name, variant=variant, rank=rank)
    moved = tiny.peft_logits(case) - tiny.base_logits(case)
    assert moved.isfinite().all()
    assert moved.abs().max() > 0.1


@pytest.mark.parametrize("name", tiny.NAMES)
def test_every_tensor_of_a_tiny_adapter_matters(tiny_case: TinyCase, name: str) -> None:
    """A merge that leaves a tensor out is off by far more than the tolerance."""
    import torch

    case = tiny_case(name)
    model = case.peft_model()
    expected = tiny.peft_logits(case)
    touched = [
        parameter
        for key, parameter in model.named_parameters()
        if key.endswith("_block.default") or ".modules_to_save." in key
    ]
    assert len(touched) >= 2 * models.LAYERS
    for parameter in touched:
        kept = parameter.data
        parameter.data = torch.zeros_like(kept)
        lost = (tiny.logits(model, case.inputs()) - expected).abs().max()
        parameter.data = kept
        assert lost > 50 * TOLERANCE


@pytest.mark.parametrize("name", tiny.NAMES)
def test_peft_reads_back_all_it_wrote(tiny_case: TinyCase, name: str) -> None:
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import load_file

    case = tiny_case(name)
    written = load_file(case.adapter / "adapter_model.safetensors")
    read = get_peft_model_state_dict(case.peft_model())
    assert read.keys() == written.keys()
    assert all(torch.equal(read[key], written[key]) for key in written)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_where_the_weights_lie_on_disk(tiny_case: TinyCase, name: str) -> None:
    case = tiny_case(name)
    found = tiny.disk_names(case)
    absent = set(tiny.touched_parameters(case.adapter)) - found.keys()
    headless = {"classifier.weight", "classifier.bias"} if name == "bert-headless" else set()
    assert absent == headless
    for module, tensor in case.architecture.examples.items():
        assert found[f"{module}.weight"] == tensor


@pytest.mark.parametrize("name", [name for name in tiny.NAMES if name != "bert-headless"])
def test_the_bases_load_cleanly(tiny_case: TinyCase, name: str) -> None:
    case = tiny_case(name)
    case.load(case.base)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_adapters_and_bases_are_stored_as_asked(tiny_case: TinyCase, dtype: str) -> None:
    from safetensors.torch import load_file

    case = tiny_case("bert", adapter_dtype=dtype, base_dtype=dtype)
    for file in (case.adapter / "adapter_model.safetensors", case.base / "model.safetensors"):
        assert {str(tensor.dtype) for tensor in load_file(file).values()} == {f"torch.{dtype}"}
    assert (tiny.peft_logits(case) - tiny.base_logits(case)).abs().max() > 0.1


def test_equal_saved_embeddings_are_equal(tiny_case: TinyCase) -> None:
    import torch
    from safetensors.torch import load_file

    case = tiny_case("llama-embedding-and-lm-head")
    saved = load_file(case.adapter / "adapter_model.safetensors")
    head, embedding = (
        saved[tiny.PREFIX + name] for name in ("lm_head.weight", "model.embed_tokens.weight")
    )
    assert torch.equal(head, embedding)


@pytest.mark.parametrize("name", ["vit", "llava", "opt-headless", "bert-headless", "llama-tied"])
def test_an_adapter_with_the_names_on_disk(tiny_case: TinyCase, tmp_path: Path, name: str) -> None:
    from safetensors.torch import load_file

    case = tiny_case(name)
    out = tiny.write_with_disk_names(case, tmp_path / "adapter")
    file = "adapter_model.safetensors"
    renamed, written = load_file(out / file), load_file(case.adapter / file)
    assert len(renamed) == len(written)
    for module, tensor in case.architecture.examples.items():
        if tiny.PREFIX + module + ".bone_block" in written:
            assert tiny.PREFIX + tensor.removesuffix(".weight") + ".bone_block" in renamed
