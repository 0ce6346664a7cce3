"""The command line with writes so slow that a test can stop it on the way."""

from __future__ import annotations

__all__ = ["SLOW"]

#: To be run by ``python -c``, followed by the command's arguments.
SLOW = """
import sys, time
from boneconv.io.write_behind import WriteBehind
real = WriteBehind.room
def slow(*arguments):
    time.sleep(0.03)
    return real(*arguments)
WriteBehind.room = slow
from boneconv.cli import run
sys.exit(run(sys.argv[1:]))
"""
