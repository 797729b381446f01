"""What the small Hub of the tests answers to whoever changes it.

A push asks which files are large, sends those to the storage and then everything else in one commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable
from typing import Any

from hub_addresses import Addresses, Answer, Request, at, json_answer
from hub_repository import File, HubError, Repository, is_large


@at("POST DELETE", "/api/repos/(?:create|delete)")
def _create_or_delete(hub: Addresses, request: Request) -> Answer:
    body = request.json
    owner = body.get("organization") or request.user
    request.names["repo"] = f"{owner}/{body['name']}"
    if request.method == "DELETE":
        del hub.repositories[hub.repository(request, write=True).id]
        return Answer()
    if request.user is None:
        raise HubError(401, "Invalid username or password.")
    if owner != request.user:
        raise HubError(403, f'You don\'t have the rights to create a model under the namespace "{owner}"')
    repo_id = request.names["repo"]
    exists = repo_id in hub.repositories
    if not exists:
        # huggingface_hub 2 says `visibility` where 1 says `private`.
        private = body.get("private") or body.get("visibility") == "private"
        hub.repositories[repo_id] = Repository(repo_id, private=bool(private))
    # The client reads the address from the refusal, too.
    answer = {"id": repo_id, "name": repo_id, "url": f"{hub.url}/{repo_id}"}
    if exists:
        return json_answer({**answer, "error": "You already created this model repo"}, 409)
    return json_answer(answer)


@at("POST", "/api/models/{repo}/branch/{branch}")
def _branch(hub: Addresses, request: Request) -> Answer:
    repository = hub.repository(request, write=True)
    repository.refer(f"refs/heads/{request.names['branch']}", request.json.get("startingPoint", "main"))
    return Answer()


@at("POST", "/api/models/{repo}/tag/{revision}")
def _tag(hub: Addresses, request: Request) -> Answer:
    repository = hub.repository(request, write=True)
    repository.refer(f"refs/tags/{request.json['tag']}", request.names["revision"])
    return Answer()


@at("POST", "/api/models/{repo}/preupload/{revision}")
def _preupload(hub: Addresses, request: Request) -> Answer:
    repository = hub.repository(request, write=not request.asks("create_pr"))
    files = repository.at(request.names["revision"]).files
    ignored = request.json.get("gitIgnore") or (files[".gitignore"].content.decode() if ".gitignore" in files else "")
    asked = [(file["path"], file["size"]) for file in request.json["files"]]
    return json_answer(
        {
            "files": [
                {
                    "path": path,
                    "uploadMode": "lfs" if is_large(path, size) else "regular",
                    "shouldIgnore": f"/{path}" in ignored.splitlines(),  # the only kind of pattern known here
                    # With it the client leaves out of the commit what the Hub has already.
                    "oid": files[path].etag if path in files else None,
                }
                for path, size in asked
            ]
        }
    )


@at("POST", "/{repo}.git/info/lfs/objects/batch")
def _batch(hub: Addresses, request: Request) -> Answer:
    repository = hub.repository(request)
    if request.user is None:
        raise HubError(401, "Invalid username or password.", "RepoNotFound")
    objects = []
    for asked in request.json["objects"]:
        answer = {"oid": asked["oid"], "size": asked["size"], "authenticated": True}
        if asked["oid"] not in repository.objects:
            upload = {"href": f"{hub.storage_url}/storage/{repository.id}/{asked['oid']}"}
            verify = {"href": f"{hub.url}/{repository.id}.git/info/lfs/verify"}
            answer["actions"] = {"upload": upload, "verify": verify}
        objects.append(answer)
    return json_answer({"transfer": "basic", "objects": objects})


@at("PUT", "/storage/{repo}/{oid}")
def _store(hub: Addresses, request: Request) -> Answer:
    oid = request.names["oid"]
    if hashlib.sha256(request.body).hexdigest() != oid:
        raise HubError(400, "The content does not have the SHA-256 that was announced.")
    hub.stored(request).objects[oid] = request.body
    return Answer()


@at("POST", "/{repo}.git/info/lfs/verify")
def _verify(hub: Addresses, request: Request) -> Answer:
    _uploaded(hub.repository(request), request.json)
    return Answer()


def _uploaded(repository: Repository, asked: dict[str, Any]) -> bytes:
    content = repository.objects.get(asked["oid"])
    if content is None or len(content) != asked.get("size", len(content)):
        raise HubError(400, f"LFS pointer points to a file that does not exist: {asked['oid']}")
    return content


@at("POST", "/api/models/{repo}/commit/{revision}")
def _commit(hub: Addresses, request: Request) -> Answer:
    proposes = request.asks("create_pr")
    repository = hub.repository(request, write=not proposes)
    if request.user is None:
        raise HubError(401, "Invalid username or password.", "RepoNotFound")
    revision = request.names["revision"]
    base = repository.at(revision)
    reference = repository.reference(revision)
    if reference is None or reference.startswith("refs/tags/"):
        raise HubError(400, f"Not a branch: {revision}")
    header, *operations = [json.loads(line) for line in request.body.splitlines()]
    message = header["value"]
    if message.get("parentCommit", base.oid) != base.oid:
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    changes = _changes(repository, set(base.files), operations)
    if proposes:
        reference = repository.propose(revision, request.user)
    commit = repository.commit(
        reference, changes, message["summary"], author=request.user, description=message["description"]
    )
    answer = {"success": True, "commitOid": commit.oid, "commitUrl": f"{hub.url}/{repository.id}/commit/{commit.oid}"}
    if proposes:
        answer["pullRequestUrl"] = f"{hub.url}/{repository.id}/discussions/{reference.split('/')[-1]}"
    return json_answer(answer)


def _changes(repository: Repository, paths: set[str], operations: Iterable[dict[str, Any]]) -> dict[str, File | None]:
    """Files that a commit adds or deletes.

    Args:
        repository: Where they are.
        paths: Files before the commit.
        operations: What the client wrote into the lines of the commit, after the first.
    """
    changes: dict[str, File | None] = {}
    for operation in operations:
        kind, value = operation["key"], operation["value"]
        path = value["path"]
        if kind == "file":
            changes[path] = File(base64.b64decode(value["content"]), False)
        elif kind == "lfsFile":
            changes[path] = File(_uploaded(repository, value), True)
        else:
            folder = path.rstrip("/") + "/"
            deleted = {path} & paths if kind == "deletedFile" else {name for name in paths if name.startswith(folder)}
            if not deleted:
                raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
            changes.update(dict.fromkeys(deleted))
    return changes
