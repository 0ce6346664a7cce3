"""``boneconv diff``: texts, JSON and the exit codes of diff(1)."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from boneconv.cli import run
from tests.builders import EMBEDDING, base_tensors, make_adapter, make_base

SCHEMA = json.loads(
    (Path(__file__).parents[2] / "specs" / "diff-report-1.0.schema.json").read_text()
)


def call(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    code = run(["diff", *map(str, arguments)])
    out, err = capfd.readouterr()
    return code, out, err


def test_the_same_in_other_files_is_the_same(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one, other = make_base(tmp_path / "one"), make_base(tmp_path / "other", shards=3)
    code, out, err = call(capfd, one, other)
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "SAME: 10 tensors, every byte equal"


def test_one_tensor_that_differs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    changed = base_tensors()
    changed[EMBEDDING] = -changed[EMBEDDING]
    one, other = make_base(tmp_path / "one"), make_base(tmp_path / "other", changed)
    code, out, _ = call(capfd, one, other)
    assert code == 1
    assert out.splitlines()[0] == "DIFFERENT: 1 differ of 10 tensors"
    assert [line for line in out.splitlines() if line.startswith(EMBEDDING)]
    assert len(call(capfd, one, other, "-v")[1].splitlines()) == len(out.splitlines()) + 9


@pytest.mark.parametrize("same", [True, False])
def test_json_conforms_to_its_schema(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], same: bool
) -> None:
    one = make_adapter(tmp_path / "one")
    other = make_adapter(tmp_path / "other", "bone" if same else "bat")
    code, out, err = call(capfd, one, other, "--json")
    assert (code, err) == (0 if same else 1, "")
    document = json.loads(out)
    jsonschema.validate(document, SCHEMA, cls=jsonschema.Draft202012Validator)
    assert document["identical"] is same
    assert document["kind"] == "adapter"


def test_what_cannot_be_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    for other in (adapter, tmp_path / "nothing"):
        code, out, err = call(capfd, base, other)
        assert (code, out) == (2, "")
        assert err.startswith("Error: ")
