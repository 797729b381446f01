"""What the small Hub of the tests answers to whoever reads it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import parse_qs, quote

import hub_card
from hub_addresses import Addresses, Answer, Request, at, json_answer
from hub_repository import Commit, File, HubError


@at("GET", "/api/whoami-v2")
def _whoami(hub: Addresses, request: Request) -> Answer:
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    return json_answer({"type": "user", "name": request.user, "fullname": request.user, "orgs": []})


@at("GET", "/api/models/{repo}")
@at("GET", "/api/models/{repo}/revision/{revision}")
def _info(hub: Addresses, request: Request) -> Answer:
    repository = hub.repository(request)
    commit = repository.at(request.names.get("revision", "main"))
    card = commit.files.get("README.md")
    try:
        data = hub_card.metadata(card.content.decode(errors="replace")) if card else {}
    except hub_card.CardError:
        data = {}
    siblings = [
        {"rfilename": path, **(_blob(file) if request.asks("blobs") else {})} for path, file in commit.files.items()
    ]
    return json_answer(
        {
            "id": repository.id,
            "modelId": repository.id,
            "author": repository.owner,
            "sha": commit.oid,
            "createdAt": repository.history("main")[-1].date,
            "lastModified": commit.date,
            "private": repository.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": hub_card.tags(data, set(commit.files)),
            **{name: data[name] for name in ("pipeline_tag", "library_name") if name in data},
            **({"cardData": data} if data else {}),
            "siblings": siblings,
        }
    )


def _blob(file: File) -> dict[str, Any]:
    large = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    return {"blobId": file.oid, "size": len(file.content), **({"lfs": large} if file.large else {})}


@at("GET", "/api/models/{repo}/tree/{revision}")
@at("GET", "/api/models/{repo}/tree/{revision}/{path}")
def _tree(hub: Addresses, request: Request) -> Answer:
    commit = hub.repository(request).at(request.names["revision"])
    folder = request.names.get("path", "").strip("/")
    start = f"{folder}/" if folder else ""
    entries = [entry for entry in _entries(commit) if entry["path"].startswith(start)]
    if not entries:
        message = f'{folder} does not exist on "{request.names["revision"]}"'
        raise HubError(404, message, "EntryNotFound", {"X-Repo-Commit": commit.oid})
    return json_answer(
        [entry for entry in entries if request.asks("recursive") or "/" not in entry["path"].removeprefix(start)]
    )


@at("POST", "/api/models/{repo}/paths-info/{revision}")
def _paths_info(hub: Addresses, request: Request) -> Answer:
    commit = hub.repository(request).at(request.names["revision"])
    paths = parse_qs(request.body.decode()).get("paths", [])
    return json_answer([entry for entry in _entries(commit) if entry["path"] in paths])


def _entries(commit: Commit) -> list[dict[str, Any]]:
    """All files and folders of a commit."""
    entries = {}
    for path, file in commit.files.items():
        parts = path.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            oid = hashlib.sha1(f"{commit.oid} {folder}".encode()).hexdigest()
            entries.setdefault(folder, {"type": "directory", "oid": oid, "size": 0, "path": folder})
        entries[path] = {"type": "file", "oid": file.oid, "size": len(file.content), "path": path}
        if file.large:
            entries[path]["lfs"] = {
                "oid": file.sha256,
                "size": len(file.content),
                "pointerSize": len(file.pointer),
            }
    return list(entries.values())


@at("GET", "/api/models/{repo}/refs")
def _references(hub: Addresses, request: Request) -> Answer:
    repository = hub.repository(request)
    kinds: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "pullRequests": [], "converts": []}
    for reference, oid in repository.references.items():
        _, kind, name = reference.split("/", 2)
        known = {"heads": "branches", "tags": "tags", "pr": "pullRequests"}[kind]
        kinds[known].append({"name": name, "ref": reference, "targetCommit": oid})
    return json_answer(kinds)


@at("GET", "/api/models/{repo}/commits/{revision}")
def _commits(hub: Addresses, request: Request) -> Answer:
    return json_answer(
        [
            {
                "id": commit.oid,
                "title": commit.title,
                "message": commit.description,
                "authors": [{"user": commit.author}],
                "date": commit.date,
            }
            for commit in hub.repository(request).history(request.names["revision"])
        ]
    )


@at("POST", "/api/validate-yaml")
def _validate(hub: Addresses, request: Request) -> Answer:
    errors, warnings = hub_card.check(request.json["content"])
    if errors and request.headers.get("Accept") == "text/plain":
        return Answer(400, "\n".join(errors).encode(), {"Content-Type": "text/plain"})
    found = {"errors": [{"message": text} for text in errors], "warnings": [{"message": text} for text in warnings]}
    return json_answer(found, 400 if errors else 200)


@at("GET HEAD", "/{repo}/resolve/{revision}/{path}")
def _resolve(hub: Addresses, request: Request) -> Answer:
    repository = hub.repository(request)
    commit, path = repository.at(request.names["revision"]), request.names["path"]
    file = repository.file(request.names["revision"], path)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
    if not file.large:
        return _part(request, file.content, f"{repository.id}/{path}", headers)
    place = f"{hub.storage_url}/storage/{repository.id}/{file.sha256}/{quote(path)}"
    linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content)), "Location": place}
    return Answer(302, b"Found. Redirecting", {**headers, **linked})


def _part(request: Request, content: bytes, file: str, headers: Mapping[str, str]) -> Answer:
    """A file, or the range of bytes that is asked for."""
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream", **headers}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
    if asked is None:
        return Answer(200, content, headers, file)
    size = len(content)
    first = int(asked[1]) if asked[1] else max(size - int(asked[2]), 0)
    last = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
    if first > last:
        raise HubError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    return Answer(206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{size}"}, file)


@at("GET", "/storage/{repo}/{oid}/{path}")
def _stored(hub: Addresses, request: Request) -> Answer:
    names = request.names
    content = hub.stored(request).objects[names["oid"]]
    return _part(request, content, f"{names['repo']}/{names['path']}", {"ETag": f'"{names["oid"]}"'})
