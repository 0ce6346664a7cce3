"""Every way to write to a tensor, and what of a layer may be written to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from boneconv.nn import BoneLinear

Parameter = Callable[[BoneLinear], Tensor]
PARAMETERS: dict[str, Parameter] = {
    "weight": lambda layer: layer.base_layer.weight,
    "block": lambda layer: layer.bone_block["a0"],
}


def optimizer_step(p: Tensor) -> None:
    p.requires_grad_()
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.1).step()


def adam_step(p: Tensor) -> None:
    p.requires_grad_()
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], lr=0.1, foreach=True).step()


def under_no_grad(p: Tensor) -> None:
    with torch.no_grad():
        p.add_(1)


def one_element(p: Tensor) -> None:
    with torch.no_grad():
        p.view(-1)[3] = 7


def copy_into(p: Tensor) -> None:
    with torch.no_grad():
        p.copy_(torch.randn_like(p))


def data_add(p: Tensor) -> None:
    p.data.add_(1)


def data_one_element(p: Tensor) -> None:
    p.data.view(-1)[5] = -3


def data_assigned(p: Tensor) -> None:
    p.data = torch.randn_like(p)


def data_swapped_back_and_forth(p: Tensor) -> None:
    held = p.data
    p.data = torch.zeros_like(p)
    held.mul_(2)
    p.data = held


def detached(p: Tensor) -> None:
    p.detach().mul_(-1)


def strides_reversed(p: Tensor) -> None:
    """The same memory, read in the other order; a second time, in the first again."""
    rows_first = torch.empty_like(p, memory_format=torch.contiguous_format)
    columns_first = rows_first.view(p.shape[::-1]).permute(*reversed(range(p.dim())))
    other = columns_first if p.is_contiguous() else rows_first
    p.data = p.data.as_strided(p.shape, other.stride())


def set_(p: Tensor) -> None:
    with torch.no_grad():
        p.set_(torch.randn_like(p))


def storage_copied(p: Tensor) -> None:
    p.untyped_storage().copy_(torch.randn_like(p).untyped_storage())


def by_numpy(p: Tensor) -> None:
    p.detach().numpy()[...] += 1


def by_dlpack(p: Tensor) -> None:
    np.from_dlpack(p.detach())
    torch.from_dlpack(p.detach()).add_(1)


def in_inference_mode(p: Tensor) -> None:
    with torch.inference_mode():
        p.add_(1)


def foreach(p: Tensor) -> None:
    torch._foreach_add_([p.data], 1.0)


def out_argument(p: Tensor) -> None:
    torch.add(p.data, 1, out=p.data)


def index_put(p: Tensor) -> None:
    p.data[torch.zeros_like(p, dtype=torch.bool).index_fill_(0, torch.tensor([0]), True)] = 4.0


def init(p: Tensor) -> None:
    nn.init.normal_(p)


def swapped(p: Tensor) -> None:
    torch.utils.swap_tensors(p, nn.Parameter(torch.randn_like(p), requires_grad=p.requires_grad))


def vector_to_parameters(p: Tensor) -> None:
    nn.utils.vector_to_parameters(torch.randn(p.numel(), dtype=p.dtype), [p])


WRITES = [
    optimizer_step,
    adam_step,
    under_no_grad,
    one_element,
    copy_into,
    data_add,
    data_one_element,
    data_assigned,
    data_swapped_back_and_forth,
    detached,
    strides_reversed,
    set_,
    storage_copied,
    by_numpy,
    by_dlpack,
    in_inference_mode,
    foreach,
    out_argument,
    index_put,
    init,
    swapped,
    vector_to_parameters,
]
