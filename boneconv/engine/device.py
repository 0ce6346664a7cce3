"""Which devices a run can compute on, checked before anything is written."""

from __future__ import annotations

from boneconv.errors import UsageError

__all__ = ["check_device"]


def check_device(device: str) -> None:
    """Imports torch only for a device that needs it.

    Args:
        device: ``cpu``, ``cuda``, or ``cuda:N``.

    Raises:
        UsageError: Another device, or one that this machine does not have.
    """
    if device == "cpu":
        return
    name, _, number = device.partition(":")
    if name != "cuda" or not (number.isdecimal() or device == "cuda"):
        raise UsageError(f"unknown device {device!r}", expected="cpu, cuda or cuda:N")
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(number or 0) >= count:
        raise UsageError(
            f"there is no device {device!r} for torch {torch.__version__} on this machine",
            found=f"{count} CUDA devices",
            hint="Leave out --device: the result has the same bytes on the CPU",
        )
