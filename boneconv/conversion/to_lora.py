"""Converting an adapter to a LoRA of one rank for all modules.

llama.cpp divides the one alpha by each tensor's own rank, vLLM knows one rank and one alpha: so all
modules get the same rank, the smaller ones padded with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from boneconv.adapter import Adapter, Block
from boneconv.config import Variant
from boneconv.conversion.base import AdaptedWeights
from boneconv.conversion.lora import (
    Factors,
    approximate,
    exact,
    needed_rank,
    spectrum,
)
from boneconv.conversion.options import SERVED_RANKS, Options, served_rank
from boneconv.errors import CheckFailedError, InputError, UsageError
from boneconv.formats.peft import SAFETENSORS_NAME
from boneconv.formats.peft_write import (
    aligned,
    lora_config,
    lora_names,
    saved_tensors,
    write_config,
    write_side_files,
)
from boneconv.formats.writing import Description, TensorFile, describe
from boneconv.io.safetensors import tensor_nbytes
from boneconv.io.staging import require_space
from boneconv.kernels import Stage
from boneconv.kernels.stage import Array

__all__ = ["LoraPlan", "ModuleError", "check_errors", "plan_lora", "remarks", "write_lora"]

Advance = Callable[[int], None]


@dataclass(frozen=True)
class ModuleError:
    """How well the LoRA of a module stands for its update.

    Attributes:
        module: The module.
        error: ``|dW - B A|_F / |dW|_F``; 0 where the LoRA is exact.
    """

    module: str
    error: float


@dataclass(frozen=True)
class LoraPlan:
    """A LoRA whose ranks are known.

    Attributes:
        adapter: What is converted.
        weights: The weights that it adapts.
        kept: The rank that the factors use.
        rank: The rank that they are stored with: R.
        alpha: ``lora_alpha``.
    """

    adapter: Adapter
    weights: AdaptedWeights
    kept: int
    rank: int
    alpha: float

    @property
    def factors(self) -> list[Description]:
        """Name, dtype and shape of every lora_A and lora_B."""
        return [
            description
            for module, block in self.adapter.blocks.items()
            for description in self._described(module, block)
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the factors."""
        return sum(tensor_nbytes(dtype, shape) for _, dtype, shape in self.factors)

    def _described(self, module: str, block: Block) -> Iterator[Description]:
        rows, columns, *rest = self.weights.shapes[module]
        name_a, name_b = lora_names(module)
        yield name_a, block.tensor.dtype, (self.rank, columns, *rest)
        yield name_b, block.tensor.dtype, (rows, self.rank, *rest)


def plan_lora(
    adapter: Adapter, weights: AdaptedWeights, options: Options, advance: Advance
) -> LoraPlan:
    """Finds the rank; for ``--energy`` that takes a first pass over the weights.

    Raises:
        UsageError: The options do not fit the variant, or the base came without its weights.
        ShapeError, NonFiniteError: A block or a weight cannot be used.
    """
    if not adapter.blocks:
        raise UsageError("the adapter has no blocks, only replaced tensors", path=adapter.path)
    own = max(block.rank for block in adapter.blocks.values())
    if not _is_bat(adapter):
        if options.rank is not None or options.energy is not None:
            raise UsageError(
                f"{adapter.config.variant} becomes a LoRA exactly, at its own rank {own}",
                path=adapter.path,
                hint="Leave out --rank and --energy; --pad-rank pads to a rank that vLLM serves",
            )
        rank = served_rank(own) if options.pad_rank else own
        return LoraPlan(adapter, weights, own, rank, adapter.scale * rank)
    if not weights.tensors:
        raise UsageError(
            "BAT's update depends on the base's weights",
            path=adapter.path,
            hint="Give the base, with its weights, with --base",
        )
    if options.rank is None and options.energy is None:
        raise UsageError(
            "BAT becomes a LoRA by approximation only",
            path=adapter.path,
            hint="Give --rank K, or --energy E for the rank that retains a share such as 0.99",
        )
    kept = options.rank or _rank_for(adapter, weights, options.energy or 1.0, advance)
    rank = served_rank(kept) if options.pad_rank else kept
    return LoraPlan(adapter, weights, rank, rank, float(rank))


