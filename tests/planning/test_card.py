"""The model card of a merged model."""

from __future__ import annotations

from pathlib import Path

import pytest

from boneconv import __version__
from boneconv.formats import read_adapter
from boneconv.planning.accounts import Strength
from boneconv.planning.card import hub_id, model_card
from tests.builders import make_adapter


def _card(
    tmp_path: Path,
    readme: str | bytes | None = None,
    base: str | None = "owner/base",
    name: str = "my/adapter",
) -> str:
    path = tmp_path / "README.md"
    if readme is not None:
        path.write_bytes(readme if isinstance(readme, bytes) else readme.encode())
    adapter = Strength(read_adapter(make_adapter(tmp_path / "adapter", "bat")), 0.5)
    return model_card(path, base, [adapter], [name]).decode()


def test_it_names_base_adapter_variant_and_tool(tmp_path: Path) -> None:
    text = _card(tmp_path)
    assert "base_model: owner/base" in text
    assert "| my/adapter | bat | 4 | 0.5 |" in text
    assert f"boneconv {__version__}" in text
    assert text.startswith("---\n")
    assert "- merged" in text


def test_the_licence_of_the_base_is_kept_and_nothing_else_of_its_card(tmp_path: Path) -> None:
    front_matter = "license: other\nlicense_name: llama3\nlicense_link: LICENSE\ntags:\n- x\n"
    readme = f"---\n{front_matter}---\nlicense: no\n"
    text = _card(tmp_path, readme)
    front = text.split("---")[1].splitlines()
    assert front[1:4] == ["license: other", "license_name: llama3", "license_link: LICENSE"]
    assert "- x" not in front
    assert "license: no" not in text


@pytest.mark.parametrize(
    "readme", [None, "", "no front matter\nlicense: mit\n", "---\nlicense: mit\n", b"\xff\xfe---"]
)
def test_a_card_without_front_matter_has_no_licence_to_keep(
    tmp_path: Path, readme: str | bytes | None
) -> None:
    assert "license" not in _card(tmp_path, readme)


def test_windows_line_ends(tmp_path: Path) -> None:
    assert "license: mit" in _card(tmp_path, "---\r\nlicense: mit\r\n---\r\ntext\r\n")


def test_a_base_without_a_name(tmp_path: Path) -> None:
    assert "base_model:" not in _card(tmp_path, base=None)


def test_a_name_cannot_break_the_table(tmp_path: Path) -> None:
    text = _card(tmp_path, name="a|b\n<script>`x`")
    assert "| a b script x | bat |" in text


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("owner/name", "owner/name"),
        ("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-1B"),
        ("/home/me/model", None),
        ("./model", None),
        ("C:\\models\\x", None),
        ("a/b/c", None),
        ("owner/name\nbase_model: other", None),
        ("", None),
        (None, None),
    ],
)
def test_only_a_name_on_the_hub_is_told(name: str | None, given: str | None) -> None:
    assert hub_id(name) == given
