"""Hub ids against a Hub on loopback: what is fetched, what is kept, and who may read."""

from __future__ import annotations

import os
import termios
from pathlib import Path
from typing import Any

import pytest

from boneconv.errors import MissingPathError
from boneconv.io.hub import BASE, Source, locate
from tests.io.hub_runs import Runner, make, model
from tests.io.hub_server import HubServer

# Local paths


def test_a_local_path_wins_over_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = model(tmp_path / "owner" / "name")
    monkeypatch.chdir(tmp_path)

    assert locate("owner/name", BASE) == Source("owner/name", Path("owner/name"))
    assert locate(folder, BASE) == Source(str(folder), folder)
    file = folder / "model.safetensors"
    assert locate(file, BASE).path == file


@pytest.mark.parametrize(
    "given",
    [
        "",
        "name",
        "./owner/name",
        "../owner/name",
        "/owner/name",
        "~/name",
        "a/b/c",
        "owner/name/",
        "owner/",
        "owner/.name",
        "owner-/name",
        "owner/na..me",
        "owner/na--me",
        "owner/name.git",
        "owner/na me",
        "owner/na\nme",
        "owner/náme",
        "owner\\name",
        "https://huggingface.co/owner/name",
        "out/adapter_model.safetensors",
        "out/model.pth",
        "owner/name@",
        "owner/name@../../x",
        "owner/name@/etc",
        "owner/name@a b",
        "owner/name@a\nb",
        "owner/name@main~1",
        "owner/name@main.lock",
        "owner/name@a//b",
        "x" * 97 + "/name",
        "x" * 5000,
    ],
)
def test_what_is_neither_a_path_nor_a_hub_id_is_missing(given: str) -> None:
    with pytest.raises(MissingPathError) as caught:
        locate(given, BASE)

    assert "\n" not in str(caught.value)


def test_a_missing_path_does_not_import_the_client(run: Runner) -> None:
    outcome = run("./no/such/folder")

    outcome.must_fail("MissingPathError", "no such file or folder", "owner/name@revision")
    assert outcome.answer["imported"] is False


# Downloads


