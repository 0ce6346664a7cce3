"""Components of a diffusers pipeline: merged as checkpoints of their own, all else as it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from boneconv.cli import run
from boneconv.conversion import convert
from boneconv.errors import (
    BaseMismatchError,
    BoneconvError,
    FormatError,
    MissingPathError,
    NameMatchError,
    UsageError,
)
from boneconv.merging import merge
from boneconv.planning import plan_merge
from tests.builders import (
    BF16,
    F16,
    F32,
    HIDDEN,
    Q,
    base_tensors,
    grid,
    make_adapter,
    make_base,
    merged,
    module,
    pack,
    same_bits,
    snapshot,
    tree_digest,
    unpack,
)
from tests.oracle.pipelines import (
    image_of,
    load_component,
    make_pipeline,
    make_pipeline_adapter,
    merged_by_peft,
    output_of,
)

UNET_FILE = "diffusion_pytorch_model.safetensors"
Q0 = f"{module(0, Q)}.weight"


def _write(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)


def _unet() -> dict[str, Any]:
    return {
        "mid.proj_in.weight": grid((HIDDEN, 8, 1, 1), F16, 1),
        "mid.proj_in.bias": grid((HIDDEN,), F16, 2),
        "conv_in.weight": grid((8, 4, 3, 3), F16, 3),
    }


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A UNet with a convolution and two text encoders whose tensors have the same names."""
    root = tmp_path / "pipeline"
    make_base(root / "text_encoder", shards=2, files={"notes.txt": "one"})
    make_base(root / "text_encoder_2", base_tensors(F32, seed=5), files={"notes.txt": "two"})
    index = {
        "_class_name": "SomePipeline",
        "_diffusers_version": "0.42.1",
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write(
        root,
        {
            "model_index.json": json.dumps(index),
            "README.md": "---\nlicense: mit\n---\nThe pipeline's own card.\n",
            "scheduler/scheduler_config.json": '{"steps": 3}',
            "tokenizer/vocab.json": "{}",
            "tokenizer/tokenizer.model": b"\x00\xff",
            "unet/config.json": '{"_class_name": "UNet", "_diffusers_version": "0.42.1"}',
            f"unet/{UNET_FILE}": pack(_unet(), {"format": "pt"}),
            "vae/config.json": "{}",
            f"vae/{UNET_FILE}": b"weights that nobody here can read",
            "vae/diffusion_pytorch_model.fp16.safetensors": b"in half precision",
        },
    )
    return root


@pytest.fixture
def unet_adapter(tmp_path: Path) -> Path:
    blocks = {"mid.proj_in": grid((4, HIDDEN), F32, 7)}
    return make_adapter(tmp_path / "for-unet", blocks=blocks)


@pytest.fixture
def text_adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "for-text", "bat")


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
    expected = _unet() | {
        "mid.proj_in.weight": merged(_unet()["mid.proj_in.weight"], block, variant)
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
    _write(pipeline, dict.fromkeys([*stale, *kept, ".gitattributes", ".cache/x"], "x"))
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


# --- what is refused --------------------------------------------------------------------------


def _refused(
    error: type[BoneconvError], words: str, pipeline: Path, adapter: Path, **options: Any
) -> None:
    out = pipeline.with_name("out")
    for act in (
        lambda: plan_merge(pipeline, adapter, **options),
        lambda: merge(pipeline, adapter, out, **options),
    ):
        with pytest.raises(error, match=words) as caught:
            act()
        assert caught.value.exit_code == 2
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


def test_a_pipeline_without_a_component_names_them(pipeline: Path, unet_adapter: Path) -> None:
    words = (
        r"this is a diffusers pipeline, not one checkpoint; "
        r"expected a component: text_encoder, text_encoder_2, unet, vae\. .* pass --component"
    )
    _refused(FormatError, words, pipeline, unet_adapter)
    (pipeline / "flux.safetensors").write_bytes(pack(_unet()))
    _refused(FormatError, words, pipeline, unet_adapter)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"component": "transformer"},
            NameMatchError,
            r"no component 'transformer'; expected text_encoder, text_encoder_2, unet, vae",
        ),
        ({"component": "image_encoder"}, NameMatchError, "no component 'image_encoder'"),
        ({"component": "../pipeline/unet"}, NameMatchError, "no component"),
        ({"component": ""}, NameMatchError, "no component ''"),
        (
            {"component": "scheduler"},
            NameMatchError,
            "the component 'scheduler' holds no weights; expected text_encoder, ",
        ),
        (
            {"component": "unet", "components": {"text_encodr": "a"}},
            NameMatchError,
            "no component 'text_encodr'",
        ),
        (
            {"component": "unet", "components": {"unet": "a"}},
            UsageError,
            r"'unet' is the component of the first adapter.*without unet=",
        ),
        ({"components": {"unet": "a"}}, UsageError, "no component for the first adapter"),
        ({"component": "unet", "components": {"vae": []}}, UsageError, "no adapter for the comp"),
    ],
    ids=str,
)
def test_components_that_cannot_be(
    pipeline: Path,
    unet_adapter: Path,
    options: dict[str, Any],
    error: type[BoneconvError],
    words: str,
) -> None:
    _refused(error, words, pipeline, unet_adapter, **options)


