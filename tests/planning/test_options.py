"""Which adapters go into which component."""

from __future__ import annotations

from pathlib import Path

import pytest

from boneconv.errors import UsageError
from boneconv.planning.options import stacks


def test_a_base_that_is_one_checkpoint() -> None:
    assert stacks("a") == {None: ("a",)}
    assert stacks("a", ["b", Path("c")]) == {None: ("a", "b", Path("c"))}


def test_components_of_a_pipeline() -> None:
    found = stacks("a", ["b"], "unet", {"text_encoder": "c", "vae": ["d", Path("e")]})
    assert found == {"unet": ("a", "b"), "text_encoder": ("c",), "vae": ("d", Path("e"))}
    assert list(found) == ["unet", "text_encoder", "vae"]


def test_what_does_not_go_together() -> None:
    with pytest.raises(UsageError, match="no component for the first adapter"):
        stacks("a", (), None, {"unet": "b"})
    with pytest.raises(UsageError, match="'unet' is the component of the first adapter"):
        stacks("a", (), "unet", {"unet": "b"})
    with pytest.raises(UsageError, match="no adapter for the component 'vae'"):
        stacks("a", (), "unet", {"vae": ()})
