"""A few steps of training, enough for an adapter that does something real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

STEPS = 8
LEARNING_RATE = 1e-3


def train(adapted: PeftModel, loss: Callable[[], Tensor], out: Path) -> None:
    """Train the adapter for `STEPS` steps of Adam, then let PEFT save it to `out`.

    `training.json` beside it holds the loss before each step and after the last.
    """
    import torch

    blocks = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(blocks, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    history = []
    for _ in range(STEPS):
        current = loss()
        history.append(current.item())
        optimiser.zero_grad()
        torch.autograd.backward(current)
        optimiser.step()
    with torch.no_grad():
        history.append(loss().item())
    adapted.save_pretrained(out)
    (out / "training.json").write_text(json.dumps({"losses": history}))


def losses(adapter: Path) -> list[float]:
    """The losses of an adapter's training: before each step and after the last."""
    record = json.loads((adapter / "training.json").read_text())
    return [float(loss) for loss in record["losses"]]
