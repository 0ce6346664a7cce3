"""``boneconv convert``: its help, its outputs, its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from boneconv.cli import run
from tests.builders import make_adapter, make_base, snapshot

LORA = ["convert", "bat", "out", "--to", "peft-lora", "--base", "base"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "bone")
    make_adapter(tmp_path / "bat", "bat")
    return tmp_path


def _run(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, str]:
    found = run(list(arguments))
    stdout, stderr = capfd.readouterr()
    assert found == code, stderr
    return stdout, stderr


def test_help_has_an_example_and_every_option(capfd: pytest.CaptureFixture[str]) -> None:
    text = " ".join(_run(capfd, "convert", "--help")[0].split())
    assert "Example: boneconv convert ./my-bone-adapter ./my-miss-adapter --to peft-miss" in text
    options = ("--to", "--base", "--rank", "--energy", "--max-error", "--allow-error", "--pad-rank")
    assert all(name in text for name in (*options, "--force", "--json", "--quiet", "--verbose"))
    assert all(to in text for to in ("native", "peft-bone", "peft-miss", "peft-lora", "rwkv"))


def test_an_exact_conversion_is_one_line(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stdout, stderr = _run(capfd, "convert", "bone", "out", "--to", "peft-miss")
    assert stdout == "out: peft-miss, 6 modules, rank 4, exact\n"
    assert stderr == ""
    assert "boneconv.json" in snapshot(here / "out")


@pytest.mark.parametrize(("to", "out"), [("native", "n.safetensors"), ("rwkv", "a.pth")])
def test_targets_that_are_files(
    here: Path, capfd: pytest.CaptureFixture[str], to: str, out: str
) -> None:
    _run(capfd, "convert", "bone", out, "--to", to)
    assert (here / out).is_file()


def test_every_modules_error_on_demand(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    stdout, stderr = _run(capfd, *LORA, "--rank", "8", "--max-error", "0.9", "-v")
    assert "out: peft-lora, 6 modules, rank 8, error at most 0." in stdout
    assert stdout.count("model.layers.") == 6
    assert "is larger than the merged weights" in stderr


def test_json_is_for_machines(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = (*LORA, "--energy", "0.9", "--allow-error", "--json", "--quiet")
    stdout, stderr = _run(capfd, *arguments)
    result = json.loads(stdout)
    assert stderr == ""
    assert (result["out"], result["to"], len(result["modules"])) == ("out", "peft-lora", 6)
    worst = max(each["error"] for each in result["modules"].values())
    assert result["worst_error"] == worst > 0.05
    assert json.loads(Path(result["record"]).read_text())["rank"] == result["rank"]
    assert len(result["notes"]) >= 1


def test_an_error_above_the_limit_is_exit_code_1(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    stdout, stderr = _run(capfd, *LORA, "--rank", "2", code=1)
    assert stdout == ""
    assert "too far from BAT's update" in stderr
    assert "--allow-error goes on regardless" in stderr
    assert not (here / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bone", "out"], "Missing option '--to'"),
        (["bone", "out", "--to", "gguf"], "'gguf' is not one of"),
        (["bone", "out", "--to", "peft-lora"], "Give the base with --base"),
        (["bat", "out", "--to", "peft-lora", "--base", "base"], "Give --rank K, or --energy E"),
        (["bat", "out.pth", "--to", "rwkv"], "over the output axis"),
        (["absent", "out", "--to", "native"], "no such file or folder"),
        (["base", "out", "--to", "native"], "not an adapter"),
        (["bone", "bat", "--to", "native"], "exists already"),
        (["bone", "out", "--to", "peft-miss", "--rank", "3"], "belong to --to peft-lora"),
    ],
)
def test_bad_usage_and_input_are_exit_code_2(
    here: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    before = snapshot(here)
    stdout, stderr = _run(capfd, "convert", *arguments, code=2)
    assert stdout == ""
    assert message in stderr
    assert "Traceback" not in stderr
    assert snapshot(here) == before


def test_force_replaces(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _run(capfd, "convert", "bone", "bat", "--to", "peft-miss", "--force")
    assert json.loads((here / "bat" / "adapter_config.json").read_text())["peft_type"] == "MISS"


@pytest.mark.parametrize(
    "arguments",
    [
        ["bone", "out", "--to", "peft-miss"],
        ["bone", "out", "--to", "native"],
        ["bat", "out", "--to", "peft-lora", "--base", "base", "--rank", "12"],
    ],
)
def test_safetensors_are_converted_without_torch(here: Path, arguments: list[str]) -> None:
    code = (
        "import sys; from boneconv.cli import run; assert run(sys.argv[1:]) == 0; "
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "convert", *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
