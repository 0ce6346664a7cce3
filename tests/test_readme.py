"""What the README shows works as pasted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.onnx.patching.cases import make_case

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

#: Sections whose commands a test below runs as they stand.
RUN = (
    "Merge an adapter",
    "Merge into a diffusers pipeline",
    "Check an adapter",
    "Undo a merge",
    "Verify a merge",
    "In a pipeline",
    "Export to ONNX",
    "Convert an adapter",
)
FOLDERS = ("base", "restored")


def blocks(language: str, section: str) -> list[str]:
    """The code blocks of a language in a section of the README."""
    body = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", README, re.M | re.S)
    assert body is not None, section
    return re.findall(rf"^```{language}\n(.*?)^```", body[1], re.M | re.S)


def run_shell(script: str, folder: Path) -> str:
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_links_lead_somewhere() -> None:
    titles = re.findall(r"^#+ (.*)$", README, re.M)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", README):
        file, _, anchor = target.partition("#")
        assert (ROOT / file).exists(), target
        assert not anchor or anchor in anchors, target


def test_every_shell_block_is_run_by_a_test() -> None:
    shown = re.findall(r"^```sh\n(.*?)^```", README, re.M | re.S)
    sections = ("Try it", *RUN, "Run the tests")
    assert sorted(shown) == sorted(block for s in sections for block in blocks("sh", s))


def test_the_merge_commands_work_as_pasted(tmp_path: Path) -> None:
    for block in blocks("sh", "Merge an adapter"):
        assert run_shell(block, tmp_path)
    assert (tmp_path / "merged" / "boneconv.json").is_file()
    assert (tmp_path / "stacked" / "model.safetensors").is_file()


def test_the_convert_commands_work_as_pasted(tmp_path: Path) -> None:
    (block,) = blocks("sh", "Convert an adapter")
    run_shell(block, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"miss", "lora", "bat-lora", "native"}


def test_the_validate_commands_work_as_pasted(tmp_path: Path) -> None:
    (block,) = blocks("sh", "Check an adapter")
    assert "valid" in run_shell(block, tmp_path)


def test_the_unmerge_commands_work_as_pasted(tmp_path: Path) -> None:
    (block,) = blocks("sh", "Undo a merge")
    run_shell(block, tmp_path)
    base, restored = (tmp_path / "undo" / name / "model.safetensors" for name in FOLDERS)
    assert restored.read_bytes() == base.read_bytes()


def test_the_component_commands_work_as_pasted(tmp_path: Path) -> None:
    (block,) = blocks("sh", "Merge into a diffusers pipeline")
    run_shell(block, tmp_path)
    record = (tmp_path / "merged-pipeline" / "boneconv.json").read_text()
    assert '"unet/' in record
    assert '"text_encoder/' in record


def test_the_verify_commands_work_as_pasted(tmp_path: Path) -> None:
    for block in blocks("sh", "Verify a merge"):
        assert run_shell(block, tmp_path)
    assert "<html" in (tmp_path / "verified" / "report.html").read_text(encoding="utf-8")


def test_the_pipeline_s_commands_work_as_pasted(tmp_path: Path) -> None:
    (block,) = blocks("sh", "In a pipeline")
    run_shell(block, tmp_path)
    reports = {path.name for path in (tmp_path / "pipeline").glob("verify.*")}
    assert reports == {"verify.xml", "verify.html", "verify.md"}


def test_the_python_example_works_as_pasted(tmp_path: Path) -> None:
    run_shell("boneconv demo ./demo", tmp_path)
    (example,) = blocks("python", "From Python")
    (tmp_path / "example.py").write_text(example, encoding="utf-8")
    assert run_shell("python example.py", tmp_path).startswith("3 weights merged")


def test_a_graph_is_patched_as_pasted(tmp_path: Path) -> None:
    case = make_case(tmp_path)
    assert (case.base.name, case.adapter.name, case.graph.parent.name) == (
        "base",
        "adapter",
        "graph",
    )
    patch, _ = blocks("sh", "Export to ONNX")
    assert "patched" in run_shell(patch, tmp_path)


@pytest.mark.slow
def test_training_and_exporting_work_as_pasted(tmp_path: Path) -> None:
    """One after the other: the second takes what the first leaves."""
    (train,) = blocks("python", "Train an adapter")
    _, export = blocks("sh", "Export to ONNX")
    (serve,) = blocks("python", "Export to ONNX")
    (tmp_path / "train.py").write_text(train, encoding="utf-8")
    (tmp_path / "serve.py").write_text(serve, encoding="utf-8")
    run_shell("python train.py", tmp_path)
    run_shell(export, tmp_path)
    moved = float(run_shell("python serve.py", tmp_path).split()[-1])
    assert moved > 1e-3


def test_every_python_block_is_run_by_a_test() -> None:
    shown = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
    sections = ("Train an adapter", "Export to ONNX", "From Python")
    assert sorted(shown) == sorted(block for s in sections for block in blocks("python", s))


@pytest.mark.slow
def test_the_installation_works_as_pasted(tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, tracked.stdout.split("\0")):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, clone / name)
    (block,) = blocks("sh", "Try it")
    assert "all are correctly rounded" in run_shell(block, clone)


def test_every_option_of_merge_is_listed() -> None:
    from boneconv.cli.merge import command

    table = README[README.index("## Merge an adapter") : README.index("## From Python")]
    missing = [
        name
        for option in command.params
        for name in option.opts[:1]
        if name.startswith("--") and name not in table and name not in ("--verbose", "--help")
    ]
    assert missing == []
