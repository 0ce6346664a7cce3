"""What goes with transformers' models: sizes of images, quiet, and which library is missing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from boneconv.errors import MissingExtraError
from boneconv.pretrained import image_size, quiet_transformers, require_libraries


@pytest.mark.parametrize(
    ("said", "processor", "expected"),
    [
        (32, {"size": 64}, (32, 32)),
        ([48, 32], None, (48, 32)),
        (None, {"crop_size": {"height": 40, "width": 30}, "size": 64}, (40, 30)),
        (None, {"size": {"shortest_edge": 16}}, (224, 224)),
        (None, None, (224, 224)),
    ],
)
def test_the_configuration_wins_over_the_processor(
    tmp_path: Path, said: object, processor: object, expected: tuple[int, int]
) -> None:
    if processor is not None:
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert image_size(SimpleNamespace(image_size=said), tmp_path) == expected


def test_remarks_and_bars_come_back() -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    with quiet_transformers():
        assert logging.get_verbosity() == logging.ERROR
        assert not logging.is_progress_bar_enabled()
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_missing_library_is_named_with_its_extra() -> None:
    require_libraries(["json"], "this", "all")
    with pytest.raises(MissingExtraError, match=r"this needs no_such.*boneconv\[all\]"):
        require_libraries(["json", "no_such"], "this", "all")
