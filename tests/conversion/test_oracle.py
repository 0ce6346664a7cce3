"""Converted adapters in PEFT: the logits of the adapter that they were converted from."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import boneconv
from boneconv.errors import NameMatchError
from tests.builders import pack, unpack
from tests.conftest import TinyCase
from tests.oracle import tiny

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")

TOLERANCE = 2e-5
ROOT = Path(__file__).parents[2]
TENSORS = "adapter_model.safetensors"
FULL = 1_000  # no side of the tiny models is wider


def _converted(case: tiny.Case, out: Path, to: str, **options: Any) -> tiny.Case:
    boneconv.convert(case.adapter, out, to=to, **options)
    return dataclasses.replace(case, adapter=out)


def _distance(one: Any, other: Any) -> float:
    return float((one - other).abs().max())


CASES = [
    ("llama-tied", "bone", 8),
    ("llama-tied", "bone", tiny.RAGGED_RANK),
    ("llama-untied", "mini", 8),
    ("gpt-neox", "bone", 8),
    ("bert", "bone", 8),
    ("llava", "bone", 8),
]


@pytest.mark.parametrize(("name", "variant", "rank"), CASES)
def test_a_lora_gives_the_logits_of_the_adapter(
    tiny_case: TinyCase, tmp_path: Path, name: str, variant: tiny.Variant, rank: int
) -> None:
    case = tiny_case(name, variant=variant, rank=rank)
    lora = _converted(case, tmp_path / "lora", "peft-lora", base=case.base)
    expected = tiny.peft_logits(case)
    assert _distance(tiny.peft_logits(lora), expected) <= TOLERANCE
    assert _distance(tiny.base_logits(case), expected) > 100 * TOLERANCE


def test_bats_lora_of_full_rank_gives_the_logits_of_the_adapter(
    tiny_case: TinyCase, tmp_path: Path
) -> None:
    case = tiny_case("llama-tied", variant="bat")
    lora = _converted(case, tmp_path / "lora", "peft-lora", base=case.base, rank=32)
    assert _distance(tiny.peft_logits(lora), tiny.peft_logits(case)) <= TOLERANCE


@pytest.mark.parametrize(
    ("name", "variant", "to"),
    [
        ("llama-tied", "bone", "peft-miss"),
        ("llama-tied", "bat", "peft-miss"),
        ("bert", "bone", "peft-miss"),
        ("llama-tied", "miss", "peft-bone"),
        ("llama-tied", "miss-bat", "peft-bone"),
    ],
)
def test_bone_and_miss_are_one_in_peft(
    tiny_case: TinyCase, tmp_path: Path, name: str, variant: tiny.Variant, to: str
) -> None:
    case = tiny_case(name, variant=variant)
    other = _converted(case, tmp_path / "other", to)
    assert _distance(tiny.peft_logits(other), tiny.peft_logits(case)) == 0.0


@pytest.mark.parametrize("variant", ["bone", "bat"])
@pytest.mark.parametrize("name", ["llama-tied", "bert", "gpt-neox"])
def test_peft_loads_a_native_adapter_as_it_is(
    tiny_case: TinyCase, tmp_path: Path, name: str, variant: tiny.Variant
) -> None:
    case = tiny_case(name, variant=variant)
    native = _converted(case, tmp_path / "native", "native", base=case.base)
    assert boneconv.validate(native.adapter, base=case.base).valid
    assert _distance(tiny.peft_logits(native), tiny.peft_logits(case)) == 0.0


@pytest.mark.parametrize("to", ["native", "rwkv"])
def test_an_adapter_that_went_another_way_gives_the_same_logits(
    tiny_case: TinyCase, tmp_path: Path, to: str
) -> None:
    case = tiny_case("llama-tied")
    between = tmp_path / ("a.pth" if to == "rwkv" else "a")
    boneconv.convert(case.adapter, between, to=to)
    boneconv.convert(between, tmp_path / "back", to="peft-bone")
    back = dataclasses.replace(case, adapter=tmp_path / "back")
    assert _distance(tiny.peft_logits(back), tiny.peft_logits(case)) == 0.0


@pytest.mark.parametrize("name", ["llama-tied", "llava"])
def test_a_config_is_base_enough_for_bone(tiny_case: TinyCase, tmp_path: Path, name: str) -> None:
    case = tiny_case(name)
    (tmp_path / "config").mkdir()
    shutil.copyfile(case.base / "config.json", tmp_path / "config" / "config.json")
    boneconv.convert(case.adapter, tmp_path / "one", to="peft-lora", base=case.base)
    for number, base in enumerate((tmp_path / "config", tmp_path / "config" / "config.json")):
        out = tmp_path / f"two{number}"
        boneconv.convert(case.adapter, out, to="peft-lora", base=base)
        for file in ("adapter_config.json", TENSORS):
            assert (out / file).read_bytes() == (tmp_path / "one" / file).read_bytes()
    other = tiny_case("gpt-neox")
    with pytest.raises(NameMatchError, match="are not in the model"):
        boneconv.convert(other.adapter, tmp_path / "x", to="peft-lora", base=tmp_path / "config")


@pytest.mark.parametrize("to", ["peft-lora", "peft-miss"])
def test_trained_biases_reach_the_model(tiny_case: TinyCase, tmp_path: Path, to: str) -> None:
    """PEFT writes none for Bone; a native adapter may have them, and PEFT loads them."""
    import torch

    case = tiny_case("bert")
    plain = tmp_path / "plain"
    shutil.copytree(case.adapter, plain)
    tensors = unpack(plain / TENSORS)
    module = "bert.encoder.layer.1.attention.self.query"
    bias = np.linspace(-1, 1, 32, dtype=np.float32)
    more = {**tensors, f"base_model.model.{module}.bias": bias}
    (plain / TENSORS).write_bytes(pack(more, {"format": "pt"}))
    boneconv.convert(plain, tmp_path / "native", to="native", base=case.base)
    options = {"base": case.base} if to == "peft-lora" else {}
    boneconv.convert(tmp_path / "native", tmp_path / "out", to=to, **options)
    model = dataclasses.replace(case, adapter=tmp_path / "out").peft_model()
    loaded = model.get_submodule(f"base_model.model.{module}").get_parameter("base_layer.bias")
    assert torch.equal(loaded.detach(), torch.from_numpy(bias))


# --- PEFT's newest release --------------------------------------------------------------------

PROBE = """
import sys
from dataclasses import replace
from pathlib import Path
import numpy as np
import peft
from tests.oracle import tiny

