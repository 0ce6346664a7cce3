"""Adding, choosing, stacking, disabling and deleting adapters."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from boneconv.config import Axis, BoneConfig, Variant
from boneconv.errors import ConfigError, ShapeError
from boneconv.kernels.reference import apply
from boneconv.kernels.stage import Stage
from boneconv.nn.linear import BoneLinear
from boneconv.nn.model.bone_model import BoneModel
from boneconv.nn.model.walking import bone_layers
from tests.nn.model.modules import MLP, Deep, array, batch, bone, ids, make, stir

CONFIGS = {
    "bone": BoneConfig(r=5, target_modules=["lin0", "lin1"]),
    "bat": BoneConfig(r=6, target_modules=["lin0"], init_weights="bat"),
    "bat_in": BoneConfig(
        r=3, target_modules=["lin0", "lin1"], init_weights="bat", axis=Axis.IN
    ),
    "mini": BoneConfig(
        peft_type="MISS", r=4, mini_r=3, target_modules=["lin1"], init_weights="mini"
    ),
}  # fmt: skip


def _all() -> BoneModel:
    model = BoneModel(make(), CONFIGS, "bone")
    for seed, name in enumerate(CONFIGS):
        stir(model, name, seed=seed)
    return model


def _by_formula(model: BoneModel, names: list[str]) -> torch.Tensor:
    """The MLP's output with every weight from the float64 formula."""
    base = make().double()
    for path, layer in bone_layers(model.model).items():
        weight = array(layer.base_layer.weight)
        stages = [
            Stage(update.variant, array(update.block), update.axis)
            for update in layer.updates([name for name in names if name in layer.bone_block])
        ]
        merged = apply(weight, stages)
        base.get_submodule(path).weight.data = torch.from_numpy(merged)
    with torch.no_grad():
        return base(batch(dtype=torch.float64)).float()


@pytest.mark.parametrize(
    "names",
    [[name] for name in CONFIGS]
    + [["bone", "bat"], ["bat", "bone"], ["mini", "bat_in", "bone"], list(CONFIGS), []],
)
def test_adapters_are_stacked_in_the_order_they_are_named_in(names: list[str]) -> None:
    model = _all()
    model.set_adapter(names)
    assert model.active_adapters == names
    torch.testing.assert_close(model(batch()), _by_formula(model, names), rtol=1e-5, atol=1e-5)


def test_the_order_matters() -> None:
    model = _all()
    model.set_adapter(["bone", "bat"])
    one = model(batch())
    model.set_adapter(["bat", "bone"])
    assert (model(batch()) - one).abs().max() > 1e-3


def test_a_new_adapter_changes_nothing_until_it_is_active_and_trained() -> None:
    x, before = batch(), make()(batch())
    model = BoneModel(make(), CONFIGS["bone"])
    assert torch.equal(model(x), before)
    model.add_adapter("other", CONFIGS["bat"])
    assert model.active_adapters == ["default"]
    stir(model, "other")
    assert torch.equal(model(x), before)
    model.set_adapter("other")
    assert not torch.equal(model(x), before)


def test_random_blocks_on_request() -> None:
    config = BoneConfig(r=4, target_modules=["lin0"], init_weights=False)
    assert not torch.equal(BoneModel(make(), config)(batch()), make()(batch()))


def test_the_attributes_of_the_page() -> None:
    base = make()
    config = CONFIGS["bone"]
    model = BoneModel(base, config, "mine")
    assert model.model is base
    assert model.peft_config == {"mine": config}
    assert isinstance(model, torch.nn.Module)
    assert isinstance(base.lin0, BoneLinear)
    assert type(base.lin0.base_layer) is torch.nn.Linear


def test_each_adapter_has_its_own_rank_and_variant_on_one_layer() -> None:
    layer = _all().model.get_submodule("lin0")
    assert isinstance(layer, BoneLinear)
    shapes = {name: list(block.shape) for name, block in layer.bone_block.items()}
    assert shapes == {"bone": [5, 24], "bat": [4, 6, 6], "bat_in": [4, 3, 3]}
    assert [u.variant for u in layer.updates(["bat", "bone"])] == [Variant.BAT, Variant.BONE]


# What is trained


