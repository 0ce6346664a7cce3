"""Bases and adapters by their Hub id, from a server on loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import boneconv
from tests.builders import base_tensors, make_adapter, make_base, snapshot
from tests.io.hub_server import HubServer, hub

__all__ = ["hub"]

BASE, ADAPTER = "someone/base", "someone/base-bone"
COMMAND = "from boneconv.cli import main; main()"
NOT_COMPARED = {"boneconv.json", "README.md"}


class Client:
    """Runs `boneconv merge` in processes that share a Hub cache."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self.home, self.out = hub, folder / "home", folder / "out"

    def __call__(
        self, base: str | Path, adapter: str | Path, *more: str, **env: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", COMMAND, "merge", base, adapter, self.out, *more],
            env=self.hub.env(self.home, **env),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def merge(self, base: str | Path, adapter: str | Path, *more: str, **env: str) -> None:
        done = self(base, adapter, *more, **env)
        assert done.returncode == 0, done.stderr

    def snapshot_of(self, repo: str, commit: str) -> Path:
        folder = f"models--{repo.replace('/', '--')}"
        return self.home / "hub" / folder / "snapshots" / commit

    @property
    def record(self) -> dict[str, Any]:
        found = json.loads((self.out / "boneconv.json").read_text())
        assert isinstance(found, dict)
        return found


@pytest.fixture
def client(hub: HubServer, tmp_path: Path) -> Client:
    return Client(hub, tmp_path)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of two shards, with other copies of the weights beside them."""
    return make_base(
        tmp_path / "base",
        shards=2,
        files={
            ".gitattributes": "* text",
            "README.md": "---\nlicense: mit\n---\n",
            "tokenizer.json": "{}",
            "modules/pooling/config.json": '{"dim": 12}',
            "pytorch_model.bin": "stale",
            "consolidated.safetensors": "stale",
            "onnx/model.onnx": "stale",
            "original/params.json": "{}",
            "model.gguf": "stale",
        },
    )


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A Bone adapter with what a training leaves behind."""
    return make_adapter(
        tmp_path / "adapter",
        files={
            "README.md": "An adapter.",
            "chat_template.jinja": "{{ messages }}",
            "adapter_model.bin": "stale",
            "training_args.bin": "stale",
            "optimizer.pt": "stale",
            "checkpoint-8/adapter_model.safetensors": "stale",
        },
    )


def test_only_what_is_needed_is_fetched(
    client: Client, hub: HubServer, base: Path, adapter: Path
) -> None:
    hub.add(BASE, base)
    hub.add(ADAPTER, adapter)
    client.merge(BASE, ADAPTER)
    assert hub.fetched(BASE) == {
        "README.md",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modules/pooling/config.json",
        "tokenizer.json",
    }
    assert hub.fetched(ADAPTER) == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
    }


def test_the_output_is_that_of_a_local_merge(
    client: Client, hub: HubServer, base: Path, adapter: Path, tmp_path: Path
) -> None:
    hub.add(BASE, base)
    hub.add(ADAPTER, adapter)
    client.merge(BASE, ADAPTER)
    boneconv.merge(base, adapter, tmp_path / "local")
    found, expected = snapshot(client.out), snapshot(tmp_path / "local")
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == NOT_COMPARED
    assert "chat_template.jinja" in found


def test_links_of_the_cache_are_followed(
    client: Client, hub: HubServer, base: Path, adapter: Path
) -> None:
    commit = hub.add(BASE, base)
    hub.add(ADAPTER, adapter)
    client.merge(BASE, ADAPTER)
    cached = client.snapshot_of(BASE, commit)
    assert (cached / "model-00001-of-00002.safetensors").is_symlink()
    files = [path for path in client.out.rglob("*") if not path.is_dir()]
    assert len(files) >= 7
    assert all(path.is_file() and not path.is_symlink() for path in files)
    for path in client.out.rglob("*"):
        assert path.is_dir() or path.stat().st_nlink == 1
    assert (cached / "tokenizer.json").read_text() == "{}"


def test_the_commits_are_recorded_and_no_path_is(
    client: Client, hub: HubServer, base: Path, adapter: Path, tmp_path: Path
) -> None:
    commits = hub.add(BASE, base), hub.add(ADAPTER, adapter)
    client.merge(BASE, ADAPTER)
    record = client.record
    assert record["base"] == {"repo": BASE, "commit": commits[0]}
    (entry,) = record["adapters"]
    assert (entry["repo"], entry["commit"]) == (ADAPTER, commits[1])
    assert len(commits[0]) == len(commits[1]) == 40
    card = (client.out / "README.md").read_text()
    assert f"base_model: {BASE}" in card
    assert ADAPTER in card
    assert "license: mit" in card
    for text in (card, (client.out / "boneconv.json").read_text()):
        assert str(tmp_path) not in text


@pytest.mark.parametrize("by_commit", [False, True])
def test_a_revision_is_that_one(
    client: Client,
    hub: HubServer,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    by_commit: bool,
) -> None:
    other = make_base(tmp_path / "other", base_tensors(seed=9))
    commit = hub.add(BASE, other, branch="v2")
    hub.add(BASE, base)
    tuned = hub.add(ADAPTER, adapter, branch="tuned/longer")
    client.merge(f"{BASE}@{commit if by_commit else 'v2'}", f"{ADAPTER}@tuned/longer")
    assert client.record["base"] == {"repo": BASE, "commit": commit}
    assert client.record["adapters"][0]["commit"] == tuned
    boneconv.merge(other, adapter, tmp_path / "local")
    assert (client.out / "model.safetensors").read_bytes() == (
        tmp_path / "local" / "model.safetensors"
    ).read_bytes()


