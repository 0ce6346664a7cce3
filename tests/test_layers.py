"""Dependencies point one way, read from the source: who imports whom, and no cycles."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import boneconv

ROOT = Path(boneconv.__file__).parent
#: What each of the lower parts may import.
LOWER: dict[str, set[str]] = {
    "errors": set(),
    "strict_json": {"errors"},
    "dtypes": set(),
    "config": {"errors", "io", "strict_json"},
    "io": {"dtypes", "errors", "strict_json"},
    "digest": {"dtypes", "errors", "io"},
    "kernels": {"config", "dtypes", "errors"},
    "pretrained": {"errors", "strict_json"},
    "names": {"errors", "pretrained"},
    "graphs": {"dtypes", "errors", "io"},
    "adapter": {"config", "dtypes", "errors", "io"},
    "formats": {"adapter", "config", "digest", "dtypes", "errors", "io", "names", "strict_json"},
    "engine": {"adapter", "config", "digest", "dtypes", "errors", "io", "kernels"},
    "delta": {
        "adapter",
        "config",
        "digest",
        "dtypes",
        "engine",
        "errors",
        "io",
        "kernels",
        "strict_json",
    },
    "nn": {
        "adapter",
        "config",
        "dtypes",
        "errors",
        "formats",
        "io",
        "kernels",
        "names",
        "strict_json",
    },
    "behaviour": {
        "adapter",
        "config",
        "dtypes",
        "engine",
        "errors",
        "formats",
        "graphs",
        "io",
        "names",
        "nn",
        "pretrained",
        "strict_json",
    },
    "planning": {
        "adapter",
        "config",
        "digest",
        "dtypes",
        "engine",
        "errors",
        "formats",
        "io",
        "names",
        "strict_json",
    },
}

#: Parts on top of the workflows; every other part is a workflow, which imports lower parts alone.
UPPER = ("demo", "reporting", "cli")


def _allowed(part: str) -> set[str]:
    if part in LOWER:
        return LOWER[part]
    if part == "demo":
        return {*LOWER, "merging"}
    if part == "reporting":
        return {*LOWER, "verification"}
    return _parts() - {"cli"} if part == "cli" else set(LOWER)


@cache
def _modules() -> dict[str, Path]:
    """Dotted name below the package -> its file; a package is its __init__."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
    return found


def _imports(path: Path, *, type_checking: bool) -> Iterator[str]:
    """The names below boneconv that a file imports, at its top or inside functions."""
    for node in _nodes(ast.parse(path.read_text(encoding="utf-8")), type_checking):
        if isinstance(node, ast.Import):
            yield from (a.name[9:] for a in node.names if a.name.startswith("boneconv."))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            base = (node.module or "").removeprefix("boneconv").removeprefix(".")
            if (node.module or "").split(".")[0] == "boneconv":
                for alias in node.names:
                    whole = f"{base}.{alias.name}".lstrip(".")
                    yield whole if whole in _modules() else base


def _nodes(tree: ast.AST, type_checking: bool) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(tree):
        guarded = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if guarded and not type_checking:
            continue
        yield child
        yield from _nodes(child, type_checking)


def _part(module: str) -> str:
    return module.split(".")[0]


def _parts() -> set[str]:
    return {_part(name) for name in _modules() if name}


def test_the_parts_are_there() -> None:
    assert {*LOWER, *UPPER, "merging", "inspection"} <= _parts()


@pytest.mark.parametrize("part", sorted(_parts()))
def test_a_part_imports_what_lies_below_it(part: str) -> None:
    wrong = {
        f"{name} imports {target}"
        for name, path in _modules().items()
        if _part(name) == part
        for target in _imports(path, type_checking=True)
        if target and _part(target) not in _allowed(part) | {part}
    }
    assert not wrong


def test_the_rules_have_no_cycle() -> None:
    left = {part: _allowed(part) for part in _parts()}
    while left:
        bottom = {part for part, below in left.items() if not below & set(left)}
        assert bottom, f"a cycle among {sorted(left)}"
        for part in bottom:
            del left[part]


def test_no_module_imports_itself_around_a_corner() -> None:
    graph = {
        name: {t for t in _imports(path, type_checking=False) if t not in ("", name)}
        for name, path in _modules().items()
    }
    left = dict(graph)
    while left:
        bottom = [name for name, targets in left.items() if not targets & set(left)]
        assert bottom, f"a cycle among {sorted(left)}"
        for name in bottom:
            del left[name]


def test_the_root_imports_nothing_when_it_is_imported() -> None:
    assert not list(_imports(ROOT / "__init__.py", type_checking=False))


@pytest.mark.parametrize(
    "heavy", ["torch", "transformers", "onnx", "onnxruntime", "huggingface_hub"]
)
def test_heavy_libraries_are_imported_inside_functions(heavy: str) -> None:
    torch_only, torch_parts = {"kernels.torch_rows"}, {"nn"}
    for name, path in _modules().items():
        if name in torch_only or (_part(name) in torch_parts and heavy == "torch"):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                assert all(a.name.split(".")[0] != heavy for a in node.names), name
            if isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] != heavy, name
