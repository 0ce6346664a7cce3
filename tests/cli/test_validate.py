"""``boneconv validate``: text, JSON and exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from boneconv.cli import run
from boneconv.formats.native import write_native
from tests.builders import make_adapter, make_base, pack
from tests.formats.native_cases import small

INVALID = Path(__file__).parent.parent.parent / "specs" / "vectors" / "invalid"


def call(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = run(["validate", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


def parsed(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, Any]:
    code, out, err = call(capfd, *arguments, "--json")
    assert err == ""
    return code, json.loads(out)


def test_a_valid_adapter_in_words(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_native(small().native, tmp_path / "a")
    code, out, err = call(capfd, tmp_path / "a")
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        f"adapter  {tmp_path / 'a'}",
        "format   Bone Adapter Format 1.0",
        "PEFT     loads in PEFT 0.14 to 0.18",
        "result   valid",
    ]


def test_a_valid_adapter_as_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder, base = make_adapter(tmp_path / "a"), make_base(tmp_path / "base")
    assert parsed(capfd, folder, "--base", base) == (
        0,
        {
            "path": str(folder),
            "format": "peft",
            "base_checked": True,
            "valid": True,
            "violations": [],
            "peft": {"loads": True, "versions": "0.14 to 0.18", "reason": None},
        },
    )
    code, out, _ = call(capfd, folder, "--base", base)
    assert (code, out.splitlines()[-1]) == (0, "result   valid, with the base")


def test_violations_in_words(capfd: pytest.CaptureFixture[str]) -> None:
    folder = INVALID / "r20-block-rank" / "adapter"
    code, out, err = call(capfd, folder)
    assert (code, err) == (1, "")
    assert out.splitlines()[2:] == [
        "PEFT     refused: it breaks R20",
        "result   1 violation",
        "",
        "R20 ShapeError: every block has the shape of its variant and rank",
        f"  {folder / 'adapter_model.safetensors'}: the bone block of 'q' does not fit",
        "  expected [2, out]",
        "  found [3, 4]",
    ]


def test_violations_as_json(capfd: pytest.CaptureFixture[str]) -> None:
    folder = INVALID / "r30-base-one-bit"
    code, found = parsed(capfd, folder / "adapter", "--base", folder / "base.safetensors")
    assert code == 1
    assert (found["valid"], found["base_checked"]) == (False, True)
    (violation,) = found["violations"]
    assert violation.keys() == {
        "rule",
        "title",
        "error",
        "path",
        "message",
        "expected",
        "found",
        "hint",
    }
    assert (violation["rule"], violation["error"]) == ("R30", "BaseMismatchError")
    assert "q.weight" in violation["message"]


@pytest.mark.parametrize("name", sorted(path.name for path in INVALID.iterdir()))
def test_exit_codes_of_the_vectors(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    case = json.loads((INVALID / name / "case.json").read_text())
    options: list[str | Path] = []
    if "base" in case:
        strength = case["adapters"][0]["strength"]
        options = ["--base", INVALID / name / case["base"], "--scale", str(strength)]
    code, found = parsed(capfd, INVALID / name / "adapter", *options)
    assert code == (2 if case["error"] == "NotABoneAdapterError" else 1)
    assert {v["rule"] for v in found["violations"]} == {case["rule"]}
    assert {v["error"] for v in found["violations"]} == {case["error"]}
    code_in_words, out, err = call(capfd, INVALID / name / "adapter", *options)
    assert (code_in_words, err) == (code, "")
    assert "\x1b" not in out
    assert "\x9b" not in out


def test_what_is_no_adapter_at_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = call(capfd, tmp_path / "nothing")
    assert (code, out) == (2, "")
    assert "no such file or folder" in err
    code, out, err = call(capfd, make_base(tmp_path / "base"))
    assert (code, out) == (2, "")
    assert err.startswith("Error: ")
    (tmp_path / "x.safetensors").write_bytes(pack({}))
    code, found = parsed(capfd, tmp_path / "x.safetensors")
    assert (code, [v["rule"] for v in found["violations"]]) == (2, ["R05"])


def test_help_has_an_example(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(capfd, "--help")
    assert code == 0
    assert "Example: boneconv validate " in out
