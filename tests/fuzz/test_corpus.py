"""Every case kept: what once got through, and what a reader must go on refusing.

Beside what `guard` says, a case may not make a reader ask for much more memory than its files have.
"""

from __future__ import annotations

import time
import tracemalloc
from pathlib import Path

import pytest

from boneconv.formats.native.canonical import parse
from tests.fuzz.engine import read_corpus, replay
from tests.fuzz.guard import Guard
from tests.fuzz.targets import TARGETS, write_case

MEMORY = 32 * 1024 * 1024
HOME = Path(__file__).parent / "corpus"


def test_every_folder_of_the_corpus_is_a_target_s() -> None:
    assert {path.name for path in HOME.iterdir()} <= set(TARGETS)


@pytest.mark.parametrize("name", sorted(path.name for path in HOME.iterdir()))
def test_the_corpus_is_read_or_refused(name: str, tmp_path: Path, guard: Guard) -> None:
    target = TARGETS[name]
    names = sorted(path.name for path in (HOME / name).iterdir())
    replay(target, target.seeds()[0], tmp_path, guard)  # imports count for nothing
    for case_name, case in zip(names, read_corpus(target), strict=True):
        tracemalloc.start()
        try:
            crash = replay(target, case, tmp_path, guard)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert crash is None, f"{case_name}: {crash}"
        assert peak < MEMORY, f"{case_name} took {peak} bytes"


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_the_good_cases_are_read(name: str, tmp_path: Path) -> None:
    target = TARGETS[name]
    for number, case in enumerate(target.seeds()):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_case(folder, case)
        target.read(folder)


def test_a_text_that_does_not_end_is_refused_at_once() -> None:
    start = time.perf_counter()
    with pytest.raises(ValueError, match="Unterminated"):
        parse(b'{"a":"' + b'\\"' * 500_000)
    assert time.perf_counter() - start < 2
