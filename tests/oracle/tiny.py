"""Tiny bases, the adapters that PEFT writes for them, and the logits that PEFT gives."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tests.oracle.architectures import ARCHITECTURES, Architecture
from tests.oracle.models import SEED, Inputs
from tests.oracle.quiet import quiet_peft

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

Variant = Literal["bone", "bat", "miss", "miss-bat", "mini"]

NAMES = tuple(ARCHITECTURES)
VARIANTS: tuple[Variant, ...] = ("bone", "bat", "miss", "miss-bat", "mini")
RANK = 8
RAGGED_RANK = 12
MINI_R = 4
BLOCK_STD = 0.05
PREFIX = "base_model.model."
BLOCKS = (".bone_block", ".miss_block")


@dataclass(frozen=True)
class Case:
    """A tiny base on disk, an adapter on disk, and how to run them.

    Attributes:
        name: Key of `ARCHITECTURES`.
        base: Folder written by `save_pretrained`.
        adapter: Folder written by PEFT's `save_pretrained`.
        variant: Which kind of adapter it is.
        rank: Its rank r.
        adapter_dtype: Dtype of all its tensors on disk.
        base_dtype: Floating dtype of the base on disk.
    """

    name: str
    base: Path
    adapter: Path
    variant: Variant
    rank: int
    adapter_dtype: str
    base_dtype: str

    @property
    def architecture(self) -> Architecture:
        """The model and adapter that this case is made of."""
        return ARCHITECTURES[self.name]

    def inputs(self) -> Inputs:
        """The keyword arguments of one forward pass, equal on every call."""
        return self.architecture.inputs()

    def load(self, folder: Path) -> PreTrainedModel:
        """Load a folder in float32, as the class that the adapter was trained on.

        Raises:
            AssertionError: A weight of the model is missing in the folder, or one is left over.
        """
        model, report = _from_pretrained(self, folder, "float32")
        left = {kind: sorted(names) for kind, names in report.items() if names}
        assert not left, f"{folder} does not load cleanly: {left}"
        return model

    def peft_model(self) -> PeftModel:
        """The base in float32 with the adapter attached by PEFT, not merged."""
        from peft import PeftModel

        with quiet_peft():
            return PeftModel.from_pretrained(_adaptable(self), self.adapter).eval()


def make_case(
    root: Path,
    name: str,
    *,
    variant: Variant = "bone",
    rank: int = RANK,
    adapter_dtype: str = "float32",
    base_dtype: str | None = None,
) -> Case:
    """Make a tiny base and an adapter under `root`, or reuse those that are there.

    Args:
        root: Folder that holds all bases and adapters.
        name: Key of `ARCHITECTURES`.
        variant: `bone`, `bat` (PEFT's BoneConfig), `miss`, `miss-bat` or `mini` (its MissConfig).
        rank: Any rank for `bone`, `miss` and `mini`; 8 or a divisor of it for the others.
        adapter_dtype: `float32`, `float16` or `bfloat16`.
        base_dtype: The same; `None` takes the architecture's own.

    Returns:
        The case; its random values depend on the arguments alone.
    """
    base_dtype = base_dtype or ARCHITECTURES[name].base_dtype
    case = Case(
        name=name,
        base=root / "bases" / f"{name}-{base_dtype}",
        adapter=root / "adapters" / f"{name}-{base_dtype}-{variant}-r{rank}-{adapter_dtype}",
        variant=variant,
        rank=rank,
        adapter_dtype=adapter_dtype,
        base_dtype=base_dtype,
    )
    if not case.base.is_dir():
        _make_base(case)
    if not case.adapter.is_dir():
        _make_adapter(case)
    return case


def logits(model: torch.nn.Module, inputs: Inputs) -> Tensor:
    """The logits of one forward pass, or the last hidden state of a model without a head."""
    import torch

    with torch.no_grad():
        outputs = model(**inputs)
    found: Tensor = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    return found


def peft_logits(case: Case) -> Tensor:
    """PEFT's logits in float32, the adapter attached and not merged."""
    return logits(case.peft_model(), case.inputs())


def base_logits(case: Case) -> Tensor:
    """The logits of the base without the adapter, its embeddings resized where the adapter's are.

    A head that the base lacks is drawn at random, the same on every call.
    """
    return logits(_adaptable(case), case.inputs())


def disk_names(case: Case) -> dict[str, str]:
    """For every weight the adapter touches, the tensor of the base that holds it, by content.

    The base is loaded by transformers; a parameter and a tensor on disk belong together when their
    bytes are the same. A tied head is found as the embedding it shares. A weight the base does not
    hold is left out.

    Returns:
        Parameter as the adapter names it (`model.layers.0.self_attn.q_proj.weight`, no
        `base_model.model.`) -> tensor name on disk.
    """
    from safetensors.torch import load_file

    on_disk = {_digest(t): n for n, t in load_file(case.base / "model.safetensors").items()}
    model, _ = _from_pretrained(case, case.base, case.base_dtype)
    found = {}
    for parameter in touched_parameters(case.adapter):
        name = on_disk.get(_digest(model.get_parameter(parameter).detach()))
        if name is not None:
            found[parameter] = name
    return found


def touched_parameters(adapter: Path) -> list[str]:
    """The parameters of the model that an adapter folder changes or replaces."""
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "pt") as file:
        return [_parameter(key) for key in file.keys()]  # noqa: SIM118


