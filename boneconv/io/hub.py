"""Inputs by name: a path of this machine, or a repository of the Hugging Face Hub.

`locate` turns what the user wrote into a local path. A Hub id is resolved to a commit once, and
exactly that commit is downloaded into the Hub client's own cache, the needed files only, each held
against the size and the digest that the listing gives.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PureWindowsPath
from typing import Any

from boneconv.errors import (
    BoneconvError,
    DiskFullError,
    FormatError,
    MissingPathError,
    NetworkError,
    listing,
)
from boneconv.io.hub_client import (
    File,
    Repository,
    bad_answer,
    guarded_client,
    patiently,
    translated,
)
from boneconv.io.hub_files import ADAPTER, BASE, Wanted

__all__ = ["ADAPTER", "BASE", "Source", "Wanted", "locate"]

_ID = re.compile(r"(?=.{3,96}\Z)(?!.*(?:--|\.\.|\.git\Z))(?a:\w(?:[\w.-]*\w)?/\w(?:[\w.-]*\w)?)")
_FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".onnx", ".gguf", ".json")
_REVISION = re.compile(
    r"(?!.*(?:\.\.|//|/\.|@\{|/\Z|\.lock(?:/|\Z)))\w[^\s\x00-\x1f\x7f~^:?*\[\\]{0,249}"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OBJECT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MOST_FILES = 100_000


@dataclass(frozen=True)
class Source:
    """Where an input came from and where it lies.

    Attributes:
        given: What the user wrote.
        path: A local folder or file.
        repo: ``owner/name``, when it came from the Hub.
        commit: The commit it came from, 40 hex digits.
    """

    given: str
    path: Path
    repo: str | None = None
    commit: str | None = None


def locate(given: str | os.PathLike[str], wanted: Wanted, *, quiet: bool = False) -> Source:
    """Finds an input: a local path where there is one, else a repository of the Hub.

    Args:
        given: A folder, a file, or a Hub id ``owner/name`` or ``owner/name@revision``, where the
            revision is a branch, a tag or a commit.
        wanted: Which files to fetch from a repository: `BASE` or `ADAPTER`.
        quiet: No progress bars and no notes about retries. There are no bars either where stderr
            is no terminal.

    Returns:
        The path as given, or the folder of the Hub client's cache that holds the wanted files of
        one commit. With ``HF_HUB_OFFLINE`` set, what an earlier download left there.

    Raises:
        MissingPathError: No such path, repository or revision, or no wanted weights in it.
        InputError: The repository is gated or closed, or the token is refused.
        FormatError: The Hub's answer cannot be used: a hostile file name, another commit.
        NetworkError: The Hub cannot be reached, refuses for now, or files arrive damaged.
        DiskFullError: The cache has no room for the files.
        MachineError: The cache cannot be written.
    """
    text = os.fsdecode(given)
    path = Path(text)
    if text and _exists(path):
        return Source(text, path)
    asked = _parse_id(text)
    if asked is None:
        raise MissingPathError(
            "no such file or folder" if text else "the path is empty",
            path=listing([text]) or None,
            hint="Give a folder, a file, or a Hub id: owner/name or owner/name@revision",
        )
    repository = Repository(*asked, cache=_cache_folder(asked[0]))
    try:
        commit, folder = _fetch(repository, wanted, quiet=quiet)
    except (BoneconvError, MemoryError):
        raise
    except Exception as error:
        raise translated(error, repository) from error
    return Source(text, folder, repository.id, commit)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        raise MissingPathError(
            f"cannot be opened: {error.strerror}", path=listing([str(path)])
        ) from error


def _parse_id(text: str) -> tuple[str, str] | None:
    repo, at, revision = text.partition("@")
    if not _ID.fullmatch(repo):
        return None
    if not at:
        return None if repo.endswith(_FILE_SUFFIXES) else (repo, "main")
    return (repo, revision) if _REVISION.fullmatch(revision) else None


def _cache_folder(repo: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _fetch(repository: Repository, wanted: Wanted, *, quiet: bool) -> tuple[str, Path]:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _offline(repository, wanted)
    with guarded_client(repository, quiet=quiet) as guard:
        guard.commit = commit = patiently(lambda: _resolve(repository), quiet=quiet)
        cached = _cached_listing(repository, commit)
        if cached is None or _missing(repository, commit, _choose(repository, cached, wanted)):
            listed = _choose(repository, _list_files(repository, commit), wanted)
            _complete(repository, commit, listed, quiet=quiet)
    _remember(repository, commit)
    return commit, repository.folder(commit)


def _offline(repository: Repository, wanted: Wanted) -> tuple[str, Path]:
    hint = "Unset HF_HUB_OFFLINE to download it, or give a local folder"
    commit = _remembered(repository)
    if commit is None or not repository.folder(commit).is_dir():
        raise MissingPathError(
            f"{repository} is not in the cache, and offline mode is on (HF_HUB_OFFLINE)", hint=hint
        )
    folder = repository.folder(commit)
    files = _cached_listing(repository, commit)
    if files is None:  # downloaded by an older client, which kept no listing
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = [File(p.relative_to(folder).as_posix(), p.stat().st_size, None) for p in paths]
    if missing := _missing(repository, commit, _choose(repository, files, wanted)):
        raise MissingPathError(
            f"the cache holds {repository} in part only, and offline mode is on (HF_HUB_OFFLINE)",
            path=folder,
            expected=listing(missing),
            hint=hint,
        )
    return commit, folder


def _resolve(repository: Repository) -> str:
    from huggingface_hub import HfApi, constants

    if _COMMIT.fullmatch(repository.revision):
        return repository.revision
    limit = constants.HF_HUB_ETAG_TIMEOUT
    info = HfApi().model_info(repository.id, revision=repository.revision, timeout=limit)
    if not isinstance(info.sha, str) or not _COMMIT.fullmatch(info.sha):
        raise bad_answer(repository, "a commit of 40 hex digits", info.sha)
    return info.sha


def _list_files(repository: Repository, commit: str) -> list[File]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    entries = HfApi().list_repo_tree(repository.id, recursive=True, revision=commit)
    files = []
    for entry in islice(entries, _MOST_FILES):
        if isinstance(entry, RepoFile):
            digest = entry.lfs.sha256 if entry.lfs is not None else entry.blob_id
            files.append(_checked(repository, entry.path, entry.size, digest))
    if next(iter(entries), None) is not None:
        raise bad_answer(repository, f"at most {_MOST_FILES} files", "more")
    return files


def _cached_listing(repository: Repository, commit: str) -> list[File] | None:
    """The listing that an earlier download left in the cache; it has no digests of LFS files."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        entries = get_cached_repo_tree(repository.id, revision=commit)
    except CachedRepoTreeNotFoundError:
        return None
    return [_checked(repository, entry.path, entry.size, None) for entry in entries]


