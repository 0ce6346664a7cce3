"""The real model: its canonical merge passes, and one spoiled number in 135 million is found."""

from __future__ import annotations

from pathlib import Path

import boneconv
from boneconv.io.checkpoint import open_checkpoint
from boneconv.verification import verify

NAME = "model.layers.17.mlp.down_proj.weight"


def test_the_real_merge(real_base: Path, trained_bat: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    boneconv.merge(real_base, trained_bat, out)
    report = verify(real_base, trained_bat, out)
    assert report.passed, report.findings
    assert report.totals.identical == report.totals.tensors
    assert report.totals.update_norm is not None
    assert 0 < report.totals.update_norm < 1
    tensor = open_checkpoint(out).tensors[NAME]
    with tensor.path.open("r+b") as file:
        file.seek(tensor.offset + 2 * 1234)
        byte = file.read(1)[0]
        file.seek(tensor.offset + 2 * 1234)
        file.write(bytes([byte ^ 1]))
    (failure,) = verify(real_base, trained_bat, out).failures
    assert (failure.name, failure.max_ulp, failure.place) == (NAME, 1.0, tensor.path.name)
    assert failure.diagnosis is not None
    row, column = divmod(1234, tensor.shape[1])
    assert f"row {row}, column {column}" in failure.diagnosis
