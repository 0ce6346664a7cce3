"""An existing Dask cluster as an executor (extra ``distributed``)."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from boneconv.errors import MissingExtraError, NetworkError, printable

__all__ = ["cluster"]

#: How often a task is run again after its worker was lost or failed.
_RETRIES = 3
_TIMEOUT = "30s"


@contextmanager
def cluster(address: str) -> Iterator[Executor]:
    """Connects to a scheduler; its workers see the same files, by the same paths.

    Args:
        address: The scheduler's address, such as ``tcp://host:8786``.

    Raises:
        MissingExtraError: distributed is not installed.
        NetworkError: There is no scheduler at the address.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise MissingExtraError(
            "distributed is not installed",
            hint="Install it with: pip install 'boneconv[distributed]'",
        ) from error
    try:
        client = Client(address, timeout=_TIMEOUT, set_as_default=False)
    except (OSError, ValueError) as error:
        raise NetworkError(
            f"no Dask scheduler answers at {printable(address)}",
            found=printable(str(error)),
            hint="Start one with: dask scheduler",
        ) from error
    with client, client.get_executor(retries=_RETRIES, pure=False) as executor:
        yield executor
