"""`AdapterSession`: one ONNX Runtime session that serves a base and many adapters.

ONNX Runtime's own way to serve an adapter has traps that give a wrong answer without an error:

- RunOptions do not keep a LoraAdapter alive: once it is collected, the base answers.
- Of two active adapters the first wins.
- IO binding ignores active adapters.
- A LoraAdapter is its file, mapped into memory: whoever overwrites the file changes the answers.
- An adapter's tensor that is named as one of the model's inputs replaces what the caller fed.
- An adapter of another graph whose names and shapes fit is accepted.

Here an adapter is read into memory once, held against the graph, and fed as plain inputs for
exactly the run that names it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from boneconv.errors import (
    FormatError,
    InputError,
    MissingPathError,
    NameMatchError,
    ShapeError,
    UsageError,
    listing,
    printable,
)
from boneconv.onnx.runtime.names import VERSION_KEY, is_block, module_of

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, IOBinding, SessionOptions

__all__ = ["AdapterSession"]

PathLike = str | os.PathLike[str]
_BF16 = "tensor(bfloat16)"
_NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    _BF16: np.uint16,
}


@dataclass(frozen=True)
class _Loaded:
    """An adapter in memory: its blocks by input name, and the object that owns their memory."""

    blocks: Mapping[str, Any]
    owner: object


class AdapterSession:
    """One model in memory, any number of adapters; every run names the one that it wants.

    Safe to use from several threads: a run keeps the adapter that it started with, whatever is
    loaded or unloaded meanwhile.

    Attributes:
        session: ONNX Runtime's session, for all that does not concern adapters.
    """

    def __init__(
        self,
        model_path: PathLike,
        providers: Sequence[Any] | None = None,
        session_options: SessionOptions | None = None,
    ) -> None:
        """Loads a graph that ``boneconv export-onnx --runtime-adapters`` wrote.

        Args:
            model_path: The graph, or its folder.
            providers: ONNX Runtime's execution providers; by default the CPU's.
            session_options: ONNX Runtime's options. Without them its warning about every
                initializer that can be overridden, which is every block, is not printed.

        Raises:
            MissingPathError: There is no such file.
            FormatError: ONNX Runtime cannot load it, or it has no inputs for adapters.
        """
        path = Path(model_path)
        path = path / "model.onnx" if path.is_dir() else path
        self._path = path
        self.session = _open(path, providers, session_options)
        metadata = self.session.get_modelmeta().custom_metadata_map
        given = {i.name: i for i in self.session.get_overridable_initializers()}
        self._inputs = {name: i for name, i in given.items() if is_block(name)}
        if not self._inputs or not metadata.get(VERSION_KEY, "").isdigit():
            raise FormatError(
                "the graph has no inputs for adapters",
                path=path,
                hint="Make it with: boneconv export-onnx --runtime-adapters",
            )
        self._version = int(metadata[VERSION_KEY])
        self._zeros = {name: _zeros(each) for name, each in self._inputs.items()}
        self._loaded: dict[str, _Loaded] = {}
        self._lock = threading.Lock()

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of the loaded adapters, in the order they were loaded."""
        with self._lock:
            return tuple(self._loaded)

    def load(self, name: str, path: PathLike, *, replace: bool = False) -> None:
        """Reads an adapter file into memory; the file is not needed after that.

        Args:
            name: What runs will call it.
            path: An ``.onnx_adapter`` file.
            replace: Whether another adapter of that name may be there; runs that have started
                with it end with it.

        Raises:
            UsageError: The name is taken.
            MissingPathError: There is no such file.
            FormatError: It is no adapter file, is empty, was made for another graph, or holds
                blocks of another dtype.
            NameMatchError: It holds tensors that are no blocks of the graph.
            ShapeError: A block does not fit its input.
        """
        loaded = self._read(Path(path))
        with self._lock:
            if name in self._loaded and not replace:
                raise UsageError(
                    f"there is an adapter {name!r} already",
                    hint="Unload it first, or give replace=True",
                )
            self._loaded[name] = loaded

    def unload(self, name: str) -> None:
        """Forgets an adapter; runs that have started with it end with it.

        Raises:
            UsageError: There is none of that name.
        """
        self._find(name)
        with self._lock:
            self._loaded.pop(name, None)

    def run(
        self,
        output_names: Sequence[str] | None,
        feeds: Mapping[str, Any],
        adapter: str | None = None,
        *,
        config: Mapping[str, str] | None = None,
    ) -> list[Any]:
        """Runs the model with one adapter, or as the base.

        Args:
            output_names: The outputs wanted; None for all.
            feeds: The model's inputs by name: arrays, or ONNX Runtime's OrtValues.
            adapter: The adapter's name; None for the base.
            config: Entries for ONNX Runtime's RunOptions.

        Returns:
            The outputs, as ``InferenceSession.run`` gives them.

        Raises:
            UsageError: There is no such adapter, or the feeds hold blocks themselves.
            Exception: ONNX Runtime's own errors, as they are.
        """
        loaded = self._find(adapter)
        self._refuse_blocks(feeds)
        found = self.session.run(
            output_names, {**feeds, **loaded.blocks}, run_options=_options(config)
        )
        return list(found)

    def io_binding(self) -> IOBinding:
        """A new binding for `run_with_iobinding`; to be used by one thread at a time."""
        return self.session.io_binding()

    def run_with_iobinding(
        self,
        binding: IOBinding,
        adapter: str | None = None,
        *,
        config: Mapping[str, str] | None = None,
    ) -> None:
        """Runs the model on bound inputs and outputs with one adapter, or as the base.

        All block inputs are bound anew, so that nothing is left of an earlier run's adapter.

        Args:
            binding: From `io_binding`, its inputs and outputs bound.
            adapter: The adapter's name; None for the base.
            config: Entries for ONNX Runtime's RunOptions.

        Raises:
            UsageError: There is no such adapter.
            Exception: ONNX Runtime's own errors, as they are.
        """
        loaded = self._find(adapter)
        for name, value in {**self._zeros, **loaded.blocks}.items():
            binding.bind_ortvalue_input(name, value)
        self.session.run_with_iobinding(binding, _options(config))

    def _find(self, name: str | None) -> _Loaded:
        if name is None:
            return _Loaded({}, None)
        with self._lock:
            loaded = self._loaded.get(name)
            known = list(self._loaded)
        if loaded is None:
            raise UsageError(
                f"no adapter {name!r} is loaded", found=listing(known) or "none at all"
            )
        return loaded

    def _refuse_blocks(self, feeds: Mapping[str, Any]) -> None:
        blocks = [name for name in feeds if name in self._inputs]
        if blocks:
            raise UsageError(
                f"the feeds hold adapter blocks: {listing(blocks)}",
                hint="Name the adapter; its blocks are fed for you",
            )

    def _read(self, path: Path) -> _Loaded:
        import onnxruntime

        if not path.is_file():
            raise MissingPathError("no such file", path=path)
        try:
            file = onnxruntime.AdapterFormat.read_adapter(str(path))
            version = file.get_model_version()
            blocks = file.get_parameters()
        except Exception as error:
            raise FormatError(
                "not an adapter file of ONNX Runtime's, or a damaged one",
                path=path,
                found=printable(str(error).split("\n")[0][-300:]),
                hint="Copy it again",
            ) from error
        self._check(path, version, blocks)
        return _Loaded(blocks, file)

    def _check(self, path: Path, version: int, blocks: Mapping[str, Any]) -> None:
        if not blocks:
            raise FormatError("the adapter holds no blocks", path=path)
        lost = [name for name in blocks if name not in self._inputs]
        if lost:
            raise NameMatchError(
                f"{len(lost)} of {len(blocks)} tensors are no blocks of {self._path}: "
                f"{listing(lost)}",
                path=path,
                hint="The adapter was exported for another graph",
            )
        for name, value in blocks.items():
            self._check_block(path, name, value)
        if version != self._version:
            raise FormatError(
                "the adapter was exported for another graph of this architecture",
                path=path,
                expected=f"model version {self._version}",
                found=version,
                hint="Export the adapter again for this graph",
            )

    def _check_block(self, path: Path, name: str, value: Any) -> None:
        given, shape = self._inputs[name], tuple(value.shape())
        if value.data_type() != given.type:
            raise FormatError(
                f"the block of {module_of(name)!r} has another dtype than the graph",
                path=path,
                expected=given.type,
                found=value.data_type(),
            )
        fits = len(shape) == len(given.shape) and all(
            size == wanted or (size > 0 and not isinstance(wanted, int))
            for size, wanted in zip(shape, given.shape, strict=True)
        )
        if not fits:
            raise ShapeError(
                f"the block of {module_of(name)!r} does not fit the graph",
                path=path,
                expected=[size if isinstance(size, int) else "r" for size in given.shape],
                found=list(shape),
            )


def _open(
    path: Path, providers: Sequence[Any] | None, options: SessionOptions | None
) -> InferenceSession:
    import onnxruntime

    if not path.is_file():
        raise MissingPathError("no such file", path=path)
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
    wanted = ["CPUExecutionProvider"] if providers is None else list(providers)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:
        raise FormatError(
            "ONNX Runtime cannot load the graph",
            path=path,
            found=printable(str(error).split("\n")[0][:400]),
        ) from error


def _options(config: Mapping[str, str] | None) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    for key, value in (config or {}).items():
        options.add_run_config_entry(key, value)
    return options


def _zeros(given: Any) -> Any:
    """A block that changes nothing."""
    import onnxruntime

    if given.type not in _NUMPY:
        raise InputError(f"the input {given.name!r} has an unknown dtype", found=given.type)
    shape = [size if isinstance(size, int) else 1 for size in given.shape]
    values = np.zeros(shape, _NUMPY[given.type])
    if given.type == _BF16:
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(values, 16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(values)