def write_with_disk_names(case: Case, out: Path) -> Path:
    """Write the case's adapter again, its modules named as the checkpoint names them.

    Older versions of transformers named their modules so, and hence PEFT the keys of the adapters
    that were trained on them. Modules that the base lacks keep their name.
    """
    from safetensors.torch import load_file, save_file

    names = disk_names(case)
    renamed = {}
    for key, tensor in load_file(case.adapter / "adapter_model.safetensors").items():
        parameter = _parameter(key)
        suffix = key.removeprefix(PREFIX + _module(parameter))
        renamed[PREFIX + _module(names.get(parameter, parameter)) + suffix] = tensor
    out.mkdir(parents=True)
    save_file(renamed, out / "adapter_model.safetensors", metadata={"format": "pt"})
    config = (case.adapter / "adapter_config.json").read_bytes()
    (out / "adapter_config.json").write_bytes(config)
    return out


def _parameter(key: str) -> str:
    name = key.removeprefix(PREFIX)
    for block in BLOCKS:
        if name.endswith(block):
            return name.removesuffix(block) + ".weight"
    return name


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _digest(tensor: Tensor) -> tuple[tuple[int, ...], str]:
    import torch

    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return tuple(tensor.shape), hashlib.sha256(data).hexdigest()


def _dtype(name: str) -> torch.dtype:
    import torch

    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype), name
    return dtype


def _make_base(case: Case) -> None:
    import torch

    torch.manual_seed(SEED)
    model = case.architecture.build()
    generator = torch.Generator().manual_seed(SEED)
    for parameter in model.parameters():
        _fill(parameter, generator)
    model.to(_dtype(case.base_dtype)).save_pretrained(case.base)
    if case.architecture.published_name is not None:
        _rename_tensors(case.base / "model.safetensors", case.architecture)


def _fill(parameter: Tensor, generator: torch.Generator) -> None:
    """Draw a matrix to keep the size of what it is applied to; shake a bias or a norm."""
    import torch

    noise = torch.randn(parameter.shape, generator=generator)
    with torch.no_grad():
        if parameter.dim() > 1:
            parameter.copy_(noise * parameter[0].numel() ** -0.5)
        else:
            parameter.add_(0.1 * noise)


def _rename_tensors(file: Path, architecture: Architecture) -> None:
    from safetensors.torch import load_file, save_file

    rename = architecture.published_name
    assert rename is not None
    tensors = {rename(name): tensor.clone() for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def _make_adapter(case: Case) -> None:
    import torch
    from peft import get_peft_model

    generator = torch.Generator().manual_seed(SEED + case.rank)
    with quiet_peft():
        model = get_peft_model(_adaptable(case), _peft_config(case))
        saved: dict[torch.Size, Tensor] = {}
        for name, parameter in model.named_parameters():
            if "_block." in name:
                parameter.data = BLOCK_STD * torch.randn(parameter.shape, generator=generator)
            elif ".modules_to_save." in name or _is_resized(case, name):
                _fill(parameter, generator)
                if case.architecture.equal:
                    parameter.data = saved.setdefault(parameter.shape, parameter.data).clone()
        model.to(_dtype(case.adapter_dtype)).save_pretrained(case.adapter)


def _is_resized(case: Case, name: str) -> bool:
    embeddings = ("embed_tokens.weight", "lm_head.weight")
    return case.architecture.vocabulary is not None and name.endswith(embeddings)


def _peft_config(case: Case) -> PeftConfig:
    from peft import BoneConfig, MissConfig

    architecture = case.architecture
    options: dict[str, Any] = {
        "r": case.rank,
        "target_modules": list(architecture.targets),
        "modules_to_save": list(architecture.modules_to_save) or None,
        "task_type": architecture.task_type,
    }
    if case.variant == "bone":
        return BoneConfig(**options, init_weights=True)
    if case.variant == "bat":
        return BoneConfig(**options, init_weights="bat")
    if case.variant == "mini":
        return MissConfig(**options, init_weights="mini", mini_r=MINI_R)
    return MissConfig(**options, init_weights="bat" if case.variant == "miss-bat" else True)


def _adaptable(case: Case) -> PreTrainedModel:
    """The base in float32 as the adapter meets it."""
    import torch

    torch.manual_seed(SEED)
    model, _ = _from_pretrained(case, case.base, "float32")
    if case.architecture.vocabulary is not None:
        model.resize_token_embeddings(case.architecture.vocabulary)
    return model


def _from_pretrained(
    case: Case, folder: Path, dtype: str
) -> tuple[PreTrainedModel, dict[str, set[str]]]:
    import json

    import transformers

    config = json.loads((case.base / "config.json").read_text())
    name = case.architecture.model_class or config["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(
        folder, dtype=_dtype(dtype), output_loading_info=True
    )
    return model.eval(), report
