"""Converting adapters: to the native format, to PEFT's Bone, MiSS and LoRA, to RWKV-PEFT.

Every conversion is written beside its place, read back and compared, and then renamed. One that was
interrupted starts anew.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from boneconv.adapter import Adapter
from boneconv.conversion.base import AdaptedWeights, adapted_weights, check_fingerprint
from boneconv.conversion.options import Options, Target
from boneconv.conversion.record import RECORD_NAME, encode_record
from boneconv.conversion.same import check_same
from boneconv.conversion.to_lora import (
    ModuleError,
    check_errors,
    plan_lora,
    remarks,
    write_lora,
)
from boneconv.conversion.to_native import to_native
from boneconv.engine.progress import Progress
from boneconv.errors import UsageError
from boneconv.formats import native, peft, peft_write, read_adapter, rwkv
from boneconv.formats.native.peft_config import misread_by_peft
from boneconv.io.checkpoint import open_checkpoint
from boneconv.io.files import machine_errors
from boneconv.io.hub import ADAPTER, Source, locate
from boneconv.io.safetensors import Tensor
from boneconv.io.staging import Staging, check_free, require_space

__all__ = ["ConvertResult", "ModuleError", "Progress", "Target", "convert"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did.

    Attributes:
        out: The converted adapter.
        to: What it was converted to.
        record: Its record, a JSON file; a native adapter has none.
        rank: The rank that the converted adapter has; the largest where they differ.
        modules: Every adapted module, with the error of its LoRA; all others are exact.
        notes: What the user should know.
    """

    out: Path
    to: Target
    record: Path | None
    rank: int
    modules: tuple[ModuleError, ...]
    notes: tuple[str, ...]

    @property
    def worst_error(self) -> float:
        """The largest error of all modules."""
        return max((each.error for each in self.modules), default=0.0)


