"""Links out of a folder are refused; those of the Hub's cache are followed."""

from __future__ import annotations

from pathlib import Path

import pytest

from boneconv.errors import FormatError
from boneconv.io.links import check_inside


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "secret").write_text("of this machine")
    made = tmp_path / "folder"
    (made / "sub").mkdir(parents=True)
    (made / "file").write_text("x")
    return made


def _cache(tmp_path: Path) -> tuple[Path, Path]:
    repository = tmp_path / "models--a--b"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "blobs" / "abc").write_text("x")
    return repository, snapshot


def test_files_and_links_within(folder: Path) -> None:
    (folder / "sub" / "link").symlink_to("../file")
    for name in ("file", "sub/link", "sub/not-there"):
        check_inside(folder, folder / name)


@pytest.mark.parametrize("target", ["../secret", "sub/../../secret", "/etc/hostname"])
def test_a_link_out(folder: Path, target: str) -> None:
    (folder / "link").symlink_to(target)
    with pytest.raises(FormatError, match="leads out") as caught:
        check_inside(folder, folder / "link")
    assert caught.value.path == str(folder / "link")


def test_a_link_by_way_of_another_and_of_a_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "one").symlink_to("two")
    (folder / "two").symlink_to(tmp_path / "secret")
    (folder / "out").symlink_to(tmp_path)
    for name in ("one", "out/secret"):
        with pytest.raises(FormatError, match="leads out"):
            check_inside(folder, folder / name)


def test_a_folder_with_a_name_that_begins_alike_is_another(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "folder-2").mkdir()
    (tmp_path / "folder-2" / "x").write_text("x")
    (folder / "link").symlink_to("../folder-2/x")
    with pytest.raises(FormatError, match="leads out"):
        check_inside(folder, folder / "link")


def test_the_folder_itself_may_be_a_link(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alias").symlink_to(folder)
    check_inside(tmp_path / "alias", tmp_path / "alias" / "file")


def test_links_of_the_hub_s_cache(tmp_path: Path) -> None:
    repository, snapshot = _cache(tmp_path)
    (snapshot / "unet").mkdir()
    for link, up in ((snapshot / "file", "../.."), (snapshot / "unet" / "file", "../../..")):
        link.symlink_to(f"{up}/blobs/abc")
        check_inside(snapshot, link)
        check_inside(link.parent, link)
    (repository / "other").write_text("x")
    (snapshot / "out").symlink_to("../../other")
    with pytest.raises(FormatError, match="leads out"):
        check_inside(snapshot, snapshot / "out")