def test_only_the_needed_files_are_fetched(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    names = ["config.json", "model.safetensors", "tokenizer.json", "sub/notes.txt"]
    folder = make(tmp_path / "m", *names, "pytorch_model.bin", "onnx/model.onnx", "m.gguf")
    commit = hub.add("owner/name", folder)

    outcome = run("owner/name")

    assert outcome.answer["repo"] == "owner/name"
    assert outcome.commit == commit
    assert outcome.files() == hub.fetched("owner/name") == set(names)
    for name in names:
        assert (outcome.path / name).read_bytes() == (folder / name).read_bytes()
    assert outcome.stderr == ""


def test_an_adapter_of_one_branch(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    adapter = make(tmp_path / "a", "adapter_config.json", "adapter_model.bin", "optimizer.pt")
    commit = hub.add("owner/name", adapter, branch="feature/bat")

    outcome = run("owner/name@feature/bat", "ADAPTER")

    assert outcome.commit == commit
    assert outcome.files() == {"adapter_config.json", "adapter_model.bin"}


def test_a_listing_of_several_pages(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    names = {"config.json", "model.safetensors", *(f"{i}.txt" for i in range(5))}
    hub.add("owner/name", make(tmp_path / "m", *names))
    hub.page = 3

    assert run("owner/name").files() == names


def test_a_branch_that_moves_meanwhile(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    first = hub.add("owner/name", model(tmp_path / "old", b"old"))
    hub.fail(
        "/api/models/owner/name/revision/main",
        times=1,
        then=lambda: hub.add("owner/name", model(tmp_path / "new", b"new")),
    )

    outcome = run("owner/name")

    assert outcome.commit == first
    assert (outcome.path / "model.safetensors").read_bytes() == b"old"
    assert all(first in path for path in hub.paths if "revision" not in path)
    assert hub.paths.count("/api/models/owner/name/revision/main") == 1

    later = run("owner/name")
    assert later.commit == hub.repos["owner/name"].refs["main"] != first
    assert (later.path / "model.safetensors").read_bytes() == b"new"


def test_a_pinned_commit_is_not_asked_for_twice(
    hub: HubServer, run: Runner, tmp_path: Path
) -> None:
    commit = hub.add("owner/name", model(tmp_path / "m"))

    first = run(f"owner/name@{commit}")
    assert not any("/revision/" in path for path in hub.paths)
    hub.requests.clear()

    assert run(f"owner/name@{commit}").path == first.path
    assert hub.requests == []


def test_what_the_cache_has_is_not_fetched_again(
    hub: HubServer, run: Runner, tmp_path: Path
) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    run("owner/name")
    hub.requests.clear()

    run("owner/name")

    assert hub.paths == ["/api/models/owner/name/revision/main"]


def test_offline_after_a_download(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    commit = hub.add("owner/name", model(tmp_path / "m"), branch="feature/x")
    first = run("owner/name@feature/x")
    hub.requests.clear()

    for again in run.all(["owner/name@feature/x", f"owner/name@{commit}"], HF_HUB_OFFLINE="1"):
        assert (again.path, again.commit) == (first.path, commit)
    assert hub.requests == []


def test_offline_without_a_download(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))

    run("owner/name", HF_HUB_OFFLINE="1").must_fail(
        "MissingPathError", "owner/name@main", "HF_HUB_OFFLINE", "local folder"
    )
    assert hub.requests == []


def test_offline_with_a_part_of_it(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors", "model.safetensors"]
    hub.add("owner/name", make(tmp_path / "m", *names))
    run("owner/name", "ADAPTER")

    run("owner/name", HF_HUB_OFFLINE="1").must_fail("MissingPathError", "model.safetensors", "part")


def test_offline_with_the_cache_of_an_older_client(
    hub: HubServer, run: Runner, tmp_path: Path
) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    first = run("owner/name")
    listing = next(run.home.rglob("trees/*.json"))
    listing.unlink()

    assert run("owner/name", HF_HUB_OFFLINE="1").path == first.path


def test_a_file_that_was_cut_short_in_the_cache(
    hub: HubServer, run: Runner, tmp_path: Path
) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    (run("owner/name").path / "model.safetensors").resolve().write_bytes(b"wei")

    run("owner/name").must_fail("FormatError", "model.safetensors", "7 bytes", "3 bytes", "Delete")


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_for_terminals(
    hub: HubServer, run: Runner, tmp_path: Path, quiet: bool
) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    ours, theirs = os.openpty()
    termios.tcsetwinsize(theirs, (24, 100))

    run("owner/name", quiet=quiet, stderr=Path(os.ttyname(theirs)))

    os.write(theirs, b".")
    shown = os.read(ours, 1 << 16).decode()
    os.close(ours)
    os.close(theirs)
    assert ("Fetching 2 files" in shown) is not quiet
    assert (shown == ".") is quiet


# Who may read


def test_private(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    hub.close("owner/name", "hf_right")

    run("owner/name").must_fail("MissingPathError", "owner/name", "private", "hf auth login")
    run("owner/name", HF_TOKEN="hf_wrong").must_fail("MissingPathError", "HF_TOKEN")
    assert run("owner/name", HF_TOKEN="hf_right").files() == {"config.json", "model.safetensors"}
    stored = [r.authorization for r in hub.requests if r.path.startswith("/storage/")]
    assert stored == [None], "the token went to the storage host"


def test_gated(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    hub.gate("owner/name")

    run("owner/name", HF_TOKEN="hf_x").must_fail(
        "InputError", "gated", f"{hub.endpoint}/owner/name", "HTTP 403"
    )


def test_missing_repository_and_revision(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))

    other, tag, commit = run.all(["owner/other", "owner/name@v9", "owner/name@" + "0" * 40])

    other.must_fail("MissingPathError", "owner/other", "Check the name")
    tag.must_fail("MissingPathError", "no revision v9", "branches and tags")
    commit.must_fail("MissingPathError", "no revision 000")


@pytest.mark.parametrize(
    ("fault", "error", "word"),
    [
        ({"status": 401, "headers": {"X-Error-Message": "Invalid"}}, "InputError", "the token"),
        ({"status": 403}, "InputError", "may not read"),
        (
            {"status": 403, "headers": {"X-Error-Message": "Access to this resource is disabled."}},
            "InputError",
            "disabled",
        ),
        ({"status": 418}, "NetworkError", "HTTP 418"),
    ],
)
def test_other_refusals(
    hub: HubServer, run: Runner, tmp_path: Path, fault: dict[str, Any], error: str, word: str
) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    hub.fail("/api/*", **fault)

    run("owner/name").must_fail(error, word)


@pytest.mark.parametrize("token", ["hf_sécret", "hf_s\x0becret"])
def test_a_token_that_cannot_be_sent_is_not_shown(hub: HubServer, run: Runner, token: str) -> None:
    outcome = run("owner/name", HF_TOKEN=token)

    outcome.must_fail("InputError", "the token cannot be sent", "HF_TOKEN")
    assert "ecret" not in outcome.answer["text"] + outcome.stderr
    assert outcome.waits == hub.requests == []


def test_no_weights_at_all(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", make(tmp_path / "m", "config.json", "m.gguf"))

    run("owner/name").must_fail("MissingPathError", "no weights of a model", "m.gguf")
    assert hub.fetched("owner/name") == set()
