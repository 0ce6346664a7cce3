"""The files that lie beside an adapter and belong to the model that it makes."""

from __future__ import annotations

import re
from pathlib import Path

from boneconv.io.links import check_inside

__all__ = ["tokenizer_files"]

#: What transformers saves of a tokenizer; a fine-tune may have added tokens or a chat template.
_TOKENIZER_FILES = re.compile(
    r"(tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt"
    r"|.*\.model|.*\.tiktoken|chat_template.*\.(jinja|json))"
)


def tokenizer_files(folder: Path) -> tuple[Path, ...]:
    """The tokenizer and chat template files in an adapter's folder.

    Raises:
        FormatError: One is a link out of the folder.
    """
    own = sorted(path for path in folder.iterdir() if _TOKENIZER_FILES.fullmatch(path.name))
    templates = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    for path in (*own, *templates):
        check_inside(folder, path)
    return (*own, *templates)
