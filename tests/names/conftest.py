"""Checkpoints of tiny models, made when they are asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.names.checkpoints import MODELS, Base


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    import torch
    from safetensors.torch import load_file
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(1)
    made: dict[str, Base] = {}

    def get(name: str) -> Base:
        if name not in made:
            torch.manual_seed(1)
            model = MODELS[name]()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_()
            folder = tmp_path_factory.mktemp(name.replace(" ", "-"))
            model.save_pretrained(folder)
            made[name] = Base(folder, load_file(folder / "model.safetensors"), model)
        return made[name]

    return get
