"""Hub ids located in fresh processes, against a Hub on loopback."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.io.hub_server import HubServer

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