def write_lora(plan: LoraPlan, out: Path, folder: Path, advance: Advance) -> list[ModuleError]:
    """Writes the LoRA into an existing folder, a module at a time, and reads it back.

    Args:
        plan: What to write.
        out: Where the folder will be; its disk must have room.
        folder: Where it is written.
        advance: Is told how many bytes of the weights are done.

    Raises:
        ShapeError, NonFiniteError: A block or a weight cannot be used.
        DiskFullError, MachineError: The folder cannot be written, or reads back differently.
    """
    adapter = plan.adapter
    saved = saved_tensors(adapter)
    tensors = aligned([*plan.factors, *describe(saved)])
    require_space(out, sum(tensor_nbytes(dtype, shape) for _, dtype, shape in tensors))
    errors = []
    with TensorFile(folder / SAFETENSORS_NAME, tensors) as file:
        for name, tensor in saved.items():
            file.copy(name, tensor)
        for block in adapter.blocks.values():
            shape = plan.weights.shapes[block.module]
            factors = _factors(plan, block)
            for name, array in zip(
                lora_names(block.module), (factors.lora_a, factors.lora_b), strict=True
            ):
                file.put(name, array.reshape(*array.shape, *shape[2:]))
            errors.append(ModuleError(block.module, factors.error))
            advance(_work(plan.weights, block))
    file.check()
    write_config(folder, lora_config(adapter, plan.rank, plan.alpha))
    write_side_files(adapter, folder)
    return errors


def check_errors(errors: Sequence[ModuleError], options: Options, path: Path) -> None:
    """Raises CheckFailedError where an error exceeds ``--max-error``, unless that is allowed."""
    wrong = sorted((e for e in errors if not e.error <= options.max_error), key=lambda e: -e.error)
    if wrong and not options.allow_error:
        shown = ", ".join(f"{e.module} {e.error:.4f}" for e in wrong[:8])
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise CheckFailedError(
            f"the LoRA of {len(wrong)} of {len(errors)} modules is too far from BAT's update: "
            f"{shown}{more}",
            path=path,
            expected=f"an error of at most {options.max_error:g}",
            hint="Raise --rank or --energy, or --max-error; --allow-error goes on regardless",
        )


def remarks(plan: LoraPlan, errors: Sequence[ModuleError], options: Options) -> list[str]:
    """What the user should know of a LoRA."""
    found = []
    worst = max(errors, key=lambda e: e.error)
    if worst.error > options.max_error:
        found.append(f"the worst error, {worst.error:.4f} of {worst.module}, was allowed")
    if plan.rank > SERVED_RANKS[-1]:
        found.append(f"the rank {plan.rank} is above {SERVED_RANKS[-1]}, the most that vLLM serves")
    merged = sum(tensor.nbytes for tensor in plan.weights.tensors.values())
    if plan.weights.tensors and plan.nbytes > merged:
        found.append(
            f"the LoRA ({plan.nbytes:,} bytes) is larger than the merged weights ({merged:,}): "
            "boneconv merge takes less"
        )
    if plan.adapter.saved:
        found.append(
            f"{len(plan.adapter.saved)} replaced tensors are carried for PEFT; vLLM and llama.cpp "
            "do not take them from a LoRA"
        )
    return found


def _is_bat(adapter: Adapter) -> bool:
    return any(block.variant is Variant.BAT for block in adapter.blocks.values())


def _rank_for(adapter: Adapter, weights: AdaptedWeights, energy: float, advance: Advance) -> int:
    """The largest of the ranks that the modules need."""
    needed = 1
    for block in adapter.blocks.values():
        with _Named(block.module):
            stage = _stage(block, adapter.scale)
            found = spectrum(_weight(weights, block.module), stage, vectors=False)
        needed = max(needed, needed_rank(found, energy))
        advance(_work(weights, block))
    return needed


def _factors(plan: LoraPlan, block: Block) -> Factors:
    with _Named(block.module):
        if block.variant is not Variant.BAT:
            rows, columns, *_ = plan.weights.shapes[block.module]
            return exact(_stage(block, 1.0), (rows, columns), plan.rank)
        stage, weight = _stage(block, plan.adapter.scale), _weight(plan.weights, block.module)
        return approximate(weight, stage, spectrum(weight, stage), plan.kept, plan.rank)


def _stage(block: Block, scale: float) -> Stage:
    return Stage(block.variant, block.tensor.read(), block.axis, scale)


def _weight(weights: AdaptedWeights, module: str) -> Array:
    shape = weights.shapes[module]
    return weights.tensors[module].read().reshape(shape[0], shape[1])


def _work(weights: AdaptedWeights, block: Block) -> int:
    return weights.tensors[block.module].nbytes if weights.tensors else block.tensor.nbytes


class _Named:
    """Says in an error of the input which module it is about."""

    def __init__(self, module: str) -> None:
        self._module = module

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, InputError):
            raise error.restated(f"{self._module!r}: {error.message}", error.path) from error
