"""What the small Hub of the tests keeps, all in memory: users, repositories, commits, files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import PurePosixPath

_LARGE = {".bin", ".gguf", ".h5", ".jpg", ".msgpack", ".npy", ".npz", ".onnx", ".png", ".pt", ".safetensors", ".zip"}
"""Endings of files that go to the storage of large files, as the `.gitattributes` of a new repository says."""
_LARGE_FROM = 10 * 2**20
"""Bytes from which a file goes there whatever its name is."""


class HubError(Exception):
    """What the Hub answers instead of a result.

    Args:
        status: Status of the answer.
        message: What went wrong.
        code: Value of the header by which the client tells one 404 from another.
        headers: More headers.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}

    @property
    def body(self) -> bytes:
        return json.dumps({"error": str(self)}).encode()


def is_large(path: str, size: int) -> bool:
    """Whether a file goes to the storage of large files. An empty one never does."""
    return size > 0 and (PurePosixPath(path).suffix in _LARGE or size >= _LARGE_FROM)


@dataclass(frozen=True)
class File:
    """One version of a file.

    Args:
        content: Its bytes.
        large: Whether it lies in the storage of large files, and git has a pointer to it only.
    """

    content: bytes
    large: bool

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """What git has of a large file."""
        size = len(self.content)
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {size}\n".encode()

    @cached_property
    def oid(self) -> str:
        """Its name in git."""
        blob = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        """The name that the client compares and caches it by."""
        return self.sha256 if self.large else self.oid


@dataclass(frozen=True)
class Commit:
    """All files at one point of the history."""

    oid: str
    parent: str | None
    files: Mapping[str, File]
    title: str
    description: str
    author: str
    date: str


class Repository:
    """A model repository; like a new one of the real Hub, it starts with a commit of `.gitattributes`.

    Args:
        repo_id: `owner/name`.
        private: Whether only its owner may read it.
    """

    def __init__(self, repo_id: str, private: bool = False) -> None:
        self.id = repo_id
        self.private = private
        self.commits: dict[str, Commit] = {}
        self.references: dict[str, str] = {}
        """Commits by `refs/heads/<branch>`, `refs/tags/<tag>` and `refs/pr/<number>`."""
        self.authors: dict[str, str] = {}
        """Who opened a pull request, by `refs/pr/<number>`: they may add to it."""
        self.objects: dict[str, bytes] = {}
        """Large files that were uploaded, committed or not, by SHA-256."""
        attributes = "".join(f"*{ending} filter=lfs diff=lfs merge=lfs -text\n" for ending in sorted(_LARGE))
        self.commit("refs/heads/main", {".gitattributes": File(attributes.encode(), False)}, "initial commit")

    @property
    def owner(self) -> str:
        return self.id.split("/")[0]

    def reference(self, revision: str) -> str | None:
        """Full name of a branch, tag or pull request; `None` if there is no such one."""
        names = [revision, f"refs/heads/{revision}", f"refs/tags/{revision}"]
        return next((name for name in names if name in self.references), None)

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, pull request or full hash names."""
        reference = self.reference(revision)
        commit = self.commits.get(self.references[reference] if reference else revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def file(self, revision: str, path: str) -> File:
        """A file at a revision."""
        commit = self.at(revision)
        if path not in commit.files:
            # With the commit the client can note for good that it has no such file.
            raise HubError(404, "Entry not found", "EntryNotFound", {"X-Repo-Commit": commit.oid})
        return commit.files[path]

    def history(self, revision: str) -> list[Commit]:
        """A commit and those before it, newest first."""
        commits = [self.at(revision)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def commit(
        self,
        reference: str,
        changes: Mapping[str, File | None],
        title: str,
        *,
        author: str | None = None,
        description: str = "",
    ) -> Commit:
        """Adds a commit to a branch or pull request.

        Args:
            reference: Its full name; a new one starts without files.
            changes: Files that are added or, with `None`, deleted, by path.
            title: First line of the message.
            author: Who did it; the owner by default.
            description: Rest of the message.
        """
        parent = self.references.get(reference)
        files = {**(self.commits[parent].files if parent else {}), **changes}
        kept = {path: file for path, file in sorted(files.items()) if file is not None}
        self.objects.update({file.sha256: file.content for file in kept.values() if file.large})
        # The number keeps commits apart that undo one another.
        content = repr((len(self.commits), parent, title, [(path, file.oid) for path, file in kept.items()]))
        oid = hashlib.sha1(content.encode()).hexdigest()
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        self.commits[oid] = Commit(oid, parent, kept, title, description, author or self.owner, date)
        self.references[reference] = oid
        return self.commits[oid]

    def refer(self, reference: str, revision: str) -> None:
        """Makes a branch or tag."""
        if reference in self.references:
            raise HubError(409, f"Reference already exists: {reference}")
        self.references[reference] = self.at(revision).oid

    def propose(self, revision: str, author: str) -> str:
        """Opens a pull request and gives its full name."""
        reference = f"refs/pr/{len(self.authors) + 1}"
        self.references[reference] = self.at(revision).oid
        self.authors[reference] = author
        return reference


class Store:
    """Users and repositories."""

    def __init__(self) -> None:
        self.users: dict[str, str] = {}
        """Names by token."""
        self.repositories: dict[str, Repository] = {}

    def add_user(self, name: str) -> str:
        """Adds a user and gives their token."""
        token = f"hf_{name}"
        self.users[token] = name
        return token

    def put(self, repo_id: str, files: Mapping[str, bytes], *, revision: str = "main", private: bool = False) -> str:
        """Puts files into a repository, past the client, and gives the hash of the commit.

        Args:
            repo_id: `owner/name`; the repository is made if it does not exist.
            files: Contents by path.
            revision: Branch; it is made from `main` if it does not exist.
            private: Whether only the owner may read the repository, if it is made.
        """
        if repo_id not in self.repositories:
            self.repositories[repo_id] = Repository(repo_id, private)
        repository = self.repositories[repo_id]
        if repository.reference(revision) is None:
            repository.refer(f"refs/heads/{revision}", "main")
        changes = {path: File(content, is_large(path, len(content))) for path, content in files.items()}
        return repository.commit(f"refs/heads/{revision}", changes, f"Put {', '.join(files)}").oid

    def read(self, repo_id: str, path: str, *, revision: str = "main") -> bytes:
        """A file at a revision, past the client."""
        return self.repositories[repo_id].file(revision, path).content

    def paths(self, repo_id: str, *, revision: str = "main") -> set[str]:
        """Paths of all files at a revision, past the client, but `.gitattributes`."""
        return set(self.repositories[repo_id].at(revision).files) - {".gitattributes"}
