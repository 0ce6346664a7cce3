"""The model card of a merged model: what was merged into what, and by what."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from boneconv import __version__
from boneconv.io.hub import Source
from boneconv.planning.accounts import Strength

__all__ = ["README", "card_of", "hub_id", "model_card"]

README = PurePosixPath("README.md")
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)
_LICENCE = re.compile(r"^license(?:_name|_link)?:.*$", re.MULTILINE)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_id(name: str | None) -> str | None:
    """A name that can be one on the Hub; None for a local path, which says nothing elsewhere."""
    return name if name is not None and _HUB_ID.fullmatch(name) else None


def card_of(
    base: Source,
    parts: Sequence[tuple[str | None, Sequence[Source], Sequence[Strength]]],
) -> bytes:
    """The model card of a merge.

    Args:
        base: The base, whose README.md may say under which licence it is.
        parts: For each checkpoint that is merged into: the component of the base that it is (None
            where it is the whole), where its adapters came from, and the adapters.
    """
    strengths = [strength for _, _, found in parts for strength in found]
    named = [(component, source) for component, sources, _ in parts for source in sources]
    names = [
        (source.repo or f"local adapter {i + 1}") + ("" if component is None else f" ({component})")
        for i, (component, source) in enumerate(named)
    ]
    return model_card(base.path / README, _base_name(base, strengths), strengths, names)


def _base_name(base: Source, strengths: Sequence[Strength]) -> str | None:
    if base.repo is not None:
        return base.repo
    names = {hub_id(strength.adapter.config.base_model_name_or_path) for strength in strengths}
    return names.pop() if len(names) == 1 else None


def model_card(
    base_readme: Path, base_name: str | None, adapters: Sequence[Strength], names: Sequence[str]
) -> bytes:
    """The text of README.md.

    Args:
        base_readme: The base's README.md, whose licence lines are kept; it need not exist.
        base_name: The base's name on the Hub, where it is known.
        adapters: The merged adapters, in order.
        names: A name for each, for people.
    """
    front = ["---", *_licence(base_readme)]
    if base_name is not None:
        front += [f"base_model: {base_name}", "base_model_relation: finetune"]
    front += ["tags:", "- boneconv", "- merged", "---"]
    rows = [
        f"| {_cell(name)} | {s.adapter.config.variant} | {s.adapter.config.r} | {s.scale:g} |"
        for s, name in zip(adapters, names, strict=True)
    ]
    body = [
        "",
        "# Merged model",
        "",
        f"The base model{f' `{_cell(base_name)}`' if base_name else ''} with these adapters merged "
        "into its weights, in this order:",
        "",
        "| adapter | variant | rank | scale |",
        "| --- | --- | --- | --- |",
        *rows,
        "",
        f"Made by boneconv {__version__}. `boneconv.json` lists every merged tensor with its "
        "digests.",
        "",
    ]
    return "\n".join(front + body).encode()


def _licence(readme: Path) -> list[str]:
    try:
        with readme.open(encoding="utf-8") as file:
            text = file.read(64 * 1024)
    except (OSError, UnicodeDecodeError):
        return []
    front = _FRONT_MATTER.match(text)
    return _LICENCE.findall(front[1]) if front else []


def _cell(text: str) -> str:
    return re.sub(r"[|`\s<>]+", " ", text).strip()
