"""A layer that keeps W'."""

from __future__ import annotations

import pytest

from boneconv.nn import BoneLinear
from tests.nn.kept import agrees, kept, kept_layer


@pytest.fixture
def layer() -> BoneLinear:
    layer = kept_layer()
    assert agrees(layer)
    assert kept(layer) is not None
    return layer
