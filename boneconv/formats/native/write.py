"""Writing a native adapter: the bytes that the specification recommends, published whole.

What was written is read back, checked against every rule and compared with what was to be written
before it gets its name. Tensors pass through memory one at a time.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from boneconv.config import CONFIG_NAME
from boneconv.digest import LeafHasher, stored_digest, tensor_digest
from boneconv.errors import CheckFailedError, UsageError
from boneconv.formats.native.container import DTYPES
from boneconv.formats.native.content import NativeAdapter
from boneconv.formats.native.metadata import METADATA_KEY
from boneconv.formats.native.peft_config import written_config
from boneconv.formats.native.read import WEIGHTS_NAME, open_native
from boneconv.formats.native.rules import StageFailed, first_error
from boneconv.io.files import Reader, Writer, machine_errors
from boneconv.io.safetensors import StoredTensor, Tensor, byte_view, layout
from boneconv.io.staging import Staging, require_space

__all__ = ["config_bytes", "write_native"]

_CHUNK = 4 * 1024 * 1024


def write_native(
    native: NativeAdapter,
    out: Path,
    *,
    side_files: Mapping[str, Path] | None = None,
    force: bool = False,
) -> Path:
    """Writes an adapter, whole or not at all.

    Args:
        native: The content.
        out: A folder, which gets adapter_model.safetensors and adapter_config.json, or a name that
            ends in ``.safetensors`` for the file alone, which is complete too.
        side_files: Files to copy into the folder, such as a tokenizer's, by their names in it; a
            file alone has none.
        force: Whether to replace an existing ``out``.

    Returns:
        The safetensors file.

    Raises:
        InputError: The content breaks a rule; the class is that of the first one.
        CheckFailedError: What was written does not read back as what was to be written.
        OutputExistsError, LockedError, DiskFullError, MachineError: ``out`` cannot be written.
    """
    is_file = out.suffix == ".safetensors"
    tensors = _in_order(native)
    head, offsets, size = layout(
        [(name, tensor.dtype, tensor.shape) for name, tensor in tensors.items()],
        {METADATA_KEY: native.metadata.encode()},
    )
    config = config_bytes(native)
    copies = {} if is_file else dict(side_files or {})
    if copies.keys() & {WEIGHTS_NAME, CONFIG_NAME}:
        raise UsageError("a side file has the name of one of the adapter's own files", path=out)
    require_space(out, size + len(config) + sum(path.stat().st_size for path in copies.values()))
    with Staging(out, key="", is_file=is_file, force=force) as staging:
        weights = staging.target if is_file else staging.target / WEIGHTS_NAME
        digests = _write_tensors(weights, head, offsets, size, tensors)
        if not is_file:
            _write(staging.target / CONFIG_NAME, config)
            for name, source in copies.items():
                with machine_errors(source):
                    (staging.target / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, staging.target / name)
        _check(staging.target, native, digests, has_config=not is_file)
        staging.publish()
    return out if is_file else out / WEIGHTS_NAME


def config_bytes(native: NativeAdapter) -> bytes:
    """adapter_config.json: indented by two spaces, sorted, ASCII."""
    config = written_config(native.metadata, native.tensors, native.free)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    return f"{text}\n".encode("ascii")


def _in_order(native: NativeAdapter) -> dict[str, Tensor]:
    """The tensors by dtype, and by name within a dtype (section 4.5)."""
    unknown = sorted({tensor.dtype for tensor in native.tensors.values()} - set(DTYPES))
    if unknown:
        raise UsageError(
            f"the format has no tensors of dtype {', '.join(unknown)}", expected=", ".join(DTYPES)
        )
    order = sorted(native.tensors, key=lambda n: (DTYPES.index(native.tensors[n].dtype), n))
    return {name: native.tensors[name] for name in order}


def _write_tensors(
    path: Path, head: bytes, offsets: dict[str, int], size: int, tensors: dict[str, Tensor]
) -> dict[str, str]:
    """Writes the safetensors file and flushes it; the digests of the tensors as they came."""
    digests = {}
    with Writer(path, size) as writer:
        writer.write_at(head, 0)
        for name, tensor in tensors.items():
            hasher = LeafHasher()
            at = offsets[name]
            for part in _parts(tensor):
                writer.write_at(part, at)
                hasher.update(part)
                at += len(part)
            digests[name] = tensor_digest(tensor.dtype, tensor.shape, hasher.leaves())
        writer.sync()
    return digests


def _parts(tensor: Tensor) -> Iterable[memoryview]:
    """A tensor's bytes, in order; each part is valid until the next is asked for."""
    if not isinstance(tensor, StoredTensor):
        array = tensor.array
        yield byte_view(array if array.flags.c_contiguous else array.copy())
        return
    buffer = memoryview(bytearray(min(_CHUNK, tensor.nbytes)))
    with Reader(tensor.path) as reader:
        for start in range(0, tensor.nbytes, _CHUNK):
            part = buffer[: min(_CHUNK, tensor.nbytes - start)]
            reader.read_into(part, tensor.offset + start)
            yield part


def _write(path: Path, content: bytes) -> None:
    with Writer(path, len(content)) as writer:
        writer.write_at(content, 0)
        writer.sync()


def _check(path: Path, native: NativeAdapter, digests: dict[str, str], *, has_config: bool) -> None:
    """Reads what was written and compares it."""
    try:
        opened = open_native(path, values=True)
    except StageFailed as failed:
        raise first_error(failed) from failed
    with Reader(opened.file.path) as reader:
        found = {name: stored_digest(t, reader) for name, t in opened.file.tensors.items()}
    same = found == digests and opened.metadata.encode() == native.metadata.encode()
    if not same or (opened.config is not None) != has_config:
        raise CheckFailedError(
            "what was written does not read back as it was", path=path, hint="Is the disk faulty?"
        )
