"""``merge --keep-delta``: the delta file appears right before the merged checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from boneconv.delta import DeltaJob, check_delta_base, delta_work, write_delta
from boneconv.engine.stream import ShardDigests
from boneconv.errors import UsageError
from boneconv.io.staging import Staging, check_free

__all__ = ["KeptDelta", "check_place"]


def check_place(file: Path, out: Path, base: Path, *, force: bool) -> None:
    """Checks where a delta file goes.

    Raises:
        OutputExistsError: It exists and may not be replaced.
        UsageError: It lies in the base or the output, or is one of them.
    """
    check_free(file, force=force)
    place = file.resolve()
    for other in (out.resolve(), base.resolve()):
        if place == other or other in place.parents:
            raise UsageError(
                "the delta file must not lie in the base or the output",
                path=file,
                found=str(other),
            )


@dataclass(frozen=True)
class KeptDelta:
    """Writes a delta file when the output of a merge is complete.

    Attributes:
        file: Where.
        job: What was merged.
        workers: How many workers compute.
        force: Whether to replace an existing file.
        advance: Is told of the bytes of the base that are done, `work` in all.
    """

    file: Path
    job: DeltaJob
    workers: int
    force: bool
    advance: Callable[[int], None]

    def __post_init__(self) -> None:
        check_delta_base(self.job.base)

    @property
    def work(self) -> int:
        """Bytes of the base that are compared."""
        return delta_work(self.job.base, self.job.plan)

    def open(self, key: str) -> Staging:
        """Opens the file's place of work; raises OutputExistsError or LockedError."""
        return Staging(self.file, key=key, is_file=True, force=self.force)

    def write(self, staging: Staging, made: Path, digests: ShardDigests) -> None:
        """Writes the file in its place of work; the output is in its own."""
        workers, advance = self.workers, self.advance
        write_delta(staging, self.job, made, digests, workers=workers, advance=advance)