def test_what_is_no_pipeline(pipeline: Path, unet_adapter: Path) -> None:
    words = r"not a diffusers pipeline; expected a folder with a model_index\.json\. Leave out"
    _refused(FormatError, words, pipeline / "unet", unet_adapter, component="unet")
    _refused(FormatError, words, pipeline / "unet" / UNET_FILE, unet_adapter, component="unet")
    _refused(MissingPathError, "no such file", pipeline / "gone", unet_adapter, component="unet")
    (pipeline / "model_index.json").write_text("[]")
    _refused(FormatError, "not a JSON object", pipeline, unet_adapter, component="unet")


def test_an_adapter_of_another_component(
    pipeline: Path, text_adapter: Path, tmp_path: Path
) -> None:
    """transformers, which cannot tell the names of a UNet, is not asked."""
    words = r"6 of its 6 tensors have no home in the base"
    _refused(NameMatchError, words, pipeline, text_adapter, component="unet")


def test_no_delta_file_is_kept_of_a_pipeline(
    pipeline: Path, unet_adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="restores one checkpoint, not components"):
        merge(
            pipeline, unet_adapter, tmp_path / "o", component="unet", keep_delta=tmp_path / "delta"
        )


def test_another_base_is_noticed_by_the_component_s_digests(pipeline: Path, tmp_path: Path) -> None:
    """A fingerprint of one text encoder does not pass for the other's."""
    native = tmp_path / "native"
    bone = make_adapter(tmp_path / "bone")
    convert(bone, native, to="native", base=pipeline / "text_encoder_2")
    out = tmp_path / "out"
    components = {"text_encoder": bone}
    merge(pipeline, native, out, component="text_encoder_2", components=components)
    with pytest.raises(BaseMismatchError, match="R30"):
        merge(
            pipeline,
            native,
            tmp_path / "other",
            component="text_encoder",
            components={"text_encoder_2": bone},
        )
    assert not (tmp_path / "other").exists()


# --- whole or absent --------------------------------------------------------------------------


