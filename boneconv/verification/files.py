"""The files beside the weights: what a merge must carry over, and what must not lie there.

A candidate whose record promises a canonical merge is held to every byte. Another tool's may have
been saved anew: JSON then counts by its content, config.json by the settings that decide what the
weights mean, and files that no model needs may be absent.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from boneconv.digest import file_digest
from boneconv.engine.plan import RECORD_NAME, Plan
from boneconv.errors import BoneconvError, listing
from boneconv.io.weight_files import is_weight_copy
from boneconv.strict_json import MAX_BYTES, parse_object, read_object
from boneconv.verification.candidate import Candidate
from boneconv.verification.report import FileReport, Status

__all__ = ["VOCABULARY_FILES", "check_file", "check_files"]

_CONFIG = "config.json"
_ADAPTER_CONFIG = "adapter_config.json"
_CARD = "README.md"
#: Files any of which makes up a tokenizer.
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "rwkv_vocab_v20230424.txt",
)
_TOKENIZER = (*VOCABULARY_FILES, "tokenizer_config.json", "chat_template.jinja")
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
#: Settings that say how and by what a file was written.
_WRITER = frozenset({"transformers_version", "_name_or_path", "_commit_hash", "torch_dtype"})
#: Settings that must not be left to a default.
_NEEDED = ("model_type", "architectures", "tie_word_embeddings", "vocab_size")


def check_files(plan: Plan, candidate: Candidate) -> list[FileReport]:
    """Holds the files of a candidate's folder against the plan's."""
    exact = candidate.record.get("numerics") == "canonical"
    own = {*candidate.file_of.values(), *(report.name for report in candidate.files)}
    expected: dict[PurePosixPath, Path | bytes] = {**plan.copies, **plan.texts}
    reports = []
    for name, content in sorted(expected.items()):
        if str(name) == _CARD or str(name).endswith(".index.json"):
            continue
        reports.append(check_file(candidate.path, name, content, exact=exact))
    reports += _tokenizer_lost(candidate.path, expected)
    reports += _strangers(candidate.path, own)
    unique = {r.name: r for r in sorted(reports, key=lambda r: r.status is Status.FAIL)}
    return [*candidate.files, *sorted(unique.values(), key=lambda report: report.name)]


def check_file(
    root: Path, name: PurePosixPath, expected: Path | bytes, *, exact: bool
) -> FileReport:
    """Holds one file against what it should be.

    Args:
        root: The candidate's folder.
        name: The file's name in it.
        expected: The file that it is a copy of, or its content.
        exact: Whether it must be the same, byte by byte.
    """
    path, text = root / name, str(name)
    if not path.is_file():
        harmless = not exact and not _is_needed(name)
        state = Status.PASS if harmless else Status.FAIL
        return FileReport(text, state, "is missing" + (", which does no harm" if harmless else ""))
    if _same(path, expected):
        return FileReport(text, Status.PASS)
    if exact:
        return FileReport(text, Status.FAIL, "is not what the merge writes")
    if text == _CONFIG:
        wrong = _config_differences(_bytes(expected), path)
        reason = f"differs: {'; '.join(wrong)}" if wrong else "says the same in other words"
        return FileReport(text, Status.FAIL if wrong else Status.PASS, reason)
    if name.suffix == ".json" and _same_json(_bytes(expected), path):
        return FileReport(text, Status.PASS, "says the same in other words")
    if text in VOCABULARY_FILES or text in _PROCESSORS or name.suffix == ".py":
        return FileReport(text, Status.FAIL, "is not the one that belongs to the model")
    return FileReport(text, Status.PASS, "differs, as a file that was saved anew may")


def _is_needed(name: PurePosixPath) -> bool:
    return str(name) in (_CONFIG, *_PROCESSORS) or name.suffix == ".py"


def _tokenizer_lost(root: Path, expected: Mapping[PurePosixPath, Any]) -> Iterator[FileReport]:
    """A tokenizer may change its form (slow to fast), but not be lost."""
    wanted = [str(name) for name in expected if str(name) in _TOKENIZER]
    has_one = any((root / name).is_file() for name in VOCABULARY_FILES)
    for name in wanted:
        lost = name in VOCABULARY_FILES and not has_one
        if lost or (name not in VOCABULARY_FILES and not (root / name).is_file()):
            reason = "the tokenizer is missing" if lost else "is missing"
            yield FileReport(name, Status.FAIL, reason)


def _strangers(root: Path, own: set[str]) -> Iterator[FileReport]:
    """Other copies of the weights, and an adapter that a loader would apply once more."""
    for path in sorted(root.iterdir()):
        name = path.name
        if name in own or not path.is_file() or name == RECORD_NAME:
            continue
        if name == _ADAPTER_CONFIG:
            reason = "makes loaders apply an adapter to weights that hold it already"
            yield FileReport(name, Status.FAIL, reason)
        elif name.endswith(".safetensors"):
            reason = "is no part of the model: a stale file of weights"
            yield FileReport(name, Status.FAIL, reason)
        elif is_weight_copy(PurePosixPath(name)):
            yield FileReport(name, Status.PASS, "is another copy of the weights, not verified")


def _same(path: Path, expected: Path | bytes) -> bool:
    if isinstance(expected, bytes):
        return path.stat().st_size == len(expected) and path.read_bytes() == expected
    if path.stat().st_size != expected.stat().st_size:
        return False
    return file_digest(path) == file_digest(expected)


def _bytes(expected: Path | bytes) -> bytes:
    return expected if isinstance(expected, bytes) else expected.read_bytes()


def _same_json(expected: bytes, path: Path) -> bool:
    try:
        large = path.stat().st_size > MAX_BYTES
        return not large and bool(json.loads(expected) == json.loads(path.read_bytes()))
    except (ValueError, RecursionError):
        return False


def _config_differences(expected: bytes, path: Path) -> list[str]:
    """Settings that a configuration says otherwise, or fails to say."""
    try:
        found = read_object(path)
        wanted = parse_object(expected, path)
    except BoneconvError as error:
        return [error.message]
    wrong = []
    for key, value in _settings(wanted).items():
        other = _settings(found).get(key, _ABSENT)
        if other is _ABSENT:
            if key in _NEEDED and not (key == "tie_word_embeddings" and value is True):
                wrong.append(f"{listing([key])} is missing, expected {_shown(value)}")
        elif not _agree(value, other):
            wrong.append(f"{listing([key])} is {_shown(other)}, expected {_shown(value)}")
    if "quantization_config" in found and "quantization_config" not in wanted:
        wrong.append("it says that the weights are quantised")
    return wrong


_ABSENT = object()


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """What decides what the weights mean; dtype under its newer name."""
    dtype = config.get("dtype", config.get("torch_dtype", _ABSENT))
    kept = {key: value for key, value in config.items() if key not in _WRITER}
    return kept if dtype is _ABSENT else kept | {"dtype": dtype}


def _agree(expected: Any, found: Any) -> bool:
    """Whether two settings agree where both speak; parts of a model nest settings of their own."""
    if isinstance(expected, dict) and isinstance(found, dict):
        one, other = _settings(expected), _settings(found)
        return all(_agree(one[key], other[key]) for key in one.keys() & other.keys())
    return expected is None or bool(expected == found)


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
