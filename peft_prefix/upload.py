"""Uploading a prefix to the Hub: its files and the repository's card, in one commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError

from .card_facts import CARD, card_on_hub
from .errors import PrefixError, PrefixFileError
from .patience import HUB_ERRORS, patiently

_FAILURES: tuple[type[Exception], ...] = (*HUB_ERRORS, ValueError)  # ValueError: what the Hub says of a card


def upload(
    repo_id: str,
    files: Mapping[str, Path],
    card: Callable[[str, str | None], str],
    *,
    commit_message: str,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Put files and a card into a repository, which is made if it is missing.

    The card that is there is read, changed and written in one go: if somebody else commits meanwhile, it is read again.
    A Hub that is busy is asked again, a few times, as late as it says.

    Args:
        repo_id: Name of the repository, with or without its owner.
        files: Files here by their paths there.
        card: Makes the new card of the repository's full name and the card that is there, if there is one.
        commit_message: First line of the commit.
        commit_description: The rest of it.
        private: Whether a new repository is private; as the owner's account says, if left out.
        token: Access token for the Hub.
        revision: Branch, made if it is missing.
        create_pr: Whether to open a pull request instead.

    Returns:
        The commit, which is the text of its address too.

    Raises:
        PrefixFileError: The Hub did not take it, or the card that is there cannot be read.
    """
    api = HfApi(token=token)

    def once() -> CommitInfo:
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            _make_branch(api, repository, revision, may_fail=create_pr)
        parent = api.repo_info(repository, revision=revision).sha
        content = card(repository, card_on_hub(repository, token, parent)).encode()
        additions: dict[str, Path | bytes] = {**files, CARD: content}
        return api.create_commit(
            repository,
            [CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in additions.items()],
            commit_message=commit_message,
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )

    try:
        return patiently(once)
    except PrefixError:
        raise
    except _FAILURES as error:
        raise PrefixFileError(
            f"The prefix was not uploaded to {repo_id} ({error}). It is still in the model: try again, or keep it with "
            "save_pretrained(folder)."
        ) from error


def _make_branch(api: HfApi, repo_id: str, branch: str, *, may_fail: bool) -> None:
    try:
        api.create_branch(repo_id, branch=branch, exist_ok=True)
    except HfHubHTTPError as error:
        # For a pull request to somebody else's repository the branch has to be there.
        if not (may_fail and error.response is not None and error.response.status_code == 403):
            raise
