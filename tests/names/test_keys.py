"""Keys of adapter files: prefixes and wrappers come off, names stay."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.names import module_key
from tests.names.checkpoints import TEXT, builder

WRAPPERS = ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"]


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("base_model.model.model.layers.0.q_proj.bone_block", "model.layers.0.q_proj.bone_block"),
        ("model.layers.0.q_proj.bone_block", "model.layers.0.q_proj.bone_block"),
        ("base_model.model.base_model.model.q.weight", "base_model.model.q.weight"),
        ("base_model.q.weight", "base_model.q.weight"),
        ("encoder.base_model.model.q.weight", "encoder.base_model.model.q.weight"),
        ("base_model.models.q.weight", "base_model.models.q.weight"),
        ("_orig_mod.base_model.model.q.bone_block", "q.bone_block"),
        ("base_model._orig_mod.model.q.bone_block", "q.bone_block"),
        ("module.base_model.model.module.q.bone_block", "module.q.bone_block"),
        ("module.q.weight", "module.q.weight"),
        ("base_model.model.q.base_layer.weight", "q.weight"),
        ("base_model.model.layers._fsdp_wrapped_module.0.q.bone_block", "layers.0.q.bone_block"),
        ("base_model.model.q.bone_block.default", "q.bone_block"),
        ("base_model.model.q.miss_block.default", "q.miss_block"),
        ("base_model.model.head.modules_to_save.default.weight", "head.weight"),
        ("base_model.model.head.modules_to_save.default._orig_mod.out.bias", "head.out.bias"),
        ("base_model.model.head.modules_to_save._orig_mod.default.bias", "head.bias"),
        ("base_model.model.head.modules_to_save.weight", "head.weight"),
        ("base_model.model.head.modules_to_save.other.weight", "head.other.weight"),
        ("base_model.model.head.original_module.weight", "head.weight"),
        ("base_model.model.default.q.weight", "default.q.weight"),
        ("base_model.model.my_base_layer.base_layers.weight", "my_base_layer.base_layers.weight"),
    ],
)
def test_module_key_strips_the_prefix_once_and_wrappers_as_segments(key: str, name: str) -> None:
    assert module_key(key) == name


SEGMENT = st.from_regex(r"[a-z_]{1,8}|[0-9]{1,3}", fullmatch=True).filter(
    lambda s: s not in {*WRAPPERS, "modules_to_save", "original_module", "base_model", "module"}
)


@given(name=st.lists(SEGMENT, min_size=1, max_size=6), data=st.data())
def test_module_key_finds_the_name_wherever_wrappers_stand(
    name: list[str], data: st.DataObject
) -> None:
    wrapped = ["base_model", "model", *name, "bone_block"]
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(wrapped)))
        wrapped.insert(place, data.draw(st.sampled_from(WRAPPERS)))
    assert module_key(".".join(wrapped)) == ".".join([*name, "bone_block"])


def test_module_key_of_a_wrapped_model_is_its_own_name() -> None:
    import torch
    from peft import BoneConfig, get_peft_model

    model = builder("BertForSequenceClassification", "BertConfig", **TEXT)()
    own = set(model.state_dict())
    blocks = {f"{key.removesuffix('.weight')}.bone_block" for key in own if "query.weight" in key}
    config = BoneConfig(r=4, target_modules=["query"], modules_to_save=["classifier"])
    wrapped = torch.compile(get_peft_model(model, config))
    assert len(blocks) == TEXT["num_hidden_layers"]
    assert {module_key(key) for key in wrapped.state_dict()} == own | blocks
