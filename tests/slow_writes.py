"""The command line with writes so slow that a test can stop it on the way."""

from __future__ import annotations

__all__ = ["SLOW"]

#: To be run by ``python -c``, followed by the command's arguments.
SLOW = """
import sys, time
import boneconv.engine.compute as compute
real = compute._write
def slow(*arguments):
    time.sleep(0.03)
    real(*arguments)
compute._write = slow
from boneconv.cli import run
sys.exit(run(sys.argv[1:]))
"""
