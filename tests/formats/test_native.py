"""Reading and writing the Bone Adapter Format: what is written is what was meant, to the byte."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from boneconv.adapter import Adapter
from boneconv.config import Axis, Variant
from boneconv.errors import (
    BoneconvError,
    ConfigError,
    FormatError,
    InputError,
    MissingPathError,
    NameMatchError,
    NonFiniteError,
    NotABoneAdapterError,
    OutputExistsError,
    UsageError,
)
from boneconv.formats import detect, read_adapter
from boneconv.formats.native import (
    Metadata,
    Module,
    NativeAdapter,
    StageFailed,
    find_homes,
    fingerprint,
    open_native,
    read,
    write_native,
)
from boneconv.formats.native.canonical import encode, parse
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.safetensors import ArrayTensor
from tests.builders import (
    BF16,
    F16,
    F32,
    F64,
    HIDDEN,
    Array,
    adapter_tensors,
    base_tensors,
    grid,
    make_adapter,
    make_base,
    pack,
    same_bits,
    snapshot,
)
from tests.formats.native_cases import Case, cases, digest, small, tensors_of

VECTORS = Path(__file__).parent.parent.parent / "specs" / "vectors"
FILES = ["adapter_config.json", "adapter_model.safetensors"]


def rewritten(native: NativeAdapter, out: Path) -> NativeAdapter:
    write_native(native, out)
    return open_native(out, values=True).content


# --- writing ------------------------------------------------------------------------------------


@given(case=cases())
def test_write_read_write_gives_the_same_bytes(case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder) / "first", Path(folder) / "second"
        content = rewritten(case.native, first)
        assert content.metadata == case.native.metadata
        assert content.tensors.keys() == case.native.tensors.keys()
        for name, tensor in case.native.tensors.items():
            assert same_bits(content.tensors[name].read(), tensor.read())
        rewritten(content, second)
        assert snapshot(first) == snapshot(second)
        assert sorted(snapshot(first)) == FILES
        alone = Path(folder) / "alone.safetensors"
        write_native(content, alone)
        assert alone.read_bytes() == (first / FILES[1]).read_bytes()


@pytest.mark.parametrize("name", sorted(path.name for path in (VECTORS / "valid").iterdir()))
def test_vectors_are_written_as_they_are(name: str, tmp_path: Path) -> None:
    folder = VECTORS / "valid" / name / "adapter"
    write_native(open_native(folder).content, tmp_path / "out")
    found, wanted = snapshot(tmp_path / "out"), snapshot(folder)
    if name == "other-metadata":  # a writer writes the one key and no other
        assert len(found[FILES[1]]) < len(wanted.pop(FILES[1]))
        assert open_native(tmp_path / "out").file.metadata.keys() == {"bone_adapter"}
    for file, content in wanted.items():
        assert found[file] == content


def test_tensors_lie_by_dtype_and_name_under_one_key(tmp_path: Path) -> None:
    metadata = Metadata(
        Variant.BONE,
        {"b": Module(2), "a": Module(2)},
        replaced={"h": ("count", "flag", "mean", "weight")},
    )
    arrays = {
        "b.bone_block": grid((2, 3), BF16),
        "a.bone_block": grid((2, 3), BF16),
        "h.weight": grid((2, 2), F32),
        "h.mean": grid((2,), F64),
        "h.count": np.arange(2, dtype=np.int64),
        "h.flag": np.ones(3, np.bool_),
    }
    native = NativeAdapter(metadata, {**tensors_of(arrays)})
    stored = write_raw(native, tmp_path / "raw")
    write_native(open_native(stored).content, tmp_path / "out")
    content = (tmp_path / "out" / FILES[1]).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header) == [
        "__metadata__",
        *(
            f"base_model.model.{name}"
            for name in ("h.count", "h.mean", "h.weight", "a.bone_block", "b.bone_block", "h.flag")
        ),
    ]
    assert list(header["__metadata__"]) == ["bone_adapter"]


def write_raw(native: NativeAdapter, folder: Path) -> Path:
    """Tensors of any dtype and order, by the tests' own writer."""
    folder.mkdir()
    arrays = {name: tensor.read() for name, tensor in native.tensors.items()}
    content = pack(arrays, {"bone_adapter": native.metadata.encode()})
    (folder / FILES[1]).write_bytes(content)
    return folder


