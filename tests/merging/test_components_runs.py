"""Runs over components: what they refuse, that they end whole or absent, the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
    F32,
    HIDDEN,
    grid,
    make_adapter,
    make_base,
    pack,
    snapshot,
)
from tests.merging.components import (
    UNET_FILE,
    pipeline,
    text_adapter,
    unet_adapter,
    unet_tensors,
    write_files,
)
from tests.slow_writes import SLOW

__all__ = ["pipeline", "text_adapter", "unet_adapter"]


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
    (pipeline / "flux.safetensors").write_bytes(pack(unet_tensors()))
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
    write_files(tmp_path / "large", {"model_index.json": json.dumps(index)})
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
