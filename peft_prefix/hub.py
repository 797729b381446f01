"""Finding saved prefixes, in a folder or in a repository on the Hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

from huggingface_hub import _CACHED_NO_EXIST, HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from .checkpoint import TENSOR_FILE
from .errors import PrefixConfigError, PrefixFileError, plain, some_of
from .patience import HUB_ERRORS, patiently
from .peft_config import CONFIG_FILE as PEFT_CONFIG_FILE
from .peft_config import TENSOR_FILE as PEFT_TENSOR_FILE
from .plain_file import folder_here

_MAYBE_OF_PEFT = (EntryNotFoundError, RuntimeError)
"""There is no prefix, or no connection: then PEFT's files may be here from before. `HUB_ERRORS` tells of the latter."""


class HubOptions(TypedDict, total=False):
    """How to find a saved prefix.

    Args:
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder inside the repository, or inside the folder.
        token: Access token for the Hub.
        cache_dir: Where downloads are kept.
        local_files_only: Never contact the Hub.
    """

    revision: str | None
    subfolder: str | None
    token: str | bool | None
    cache_dir: str | Path | None
    local_files_only: bool


@dataclass(frozen=True)
class SavedFiles:
    """Where the files of a saved prefix are.

    Args:
        tensors: The safetensors file. It may not exist.
        peft_config: PEFT's description of it, if PEFT saved it.
        is_from_hub: Whether they are of a repository on the Hub.
    """

    tensors: Path
    peft_config: Path | None = None
    is_from_hub: bool = False


def locate_prefix(prefix_name_or_path: str | Path, **options: Unpack[HubOptions]) -> SavedFiles:
    """The files of a prefix, downloaded if they are on the Hub. Nothing else of the repository is.

    Args:
        prefix_name_or_path: A folder; or a repository on the Hub, perhaps with a folder in it (`user/repo/webnlg`).
        **options: See `HubOptions`.

    Raises:
        PrefixConfigError: A subfolder leads out of its folder, or a revision is given for a folder.
        PrefixFileError: It is neither a folder nor to be had from the Hub.
    """
    subfolder = checked_subfolder(options.get("subfolder") or "")
    directory = folder_here(prefix_name_or_path)
    if directory is not None:
        if options.get("revision") is not None:
            raise PrefixConfigError(
                f"{directory} is a folder here, which has no revisions. Leave revision= out, or rename the folder if "
                "you mean a repository on the Hub."
            )
        return _in_folder(directory, subfolder)
    repo_id, inside = split_name(prefix_name_or_path)
    return _on_hub(repo_id, "/".join(filter(None, (inside, subfolder))), options)


def list_prefixes(
    name_or_path: str | Path, *, revision: str | None = None, token: str | bool | None = None
) -> list[str]:
    """The prefixes of a repository on the Hub or of a folder, those in PEFT's format too.

    Args:
        name_or_path: A folder or a repository.
        revision: Branch, tag or commit on the Hub.
        token: Access token for the Hub.

    Returns:
        The folders that they are in, in alphabetical order, for `subfolder=`; an empty text for the outermost one. Of
        PEFT's adapters all are named, also those that are no prefixes: it takes a download to tell.

    Raises:
        PrefixFileError: It is neither a folder nor to be had from the Hub.

    Example:
        >>> for subfolder in list_prefixes("user/repo"):  # doctest: +SKIP
        ...     model.load_prefix("user/repo", subfolder.replace("/", "-") or "main", subfolder=subfolder)
    """
    directory = folder_here(name_or_path)
    if directory is not None:
        return _folders_of_prefixes(_paths_in(directory))
    repo_id, inside = split_name(name_or_path)
    try:
        paths = patiently(lambda: HfApi(token=token).list_repo_files(repo_id, revision=revision))
    except HUB_ERRORS as error:
        raise _not_found(name_or_path, "its files", error) from error
    folders = _folders_of_prefixes(paths)
    return [folder for folder in folders if not inside or f"{folder}/".startswith(f"{inside}/")]


def checked_subfolder(subfolder: str | Path) -> str:
    """A folder inside another one, with `/` between its parts.

    Raises:
        PrefixConfigError: It leads out of there, could name no folder on every system, or is no text.
    """
    if not isinstance(subfolder, (str, Path)):
        raise PrefixConfigError(f"subfolder must be a text such as 'webnlg', not {subfolder!r:.100}.")
    text = subfolder.as_posix() if isinstance(subfolder, Path) else subfolder
    parts = text.strip("/").split("/") if text else []
    if text.startswith("/") or any(not _is_file_name(part) for part in parts):
        raise PrefixConfigError(
            f"subfolder={text[:200]!r} does not stay inside its folder or is no name for one. Give a relative path "
            "such as 'webnlg' or 'tasks/webnlg'."
        )
    return "/".join(parts)


