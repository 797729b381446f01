"""Fixtures that point huggingface_hub and transformers at the small Hub, with an empty cache and without a token."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import transformers.utils.hub
from hub_server import HubServer
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http

TRANSPORT = getattr(_http, "httpx2", None) or _http.httpx
"""The package that the client sends requests with, `httpx` or `httpx2`, for its exceptions."""
_UNSET = (
    *("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH", "HF_OIDC_RESOURCE"),
)


class _Pauses:
    """Takes the place of the module `time` where the client pauses between tries.

    Args:
        seconds: Where it is noted how long each pause should have been.
    """

    def __init__(self, seconds: list[float]) -> None:
        self.seconds = seconds

    def sleep(self, seconds: float) -> None:
        self.seconds.append(seconds)
        time.sleep(0.001)

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the client wanted to wait between tries; it does not wait."""
    seconds: list[float] = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", _Pauses(seconds))
    return seconds


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pauses: list[float]) -> Iterator[HubServer]:
    """A Hub with the user "ada", to which this process and those that it starts talk. Nobody is logged in."""
    with HubServer() as server:
        server.add_user("ada")
        _point_at(server.url, tmp_path / "hugging face", monkeypatch)
        yield server
        # While they are open: what the server cuts would stay in the pool for the next test.
        huggingface_hub.close_session()
    unknown = [seen for seen in server.requests if seen.status == 501]
    assert not unknown, f"addresses that the server does not know: {unknown}"


@pytest.fixture
def ada(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The token of "ada", who is logged in."""
    token = hub.add_user("ada")
    monkeypatch.setenv("HF_TOKEN", token)
    return token


def _point_at(url: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the client use a Hub and a folder.

    The client reads its settings from the environment when it is imported, which has happened long ago: both are set,
    the environment for processes that the test starts.
    """
    for name in _UNSET:
        monkeypatch.delenv(name, raising=False)
    environment = {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        # Large files go by HTTP: the server does not know Xet.
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(home / "hub"),
        "HF_TOKEN_PATH": str(home / "token"),
        "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    for name, value in settings.items():
        monkeypatch.setattr(constants, name, value)
    # These objects remember the address from when they were made.
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", lambda: _client(url))
    # Connections of before are forgotten.
    huggingface_hub.close_session()
    # Made now: in huggingface_hub 1.5, threads that begin together make one each and close only the last one.
    huggingface_hub.get_session()


def _client(url: str) -> Any:
    """A client that talks to this machine only."""
    client = _http.default_client_factory()

    def stay(request: Any) -> None:
        if request.url.host == "huggingface.co":
            # huggingface_hub 1.5 validates cards there, whatever the endpoint.
            request.url = type(request.url)(url).copy_with(raw_path=request.url.raw_path)
        if request.url.host != "127.0.0.1":
            raise ValueError(f"A test asks for {request.url}, which is not on this machine.")

    client.event_hooks["request"].append(stay)
    return client
