"""Hub ids against a Hub on loopback: what is fetched, what is kept, what every failure says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import termios
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boneconv.errors import MissingPathError
from boneconv.io.hub import ADAPTER, BASE, Source, locate
from boneconv.io.hub_files import PIPELINE
from tests.io.hub_server import HubServer, hub

__all__ = ["hub"]

ROOT = Path(__file__).parents[2]
MIB = 1 << 20

#: Locates inputs. Waits are noted and cut short, so that tests are quick.
CLIENT = """
import errno, json, os, sys, time
waits, sleep = [], time.sleep
time.sleep = lambda seconds: (waits.append(seconds), sleep(min(seconds, 0.01)))[1]
from boneconv.errors import BoneconvError
from boneconv.io import hub

if os.environ.get("TEST_DISK_FULL"):
    from huggingface_hub import file_download
    def full(url, file, **_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    file_download.http_get = full

answers = []
for given in GIVEN:
    waits.clear()
    try:
        found = hub.locate(given, getattr(hub, WANTED), quiet=QUIET)
        answer = {"path": str(found.path), "repo": found.repo, "commit": found.commit}
    except BoneconvError as error:
        answer = {"error": type(error).__name__, "exit": error.exit_code, "text": str(error)}
    answers.append(answer | {"waits": waits[:], "imported": "huggingface_hub" in sys.modules})
print(json.dumps(answers), flush=True)
"""

#: A process that has imported all but huggingface_hub, which reads its settings when it is imported
#: and hence is imported by a fork of its own for every run.
NURSERY = """
import json, os, sys
import filelock, httpx2, tqdm.auto, yaml
import boneconv.io.hub
httpx2.Client().close()
assert "huggingface_hub" not in sys.modules
for line in sys.stdin:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for fd, path in ((1, job["stdout"]), (2, job["stderr"])):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOCTTY), fd)
        os.environ.clear()
        os.environ.update(job["env"])
        exec(job["code"], job["names"])
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass(frozen=True)
class Outcome:
    """What `locate` returned or raised in its process."""

    answer: dict[str, Any]
    stderr: str

    @property
    def path(self) -> Path:
        assert "path" in self.answer, self.answer
        return Path(self.answer["path"])

    @property
    def commit(self) -> str:
        return str(self.answer["commit"])

    @property
    def waits(self) -> list[float]:
        return list(self.answer["waits"])

    def files(self) -> set[str]:
        return {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if p.is_file()}

    def must_fail(self, error: str, *words: str) -> None:
        exits = {"MissingPathError": 2, "InputError": 2, "FormatError": 2}
        assert self.answer.get("error") == error, self.answer
        assert self.answer["exit"] == exits.get(error, 3)
        for word in words:
            assert word in self.answer["text"], self.answer["text"]
        assert "Traceback" not in self.stderr


@pytest.fixture(scope="module")
def nursery() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", NURSERY],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        text=True,
    ) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@dataclass
class Runner:
    """Locates inputs in fresh processes whose cache lasts for a test."""

    nursery: subprocess.Popen[str]
    hub: HubServer
    home: Path

    def __call__(self, given: str, wanted: str = "BASE", **options: Any) -> Outcome:
        return self.all([given], wanted, **options)[0]

    def all(
        self,
        given: list[str],
        wanted: str = "BASE",
        *,
        quiet: bool = False,
        stderr: Path | None = None,
        **env: str,
    ) -> list[Outcome]:
        out, err = self.home.with_name("stdout"), stderr or self.home.with_name("stderr")
        out.write_text("")
        if stderr is None:
            err.write_text("")
        job = {
            "env": self.hub.env(self.home, **env),
            "code": CLIENT,
            "names": {"GIVEN": given, "WANTED": wanted, "QUIET": quiet},
            "stdout": str(out),
            "stderr": str(err),
        }
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        self.nursery.stdin.write(json.dumps(job) + "\n")
        self.nursery.stdin.flush()
        code = self.nursery.stdout.readline().strip()
        said = "" if stderr else err.read_text()
        assert code == "0", said
        return [Outcome(answer, said) for answer in json.loads(out.read_text())]


@pytest.fixture
def run(hub: HubServer, nursery: subprocess.Popen[str], tmp_path: Path) -> Runner:
    (tmp_path / "run").mkdir()
    return Runner(nursery, hub, tmp_path / "run" / "home")


def make(folder: Path, *names: str, **contents: bytes) -> Path:
    """A folder with files of some bytes each."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents.get(name, f"content of {name}".encode()))
    return folder


def model(folder: Path, weights: bytes = b"weights") -> Path:
    make(folder, "config.json")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def outside(tmp_path: Path) -> set[Path]:
    """All that lies outside the client's home."""
    run = tmp_path / "run"
    kept = {run / "stdout", run / "stderr", run / "home"}
    return {p for p in tmp_path.rglob("*") if not kept & {p, *p.parents}}


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


# Which files


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
