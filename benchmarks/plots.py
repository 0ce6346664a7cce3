"""What the benchmarks' plots have in common; needs matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def subplots(columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """A figure of so many inches, and its axes side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "boneconv"
    return pyplot.subplots(1, columns, figsize=size, layout="constrained")


def save(figure: Any, path: Path) -> None:
    """Writes an .svg or a .png; equal figures give equal files."""
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