def test_a_local_base_and_an_adapter_of_the_hub(
    client: Client, hub: HubServer, base: Path, adapter: Path
) -> None:
    hub.add(ADAPTER, adapter)
    client.merge(base, ADAPTER)
    assert client.record["base"] == {}
    assert client.record["adapters"][0]["repo"] == ADAPTER
    assert hub.fetched(BASE) == set()


def test_further_adapters_of_the_hub(
    client: Client, hub: HubServer, base: Path, adapter: Path, tmp_path: Path
) -> None:
    hub.add(BASE, base)
    hub.add(ADAPTER, adapter)
    hub.add("someone/second", make_adapter(tmp_path / "second", "bat"))
    client.merge(BASE, ADAPTER, "--adapter", "someone/second")
    assert [entry["repo"] for entry in client.record["adapters"]] == [ADAPTER, "someone/second"]


def test_what_is_in_the_cache_is_not_fetched_again(
    client: Client, hub: HubServer, base: Path, adapter: Path
) -> None:
    hub.add(BASE, base)
    hub.add(ADAPTER, adapter)
    client.merge(BASE, ADAPTER)
    first = snapshot(client.out)
    hub.requests.clear()
    client.merge(BASE, ADAPTER, "--force")
    assert hub.fetched(BASE) == hub.fetched(ADAPTER) == set()
    assert snapshot(client.out) == first
    hub.requests.clear()
    client.merge(BASE, ADAPTER, "--force", HF_HUB_OFFLINE="1")
    assert hub.requests == []
    assert snapshot(client.out) == first


def test_a_dry_run_says_what_would_be_done(
    client: Client, hub: HubServer, base: Path, adapter: Path
) -> None:
    hub.add(BASE, base)
    hub.add(ADAPTER, adapter)
    done = client(BASE, ADAPTER, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert not client.out.exists()
    foretold = json.loads(done.stdout)
    client.merge(BASE, ADAPTER)
    assert foretold["tensors"]["merge"] == 6
    assert foretold["bytes"] == sum(len(content) for content in snapshot(client.out).values())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((f"{BASE}", "someone/nothing"), "someone/nothing"),
        (("someone/nothing", ADAPTER), "someone/nothing"),
        ((f"{BASE}@v9", ADAPTER), "v9"),
        ((BASE, BASE), "adapter"),
    ],
)
def test_what_the_hub_has_not(
    client: Client,
    hub: HubServer,
    base: Path,
    adapter: Path,
    given: tuple[str, str],
    words: str,
) -> None:
    hub.add(BASE, base)
    hub.add(ADAPTER, adapter)
    done = client(*given)
    assert done.returncode == 2
    assert done.stderr.startswith("Error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not client.out.exists()
    assert not list(client.out.parent.glob("out.*"))


@pytest.mark.slow
def test_a_hub_that_cannot_be_reached_is_the_machine_s_fault(
    client: Client, hub: HubServer, base: Path, adapter: Path
) -> None:
    hub.add(BASE, base)
    hub.add(ADAPTER, adapter)
    hub.fail("*", status=503)
    done = client(BASE, adapter)
    assert done.returncode == 3
    assert "Traceback" not in done.stderr
    assert not client.out.exists()


# Pipelines


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """A pipeline with another component, in another form, and a copy of the whole at the top."""
    root = tmp_path / "pipeline"
    make_base(root / "unet", shards=2, files={"model.fp16.safetensors": "stale"})
    files = {
        "model_index.json": json.dumps({n: ["diffusers", "X"] for n in ("unet", "vae")}),
        "whole.safetensors": "stale",
        "vae/diffusion_pytorch_model.bin": "another component",
        "vae/config.json": '{"of": "vae"}',
        "scheduler/scheduler_config.json": "{}",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_pipeline_is_fetched_without_other_copies_of_its_weights(
    client: Client, hub: HubServer, pipeline: Path, adapter: Path, tmp_path: Path
) -> None:
    commit = hub.add(BASE, pipeline)
    client.merge(BASE, adapter, "--component", "unet")
    stale = {"unet/model.fp16.safetensors", "whole.safetensors"}
    assert hub.fetched(BASE) == snapshot(pipeline).keys() - stale
    boneconv.merge(pipeline, adapter, tmp_path / "local", component="unet")
    found, expected = snapshot(client.out), snapshot(tmp_path / "local")
    assert found.keys() == expected.keys()
    assert {name for name in found if found[name] != expected[name]} == NOT_COMPARED
    assert client.record["base"] == {"repo": BASE, "commit": commit}


def test_of_a_pipeline_without_a_component_hardly_anything_is_fetched(
    client: Client, hub: HubServer, pipeline: Path, adapter: Path
) -> None:
    hub.add(BASE, pipeline)
    done = client(BASE, adapter)
    assert done.returncode == 2
    assert "this is a diffusers pipeline" in done.stderr
    assert "expected a component: unet, vae" in done.stderr
    assert "pass --component" in done.stderr
    assert hub.fetched(BASE) == {"model_index.json"}


def test_a_checkpoint_of_the_hub_has_no_components(
    client: Client, hub: HubServer, base: Path, adapter: Path
) -> None:
    hub.add(BASE, base)
    done = client(BASE, adapter, "--component", "unet")
    assert done.returncode == 2
    assert "holds no weights of a diffusers pipeline" in done.stderr
    assert hub.fetched(BASE) == set()