def convert(
    adapter: PathLike,
    out: PathLike,
    *,
    to: str,
    base: PathLike | None = None,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float = 0.05,
    allow_error: bool = False,
    pad_rank: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertResult:
    """Converts a Bone, BAT or mini adapter of any format that `load_adapter` reads.

    Tensors keep their values and dtypes. The exception is BAT as a LoRA, which is approximated:
    by the truncated singular value decomposition of the exact update of the base's weights.

    Args:
        adapter: A folder, a file, or a Hub id ``owner/name[@revision]``.
        out: A folder; a name ending in ``.pth`` for ``rwkv``; for ``native`` also one ending in
            ``.safetensors``.
        to: ``native``, ``peft-bone`` (PEFT 0.14 to 0.18), ``peft-miss`` (0.17 and later),
            ``peft-lora`` or ``rwkv``.
        base: The base that the adapter was made for. For a LoRA, whose width it gives (a folder
            with a config.json is enough for Bone and mini) and whose weights BAT needs; for
            ``native``, to record its fingerprint.
        rank: The rank of BAT's LoRA.
        energy: In place of a rank: the share of the sum of squared singular values that every
            module retains; the rank is the largest needed.
        max_error: The largest ``|dW - B A|_F / |dW|_F`` of a module that is accepted.
        allow_error: Whether to go on where that is exceeded.
        pad_rank: Whether to raise the LoRA's rank to the next that vLLM serves.
        force: Whether to replace ``out``.
        progress: Is told how far the conversion is.

    Raises:
        CheckFailedError: An error exceeds ``max_error``; nothing is left behind.
        InputError: One of its kinds, for every fault in the input.
        MachineError: The disk or the network failed.
    """
    options = Options(_target(to), rank, energy, max_error, allow_error, pad_rank)
    options.check(has_base=base is not None)
    target = Path(out)
    is_file = options.is_file(target)
    check_free(target, force=force)
    source = locate(adapter, ADAPTER)
    _check_apart(target, source.path, base)
    loaded = read_adapter(source.path)
    if options.to is Target.NATIVE:
        to_native(loaded, target, base, force=force)
        return ConvertResult(target, options.to, None, _rank(loaded), _exact(loaded), ())
    record = target.with_name(f"{target.name}.{RECORD_NAME}") if is_file else None
    with Staging(target, key="", is_file=is_file, force=force, beside=record) as staging:
        work = _Work(loaded, source, options, target, staging)
        if options.to is Target.PEFT_LORA:
            result = work.lora(adapted_weights(loaded, base), progress)
        else:
            result = work.copy()
        staging.publish()
    return result


@dataclass(frozen=True)
class _Work:
    """One conversion, written to the place of work of ``out``."""

    adapter: Adapter
    source: Source
    options: Options
    out: Path
    staging: Staging

    @property
    def place(self) -> Path:
        """Where the adapter is written."""
        return self.staging.target

    def copy(self) -> ConvertResult:
        """Writes the same tensors in another format."""
        require_space(self.out, sum(t.nbytes for t in _tensors(self.adapter)))
        if self.options.to is Target.RWKV:
            rwkv.write(self.adapter, self.place)
            again = rwkv.read(self.place)
        else:
            kind = "BONE" if self.options.to is Target.PEFT_BONE else "MISS"
            self._refuse_misread(kind)
            peft_write.write(self.adapter, self.place, kind)
            again = peft.read(self.place)
        check_same(self.adapter, again)
        notes = peft_write.dropped(self.adapter, again.config)
        return self._finish(None, _rank(self.adapter), _exact(self.adapter), notes)

    def lora(self, weights: AdaptedWeights, progress: Progress | None) -> ConvertResult:
        """Writes a LoRA, held against ``max_error``."""
        adapter, options = self.adapter, self.options
        if weights.source is not None and weights.tensors:
            check_fingerprint(adapter, open_checkpoint(weights.source.path))
        advance = _advance(progress)
        if progress is not None:
            passes = 1 if options.energy is None else 2
            progress.start(passes * sum(t.nbytes for t in weights.tensors.values()))
        plan = plan_lora(adapter, weights, options, advance)
        errors = tuple(write_lora(plan, self.out, self.place, advance))
        check_errors(errors, options, adapter.path)
        notes = remarks(plan, errors, options)
        return self._finish(weights.source, plan.rank, errors, notes)

    def _refuse_misread(self, kind: str) -> None:
        """Refuses what PEFT 0.14 to 0.18 would read wrongly, names included."""
        if kind != "BONE" or not self.adapter.is_native:
            return
        opened = native.open_native(self.adapter.path)
        task = self.adapter.config.task_type
        for reason in misread_by_peft(opened.metadata, opened.file.tensors, task):
            raise UsageError(
                f"PEFT 0.14 to 0.18 would apply this adapter wrongly: {reason}",
                path=self.adapter.path,
                hint="Convert it to peft-miss or peft-lora, or merge it with boneconv merge",
            )

    def _finish(
        self,
        base: Source | None,
        rank: int,
        modules: tuple[ModuleError, ...],
        notes: list[str],
    ) -> ConvertResult:
        """Writes the record: inside a folder, beside a file."""
        content = encode_record(self.adapter, self.source, base, self.options, rank, modules)
        if self.place.is_dir():
            written, record = self.place / RECORD_NAME, self.out / RECORD_NAME
        else:
            written = self.staging.beside
            record = self.out.with_name(f"{self.out.name}.{RECORD_NAME}")
        with machine_errors(written):
            written.write_bytes(content)
        return ConvertResult(self.out, self.options.to, record, rank, modules, tuple(notes))


def _target(name: str) -> Target:
    try:
        return Target(name)
    except ValueError:
        raise UsageError(
            f"cannot convert to {name!r}", expected=", ".join(map(str, Target))
        ) from None


def _check_apart(out: Path, adapter: Path, base: PathLike | None) -> None:
    inputs = [adapter, *([Path(base)] if base is not None else [])]
    place = out.resolve()
    for given in (path.resolve() for path in inputs):
        if place == given or place in given.parents or given in place.parents:
            raise UsageError(
                "the output must not be, hold or lie in an input", path=out, found=str(given)
            )


def _advance(progress: Progress | None) -> Callable[[int], None]:
    return (lambda nbytes: None) if progress is None else progress.advance


def _rank(adapter: Adapter) -> int:
    return max((block.rank for block in adapter.blocks.values()), default=adapter.config.r)


def _exact(adapter: Adapter) -> tuple[ModuleError, ...]:
    return tuple(ModuleError(module, 0.0) for module in adapter.blocks)


def _tensors(adapter: Adapter) -> list[Tensor]:
    return [*(block.tensor for block in adapter.blocks.values()), *adapter.saved.values()]
