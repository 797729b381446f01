"""Finding a saved prefix, on disk or on the Hub, and uploading one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers.utils import PushToHubMixin

from .checkpoint import TENSOR_FILE
from .errors import PrefixFileError


class Upload(PushToHubMixin):
    """What `push_to_hub` of transformers uploads: whatever one function writes to a folder.

    Args:
        write: Writes the files.
    """

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write

    def save_pretrained(self, folder: str, **_: Any) -> None:
        """Write the files; how large weights are split means nothing to them."""
        self._write(folder)


def locate_prefix(
    prefix_name_or_path: str | Path,
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The local path of a prefix's tensor file, downloaded if it is on the Hub.

    Args:
        prefix_name_or_path: A folder, or a repository id on the Hub.
        revision: Branch, tag or commit on the Hub.
        subfolder: Folder inside `prefix_name_or_path`.
        token: Access token for the Hub.
        cache_dir: Where downloads are kept.
        local_files_only: Never contact the Hub.

    Returns:
        Path of `prefix.safetensors`. On disk it may not exist.

    Raises:
        PrefixFileError: It is neither a folder nor to be had from the Hub.
    """
    directory = Path(prefix_name_or_path)
    if directory.is_dir():
        return directory / (subfolder or "") / TENSOR_FILE
    try:
        return Path(
            hf_hub_download(
                str(prefix_name_or_path),
                TENSOR_FILE,
                subfolder=subfolder,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise PrefixFileError(
            f"{prefix_name_or_path} is no folder here, and the Hub did not give {TENSOR_FILE} ({error}). Check the "
            "spelling, your connection and, for a private repository, the token."
        ) from error
