"""Reports as a table, JSON, JUnit, Markdown and HTML, from what a verification or diff found.

Nothing here is imported before a format is asked for: each lies in a module of its own.
"""

from __future__ import annotations
