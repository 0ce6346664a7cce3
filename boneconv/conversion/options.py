"""What a conversion is asked for, checked before anything is read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from boneconv.errors import UsageError

__all__ = ["SERVED_RANKS", "Options", "Target", "served_rank"]

#: The ranks that vLLM serves.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class Target(StrEnum):
    """What an adapter is converted to."""

    NATIVE = "native"
    PEFT_BONE = "peft-bone"
    PEFT_MISS = "peft-miss"
    PEFT_LORA = "peft-lora"
    RWKV = "rwkv"


#: The name that OUT must end in, for targets that are or may be one file.
_FILES = {Target.RWKV: ".pth", Target.NATIVE: ".safetensors"}


@dataclass(frozen=True)
class Options:
    """The options of one conversion; the fields are the arguments of `boneconv.convert`."""

    to: Target
    rank: int | None = None
    energy: float | None = None
    max_error: float = 0.05
    allow_error: bool = False
    pad_rank: bool = False

    def check(self, *, has_base: bool) -> None:
        """Raises UsageError for values that cannot be, or options that do not go together."""
        if self.rank is not None and self.rank < 1:
            raise UsageError("the rank must be positive", found=self.rank)
        if self.energy is not None and not 0.0 < self.energy <= 1.0:
            raise UsageError("the energy is a share", expected="0 < E <= 1", found=self.energy)
        if not self.max_error >= 0.0:
            raise UsageError("the error cannot be negative", found=self.max_error)
        if self.rank is not None and self.energy is not None:
            raise UsageError("--rank and --energy exclude each other")
        own = self.rank is not None or self.energy is not None or self.pad_rank or self.allow_error
        if own and self.to is not Target.PEFT_LORA:
            raise UsageError(
                "--rank, --energy, --pad-rank and --allow-error belong to --to peft-lora",
                found=f"--to {self.to}",
            )
        if has_base and self.to not in (Target.PEFT_LORA, Target.NATIVE):
            raise UsageError(
                "--base belongs to --to peft-lora and --to native", found=f"--to {self.to}"
            )

    def is_file(self, out: Path) -> bool:
        """Whether OUT will be a file; raises UsageError where its name does not fit the target."""
        suffix = _FILES.get(self.to)
        if self.to is Target.RWKV and out.suffix != suffix:
            raise UsageError(
                "an RWKV-PEFT adapter is one file", path=out, expected=f"a name ending in {suffix}"
            )
        if out.suffix in (".safetensors", ".pth", ".bin", ".pt") and out.suffix != suffix:
            raise UsageError(f"{self.to} is a folder", path=out, expected="a folder's name")
        return out.suffix == suffix

    def record(self) -> dict[str, Any]:
        """The options that determine the output."""
        if self.to is not Target.PEFT_LORA:
            return {}
        return {
            "rank": self.rank,
            "energy": self.energy,
            "max_error": self.max_error,
            "pad_rank": self.pad_rank,
        }


def served_rank(rank: int) -> int:
    """The next rank that vLLM serves; the rank itself above the largest."""
    return next((served for served in SERVED_RANKS if served >= rank), rank)