def _trained(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_only_the_parameters_of_active_adapters_are_trained() -> None:
    model = _all()
    assert _trained(model) == {"model.lin0.bone_block.bone", "model.lin1.bone_block.bone"}
    model.set_adapter(["bat", "mini"])
    assert _trained(model) == {"model.lin0.bone_block.bat", "model.lin1.bone_block.mini"}
    model.add_adapter("more", CONFIGS["bone"])
    assert _trained(model) == {"model.lin0.bone_block.bat", "model.lin1.bone_block.mini"}


def test_an_adapter_for_inference_is_not_trained() -> None:
    config = BoneConfig(r=4, target_modules=["lin0"], inference_mode=True)
    assert _trained(BoneModel(make(), config)) == set()


def test_training_moves_the_active_blocks_alone() -> None:
    model = _all()
    model.set_adapter(["bone", "bat"])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained = _trained(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model(batch()).square().sum().backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name


def test_numbers_of_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    model = BoneModel(make(), CONFIGS["bone"])
    total = sum(p.numel() for p in make().parameters()) + 5 * 24 + 5 * 6
    assert model.get_nb_trainable_parameters() == (150, total)
    model.print_trainable_parameters()
    share = 100 * 150 / total
    assert capsys.readouterr().out == (
        f"trainable parameters: 150 of {total:,} ({share:.4f} %)\n"
    )  # fmt: skip


# Disabling


def test_a_disabled_model_is_the_base_to_the_bit() -> None:
    model, x = bone(), batch()
    adapted, plain = model(x), make()(x)
    model.disable_adapters()
    assert torch.equal(model(x), plain)
    model.enable_adapters()
    assert torch.equal(model(x), adapted)


def test_disabling_for_a_while() -> None:
    model, x = bone(), batch()
    adapted, plain = model(x), make()(x)
    for disable in (model.disable_adapters, model.disable_adapter):
        with disable():
            assert torch.equal(model(x), plain)
            with disable():
                pass
            assert torch.equal(model(x), plain)
        assert torch.equal(model(x), adapted)
    with pytest.raises(ValueError, match="inside"), model.disable_adapters():
        raise ValueError("inside")
    assert torch.equal(model(x), adapted)


def test_gradients_of_a_forward_before_a_pause_are_right() -> None:
    x = batch()
    model = bone()
    model(x).sum().backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    other = bone()
    loss = other(x).sum()
    with torch.no_grad(), other.disable_adapters():
        other(x)
    loss.backward()
    for name, parameter in other.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, expected[name])  # type: ignore[arg-type]


def test_weights_are_kept_between_calls_on_request() -> None:
    model, x = _all(), batch()
    model.set_adapter(list(CONFIGS))
    layers = list(bone_layers(model.model).values())
    assert not any(layer.cache_weight for layer in layers)
    with torch.no_grad():
        expected = model(x)
        model.cache_weights()
        assert all(layer.cache_weight for layer in layers)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
        model.set_adapter("bone")
        other = model(x)
        model.cache_weights(False)
        torch.testing.assert_close(model(x), other, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(other, expected, atol=1e-3)


# Deleting


def test_deleting_takes_the_adapter_out_of_everything() -> None:
    model = _all()
    model.set_adapter(["bone", "bat"])
    model.delete_adapter("bone")
    assert list(model.peft_config) == ["bat", "bat_in", "mini"]
    assert model.active_adapters == ["bat"]
    assert not [name for name in model.state_dict() if name.endswith(".bone")]
    torch.testing.assert_close(model(batch()), _by_formula(model, ["bat"]), rtol=1e-5, atol=1e-5)


def test_deleting_the_active_adapter_makes_the_first_other_active() -> None:
    model = _all()
    with pytest.warns(UserWarning, match="'bone' was deleted; 'bat' is active now"):
        model.delete_adapter("bone")
    assert model.active_adapters == ["bat"]
    assert _trained(model) == {"model.lin0.bone_block.bat"}


def test_deleting_all_of_them_leaves_the_base() -> None:
    model = _all()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in CONFIGS:
            model.delete_adapter(name)
    assert model.active_adapters == []
    assert set(model.model.state_dict()) == set(make().state_dict())
    assert torch.equal(model(batch()), make()(batch()))
    model.add_adapter("again", CONFIGS["bone"])
    model.set_adapter("again")
    assert torch.equal(model(batch()), make()(batch()))


def test_deleting_a_merged_adapter_takes_it_out_of_the_weights() -> None:
    model = _all()
    model.merge_adapter(["bone", "mini"])
    model.set_adapter("mini")
    model.delete_adapter("bone")
    torch.testing.assert_close(model(batch()), _by_formula(_all(), ["mini"]), rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(model.model.lin0.weight, make().lin0.weight)  # type: ignore[union-attr]


# What cannot be


@pytest.mark.parametrize(
    "name", ["", "a.b", "a/b", "..", "a\\b", "keys", "items", "training", "a\nb", None, 3]
)
def test_names_that_cannot_be(name: Any) -> None:
    base = make()
    with pytest.raises(ConfigError, match="no name for a new adapter"):
        BoneModel(base, CONFIGS["bone"], name)
    assert set(base.state_dict()) == set(make().state_dict())


def test_names_that_are_taken_or_unknown() -> None:
    model = _all()
    with pytest.raises(ConfigError, match="one other than bat, bat_in, bone, mini"):
        model.add_adapter("bone", CONFIGS["bone"])
    for call in (
        lambda: model.set_adapter("nobody"),
        lambda: model.set_adapter(["bone", "nobody"]),
        lambda: model.delete_adapter("nobody"),
        lambda: model.merge_adapter(["nobody"]),
        lambda: model.merge_and_unload(adapter_names=["nobody"]),
        lambda: model.save_pretrained("x", selected_adapters=["nobody"]),
    ):
        with pytest.raises(ValueError, match="there is no such adapter"):
            call()
    with pytest.raises(ConfigError, match="named twice"):
        model.set_adapter(["bone", "bone"])
    assert model.active_adapters == ["bone"]


def test_configurations_that_cannot_be() -> None:
    with pytest.raises(ConfigError, match="adapter_name is none of those in peft_config"):
        BoneModel(make(), CONFIGS, "default")
    with pytest.raises(ConfigError, match=r"no configuration of Bone.* found builtins.int"):
        BoneModel(make(), 3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="carries adapters already"):
        BoneModel(bone(), CONFIGS["bone"])
    with pytest.raises(ConfigError, match="carries adapters already"):
        BoneModel(bone().model, CONFIGS["bone"])


@pytest.mark.parametrize(
    "config",
    [
        BoneConfig(r=5, target_modules=["lin0", "lin1"], init_weights="bat"),
        BoneConfig(r=12, target_modules=["lin0", "lin1"], init_weights="bat"),
        BoneConfig(
            peft_type="MISS", r=4, mini_r=4, target_modules=["lin0", "lin1"], init_weights="mini"
        ),
    ],
)
def test_a_rank_that_does_not_fit_changes_nothing(config: BoneConfig) -> None:
    base = make()
    with pytest.raises(ShapeError, match=r"^'lin[01]': "):
        BoneModel(base, config)
    assert type(base.lin0) is torch.nn.Linear
    assert all(parameter.requires_grad for parameter in base.parameters())
    model = bone()
    state, x = set(model.state_dict()), batch()
    before = model(x)
    with pytest.raises(ValueError, match="lin"):
        model.add_adapter("bad", config)
    assert set(model.state_dict()) == state
    assert torch.equal(model(x), before)


def test_convolutions_embeddings_and_lists_of_layers_in_one_model() -> None:
    base, tokens = make(Deep), ids()
    plain = base(tokens)
    model = BoneModel(base, BoneConfig(r=4, target_modules="all-linear"))
    assert len(bone_layers(model.model)) == 7
    assert torch.equal(model(tokens), plain)
    stir(model)
    adapted = model(tokens)
    assert (adapted - plain).abs().max() > 1e-2
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged(tokens), adapted, rtol=1e-5, atol=1e-5)
    assert type(merged.mix) is torch.nn.Conv2d


def test_training_and_eval_mode_are_the_models() -> None:
    base = MLP()
    assert BoneModel(base, CONFIGS["bone"]).training
    assert not BoneModel(make(), CONFIGS["bone"]).training
    model = BoneModel(make(), CONFIGS["bone"])
    model.train()
    assert model.model.lin0.training  # type: ignore[union-attr]
