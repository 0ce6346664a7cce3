"""A Hub that fails or means harm, and a machine that has no room for it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.io.hub_runs import MIB, Runner, model, outside
from tests.io.hub_server import HubServer

# A Hub that fails


def test_a_broken_connection_is_resumed(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    weights = os.urandom(25 * MIB)
    hub.add("owner/name", model(tmp_path / "m", weights))
    hub.fail("/storage/*", method="GET", cut=12 * MIB, times=1)

    outcome = run("owner/name")

    assert (outcome.path / "model.safetensors").read_bytes() == weights
    ranges = [r.range for r in hub.requests if r.path.startswith("/storage/")]
    assert ranges == [None, f"bytes={10 * MIB}-"]  # the client keeps whole pieces of 10 MiB
    assert "resume" in outcome.stderr


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503, "times": 2},
        {"status": 429, "headers": {"Retry-After": "3"}, "times": 2},
        {"cut": 1, "times": 2},
        {"cut": 1, "reset": True, "times": 1},
    ],
    ids=["503", "429", "cut", "reset"],
)
def test_failures_of_every_kind_of_request_are_got_over(
    hub: HubServer, run: Runner, tmp_path: Path, fault: dict[str, Any]
) -> None:
    weights = os.urandom(3 * MIB)
    hub.add("owner/name", model(tmp_path / "m", weights))
    for path in ("*/revision/*", "*/tree/*", "*/resolve/*/model.safetensors", "/storage/*"):
        hub.fail(path, **fault)

    outcome = run("owner/name")

    assert (outcome.path / "model.safetensors").read_bytes() == weights
    assert outcome.files() == {"config.json", "model.safetensors"}
    assert not any(each.times for each in hub.faults)
    assert sum(outcome.waits) < 60


@pytest.mark.parametrize(
    ("path", "fault", "words"),
    [
        ("*/revision/*", {"status": 503}, ["HTTP 503", "later"]),
        ("*/tree/*", {"status": 503}, ["HTTP 503", "later"]),
        ("*/resolve/*", {"status": 503}, ["HTTP 503", "later"]),
        ("/storage/*", {"status": 503}, ["HTTP 503", "later"]),
        ("*/revision/*", {"status": 429}, ["rate limit", "later"]),
        ("/storage/*", {"status": 429, "headers": {"Retry-After": "5"}}, ["rate limit"]),
        ("/storage/*", {"cut": 5}, ["peer closed", "connection"]),
        ("/storage/*", {"cut": 5, "reset": True}, ["ReadError", "connection"]),
        ("*/revision/*", {"cut": 5}, ["peer closed", "HF_HUB_OFFLINE=1"]),
        ("/storage/*", {"length": 6}, ["Consistency check"]),
        ("/storage/*", {"length": 8}, ["peer closed"]),
        ("/storage/*", {"content": b"WEIGHTS"}, ["arrived damaged", "run the command again"]),
        ("*/model.safetensors", {"headers": {"X-Linked-Size": "6"}}, ["Consistency check"]),
        ("*/config.json", {"status": 404, "code": "EntryNotFound"}, ["is not there"]),
    ],
)
def test_lasting_failures_end_with_a_message(
    hub: HubServer, run: Runner, tmp_path: Path, path: str, fault: dict[str, Any], words: list[str]
) -> None:
    commit = hub.add("owner/name", model(tmp_path / "m"))
    hub.fail(path, **fault)

    outcome = run("owner/name")

    error = "MissingPathError" if fault.get("status") == 404 else "NetworkError"
    outcome.must_fail(error, *words)
    assert sum(outcome.waits) < 240
    hub.faults.clear()
    again = run("owner/name")
    assert again.commit == commit
    assert (again.path / "model.safetensors").read_bytes() == b"weights"


def test_a_wrong_etag_does_no_harm(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    """It is a name in the cache, nothing more: the content is held against the listing."""
    hub.add("owner/name", model(tmp_path / "m"))
    hub.fail("*/resolve/*/model.safetensors", headers={"X-Linked-Etag": f'"{"0" * 64}"'})

    outcome = run("owner/name")

    assert (outcome.path / "model.safetensors").read_bytes() == b"weights"
    assert outcome.files() == {"config.json", "model.safetensors"}


def test_an_endless_wait_is_refused(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    hub.fail("*/resolve/*", status=429, headers={"Retry-After": "86400"})

    outcome = run("owner/name")

    outcome.must_fail("NetworkError", "86400 s", "hf auth login")
    assert outcome.waits == []


def test_the_hubs_rate_limit_header_is_heeded(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    hub.fail("*/revision/*", times=1, status=429, headers={"RateLimit": '"api";r=0;t=17'})

    assert run("owner/name").waits == [17]


@pytest.mark.slow
def test_a_silent_server_is_not_waited_for(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    hub.fail("*/tree/*", stall=60)

    outcome = run("owner/name", HF_HUB_DOWNLOAD_TIMEOUT="1")

    outcome.must_fail("NetworkError", "ReadTimeout")


def test_no_server_at_all(run: Runner) -> None:
    outcome = run("owner/name", HF_ENDPOINT="http://127.0.0.1:9")

    outcome.must_fail("NetworkError", "ConnectError", "HF_ENDPOINT")
    assert outcome.waits == [1, 2, 4]


def test_quiet_says_nothing_of_retries(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    for path in ("*/revision/*", "*/tree/*", "/storage/*"):
        hub.fail(path, status=503, times=1)

    assert "503" in run("owner/name").stderr
    for fault in hub.faults:
        fault.times = 1
    assert run("owner/name@main", quiet=True).stderr == ""


# The machine


def test_no_room_is_noticed_before_the_download(
    hub: HubServer, run: Runner, tmp_path: Path
) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    hub.list_also("owner/name", "model-2.safetensors", size=10**18)

    run("owner/name").must_fail("DiskFullError", "no room", "HF_HUB_CACHE")
    assert hub.fetched("owner/name") == set()


def test_a_disk_that_fills_up_meanwhile(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))

    run("owner/name", TEST_DISK_FULL="1").must_fail("DiskFullError", "full", "HF_HUB_CACHE")


def test_a_cache_that_cannot_be_written(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    (tmp_path / "file").touch()

    run("owner/name", HF_HOME=str(tmp_path / "file")).must_fail(
        "MachineError", "cannot be used", "HF_HUB_CACHE"
    )


# A Hub that means harm

HOSTILE_NAMES: list[Any] = [
    "../x.json",
    "a/../../x.json",
    "/etc/x.json",
    "a//x.json",
    "./x.json",
    "a/./x.json",
    "",
    "..",
    "a\nb.json",
    "a\x1b[2Jb.json",
    "a\0b.json",
    "a\u202eb.json",
    "\ud800.json",
    "a\\..\\b.json",
    "C:/x.json",
    "d:x.json",
    "x" * 1001,
    7,
    None,
]


def copies(hub: HubServer, folder: Path, cases: Sequence[object]) -> dict[str, Any]:
    """A repository for every case, all with the same files."""
    repos = {f"owner/case-{number}": case for number, case in enumerate(cases)}
    for repo in repos:
        hub.add(repo, model(folder))
    return repos


def test_hostile_file_names(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    cases = copies(hub, tmp_path / "m", HOSTILE_NAMES)
    for repo, name in cases.items():
        hub.list_also(repo, name)
    before = outside(tmp_path)

    for repo, outcome in zip(cases, run.all(list(cases)), strict=True):
        outcome.must_fail("FormatError", repo, "file names")
        assert outcome.answer["text"].isprintable()
        assert hub.fetched(repo) == set()
    assert outside(tmp_path) == before


def test_hostile_sizes(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    cases = copies(hub, tmp_path / "m", [-1, "9", None, 1.5, True])
    for repo, size in cases.items():
        hub.list_also(repo, "x.json", size=size)

    for repo, outcome in zip(cases, run.all(list(cases)), strict=True):
        outcome.must_fail("FormatError", "a size for x.json")
        assert hub.fetched(repo) == set()


def test_a_listing_that_turns_hostile_when_asked_again(
    hub: HubServer, run: Runner, tmp_path: Path
) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    hub.fail("*/tree/*", times=1, then=lambda: hub.list_also("owner/name", "../../../../x.json"))
    before = outside(tmp_path)

    assert run("owner/name").files() == {"config.json", "model.safetensors"}
    run("owner/name").must_fail("FormatError", "file names")
    assert outside(tmp_path) == before


@pytest.mark.parametrize("header", ["ETag", "X-Linked-Etag"])
def test_etags_that_are_paths(hub: HubServer, run: Runner, tmp_path: Path, header: str) -> None:
    etags = ["../../../../../evil", f"{tmp_path}/evil", "a/b", "..", ".", "a\\b", ""]
    cases = copies(hub, tmp_path / "m", etags)
    for repo, etag in cases.items():
        hub.fail(f"/{repo}/resolve/*", method="HEAD", headers={header: f'"{etag}"'})
    before = outside(tmp_path)

    for outcome in run.all(list(cases)):
        outcome.must_fail("FormatError", "ETag")
    assert outside(tmp_path) == before


def test_files_of_another_commit(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    cases = copies(hub, tmp_path / "m", ["f" * 40, "../../../../evil", "/evil"])
    for repo, commit in cases.items():
        hub.fail(f"/{repo}/resolve/*", method="HEAD", headers={"X-Repo-Commit": commit})
    before = outside(tmp_path)

    for outcome in run.all(list(cases)):
        outcome.must_fail("FormatError", "commit")
    assert outside(tmp_path) == before


@pytest.mark.parametrize(
    ("kind", "answers"),
    [
        (
            "revision",
            [
                b"<html>",
                b"[]",
                b"{}",
                b'{"id": "owner/name"}',
                b'{"id": "owner/name", "sha": "../../evil"}',
                b'{"id": "owner/name", "sha": ["x"]}',
                b"[" * 100_000,
            ],
        ),
        (
            "tree",
            [
                b"7",
                b'{"a": 1}',
                b"[{}]",
                b'[{"type": "file", "path": "a"}]',
                b"\xff\xfe",
            ],
        ),
    ],
)
def test_answers_that_make_no_sense(
    hub: HubServer, run: Runner, tmp_path: Path, kind: str, answers: list[bytes]
) -> None:
    cases = copies(hub, tmp_path / "m", answers)
    for repo, content in cases.items():
        hub.fail(f"/api/models/{repo}/{kind}/*", content=content)

    for outcome in run.all(list(cases)):
        outcome.must_fail("FormatError", "the Hub's answer", "HF_ENDPOINT")


def test_an_endless_listing(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    entry = {"type": "file", "path": "x", "size": 1, "oid": "0"}
    link = f'<{hub.endpoint}/api/models/owner/name/tree/main>; rel="next"'
    page = json.dumps([entry] * 40_000).encode()
    hub.fail("*/tree/*", content=page, headers={"Link": link})

    run("owner/name").must_fail("FormatError", "at most 100000 files")


def test_an_answer_cannot_move_the_cursor(hub: HubServer, run: Runner, tmp_path: Path) -> None:
    hub.add("owner/name", model(tmp_path / "m"))
    said = "\x1b[2Jall is well"
    hub.fail("*/revision/*", times=1, headers={"X-HF-Warning": said})
    hub.fail("*/revision/*", status=403, headers={"X-Error-Message": said})

    assert "\x1b" not in run("owner/name").stderr
    outcome = run("owner/name")
    outcome.must_fail("InputError", "all is well")
    assert "\x1b" not in outcome.answer["text"] + outcome.stderr
