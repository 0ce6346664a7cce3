"""GGUF bases, and tensors that tell of a quantisation."""

from __future__ import annotations

from pathlib import Path

import pytest

from boneconv.errors import FormatError
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.quantised import quantised_by
from tests.builders import Raw, base_tensors, make_base


def test_a_gguf_base_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    (tmp_path / "config.json").write_text("{}")
    for path in (tmp_path, tmp_path / "model-Q4_K_M.gguf"):
        with pytest.raises(FormatError, match=r"'gguf'.*converted from, then convert the result"):
            open_checkpoint(path)


def test_plain_and_float8_weights_tell_of_no_other_method(tmp_path: Path) -> None:
    eight = Raw("F8_E4M3", (2, 2), bytes(4))
    scale = Raw("F32", (1, 1), bytes(4))
    own = {"a.weight": eight, "a.weight_scale_inv": scale, "b.weight": eight, "b.scale": scale}
    base = make_base(tmp_path, base_tensors() | own)
    assert quantised_by(open_checkpoint(base).tensors) is None