def _checked(repository: Repository, name: object, size: object, digest: object) -> File:
    if not isinstance(name, str) or not _is_safe(name):
        raise bad_answer(repository, "file names that stay in their folder", name)
    if type(size) is not int or size < 0:
        raise bad_answer(repository, f"a size for {name}", size)
    known = isinstance(digest, str) and _OBJECT.fullmatch(digest)
    return File(name, size, str(digest) if known else None)


def _is_safe(name: str) -> bool:
    if not name.isprintable() or "\\" in name or len(name) > 1000:
        return False
    parts = name.split("/")
    return not any(part in ("", ".", "..") or PureWindowsPath(part).drive for part in parts)


def _choose(repository: Repository, files: list[File], wanted: Wanted) -> list[File]:
    names = set(wanted.select(file.name for file in files))
    if not names:
        raise MissingPathError(
            f"{repository} holds no weights of a {wanted.what}",
            expected=" or ".join(kind[0] for kind in wanted.weights),
            found=listing([file.name for file in files]) or "no files",
        )
    return [file for file in files if file.name in names]


def _missing(repository: Repository, commit: str, files: list[File]) -> list[str]:
    """The files that the cache lacks; one of another size than listed is an error."""
    folder = repository.folder(commit)
    for path, file in ((folder / file.name, file) for file in files):
        if path.exists() and path.stat().st_size != file.size:
            raise FormatError(
                "the file in the cache is damaged",
                path=path,
                expected=f"{file.size} bytes",
                found=f"{path.stat().st_size} bytes",
                hint=f"Delete it and {path.resolve()}, and run the command again",
            )
    return [file.name for file in files if not (folder / file.name).exists()]


