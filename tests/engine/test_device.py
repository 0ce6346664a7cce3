"""Devices: checked before anything is written, and torch only where it is needed."""

from __future__ import annotations

import sys

import pytest

from boneconv.engine.device import check_device
from boneconv.errors import UsageError


def test_the_cpu_needs_no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    check_device("cpu")


@pytest.mark.parametrize("device", ["", "gpu", "CUDA", "mps", "meta", "cuda:", "cuda:x", "cuda:-1"])
def test_devices_that_cannot_be(device: str) -> None:
    with pytest.raises(UsageError, match=r"unknown device.*expected cpu, cuda or cuda:N"):
        check_device(device)


@pytest.mark.parametrize(("count", "device"), [(0, "cuda"), (0, "cuda:0"), (2, "cuda:2")])
def test_devices_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, count: int, device: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    with pytest.raises(UsageError, match=f"found {count} CUDA devices") as caught:
        check_device(device)
    assert caught.value.exit_code == 2


def test_devices_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device in ("cuda", "cuda:0", "cuda:1"):
        check_device(device)
