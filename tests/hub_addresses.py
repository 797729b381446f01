"""How the small Hub of the tests finds the answer to a request, and who may ask what."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote

from hub_repository import HubError, Repository, Store


@dataclass
class Request:
    """A request, as the addresses below read it.

    Args:
        method: `GET` and so on.
        path: Path of the address, quoted as it came.
        query: What follows the `?`.
        headers: Its headers; their names in any case.
        body: Its body.
        user: Whose token came along; `None` without a token that is known.
    """

    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    body: bytes
    user: str | None = None
    names: dict[str, str] = field(default_factory=dict)
    """The variable parts of the path, unquoted."""

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    def asks(self, name: str) -> bool:
        """Whether a switch is on in the query."""
        return parse_qs(self.query).get(name, ["0"])[0] in {"1", "true", "True"}


@dataclass
class Answer:
    """What is sent back.

    Args:
        status: Status.
        body: Body.
        headers: Headers besides its length.
        file: `owner/name/path` if the body is that file or a part of it.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    file: str | None = None


class Addresses(Store):
    """The Hub's addresses.

    Args:
        url: Where the Hub is.
        storage_url: Where its storage of large files is: another origin, as with the real Hub, so that the client must
            follow a redirect and must not send its token along.
    """

    def __init__(self) -> None:
        super().__init__()
        self.url = self.storage_url = ""

    def answer(self, request: Request) -> Answer:
        """Answers a request."""
        try:
            if "Authorization" in request.headers and request.user is None:
                raise HubError(401, "Invalid credentials in Authorization header")
            for methods, pattern, address in _ADDRESSES:
                found = pattern.fullmatch(request.path)
                if found and request.method in methods:
                    request.names = {name: unquote(value) for name, value in found.groupdict().items()}
                    return address(self, request)
            # Not 404, which would mean that the Hub has no such repository, and no status that the client retries.
            raise HubError(501, f"The Hub of the tests does not know {request.method} {request.path}.")
        except HubError as error:
            return Answer(error.status, error.body, {"Content-Type": "application/json", **error.headers})

    def repository(self, request: Request, *, write: bool = False) -> Repository:
        """The repository that a request names, if its user may read it, or write to it."""
        repository = self.repositories.get(request.names["repo"])
        if repository is None or (repository.private and request.user != repository.owner):
            # Nobody else may learn that it exists. Without a token the Hub says 401, whatever the name.
            raise HubError(404 if request.user else 401, "Repository not found", "RepoNotFound")
        if write and request.user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        opened = repository.authors.get(request.names.get("revision", ""))
        if write and request.user not in {repository.owner, opened}:
            raise HubError(403, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repository

    def stored(self, request: Request) -> Repository:
        """The repository whose large file a request sends or asks for."""
        if "Authorization" in request.headers:
            # The address alone gives access; a real storage refuses both at once, and a token must not get there.
            raise HubError(400, "Only one auth mechanism allowed")
        return self.repositories[request.names["repo"]]


_Address = Callable[[Addresses, Request], Answer]
_ADDRESSES: list[tuple[list[str], re.Pattern[str], _Address]] = []
_SHAPES = {"repo": "[^/]+(?:/[^/]+)?", "path": ".+"}


def at(methods: str, path: str) -> Callable[[_Address], _Address]:
    """Serves an address: `{repo}` is `owner/name`, `{path}` all that is left, another name one part of the path."""
    pattern = re.sub(r"\{(\w+)\}", lambda name: f"(?P<{name[1]}>{_SHAPES.get(name[1], '[^/]+')})", path)

    def add(address: _Address) -> _Address:
        _ADDRESSES.append((methods.split(), re.compile(pattern), address))
        return address

    return add


def json_answer(value: Any, status: int = 200) -> Answer:
    return Answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})