def test_the_config_says_what_peft_needs_and_nothing_else(tmp_path: Path) -> None:
    case = small(Variant.BAT)
    free = {"base_model_name_or_path": "owner/base", "task_type": "CAUSAL_LM"}
    write_native(replace(case.native, free=free), tmp_path / "out")
    text = (tmp_path / "out" / FILES[0]).read_text()
    config = json.loads(text)
    assert config == {
        "auto_mapping": None,
        "base_model_name_or_path": "owner/base",
        "bias": "none",
        "exclude_modules": None,
        "inference_mode": True,
        "init_weights": "bat",
        "layers_pattern": None,
        "layers_to_transform": None,
        "modules_to_save": None,
        "peft_type": "BONE",
        "r": 2,
        "revision": None,
        "target_modules": ["k", "layers.0.q"],
        "task_type": "CAUSAL_LM",
    }
    assert text == json.dumps(config, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize(
    "native",
    [
        small(Variant.MINI).native,
        small(scale=0.5).native,
        small(replaced={"m": ("weight",)}).native,
        replace(small().native, metadata=replace(small().native.metadata, scale=2)),
    ],
    ids=["mini", "scale", "a name inside names", "an integral scale"],
)
def test_what_peft_would_misread_it_is_made_to_refuse(
    native: NativeAdapter, tmp_path: Path
) -> None:
    write_native(native, tmp_path / "out")
    config = json.loads((tmp_path / "out" / FILES[0]).read_text())
    assert config["peft_type"] == "BONE_ADAPTER"
    assert set(config) == {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "revision",
        "task_type",
    }


def test_side_files_are_copied_into_a_folder(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    files = {
        "tokenizer.json": tmp_path / "tokenizer.json",
        "additional_chat_templates/a.jinja": tmp_path / "tokenizer.json",
    }
    write_native(small().native, tmp_path / "out", side_files=files)
    assert sorted(snapshot(tmp_path / "out")) == sorted([*FILES, *files])
    found = read(tmp_path / "out").side_files
    assert sorted(path.relative_to(tmp_path / "out").as_posix() for path in found) == sorted(files)
    with pytest.raises(UsageError, match="own files"):
        write_native(small().native, tmp_path / "b", side_files={FILES[0]: tmp_path / "x"})


def test_nothing_is_overwritten_without_force(tmp_path: Path) -> None:
    write_native(small().native, tmp_path / "out")
    before = snapshot(tmp_path)
    with pytest.raises(OutputExistsError):
        write_native(small(Variant.MINI).native, tmp_path / "out")
    assert snapshot(tmp_path) == before
    write_native(small(Variant.MINI).native, tmp_path / "out", force=True)
    assert read(tmp_path / "out").config.variant is Variant.MINI
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def with_tensor(name: str, array: Array) -> Callable[[NativeAdapter], NativeAdapter]:
    return lambda native: replace(native, tensors={**native.tensors, **tensors_of({name: array})})


def with_metadata(**fields: Any) -> Callable[[NativeAdapter], NativeAdapter]:
    return lambda native: replace(native, metadata=replace(native.metadata, **fields))


@pytest.mark.parametrize(
    ("spoil", "error", "text"),
    [
        (with_tensor("k.bone_block", grid((3, 4))), BoneconvError, "R20: "),
        (with_tensor("k.bone_block", grid((2, 4), F64)), FormatError, "R19: "),
        (with_tensor("k.bone_block", np.full((2, 4), np.nan, "f4")), NonFiniteError, "R23: "),
        (with_tensor("k.bias", grid((4,))), NameMatchError, "R18: "),
        (with_metadata(axis=Axis.OUT), ConfigError, "R12: "),
        (with_metadata(vocab_size=7), BoneconvError, "R22: "),
        (with_metadata(fingerprint="blake3-1m:" + "0" * 64), ConfigError, "R15: "),
        (with_metadata(version="2.0"), FormatError, "R08: "),
        (with_metadata(scale=0.00001), ConfigError, "cannot be written"),
        (with_metadata(scale=float("nan")), ConfigError, "cannot be written"),
        (with_metadata(scale=2.0**60), ConfigError, "cannot be written"),
        (lambda native: replace(native, free={"r": 3}), FormatError, "cannot stand in"),
        (lambda native: replace(native, free={"revision": 3}), FormatError, "cannot stand in"),
        (lambda native: replace(native, free={"task_type": "X"}), FormatError, "cannot stand in"),
        (with_tensor("k.bone_block", grid((2, 4), np.dtype("i1"))), UsageError, "dtype I8"),
    ],
)
def test_content_that_breaks_a_rule_is_not_written(
    spoil: Callable[[NativeAdapter], NativeAdapter],
    error: type[Exception],
    text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if text == "dtype I8":
        monkeypatch.setattr(ArrayTensor, "dtype", "I8")
    with pytest.raises(error, match=text):
        write_native(spoil(small().native), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- reading ------------------------------------------------------------------------------------


def test_a_native_adapter_as_an_adapter(tmp_path: Path) -> None:
    metadata = Metadata(
        Variant.MINI,
        {
            "a": Module(2, 2, base_shape=(4, 5), bias=True),
            "b": Module(3, 1),
        },
        scale=0.25,
        replaced={"embed": ("weight",), "score": ("weight",)},
        added=("score",),
        vocab_size=9,
    )
    arrays = {
        "a.bone_block": grid((2, 2), F16),
        "b.bone_block": grid((3, 1), BF16),
        "a.bias": grid((4,), F32),
        "embed.weight": grid((9, 4), F32),
        "score.weight": grid((2, 4), F32),
    }
    native = NativeAdapter(metadata, tensors_of(arrays), {"task_type": "SEQ_CLS"})
    write_native(native, tmp_path / "out")
    found = read_adapter(tmp_path / "out")
    assert (found.format, found.scale, found.vocab_size) == ("native", 0.25, 9)
    assert found.may_add == ("score",)
    blocks = found.blocks
    assert [(b.rank, b.mini_rank, b.base_shape) for b in blocks.values()] == [
        (2, 2, (4, 5)),
        (3, 1, None),
    ]
    assert same_bits(blocks["a"].tensor.read(), arrays["a.bone_block"])
    assert sorted(found.saved) == ["a.bias", "embed.weight", "score.weight"]
    config = found.config
    assert (config.variant, config.r, config.task_type) == (Variant.MINI, 3, "SEQ_CLS")
    assert config.modules_to_save == ("embed", "score")


@pytest.mark.parametrize("axis", list(Axis))
def test_the_axis_is_the_files(axis: Axis, tmp_path: Path) -> None:
    metadata = Metadata(Variant.BAT, {"q": Module(2)}, axis=axis)
    arrays = {"q.bone_block": grid((2, 2, 2))}
    write_native(NativeAdapter(metadata, tensors_of(arrays)), tmp_path / "out.safetensors")
    found = read_adapter(tmp_path / "out.safetensors")
    assert found.blocks["q"].axis is axis
    assert found.config.axis is axis


def test_a_file_alone_is_complete_under_any_name(tmp_path: Path) -> None:
    case = small(marked=True, info={"base_model_name_or_path": "owner/base", "task_type": 5})
    write_native(case.native, tmp_path / "some.safetensors")
    for name in ("some.safetensors", "adapter_model.safetensors", "weights"):
        (tmp_path / "some.safetensors").replace(tmp_path / "moved")
        (tmp_path / "moved").replace(tmp_path / name)
        found = read_adapter(tmp_path / name)
        assert found.config.base_model_name_or_path == "owner/base"
        assert found.config.task_type is None
        assert found.base_digests.keys() == {"k.weight", "layers.0.q.weight"}
        assert found.fingerprint == case.native.metadata.fingerprint
        (tmp_path / name).replace(tmp_path / "some.safetensors")


def test_the_formats_are_told_apart(tmp_path: Path) -> None:
    write_native(small().native, tmp_path / "native")
    assert detect(tmp_path / "native") == "native"
    assert detect(tmp_path / "native" / FILES[1]) == "native"
    assert detect(make_adapter(tmp_path / "peft")) == "peft"
    (tmp_path / "native" / FILES[1]).write_bytes(b"broken")
    assert detect(tmp_path / "native") == "peft"  # BONE, and nothing says more
    write_native(small(scale=2).native, tmp_path / "other")
    (tmp_path / "other" / FILES[1]).write_bytes(b"broken")
    assert detect(tmp_path / "other") == "native"
    with pytest.raises(FormatError, match="R01: "):
        read_adapter(tmp_path / "other")
    base = make_base(tmp_path / "base")
    with pytest.raises(NotABoneAdapterError, match="BASE comes first"):
        detect(base)
    with pytest.raises(NotABoneAdapterError, match=r"R05: .*BASE comes first"):
        read_adapter(base / "model.safetensors")
    with pytest.raises(MissingPathError):
        detect(tmp_path / "nothing")


def test_weights_that_are_missing(tmp_path: Path) -> None:
    write_native(small(scale=2).native, tmp_path / "out")
    (tmp_path / "out" / FILES[1]).unlink()
    with pytest.raises(MissingPathError, match="adapter_model"):
        read_adapter(tmp_path / "out")
    (tmp_path / "out" / FILES[1]).mkdir()
    with pytest.raises(FormatError, match="not a regular file"):
        read_adapter(tmp_path / "out")


def test_a_config_that_is_too_large_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_native(small().native, tmp_path / "out")
    monkeypatch.setattr("boneconv.formats.native.peft_config.MAX_CONFIG", 100)
    with pytest.raises(FormatError, match="R24: too large"):
        read_adapter(tmp_path / "out")


def test_a_reader_says_how_many_other_violations_there_are(tmp_path: Path) -> None:
    native = replace(small().native, tensors={})
    with pytest.raises(NameMatchError, match=r"R17: .*1 more: boneconv validate"):
        read(write_raw(native, tmp_path / "raw"))


@pytest.mark.parametrize(
    "field", [{"revision": 5}, {"task_type": "SING"}, {"inference_mode": "no"}]
)
def test_free_fields_of_the_config_have_types(field: dict[str, Any], tmp_path: Path) -> None:
    write_native(small().native, tmp_path / "out")
    path = tmp_path / "out" / FILES[0]
    path.write_text(json.dumps(json.loads(path.read_text()) | field))
    with pytest.raises(ConfigError, match="R26: "):
        read_adapter(tmp_path / "out")


@hypothesis.settings(max_examples=150)
@given(data=st.data())
def test_damage_is_an_error_of_ours_or_no_damage(data: st.DataObject) -> None:
    """Whatever bytes of the header change, reading ends with a rule's number or an adapter."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        write_native(small(Variant.BAT, marked=True).native, path)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, len(content) - 1))
            content[at] = data.draw(st.integers(0, 255))
        path.write_bytes(content[: data.draw(st.sampled_from([None, -1, len(content) // 2]))])
        try:
            found = read(path)
        except InputError as error:
            assert " R" in str(error)
        else:
            assert isinstance(found, Adapter)


# --- canonical JSON -----------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53) + 1, 2**53 - 1)
    | st.floats(0.0001, 1e15).filter(lambda x: not x.is_integer())
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), JSON, max_size=4))
def test_canonical_json_reads_back(value: dict[str, Any]) -> None:
    text = encode(value)
    assert parse(text.encode()) == value
    assert encode(parse(text.encode())) == text


@pytest.mark.parametrize(
    "text",
    [
        b'{"a":1e5}',
        b'{"a":2.0}',
        b'{"a":-0.0}',
        b'{"a":9007199254740992}',
        b'{"a":1,"a":1}',
        b'{"a":NaN}',
        b'{"a":"\\ud800"}',
        b'{"a":"\xff"}',
        b"[]",
        b" {}",
        b"\xef\xbb\xbf{}",
        b"",
        b"{",
        b'{"a":' + b"[" * 16 + b"]" * 16 + b"}",
        b'{"a":' + b"1" * 5000 + b"}",
        b'{"a":' + b"1" * 400 + b".5}",
    ],
)
def test_what_is_not_strict_json(text: bytes) -> None:
    with pytest.raises(ValueError):
        parse(text)


def test_brackets_in_texts_are_not_nesting() -> None:
    assert parse(b'{"a":"[[[[[[[[[[[[[[[[[[[[\\"{{{{"}') == {"a": "[" * 20 + '"{{{{'}


# --- the base ------------------------------------------------------------------------------------


def test_the_fingerprint_of_a_base(tmp_path: Path) -> None:
    """Digests are those of the adapted weights, whatever the adapter's format and the shards."""
    adapter = read_adapter(make_adapter(tmp_path / "peft"))
    tensors = base_tensors()
    found = fingerprint(open_checkpoint(make_base(tmp_path / "base", shards=3)), adapter)
    assert found.keys() == adapter.blocks.keys()
    for name, tensor in found.items():
        weight = tensors[f"{name}.weight"]
        assert isinstance(weight, np.ndarray)
        assert (tensor.dtype, tensor.shape) == ("BF16", weight.shape)
        assert tensor.digest == digest(weight)


def test_a_fingerprint_of_another_base_is_none(tmp_path: Path) -> None:
    adapter = read_adapter(make_adapter(tmp_path / "peft"))
    other = {f"x.{name}": tensor for name, tensor in base_tensors().items()}
    checkpoint = open_checkpoint(make_base(tmp_path / "base", other))
    with pytest.raises(NameMatchError, match="R28: "):
        fingerprint(checkpoint, adapter)


def test_homes_are_named_as_the_adapter_names_them(tmp_path: Path) -> None:
    saved = {"score.weight": grid((3, HIDDEN)), "model.layers.0.norm.weight": grid((HIDDEN,))}
    adapter = read_adapter(make_adapter(tmp_path / "a", saved=saved, modules_to_save=["score"]))
    homes = find_homes(adapter, open_checkpoint(make_base(tmp_path / "base")))
    weights = {f"{name}.weight" for name in adapter.blocks}
    assert set(homes) == weights | {"model.layers.0.norm.weight"}
    assert all(homes[name].name == name for name in homes)


# --- violations ----------------------------------------------------------------------------------


def test_all_violations_of_a_stage_are_found(tmp_path: Path) -> None:
    blocks = {"a": grid((3, 4)), "b": grid((2, 4), F64), "c": grid((2, 4))}
    metadata = Metadata(Variant.BONE, {"a": Module(2), "b": Module(2), "d": Module(2)})
    folder = tmp_path / "out"
    folder.mkdir()
    content = pack(adapter_tensors(blocks), {"bone_adapter": metadata.encode()})
    (folder / FILES[1]).write_bytes(content)
    with pytest.raises(StageFailed) as caught:
        open_native(folder)
    assert [violation.rule for violation in caught.value.violations] == ["R17", "R18", "R19", "R20"]
