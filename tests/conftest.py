"""What all tests share: no network, few threads, and the bases and adapters of `tests.oracle`."""

from __future__ import annotations

import functools
import ipaddress
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import hypothesis
import pytest

from tests.oracle import real, tiny
from tests.oracle.cache import default_cache

# Nothing above imports torch, numpy or a Hugging Face library, which read these when imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
for _threads in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_threads] = "2"
# Threads that spin while they wait make a busy machine ten times slower.
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

hypothesis.settings.register_profile("default", deadline=None, max_examples=50)
hypothesis.settings.register_profile("ci", deadline=None, max_examples=50, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "default")


class TinyCase(Protocol):
    """`tiny.make_case` without its folder."""

    def __call__(
        self,
        name: str,
        *,
        variant: tiny.Variant = "bone",
        rank: int = tiny.RANK,
        adapter_dtype: str = "float32",
        base_dtype: str | None = None,
    ) -> tiny.Case: ...


@pytest.fixture(autouse=True, scope="session")
def no_network() -> Iterator[None]:
    """Refuse every connection that leaves the machine.

    Tests that serve a Hub on loopback start the client in a process of its own, or set
    `HF_HUB_OFFLINE` and `HF_ENDPOINT` where it runs: huggingface_hub reads both on import.
    """
    with pytest.MonkeyPatch.context() as patch:
        for name in ("connect", "connect_ex"):
            patch.setattr(socket.socket, name, _local_only(getattr(socket.socket, name)))
        yield


def _local_only(connect: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(connect)
    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise RuntimeError(f"a test reached for the network: {address}")
        return connect(self, address)

    return guarded


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@pytest.fixture(scope="session")
def cache() -> Path:
    """The folder of what is made once per machine, see `tests.oracle.cache`."""
    return default_cache()


@pytest.fixture(scope="session")
def real_base(cache: Path) -> Path:
    """SmolLM2-135M-Instruct: bfloat16, three shards, tied head."""
    return real.smollm2(cache)


@pytest.fixture(scope="session")
def trained_bone(cache: Path) -> Path:
    """The Bone adapter trained on `real_base`."""
    return real.trained(cache, "bone")


@pytest.fixture(scope="session")
def trained_bat(cache: Path) -> Path:
    """The BAT adapter trained on `real_base`."""
    return real.trained(cache, "bat")


@pytest.fixture(scope="session")
def bone_reference(cache: Path) -> real.Generation:
    """What PEFT says with `trained_bone` attached."""
    return real.reference(cache, "bone")


@pytest.fixture(scope="session")
def bat_reference(cache: Path) -> real.Generation:
    """What PEFT says with `trained_bat` attached."""
    return real.reference(cache, "bat")


@pytest.fixture(scope="session")
def minilm_base(cache: Path) -> Path:
    """all-MiniLM-L6-v2: BERT, float32, keys without a prefix."""
    return real.minilm(cache)


@pytest.fixture(scope="session")
def minilm_bone(cache: Path) -> Path:
    """The Bone adapter of rank 20 trained on `minilm_base`."""
    return real.minilm_bone(cache)


@pytest.fixture(scope="session")
def tiny_case(tmp_path_factory: pytest.TempPathFactory) -> TinyCase:
    """Make, once a session, a tiny base with an adapter: `tiny_case("qwen2", variant="bat")`."""
    return functools.partial(tiny.make_case, tmp_path_factory.mktemp("tiny"))
