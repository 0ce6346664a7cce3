"""FSDP2 (`torch.distributed.fsdp.fully_shard`) on two gloo processes against one process."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard

from boneconv.nn.model.bone_model import BoneModel
from tests.nn.model.causal import CONFIGS, adapted, causal, tokens, trainable

PROCESSES = 2
STEPS = 4
SAVED_AFTER = 2
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)
FROM_FIRST = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo"),
]


class Run:
    """A model in training, sharded or whole, and its share of the rows."""

    def __init__(self, kind: str, share: slice, *, sharded: bool) -> None:
        self.model = adapted(kind)
        if sharded:
            for layer in self.model.model.model.layers:
                fully_shard(layer)
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(list(trainable(self.model).values()), lr=0.01)
        self.share = share

    def step(self, number: int) -> tuple[float, dict[str, torch.Tensor]]:
        """One step: the loss, and the gradients of new parameters, gathered."""
        rows = tokens(4, seed=number)[self.share]
        self.optimizer.zero_grad()
        loss = self.model(input_ids=rows, labels=rows).loss
        loss.backward()
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        gradients = {name: _gathered(grad).clone() for name, grad in found.items()}
        self.optimizer.step()
        return loss.item(), gradients


def _gathered(tensor: Any) -> torch.Tensor:
    whole: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return whole


def _process(rank: int, kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), PROCESSES)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=PROCESSES)
    try:
        found = _train_sharded(rank, kind, folder)
        torch.save(found, folder / f"found-{rank}.pt")
    except BaseException:
        (folder / f"error-{rank}").write_text(traceback.format_exc())
        raise
    finally:
        dist.destroy_process_group()


def _train_sharded(rank: int, kind: str, folder: Path) -> dict[str, Any]:
    share = slice(2 * rank, 2 * rank + 2)
    run = Run(kind, share, sharded=True)
    assert isinstance(run.model, FSDPModule)
    assert isinstance(run.model, BoneModel)
    assert run.model.get_nb_trainable_parameters()[0] > 0
    steps: list[Any] = []
    for number in range(STEPS):
        steps.append(run.step(number))
        if number == SAVED_AFTER - 1:
            state = get_model_state_dict(run.model, options=FULL)
            moments = get_optimizer_state_dict(run.model, run.optimizer, options=FULL)
            if rank == 0:  # the others have nothing
                torch.save((state, moments), folder / "checkpoint.pt")
            run.model.save_pretrained(folder / "adapter", is_main_process=rank == 0)
    run.model.eval()
    with torch.no_grad():
        logits = run.model(tokens(2)).logits

    again = Run(kind, share, sharded=True)
    with torch.no_grad():
        for parameter in again.model.parameters():
            parameter.fill_(0.5)
    state, moments = torch.load(folder / "checkpoint.pt") if rank == 0 else ({}, {})
    set_model_state_dict(again.model, state, options=FROM_FIRST)
    set_optimizer_state_dict(again.model, again.optimizer, moments, options=FROM_FIRST)
    resumed = [again.step(number) for number in range(SAVED_AFTER, STEPS)]
    return {"steps": steps, "logits": logits, "resumed": resumed}


@pytest.fixture(scope="module", params=list(CONFIGS))
def runs(request: Any, tmp_path_factory: Any) -> tuple[str, Path, list[dict[str, Any]]]:
    """What the two processes found, once for each kind of adapter."""
    folder = tmp_path_factory.mktemp("fsdp")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        patch.setenv("OMP_NUM_THREADS", "1")
        try:
            mp.spawn(_process, (request.param, folder), nprocs=PROCESSES)
        except Exception as error:
            errors = [path.read_text() for path in sorted(folder.glob("error-*"))]
            raise AssertionError("\n".join(errors)) from error
    ends = [torch.load(folder / f"found-{rank}.pt") for rank in range(PROCESSES)]
    return request.param, folder, ends


def test_losses_and_gradients_are_a_single_process_s(
    runs: tuple[str, Path, list[dict[str, Any]]],
) -> None:
    kind, _, ends = runs
    whole = Run(kind, slice(None), sharded=False)
    for number in range(STEPS):
        loss, gradients = whole.step(number)
        losses, found = zip(*(end["steps"][number] for end in ends), strict=True)
        assert sum(losses) / PROCESSES == pytest.approx(loss, abs=1e-5)
        for each in found:
            assert set(each) == set(gradients) == set(trainable(whole.model))
            for name, expected in gradients.items():
                torch.testing.assert_close(each[name], expected, rtol=1e-4, atol=1e-5)


def test_a_full_state_dict_is_that_of_a_plain_model(
    runs: tuple[str, Path, list[dict[str, Any]]],
) -> None:
    kind, folder, _ = runs
    state, _ = torch.load(folder / "checkpoint.pt")
    plain = adapted(kind, seed=9).eval()
    assert set(state) == set(plain.state_dict())
    plain.load_state_dict(state)
    whole = Run(kind, slice(None), sharded=False)
    for number in range(SAVED_AFTER):
        whole.step(number)
    with torch.no_grad():
        expected = whole.model.eval()(tokens(2)).logits
        torch.testing.assert_close(plain(tokens(2)).logits, expected, rtol=1e-4, atol=1e-4)
        again = BoneModel.from_pretrained(causal(), folder / "adapter")
        assert torch.equal(again(tokens(2)).logits, plain(tokens(2)).logits)


def test_a_sharded_run_goes_on_from_a_full_state_dict(
    runs: tuple[str, Path, list[dict[str, Any]]],
) -> None:
    for end in runs[2]:
        for (loss, gradients), (expected, others) in zip(
            end["resumed"], end["steps"][SAVED_AFTER:], strict=True
        ):
            assert loss == expected
            assert all(torch.equal(gradients[name], others[name]) for name in others)


def test_a_sharded_model_computes_the_same_in_eval_mode(
    runs: tuple[str, Path, list[dict[str, Any]]],
) -> None:
    kind, _, ends = runs
    whole = Run(kind, slice(None), sharded=False)
    for number in range(STEPS):
        whole.step(number)
    with torch.no_grad():
        expected = whole.model.eval()(tokens(2)).logits
    for end in ends:
        torch.testing.assert_close(end["logits"], expected, rtol=1e-4, atol=1e-4)
