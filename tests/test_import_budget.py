"""What is imported: no torch, no transformers and no Hub client where they are not needed."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.builders import make_adapter, make_base

HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "huggingface_hub", "peft", "tqdm")
HELP_SECONDS = 0.3

PROBE = """
import json, sys
sys.argv = ["boneconv", *sys.argv[1:]]
{code}
found = sorted({{name.split(".")[0] for name in sys.modules}})
print(json.dumps(found), file=sys.stderr)
"""

RUN = "from boneconv.cli import run; code = run(sys.argv[1:]); assert code == {code}, code"


def _imported(code: str, *arguments: str) -> set[str]:
    """The top-level modules that are loaded after some code ran in an interpreter of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(code=code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr.splitlines()[-1]))


def _heavy(found: set[str]) -> set[str]:
    return found & set(HEAVY)


def test_import_boneconv_loads_next_to_nothing() -> None:
    found = _imported("import boneconv; boneconv.__version__")
    assert not _heavy(found)
    assert not found & {"numpy", "ml_dtypes", "click", "blake3", "safetensors"}


def test_the_configuration_needs_neither_numpy_nor_torch() -> None:
    found = _imported("from boneconv import BoneConfig; BoneConfig(r=4)")
    assert not _heavy(found) | found & {"numpy", "ml_dtypes"}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_loads_no_numpy(arguments: list[str]) -> None:
    found = _imported(RUN.format(code=0), *arguments)
    assert not _heavy(found) | found & {"numpy", "ml_dtypes", "blake3"}


@pytest.mark.parametrize(
    "command",
    ["merge", "unmerge", "convert", "export-onnx", "verify", "diff", "validate", "inspect", "demo"],
)
def test_help_of_a_command_loads_no_numpy(command: str) -> None:
    found = _imported(RUN.format(code=0), command, "--help")
    assert not _heavy(found) | found & {"numpy", "ml_dtypes", "blake3"}


@pytest.mark.parametrize("variant", ["bone", "bat"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_merge_on_the_cpu(tmp_path: Path, variant: str, workers: str) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", variant)
    arguments = ["merge", str(base), str(adapter), str(tmp_path / "out"), "--workers", workers]
    assert not _heavy(_imported(RUN.format(code=0), *arguments))
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_a_verification_with_all_its_reports_and_a_comparison(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    out, inputs = tmp_path / "out", [str(base), str(adapter), str(tmp_path / "out")]
    reports = [f"--{name}={tmp_path / name}" for name in ("junit", "html", "markdown")]
    assert not _heavy(_imported(RUN.format(code=0), "merge", *inputs, "--verify"))
    assert not _heavy(_imported(RUN.format(code=0), "verify", *inputs, *reports))
    assert not _heavy(_imported(RUN.format(code=1), "verify", *inputs[:2], str(base)))
    assert not _heavy(_imported(RUN.format(code=0), "diff", str(out), str(out)))


def test_a_dry_run_and_inspect(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    dry = ["merge", str(base), str(adapter), str(tmp_path / "out"), "--dry-run"]
    for arguments in (dry, ["inspect", str(base)], ["inspect", str(adapter)]):
        assert not _heavy(_imported(RUN.format(code=0), *arguments))


def test_demo(tmp_path: Path) -> None:
    assert not _heavy(_imported(RUN.format(code=0), "demo"))


def test_an_error_in_the_input(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter", r=-1)
    arguments = ["merge", str(base), str(adapter), str(tmp_path / "out")]
    assert not _heavy(_imported(RUN.format(code=2), *arguments))


def test_help_answers_at_once() -> None:
    script = Path(sys.executable).with_name("boneconv")
    command = (
        [str(script)]
        if script.exists()
        else [sys.executable, "-c", "import boneconv.cli as c; c.main()"]
    )
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        subprocess.run([*command, "--help"], check=True, capture_output=True, timeout=60)
        best = min(best, time.perf_counter() - start)
        if best < HELP_SECONDS:
            break
    assert best < HELP_SECONDS
