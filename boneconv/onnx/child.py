"""Checking a patched graph in a process of its own.

ONNX's checker and ONNX Runtime take memory of the model's size, and a graph that they do not
survive must not take the export down with it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import boneconv
from boneconv.errors import CheckFailedError, printable

__all__ = ["accept_in_child", "check_rules", "main"]

#: Operators of ONNX Runtime that stand in ONNX's own domain; the checker does not know them.
_UNKNOWN_OP = "No Op registered for"


def accept_in_child(path: Path, *, load: bool = True) -> None:
    """Holds a graph against ONNX's rules, and loads it in ONNX Runtime on the CPU.

    Args:
        path: The graph, its external data beside it.
        load: Whether to load it: ONNX Runtime lacks most bfloat16 kernels on the CPU.

    Raises:
        CheckFailedError: The graph breaks a rule, or does not load.
    """
    package = str(Path(boneconv.__file__).parents[1])
    search = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "boneconv.onnx.child", str(path), "load" if load else ""],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": search},
    )
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = done.stderr.strip().splitlines()
        raise CheckFailedError(
            "ONNX Runtime broke down over the graph",
            path=path,
            found=f"exit code {done.returncode}{', ' + printable(said[-1]) if said else ''}",
        )
    message = json.loads(lines[-1])
    if message:
        raise CheckFailedError(message, path=path)


def main(path: str, load: str) -> None:
    """The other process: prints what is wrong with a graph, or nothing, as a line of JSON."""
    message = ""
    try:
        check_rules(Path(path))
        if load:
            _check_load(path)
    except CheckFailedError as failure:
        message = failure.message
    sys.stdout.write(json.dumps(message) + "\n")


def check_rules(path: Path, says: str = "the graph breaks ONNX's rules") -> None:
    """Holds a graph against ONNX's checker, but for operators that only ONNX Runtime knows.

    Args:
        path: The graph, its external data beside it.
        says: What the error says before the checker's own words.

    Raises:
        CheckFailedError: It breaks a rule.
    """
    try:
        import_module("onnx").checker.check_model(str(path))
    except Exception as error:
        if _UNKNOWN_OP in str(error):
            return
        raise CheckFailedError(f"{says}: {_brief(error)}", path=path) from error


def _check_load(path: str) -> None:
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise CheckFailedError(f"ONNX Runtime does not load the graph: {_brief(error)}") from error


def _brief(error: Exception) -> str:
    return printable(str(error) or type(error).__name__).split("\n")[0][:400]


if __name__ == "__main__":
    main(*sys.argv[1:])
