"""Two-sided accounts: every adapter tensor is used once, every base tensor has one fate.

Nothing here reads tensor values, except to learn whether a saved embedding and a saved head that
the base ties are still equal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from boneconv.digest import same_values
from boneconv.dtypes import FLOATS
from boneconv.engine.plan import Update
from boneconv.errors import FormatError, NameMatchError, ShapeError, listing
from boneconv.formats.native import check_homes
from boneconv.io.checkpoint import Checkpoint
from boneconv.io.safetensors import StoredTensor, Tensor
from boneconv.names import Resolution, disk_name, resolve, tied_names, trained_on
from boneconv.planning.config_edits import ConfigEdits
from boneconv.planning.fit import check_block_fits, check_resized, is_resize
from boneconv.planning.lost import lost_error
from boneconv.planning.quantised import Dequantised
from boneconv.planning.strength import Strength

__all__ = ["Accounts", "Addition", "Strength", "settle"]

_AS_STORED = Dequantised()


@dataclass(frozen=True)
class Addition:
    """A tensor that the base does not have on disk.

    Attributes:
        source: Its values: the adapter's, or those of the base's tensor that it was tied to.
        beside: A tensor of the base whose shard and dtype it takes; None for the last shard.
        updates: The updates to apply.
        keeps_dtype: Whether it has its own dtype, rather than that of the base's tensors.
    """

    source: Tensor
    beside: str | None
    updates: tuple[Update, ...] = ()
    keeps_dtype: bool = False


@dataclass
class Accounts:
    """What happens to each tensor; base tensors that are not named are copied.

    Attributes:
        updates: The updates of merged tensors, in the order of the adapters.
        replaced: New values of replaced tensors; a tensor that is merged too starts from them.
        rebased: The tensors that are replaced first and merged into then.
        added: Tensors that the base does not have.
        untied: Whether the output head no longer shares the embedding.
        resized: Old and new number of rows of resized embeddings.
        matched_by: How names were matched.
        homes: For each adapter, the base's tensors that it names, by its names.
        notes: What the user should know.
    """

    updates: dict[str, list[Update]] = field(default_factory=dict)
    replaced: dict[str, Tensor] = field(default_factory=dict)
    rebased: set[str] = field(default_factory=set)
    added: dict[str, Addition] = field(default_factory=dict)
    untied: bool = False
    resized: set[tuple[int, int]] = field(default_factory=set)
    matched_by: set[str] = field(default_factory=set)
    homes: list[Mapping[str, StoredTensor]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def settle(
    base: Checkpoint,
    config: ConfigEdits | None,
    adapters: Sequence[Strength],
    dequantised: Dequantised = _AS_STORED,
    dtype: str | None = None,
) -> Accounts:
    """Finds a home in the base for every tensor of every adapter.

    Args:
        base: The base.
        config: Its configuration.
        adapters: The adapters, in order.
        dequantised: How its FP8 weights are dequantised.
        dtype: The safetensors dtype that they are dequantised to.

    Raises:
        NameMatchError: Adapter tensors without a home in the base, or two for one.
        ShapeError: A tensor that does not fit its home.
        MissingExtraError: Names differ and transformers is not installed.
    """
    accounts = Accounts()
    for strength in adapters:
        _Settlement(base, config, strength, accounts, dequantised, dtype).run()
    both = set(accounts.updates) & set(accounts.replaced) - accounts.rebased
    if both:
        raise NameMatchError(f"both merged into and replaced: {listing(sorted(both))}")
    check_resized(base, accounts.resized, accounts.replaced)
    return accounts


class _Settlement:
    """One adapter's tensors finding their homes."""

    def __init__(
        self,
        base: Checkpoint,
        config: ConfigEdits | None,
        strength: Strength,
        accounts: Accounts,
        dequantised: Dequantised,
        dtype: str | None,
    ) -> None:
        self.base, self.config, self.accounts = base, config, accounts
        self.dequantised, self.dtype = dequantised.weights, dtype
        #: The config.json that transformers can tell names by.
        self.naming = None if config is not None and config.is_diffusers else base.config
        self.adapter = strength.adapter
        self.scale, self.residue = strength.factor()
        self.blocks = {f"{b.module}.weight": b for b in self.adapter.blocks.values()}
        self.saved = self.adapter.saved
        self.classes = trained_on(self.adapter.config.task_type, self.adapter.config.auto_mapping)
        self.ties: Mapping[str, str] = {}

    def run(self) -> None:
        """Settles all of the adapter's tensors."""
        replaced = sorted(self.saved.keys() - self.blocks.keys())
        if self.scale != 1.0 and replaced:
            self.accounts.notes.append(
                f"the scale {self.scale:g} does not apply to replaced tensors: {listing(replaced)}"
            )
        homes = self._resolve()
        self.accounts.matched_by.add(homes.via)
        if self.naming and (homes.missing or self._may_touch_ties(homes)):
            self.ties = tied_names(self.naming, architectures=self.classes)
        stored = self._stored(homes)
        self.accounts.homes.append(stored)
        if self.adapter.is_native:
            check_homes(self.adapter, {n: self._as_merged(each) for n, each in stored.items()})
        lost = [name for name in homes.missing if not self._add(name)]
        if lost:
            raise lost_error(self.adapter, lost, self.base)
        for name, home in homes.found.items():
            self._use(name, home)
        self._untie_stored(homes)
        self._keep_heads(homes)

    def _resolve(self) -> Resolution:
        return resolve(
            self.blocks.keys() | self.saved.keys(),
            self.base.tensors.keys(),
            self.naming,
            architectures=self.classes,
        )

    def _as_merged(self, stored: StoredTensor) -> StoredTensor:
        """A tensor of the base with the dtype that it is dequantised to, if it is."""
        if stored.name not in self.dequantised or self.dtype is None:
            return stored
        return replace(stored, dtype=self.dtype)

    def _fit(self, name: str, weight: Tensor) -> None:
        """Checks a block against its weight; raises as `check_block_fits`."""
        known = weight.name in self.dequantised and weight is self.base.tensors[weight.name]
        check_block_fits(self.blocks[name], weight, dequantised=known)

    def _stored(self, homes: Resolution) -> dict[str, StoredTensor]:
        """The base's tensors that the adapter names; a tied one's is the other's."""
        found = {name: self.base.tensors[home] for name, home in homes.found.items()}
        tied = {name: self._tied_to(name) for name in homes.missing}
        return found | {name: stored for name, stored in tied.items() if stored is not None}

    def _may_touch_ties(self, homes: Resolution) -> bool:
        """Whether a tensor of the vocabulary's height is changed in a model that may tie it."""
        if self.config is None or self.config.says_untied:
            return False
        sizes = self.config.vocabulary_sizes()
        stored = (
            self.base.tensors[home]
            for name, home in homes.found.items()
            if name in self.saved or name in self.blocks
        )
        return any(len(tensor.shape) == 2 and tensor.shape[0] in sizes for tensor in stored)

    def _use(self, name: str, home: str) -> None:
        """Merges into, or replaces, a tensor that the base has."""
        if name in self.blocks:
            self._merge(name, home)
        else:
            self._replace(name, home)

    def _merge(self, name: str, home: str) -> None:
        """Merges a block into a tensor of the base, or into the one that came with the block.

        PEFT saves the weight below a block where that is an output head (``base_layer``), and puts
        it in place of the base's. Mostly it is the base's.
        """
        stored, known = self.base.tensors[home], self.accounts.replaced.get(home)
        under = self.saved.get(name)
        if under is not None and not same_values(under, known or stored):
            if home in self.accounts.updates:
                raise NameMatchError(
                    f"the adapters were trained on different {home!r}", path=self.adapter.weights
                )
            self._replace(name, home)
            self.accounts.rebased.add(home)
        elif known is not None and self.adapter.is_native:
            if known.shape != stored.shape:
                raise ShapeError(
                    f"an earlier adapter changed the shape of {home!r}, which this one adapts",
                    path=self.adapter.weights,
                )
            self.accounts.rebased.add(home)
        self._fit(name, self.accounts.replaced.get(home, stored))
        update = Update(self.blocks[name], self.scale, self.residue)
        self.accounts.updates.setdefault(home, []).append(update)

    def _replace(self, name: str, home: str) -> None:
        saved, stored = self.saved[name], self.base.tensors[home]
        if self.adapter.is_native:  # a later tensor wins (specification, section "Stacking")
            self.accounts.updates.pop(home, None)
        elif home in self.accounts.replaced:
            raise NameMatchError(f"two adapters replace {home!r}", path=self.adapter.weights)
        elif stored.dtype not in FLOATS and home not in self.dequantised:
            raise FormatError(
                f"the adapter replaces {home!r}, whose dtype is {stored.dtype}",
                path=self.adapter.weights,
                expected=", ".join(FLOATS),
                hint="The adapter was made for another base",
            )
        if saved.shape != stored.shape:
            if not self._resizes(saved, stored):
                raise ShapeError(
                    f"the saved {name!r} does not fit the base",
                    path=self.adapter.weights,
                    expected=list(stored.shape),
                    found=list(saved.shape),
                    hint="The adapter was made for another base",
                )
            self.accounts.resized.add((stored.shape[0], saved.shape[0]))
        self.accounts.replaced[home] = saved

    def _resizes(self, saved: Tensor, stored: StoredTensor) -> bool:
        """Whether a saved tensor is the stored one with another number of vocabulary rows."""
        if self.adapter.is_native:
            return saved.shape[0] == self.adapter.vocab_size
        return is_resize(saved, stored, self.config.vocabulary_sizes() if self.config else set())

    def _add(self, name: str) -> bool:
        """Adds a tensor that the base has not on disk; false if it has no place in the model."""
        stored = self._tied_to(name)
        if stored is not None:
            self._check_tied_shape(name, stored)
            if name in self.blocks:
                source = self.saved.get(name, stored)
                self._fit(name, source)
                update = Update(self.blocks[name], self.scale, self.residue)
                self._untie(name, Addition(source, stored.name, (update,)))
            elif not self._equals_saved_source(name):
                self._untie(name, Addition(self.saved[name], stored.name))
            return True
        if name in self.saved and self._is_module_to_save(name):
            addition = Addition(self.saved[name], None, keeps_dtype=self.adapter.is_native)
            self._put(name, addition)
            return True
        return False

    def _check_tied_shape(self, name: str, stored: StoredTensor) -> None:
        """A head must be as tall as the embedding that it was tied to is, or will be."""
        if name not in self.saved:
            return
        expected = self.saved.get(self.ties[name], stored).shape
        if self.saved[name].shape != expected:
            raise ShapeError(
                f"the saved {name!r} does not fit {self.ties[name]!r}, which the base ties it to",
                path=self.adapter.weights,
                expected=list(expected),
                found=list(self.saved[name].shape),
            )

    def _untie(self, name: str, addition: Addition) -> None:
        """Gives a tied parameter values of its own, and says so in the configuration.

        The parameters of an encoder and a decoder stay tied to the rest: transformers ties those
        that are absent and keeps those that differ, and T5 reads the setting as something else.
        """
        self._put(name, addition)
        self._say_untied(name)

    def _untie_stored(self, homes: Resolution) -> None:
        """Says that heads are on their own that the base stores, and ties to what they equal."""
        for name in self.ties:
            if name not in homes.found or not (name in self.blocks or name in self.saved):
                continue
            kept = name not in self.blocks and (
                self._equals_saved_source(name)
                or same_values(self.saved[name], self.base.tensors[homes.found[name]])
            )
            if not kept:
                self._say_untied(name)

    def _say_untied(self, name: str) -> None:
        self.accounts.notes.append(f"{name} was tied to {self.ties[name]}; now it is on its own")
        if self.config is None or self.config.values.get("is_encoder_decoder"):
            return
        self.accounts.untied = True
        for other in self.ties:
            stored = self._tied_to(other)
            if stored and other != name and other not in self.blocks and other not in self.saved:
                self._put(other, Addition(stored, stored.name), if_absent=True)

    def _tied_to(self, name: str) -> StoredTensor | None:
        """The base's tensor whose values a tied parameter shares."""
        if name not in self.ties:
            return None
        home = disk_name(
            self.ties[name], self.base.tensors.keys(), self.naming, architectures=self.classes
        )
        return self.base.tensors.get(home)

    def _put(self, name: str, addition: Addition, *, if_absent: bool = False) -> None:
        """Writes a tensor under the name that the base's style gives it."""
        known = [*self.base.tensors, *self.accounts.added]
        home = name
        if self.naming is not None or not self.adapter.is_native:
            home = disk_name(name, known, self.naming, architectures=self.classes)
        if home in self.accounts.added or home in self.base.tensors:
            if not if_absent:
                raise NameMatchError(f"two tensors for {home!r}", path=self.adapter.weights)
            return
        self.accounts.added[home] = addition

    def _equals_saved_source(self, name: str) -> bool:
        """Whether a head was saved together with its embedding and equals it: they stay tied."""
        source = self.saved.get(self.ties[name])
        return source is not None and same_values(source, self.saved[name])

    def _keep_heads(self, homes: Resolution) -> None:
        """Where an embedding alone was saved, its tied head goes on with the base's values."""
        for head, source in self.ties.items():
            if source not in self.saved or head in self.saved or source not in homes.found:
                continue
            if self._was_saved_in_place(source):
                continue
            stored = self.base.tensors[homes.found[source]]
            if stored.shape != self.saved[source].shape:
                raise ShapeError(
                    f"the adapter resizes {source!r} without saving {head!r}, which the base ties "
                    "to it",
                    path=self.adapter.weights,
                    hint="Its new rows are lost; save both when training",
                )
            if head in self.base.tensors:
                self.accounts.untied = True
            else:
                self._untie(head, Addition(stored, stored.name))

    def _was_saved_in_place(self, source: str) -> bool:
        """Whether what is tied to a saved embedding goes on sharing its values.

        A module of ``modules_to_save`` is a copy that PEFT puts beside the embedding. Where it
        saves embeddings as they are (``save_embedding_layers``), it saves input and output.
        """
        others = [tied for tied, other in self.ties.items() if other == source]
        return not self._is_module_to_save(source) and any(tied in self.saved for tied in others)

    def _is_module_to_save(self, name: str) -> bool:
        parents = name.split(".")[:-1]
        return any(_contains(parents, module.split(".")) for module in self.adapter.may_add)


def _contains(parents: Sequence[str], module: Sequence[str]) -> bool:
    """Whether a module's name, one segment or more, stands somewhere in a tensor's path."""
    width = len(module)
    return any(list(parents[i : i + width]) == list(module) for i in range(len(parents)))