def _complete(repository: Repository, commit: str, files: list[File], *, quiet: bool) -> None:
    """Downloads what the cache lacks, and compares it with the listing."""
    fresh = [file for file in files if not repository.has(commit, file)]
    _check_room(repository, fresh)
    patiently(lambda: _download(repository, commit, files, quiet=quiet), quiet=quiet)
    for file in fresh:
        _check_content(repository, repository.folder(commit) / file.name, file)
    if missing := _missing(repository, commit, files):
        raise NetworkError(
            f"the download of {repository} is not complete",
            expected=listing(missing),
            hint="Run the command again; what has arrived is kept",
        )


def _check_room(repository: Repository, files: list[File]) -> None:
    cache = repository.cache.absolute()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    needed, free = sum(file.size for file in files), shutil.disk_usage(place).free
    if needed > free:
        raise DiskFullError(
            f"no room to download {repository}",
            path=place,
            expected=f"{needed:,} bytes free",
            found=f"{free:,}",
            hint="Free some space, or set HF_HUB_CACHE to a folder on another disk",
        )


def _download(repository: Repository, commit: str, files: list[File], *, quiet: bool) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            if quiet or not sys.stderr.isatty():
                options["disable"] = True
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

    snapshot_download(
        repository.id,
        revision=commit,
        allow_patterns=[glob.escape(file.name) for file in files],
        tqdm_class=Bar,
    )


def _check_content(repository: Repository, path: Path, file: File) -> None:
    if not path.exists():
        return
    size, digest = path.stat().st_size, _digest(path, file)
    if size == file.size and digest == file.digest:
        return
    blob = path.resolve()
    path.unlink()
    if blob.parent == (repository.cache / "blobs").resolve():
        blob.unlink(missing_ok=True)
    raise NetworkError(
        f"{file.name} of {repository} arrived damaged",
        expected=f"{file.size} bytes with the digest {file.digest}",
        found=f"{size} bytes, {digest}",
        hint="It was removed from the cache; run the command again",
    )


def _digest(path: Path, file: File) -> str | None:
    """The content's SHA-256 or its Git object id, whichever the listing has."""
    if file.digest is None:
        return None
    import hashlib  # which loads OpenSSL: four megabytes that a merge of local files has no use for

    with path.open("rb") as content:
        if len(file.digest) == 64:
            return hashlib.file_digest(content, "sha256").hexdigest()
        git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while block := content.read(1 << 20):
            git.update(block)
    return git.hexdigest()


def _remember(repository: Repository, commit: str) -> None:
    """Notes a branch's commit where the Hub's cache layout has it, for offline runs."""
    note = repository.cache / "refs" / repository.revision
    if repository.revision == commit:
        return
    with suppress(OSError):  # a cache that is mounted read-only serves all the same
        note.parent.mkdir(parents=True, exist_ok=True)
        temporary = note.with_name(f"{note.name}.{os.getpid()}.tmp")
        temporary.write_text(commit, encoding="ascii")
        temporary.replace(note)


def _remembered(repository: Repository) -> str | None:
    if _COMMIT.fullmatch(repository.revision):
        return repository.revision
    try:
        commit = (repository.cache / "refs" / repository.revision).read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    return commit if _COMMIT.fullmatch(commit) else None