SLOW = """
import sys, time
import boneconv.engine.compute as compute
real = compute._write
def slow(*arguments):
    time.sleep(0.03)
    real(*arguments)
compute._write = slow
from boneconv.cli import run
from boneconv.conversion import convert
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_a_run_that_was_killed_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = {f"m{i}.weight": grid((1024, 1024), F32, i) for i in range(4)}
    for name in ("one", "two"):
        make_base(tmp_path / "large" / name, weights, shards=4)
    index = {name: ["transformers", "X"] for name in ("one", "two")}
    _write(tmp_path / "large", {"model_index.json": json.dumps(index)})
    blocks = {f"m{i}": grid((16, 64, 64)) for i in range(4)}
    make_adapter(tmp_path / "fits", "bat", rank=64, blocks=blocks)
    arguments = ["merge", "large", "fits", "out", "--component", "one", "--adapter", "two=fits"]
    process = subprocess.Popen([sys.executable, "-c", SLOW, *arguments, "--workers", "2"])
    journal = tmp_path / "out.partial" / "journal"
    for _ in range(3000):
        if journal.exists() and len(journal.read_bytes().splitlines()) > 2:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert not (tmp_path / "out").exists()
    finished = [json.loads(line)["name"] for line in journal.read_text().splitlines()[1:]]
    assert 0 < len(finished) < 8
    inodes = {n: (tmp_path / "out.partial" / "out" / n).stat().st_ino for n in finished}
    for _ in range(500):  # the workers of a killed run notice, and let go of the lock
        if run(arguments) == 0:
            break
        time.sleep(0.01)
    assert {n: (tmp_path / "out" / n).stat().st_ino for n in finished} == inodes
    assert run([*arguments[:3], "fresh", *arguments[4:], "--workers", "1"]) == 0
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "fresh")


def test_adapters_that_change_places_are_another_run(
    pipeline: Path, text_adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bone, out = make_adapter(tmp_path / "bone"), tmp_path / "out"

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def go(first: Path, second: Path, place: Path) -> None:
        components = {"text_encoder_2": second}
        merge(pipeline, first, place, component="text_encoder", components=components)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("boneconv.engine.commit._write_folder", interrupted)
        go(bone, text_adapter, out)
    assert out.with_name("out.partial").exists()
    go(text_adapter, bone, out)
    go(text_adapter, bone, tmp_path / "fresh")
    assert snapshot(out) == snapshot(tmp_path / "fresh")


def test_further_outputs_hold_their_own_adapter_alone(
    pipeline: Path, unet_adapter: Path, text_adapter: Path, tmp_path: Path
) -> None:
    second = make_adapter(tmp_path / "second", blocks={"mid.proj_in": grid((4, HIDDEN), F32, 9)})
    merge(
        pipeline,
        unet_adapter,
        tmp_path / "a",
        component="unet",
        components={"text_encoder": text_adapter},
        each=[(second, tmp_path / "b")],
    )
    merge(pipeline, second, tmp_path / "alone", component="unet")
    assert snapshot(tmp_path / "b") == snapshot(tmp_path / "alone")


# --- the command line -------------------------------------------------------------------------


@pytest.fixture
def here(
    pipeline: Path,
    unet_adapter: Path,
    text_adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = ["merge", "pipeline", "for-unet", "out", "--component", "unet"]


def _run(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    found = run(list(arguments))
    stdout, stderr = capfd.readouterr()
    assert found == code, stderr
    return stdout, stderr


def test_the_command_line_names_components(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = [*COMMAND, "--adapter", "text_encoder=for-text"]
    plan = json.loads(_run(capfd, *arguments, "--dry-run", "--json")[0])
    assert not (here / "out").exists()
    done = json.loads(_run(capfd, *arguments, "--json")[0])
    assert {key: plan[key] for key in ("tensors", "bytes", "left_out", "notes")} == {
        key: done[key] for key in ("tensors", "bytes", "left_out", "notes")
    }
    found = snapshot(here / "out")
    assert sum(map(len, found.values())) == plan["bytes"]
    assert set(plan["files"]) | set(plan["copies"]) <= set(found)
    assert set(plan["files"]) == {
        f"unet/{UNET_FILE}",
        "text_encoder/model-00001-of-00002.safetensors",
        "text_encoder/model-00002-of-00002.safetensors",
    }
    record = json.loads(found["boneconv.json"])["tensors"]
    assert {e["name"]: e["action"] for e in plan["plan"]} == {
        name: entry["action"] for name, entry in record.items()
    }
    merge("pipeline", "for-unet", "api", component="unet", components={"text_encoder": "for-text"})
    assert snapshot(here / "api") == found


def test_a_dry_run_in_words(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stdout, _ = _run(capfd, *COMMAND, "--dry-run", "-v")
    assert "names        matched by direct" in stdout
    rows = [line.split() for line in stdout.splitlines()]
    assert ["merge", "unet/mid.proj_in.weight", "F16", f"{HIDDEN}x8x1x1"] in rows


def test_an_adapter_without_a_name_is_stacked_on_the_first(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also one whose path has an equals sign in it."""
    make_adapter(here / "lr=1", blocks={"mid.proj_in": grid((4, HIDDEN), F32, 8)})
    _run(capfd, *COMMAND, "--adapter", "lr=1", "--adapter", "./lr=1")
    merge("pipeline", "for-unet", "api", component="unet", more=["lr=1", "lr=1"])
    assert snapshot(here / "api") == snapshot(here / "out")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--adapter", "unet=for-unet"], "Give further adapters of it without unet="),
        (["--adapter", "text_encodr=for-text"], "no component 'text_encodr'; expected text_enc"),
        (["--adapter", "text_encoder=gone"], "gone: no such file or folder"),
    ],
    ids=str,
)
def test_the_command_line_refuses(
    here: Path, capfd: pytest.CaptureFixture[str], more: list[str], words: str
) -> None:
    _, stderr = _run(capfd, *COMMAND, *more, code=2)
    assert words in stderr
    assert not (here / "out").exists()


def test_the_command_line_says_that_a_pipeline_needs_a_component(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, stderr = _run(capfd, *COMMAND[:4], "--adapter", "text_encoder=for-text", code=2)
    assert "this is a diffusers pipeline" in stderr
    assert "pass --component" in stderr


# --- with diffusers and PEFT ------------------------------------------------------------------


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
