"""A diffusers pipeline on disk: components in folders of their own, and what lies beside them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from boneconv.errors import FormatError, MissingPathError, NameMatchError, listing
from boneconv.io.checkpoint import ADAPTER_CONFIG, Checkpoint, open_checkpoint
from boneconv.io.links import check_inside
from boneconv.io.model_index import MODEL_INDEX, read_components
from boneconv.io.weight_files import files_below, holds_weights, in_weight_folder, is_weight_copy

__all__ = ["Pipeline", "open_pipeline"]


@dataclass(frozen=True)
class Pipeline:
    """A folder with a model_index.json.

    Attributes:
        root: The folder.
        components: The names of its components, with weights or without.
    """

    root: Path
    components: tuple[str, ...]

    @property
    def with_weights(self) -> tuple[str, ...]:
        """The components that hold weights."""
        return tuple(name for name in self.components if holds_weights(self.root / name))

    def open(self, name: str) -> Checkpoint:
        """Reads the headers of a component.

        Raises:
            NameMatchError: The pipeline has no such component, or one without weights.
            FormatError, MissingPathError: As `open_checkpoint`; a link out of the pipeline.
        """
        known = listing(list(self.with_weights)) or "no component with weights"
        if name not in self.components:
            raise NameMatchError(
                f"the pipeline has no component {name!r}", path=self.root, expected=known
            )
        if name not in self.with_weights:
            raise NameMatchError(
                f"the component {name!r} holds no weights", path=self.root / name, expected=known
            )
        check_inside(self.root, self.root / name)
        return open_checkpoint(self.root / name)

    def other_files(
        self, opened: Collection[str]
    ) -> tuple[list[PurePosixPath], list[PurePosixPath]]:
        """The files of all but some components.

        A weight file right in the pipeline's folder, or below ``onnx/`` and the like, is another
        copy of the whole: with a component changed, it is stale. The weights in the folders of
        other components are theirs, in whatever form.

        Args:
            opened: The components whose files do not count.

        Returns:
            Files to carry over, and what is left out: other copies of the whole, and linked folders
            that are no component; relative to the pipeline.

        Raises:
            FormatError: A link leads out of the pipeline.
        """
        files: list[PurePosixPath] = []
        left_out: list[PurePosixPath] = []
        for path, is_link in files_below(self.root, without=self.components):
            top = len(path.parts) == 1
            stale = in_weight_folder(path) or (top and is_weight_copy(path))
            stays = is_link or stale or (top and path.name == ADAPTER_CONFIG)
            (left_out if stays else files).append(path)
        for name in self.components:
            if name not in opened and (self.root / name).is_dir():
                for path, is_link in files_below(self.root / name):
                    (left_out if is_link else files).append(PurePosixPath(name) / path)
        for path in files:
            check_inside(self.root, self.root / path)
        return files, left_out


def open_pipeline(path: Path) -> Pipeline:
    """Reads what a folder's model_index.json says.

    Raises:
        MissingPathError: There is nothing at the path.
        FormatError: It is no pipeline, or model_index.json is malformed.
    """
    if not path.exists():
        raise MissingPathError("no such file or folder", path=path)
    components = read_components(path)
    if components is None:
        raise FormatError(
            "not a diffusers pipeline",
            path=path,
            expected=f"a folder with a {MODEL_INDEX}",
            hint="Leave out --component to merge into a checkpoint",
        )
    return Pipeline(path, components)
