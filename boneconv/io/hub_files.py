"""Which files of a Hub repository a model or an adapter needs."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePosixPath

from boneconv.io.model_index import MODEL_INDEX
from boneconv.io.weight_files import in_weight_folder, is_weight_copy

__all__ = ["ADAPTER", "BASE", "PIPELINE", "Wanted"]


@dataclass(frozen=True)
class Wanted:
    """Which files of a repository are needed.

    A pattern with a slash is for a path, one without for a file's name.

    Attributes:
        what: What the files make up, for messages.
        weights: Kinds of weights, best first; a folder contributes the first kind that it holds.
        others: The files wanted beside them. Weights of other kinds never count.
        never: Files that are not wanted in any case.
        nested: Whether names count in folders below the top one too.
        only_nested: Whether weights count in folders below the top one only.
        needs: A file at the top that a repository of this kind has.
        foreign: A file at the top of a repository of another kind: it alone is then wanted, so that
            nothing is fetched in vain before the one who opens it says what it is.
    """

    what: str
    weights: tuple[tuple[str, ...], ...]
    others: tuple[str, ...]
    never: tuple[str, ...] = ()
    nested: bool = True
    only_nested: bool = False
    needs: str | None = None
    foreign: str | None = None

    def select(self, names: Iterable[str]) -> list[str]:
        """The wanted ones of a repository's files, sorted; none where it is of another kind."""
        names = list(names)
        if self.foreign in names:
            return [name for name in names if name == self.foreign]
        if self.needs is not None and self.needs not in names:
            return []
        folders: dict[PurePosixPath, list[PurePosixPath]] = {}
        for path in map(PurePosixPath, names):
            if not self._fits(path, self.never):
                folders.setdefault(path.parent, []).append(path)
        weights = {path for paths in folders.values() for path in self._best_weights(paths)}
        if not weights:
            return []
        others = {
            path
            for paths in folders.values()
            for path in paths
            if self._fits(path, self.others) and not is_weight_copy(path)
        }
        return sorted(str(path) for path in weights | others)

    def _best_weights(self, folder: list[PurePosixPath]) -> list[PurePosixPath]:
        top = len(folder[0].parts) == 1
        if in_weight_folder(folder[0]) or (top and self.only_nested):
            return []
        kinds = ([path for path in folder if self._fits(path, kind)] for kind in self.weights)
        return next((found for found in kinds if found), [])

    def _fits(self, path: PurePosixPath, patterns: tuple[str, ...]) -> bool:
        top = self.nested or len(path.parts) == 1
        return any(
            fnmatch.fnmatchcase(str(path), pattern)
            if "/" in pattern
            else top and fnmatch.fnmatchcase(path.name, pattern)
            for pattern in patterns
        )


#: A checkpoint: all but other copies of its weights; PyTorch's files where there is nothing better.
BASE = Wanted(
    what="model",
    weights=(
        ("*.safetensors", "*.safetensors.index.json"),
        ("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    ),
    others=("*",),
    never=("consolidated*.safetensors", "adapter_model*.safetensors", ".gitattributes"),
    foreign=MODEL_INDEX,
)

#: A diffusers pipeline: all but other copies of its components' weights. What loaders take where
#: they are asked for no variant comes first, in safetensors or not; a variant such as fp16 counts
#: where there is nothing else. Copies of the whole at the top never count.
PIPELINE = Wanted(
    what="diffusers pipeline",
    weights=(
        (
            "model.safetensors",
            "model-*.safetensors",
            "model.safetensors.index.json",
            "diffusion_pytorch_model.safetensors",
            "diffusion_pytorch_model-*.safetensors",
            "diffusion_pytorch_model.safetensors.index.json",
        ),
        (
            "pytorch_model.bin",
            "pytorch_model-*.bin",
            "pytorch_model.bin.index.json",
            "diffusion_pytorch_model.bin",
            "diffusion_pytorch_model-*.bin",
            "diffusion_pytorch_model.bin.index.json",
        ),
        ("*.safetensors", "*.safetensors.index.*json"),
        ("*.bin", "*.bin.index.*json"),
    ),
    others=("*",),
    never=(".gitattributes",),
    only_nested=True,
    needs=MODEL_INDEX,
)

#: An adapter: its configuration, the best of its weights, and a tokenizer saved with it.
ADAPTER = Wanted(
    what="adapter",
    weights=(("adapter_model.safetensors",), ("adapter_model.bin",), ("*.pth",)),
    others=(
        "adapter_config.json",
        "tokenizer*.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "*.model",
        "*.tiktoken",
        "chat_template*.ji*",
        "chat_template.json",
        "additional_chat_templates/*.jinja",
    ),
    nested=False,
)