cache, name, variant, adapter, out = sys.argv[1:]
case = tiny.make_case(Path(cache), name, variant=variant)
case = replace(case, adapter=Path(adapter))
np.save(out, tiny.peft_logits(case).numpy())
print(peft.__version__)
"""


@pytest.fixture(scope="module")
def newest_peft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment with PEFT's newest release, and the rest from this one."""
    folder = tmp_path_factory.mktemp("newest") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    (Path(own) / "rest.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = folder / "constraints.txt"
    constraints.write_text("\n".join(pin for pin in pins if not pin.startswith("peft==")))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    install = ["install", "--quiet", "--upgrade", "-c", str(constraints), "peft>=0.19"]
    done = subprocess.run([*pip, *install], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return python


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "variant", "to"),
    [
        ("llama-tied", "bone", "peft-miss"),
        ("llama-tied", "bat", "peft-miss"),
        ("llama-tied", "bone", "peft-lora"),
        ("llama-tied", "bat", "peft-lora"),
        ("llama-untied", "mini", "peft-miss"),
        ("llama-untied", "mini", "peft-lora"),
        ("bert", "bone", "peft-miss"),
        ("bert", "bone", "peft-lora"),
    ],
)
def test_the_newest_peft_gives_the_logits_of_peft_0_18(
    newest_peft: Path, tmp_path: Path, name: str, variant: tiny.Variant, to: str
) -> None:
    case = tiny.make_case(tmp_path, name, variant=variant)
    options: dict[str, Any] = {}
    if to == "peft-lora":
        options = {"base": case.base} | ({"rank": 32} if variant == "bat" else {})
    converted = _converted(case, tmp_path / "converted", to, **options)
    arguments = [str(tmp_path), name, variant, str(converted.adapter), str(tmp_path / "out.npy")]
    done = subprocess.run(
        [newest_peft, "-c", PROBE, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    version = tuple(map(int, done.stdout.splitlines()[-1].split(".")[:2]))
    assert version >= (0, 19)
    found, expected = np.load(tmp_path / "out.npy"), tiny.peft_logits(case).numpy()
    assert np.abs(found - expected).max() <= TOLERANCE


@pytest.mark.slow
def test_the_newest_peft_refuses_bone(newest_peft: Path, tmp_path: Path) -> None:
    """Else there would be no need to convert."""
    case = tiny.make_case(tmp_path, "llama-tied")
    assert json.loads((case.adapter / "adapter_config.json").read_text())["peft_type"] == "BONE"
    code = "import sys; from peft import PeftConfig; PeftConfig.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [newest_peft, "-c", code, str(case.adapter)], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "BONE" in done.stderr
