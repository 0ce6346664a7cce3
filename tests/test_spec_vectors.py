"""The specification's conformance vectors, run through boneconv and through PEFT 0.18.1.

`specs/run_vectors.py` is an implementation of its own; a test runs it, and it shares no code with
what is tested here.
"""

from __future__ import annotations

import filecmp
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import boneconv
from boneconv.errors import BoneconvError
from boneconv.formats import read_adapter
from boneconv.formats.native import RULES
from boneconv.names import DIRECT, Resolution
from boneconv.planning import accounts
from tests.builders import F64, Array
from tests.oracle.quiet import quiet_peft

SPECS = Path(__file__).parent.parent / "specs"
VECTORS = SPECS / "vectors"
VALID = sorted(path.name for path in (VECTORS / "valid").iterdir())
INVALID = sorted(path.name for path in (VECTORS / "invalid").iterdir())
CLI_DTYPES = {None: "keep", "BF16": "bfloat16", "F32": "float32"}


def case_of(kind: str, name: str) -> tuple[Path, dict[str, Any]]:
    folder = VECTORS / kind / name
    return folder, json.loads((folder / "case.json").read_text())


def raw_tensors(path: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of every tensor of a safetensors file."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    found = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        found[name] = (entry["dtype"], entry["shape"], content[start + begin : start + end])
    return found


# --- the merge ----------------------------------------------------------------------------------


@pytest.fixture
def ties(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """Ties that stand in for those of a model's configuration.

    Which tensors a model ties is known to transformers, by the class that config.json names. The
    vectors' bases are of no class that it knows, so the three questions to it are answered here.
    """
    known: dict[str, str] = {}

    def resolve(wanted: Any, on_disk: Any, *_: Any, **__: Any) -> Resolution:
        found = {name: name for name in wanted if name in on_disk}
        return Resolution(found, tuple(sorted(set(wanted) - set(found))), DIRECT)

    monkeypatch.setattr(accounts, "resolve", resolve)
    monkeypatch.setattr(accounts, "tied_names", lambda *_, **__: known)
    monkeypatch.setattr(accounts, "disk_name", lambda name, *_, **__: name)
    yield known


def with_strength(folder: Path, strength: float, out: Path) -> Path:
    """An adapter of another strength: `merge` has one for all, and the field `scale` is a factor.

    By the specification (7.9) strength is scale times the caller's factor, exactly.
    """
    content = (folder / "adapter_model.safetensors").read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    metadata = json.loads(header["__metadata__"]["bone_adapter"])
    assert "scale" not in metadata
    metadata["scale"] = strength
    text = json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    header["__metadata__"]["bone_adapter"] = text
    encoded = json.dumps(header).encode()
    out.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[start:])
    return out


def run_merge(folder: Path, case: Mapping[str, Any], tmp_path: Path) -> Path:
    """Merges a case's adapters into its base and returns the file of the result."""
    first, *more = case["adapters"]
    others = [folder / each["path"] for each in more]
    if any(each["strength"] != first["strength"] for each in more):
        others = [
            with_strength(folder / each["path"], each["strength"], tmp_path / f"{i}.safetensors")
            for i, each in enumerate(more)
        ]
        assert first["strength"] == 1
    base, out = folder / case["base"], tmp_path / "out.safetensors"
    result = out
    if "ties" in case:
        base, out = tmp_path / "base", tmp_path / "out"
        base.mkdir()
        (base / "model.safetensors").write_bytes((folder / case["base"]).read_bytes())
        config = {"tie_word_embeddings": True, "vocab_size": 5}
        (base / "config.json").write_text(json.dumps(config))
        result = out / "model.safetensors"
    boneconv.merge(
        base,
        folder / first["path"],
        out,
        more=others,
        scale=first["strength"],
        dtype=CLI_DTYPES[case.get("dtype")],
        workers=1,
    )
    return result


@pytest.mark.parametrize("name", VALID)
def test_a_valid_vector_merges_to_the_expected_bytes(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder, case = case_of("valid", name)
    if "ties" in case:
        request.getfixturevalue("ties").update(case["ties"])
    found = run_merge(folder, case, tmp_path)
    assert raw_tensors(found) == raw_tensors(folder / case["expected"])


def test_a_tie_that_is_cut_is_cut_in_the_configuration_too(
    tmp_path: Path, ties: dict[str, str]
) -> None:
    for name, tied in (("tied-head", False), ("tied-untouched", True), ("resized-tied", True)):
        folder, case = case_of("valid", name)
        ties.update(case["ties"])
        place = tmp_path / name
        place.mkdir()
        merged = run_merge(folder, case, place)
        config = json.loads((merged.parent / "config.json").read_text())
        assert config["tie_word_embeddings"] is tied, name
        assert config["vocab_size"] == (7 if name == "resized-tied" else 5)


@pytest.mark.parametrize("name", VALID)
def test_a_valid_vector_breaks_no_rule(name: str) -> None:
    folder, case = case_of("valid", name)
    base = None if "ties" in case else folder / case["base"]
    for each in case["adapters"]:
        found = boneconv.validate(folder / each["path"], base=base, scale=each["strength"])
        assert (found.violations, found.format) == ((), "native")
        assert (found.peft.versions == "0.14 to 0.18") is (case["peft"] == "loads")
        weights = folder / each["path"] / "adapter_model.safetensors"
        alone = weights.read_bytes()
        assert boneconv.load_adapter(weights).blocks.keys() == read_adapter(weights).blocks.keys()
        assert weights.read_bytes() == alone


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_vector_breaks_its_rule_and_no_other(name: str, tmp_path: Path) -> None:
    folder, case = case_of("invalid", name)
    (each,) = case["adapters"]
    base = folder / case["base"] if "base" in case else None
    found = boneconv.validate(folder / each["path"], base=base, scale=each["strength"])
    assert {violation.rule for violation in found.violations} == {case["rule"]}
    assert {type(violation.error()).__name__ for violation in found.violations} == {case["error"]}
    for violation in found.violations:
        assert str(violation.error()).startswith(f"{violation.path}: {case['rule']}: ")


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_vector_is_not_merged(name: str, tmp_path: Path) -> None:
    folder, case = case_of("invalid", name)
    (each,) = case["adapters"]
    base = tmp_path / "base.safetensors"
    if "base" in case:
        base = folder / case["base"]
    else:  # any base that has what the small adapters of these vectors adapt
        base.write_bytes((VECTORS / "invalid/r31-overflow-strength/base.safetensors").read_bytes())
    out = tmp_path / "out.safetensors"
    with pytest.raises(BoneconvError) as caught:
        boneconv.merge(base, folder / each["path"], out, scale=each["strength"], workers=1)
    if name == "r23-replaced-nan":  # a merge looks at numbers last, and this base does not fit
        assert "R29: 'norm.weight' does not fit the base" in str(caught.value)
    else:
        assert type(caught.value).__name__ == case["error"]
        assert f"{case['rule']}: " in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == (
        [] if "base" in case else ["base.safetensors"]
    )


# --- the rules, the runner and the generator ----------------------------------------------------


def test_the_rules_are_those_of_the_text() -> None:
    text = (SPECS / "bone-adapter-1.0.md").read_text()
    rows = re.findall(r"^\| \*\*(R\d\d)\*\* \| (\w+) \|", text, re.MULTILINE)
    assert dict(rows) == {rule.id: rule.error.__name__ for rule in RULES.values()}
    assert [rule for rule, _ in rows] == sorted(RULES)


def test_every_rule_has_a_vector() -> None:
    with_vectors = {case_of("invalid", name)[1]["rule"] for name in INVALID}
    assert with_vectors == set(RULES)


def test_the_standalone_runner_passes_and_needs_no_boneconv() -> None:
    guard = (
        "import runpy, sys\n"
        "sys.modules['boneconv'] = None\n"  # an import of it fails
        "sys.argv = ['run_vectors.py', '--json']\n"
        f"runpy.run_path({str(SPECS / 'run_vectors.py')!r}, run_name='__main__')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", guard], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(done.stdout)
    assert all(results.values())
    assert {f"valid/{n}" for n in VALID} | {f"invalid/{n}" for n in INVALID} < set(results)
    assert len((SPECS / "run_vectors.py").read_text().splitlines()) <= 200


@pytest.mark.slow
def test_the_generator_writes_the_same_vectors_again(tmp_path: Path) -> None:
    command = [sys.executable, str(SPECS / "make_vectors.py"), str(tmp_path)]
    subprocess.run(command, check=True, timeout=300)
    wanted = sorted(p.relative_to(VECTORS) for p in VECTORS.rglob("*") if p.is_file())
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file()) == wanted
    _, differ, unreadable = filecmp.cmpfiles(
        VECTORS, tmp_path, [str(path) for path in wanted], shallow=False
    )
    assert (differ, unreadable) == ([], [])


# --- PEFT ---------------------------------------------------------------------------------------


def model_of(state: Mapping[str, Array]) -> Any:
    """A torch model of a state in float32: linear and convolution layers by shape."""
    import torch
    from torch import nn

    class Holder(nn.Module):
        """Parameters without a layer; modules_to_save wants a forward."""

        def forward(self, x: Any) -> Any:
            return x

    def layer(weight: Any) -> nn.Module:
        if weight.dim() == 2:
            made: nn.Module = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        elif weight.dim() == 4:
            made = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
        else:
            return Holder()
        made.weight = nn.Parameter(weight)
        return made

    root = Holder()
    tensors = {name: torch.from_numpy(values) for name, values in state.items()}
    for name, values in sorted(tensors.items(), key=lambda item: not item[0].endswith(".weight")):
        *path, leaf = name.split(".")
        place: nn.Module = root
        for i, part in enumerate(path):
            if part not in dict(place.named_children()):
                is_layer = i == len(path) - 1 and leaf == "weight"
                place.add_module(part, layer(values) if is_layer else Holder())
            place = dict(place.named_children())[part]
        if leaf not in dict(place.named_parameters(recurse=False)):
            if values.dtype == torch.float32:
                place.register_parameter(leaf, nn.Parameter(values))
            else:
                place.register_buffer(leaf, values)
    return root


def numbers(path: Path) -> dict[str, Array]:
    """The tensors of a file; those of floats in float32."""
    kinds = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8"}
    found = {}
    for name, (dtype, shape, data) in raw_tensors(path).items():
        if dtype == "BF16":
            flat = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        else:
            flat = np.frombuffer(data, kinds[dtype])
        array = flat.reshape(shape)
        found[name] = (array if dtype == "I64" else array.astype("<f4")).copy()
    return found


def load_in_peft(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    with quiet_peft():
        return PeftModel.from_pretrained(model, str(adapter))


def adapters_where(peft: str) -> list[Any]:
    return [
        pytest.param(name, each["path"], id=f"{name}-{each['path']}")
        for name in VALID
        for each in case_of("valid", name)[1]["adapters"]
        if case_of("valid", name)[1]["peft"] == peft
    ]


@pytest.mark.parametrize(("name", "path"), adapters_where("loads"))
def test_peft_applies_rightly_what_it_loads(name: str, path: str) -> None:
    import torch

    folder, case = case_of("valid", name)
    adapter = read_adapter(folder / path)
    before = trained_base(case, folder, path)
    loaded = load_in_peft(model_of(before), folder / path).base_model.model
    for module, block in adapter.blocks.items():
        weight = before[f"{module}.weight"].astype(F64)
        merged = weight + change(weight, block.tensor.read().astype(F64), str(block.variant))
        x = np.random.default_rng(5).uniform(-0.25, 0.25, (3, weight.shape[1])).astype("<f4")
        with torch.no_grad():
            y = loaded.get_submodule(module)(torch.from_numpy(x)).numpy()
        np.testing.assert_allclose(y, x @ merged.T, rtol=1e-5, atol=1e-5)
    in_file = numbers(folder / path / "adapter_model.safetensors")
    state = loaded.state_dict()
    for saved in adapter.saved:
        (trained,) = [key for key in state if _is_trained_copy(key, saved)]
        np.testing.assert_array_equal(state[trained].numpy(), in_file[f"base_model.model.{saved}"])


def trained_base(case: Mapping[str, Any], folder: Path, path: str) -> dict[str, Array]:
    """The base as the adapter's trainer had it: ties resolved, heads added, embeddings resized."""
    state = numbers(folder / case["base"])
    state |= {alias: state[name].copy() for alias, name in case.get("ties", {}).items()}
    for name, saved in read_adapter(folder / path).saved.items():
        if name not in state or state[name].shape != saved.shape:
            state[name] = np.zeros(saved.shape, "<f4")
    return state


def _is_trained_copy(key: str, name: str) -> bool:
    parts = key.split(".")
    if "modules_to_save" not in parts:
        return False
    at = parts.index("modules_to_save")
    return ".".join([*parts[:at], *parts[at + 2 :]]) == name


def change(weight: Array, block: Array, variant: str) -> Array:
    """U(W) of sections 7.2 and 7.3."""
    out, inside = weight.shape
    if variant == "bone":
        return block[np.arange(inside) % len(block)].T
    r = block.shape[-1]
    tiles = weight.reshape(out // r, r, inside // r, r).swapaxes(1, 2)
    return (tiles @ block[:, None] + block[:, None]).swapaxes(1, 2).reshape(out, inside)


@pytest.mark.parametrize(("name", "path"), adapters_where("refuses"))
def test_peft_refuses_what_it_would_misread(name: str, path: str) -> None:
    folder, case = case_of("valid", name)
    model = model_of(trained_base(case, folder, path))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(KeyError, match="BONE_ADAPTER"):
        load_in_peft(model, folder / path)
    assert all((model.state_dict()[key] == value).all() for key, value in before.items())


@pytest.mark.parametrize(("name", "path"), adapters_where("no config"))
def test_peft_needs_a_config(name: str, path: str) -> None:
    folder, case = case_of("valid", name)
    with pytest.raises((ValueError, OSError)):
        load_in_peft(model_of(trained_base(case, folder, path)), folder / path)