def split_name(name: str | Path) -> tuple[str, str]:
    """A repository's name and the folder inside of it: `user/repo/webnlg` is `user/repo` and `webnlg`.

    Raises:
        PrefixFileError: It looks like a path on this machine.
    """
    if not isinstance(name, (str, Path)):
        raise PrefixConfigError(
            f"A prefix is named by a text such as 'user/repo' or by a folder, not by {name!r:.100}."
        )
    text = name.as_posix() if isinstance(name, Path) else name
    parts = text.split("/")
    if text.endswith(".safetensors"):
        raise PrefixFileError(f"{plain(text)} names a file; give the folder or the repository that it is in.")
    if not all(map(_is_file_name, parts)) or text.startswith("~"):
        raise PrefixFileError(
            f"{plain(text, 200)!r} is no folder here and no name of a repository on the Hub. Give a folder that "
            "save_pretrained wrote, or a name such as user/repo or user/repo/subfolder."
        )
    return "/".join(parts[:2]), "/".join(parts[2:])


def _is_file_name(part: str) -> bool:
    """Whether it names something inside of a folder, on any system, without leading anywhere else."""
    return (
        part not in ("", ".", "..") and part.isprintable() and not re.search(r'[\\:*?"<>|]', part) and len(part) < 256
    )


def _in_folder(directory: Path, subfolder: str) -> SavedFiles:
    folder = directory / subfolder
    tensors, peft_config = folder / TENSOR_FILE, folder / PEFT_CONFIG_FILE
    if not tensors.exists() and peft_config.is_file():
        return SavedFiles(folder / PEFT_TENSOR_FILE, peft_config)
    if not tensors.exists():
        inside = sorted(folder.iterdir()) if folder.is_dir() else []
        others = [one.name for one in inside if (one / TENSOR_FILE).is_file()]
        hint = f" There are some in its subfolders {some_of(others)}: give subfolder=..." if others else ""
        raise PrefixFileError(
            f"There is no prefix at {tensors}. Give a folder that save_pretrained wrote, or a repository id on the "
            f"Hub.{hint}"
        )
    return SavedFiles(tensors)


def _on_hub(repo_id: str, subfolder: str, options: HubOptions) -> SavedFiles:
    def download(file: str) -> Path:
        return Path(
            hf_hub_download(
                repo_id,
                file,
                subfolder=subfolder or None,
                revision=options.get("revision"),
                token=options.get("token"),
                cache_dir=options.get("cache_dir"),
                local_files_only=options.get("local_files_only", False),
            )
        )

    try:
        return SavedFiles(download(TENSOR_FILE), is_from_hub=True)
    except _MAYBE_OF_PEFT as error:
        has_answered = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if not has_answered and not _is_known_to_be_missing(repo_id, subfolder, options):
            raise _not_found(repo_id, TENSOR_FILE, error) from error
        try:
            config = download(PEFT_CONFIG_FILE)
        except HUB_ERRORS:
            name = "/".join(filter(None, (repo_id, subfolder)))
            raise _not_found(name, TENSOR_FILE, error, _others(repo_id, options)) from error
    except HUB_ERRORS as error:
        raise _not_found(repo_id, TENSOR_FILE, error) from error
    try:
        return SavedFiles(download(PEFT_TENSOR_FILE), config, is_from_hub=True)
    except HUB_ERRORS as error:
        raise PrefixFileError(
            f"{repo_id} holds an adapter of PEFT, but the Hub did not give {PEFT_TENSOR_FILE} ({error}). If it was "
            "saved as adapter_model.bin, which is a pickle and is not opened here, load it with PEFT and save it again."
        ) from error


def _is_known_to_be_missing(repo_id: str, subfolder: str, options: HubOptions) -> bool:
    """Whether the Hub, which does not answer now, once said that a repository has no file of this library's own."""
    found = try_to_load_from_cache(
        repo_id,
        "/".join(filter(None, (subfolder, TENSOR_FILE))),
        cache_dir=options.get("cache_dir"),
        revision=options.get("revision"),
    )
    return found is _CACHED_NO_EXIST


def _others(repo_id: str, options: HubOptions) -> list[str]:
    """Where else in a repository there are prefixes, if the Hub says it."""
    if options.get("local_files_only"):
        return []
    try:
        return list_prefixes(repo_id, revision=options.get("revision"), token=options.get("token"))
    except PrefixFileError:
        return []


def _paths_in(directory: Path) -> Iterator[str]:
    """The files in a folder by their paths in it, without hidden folders and without following links."""
    for folder, inside, files in os.walk(directory):
        inside[:] = [name for name in inside if not name.startswith(".")]
        for file in files:
            yield Path(folder, file).relative_to(directory).as_posix()


def _folders_of_prefixes(paths: Iterable[str]) -> list[str]:
    folders = set()
    for path in paths:
        folder, _, file = path.rpartition("/")
        if file in (TENSOR_FILE, PEFT_CONFIG_FILE) and all(map(_is_file_name, path.split("/"))):
            folders.add(folder)
    return sorted(folders)


def _not_found(name: str | Path, what: str, error: Exception, others: Iterable[str] = ()) -> PrefixFileError:
    found = [repr(other) for other in others if other]
    hint = f" It has prefixes in the subfolders {some_of(found)}." if found else ""
    return PrefixFileError(
        f"{name} is no folder here, and the Hub did not give {what} ({error}). Check the spelling, your connection "
        f"and, for a private repository, the token.{hint}"
    )
