"""A small Hugging Face Hub on this machine, for tests with the real client; see `hub_client.py` for the fixture."""

from __future__ import annotations

import socket
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote

# These two add their addresses.
import hub_reading  # noqa: F401
import hub_writing  # noqa: F401
from hub_addresses import Addresses, Answer, Request
from hub_repository import HubError

_HOST = "127.0.0.1"


@dataclass(frozen=True)
class Seen:
    """A request that was answered.

    Args:
        method: `GET` and so on.
        path: Path of the address, unquoted, without what follows a `?`.
        range: The bytes that were asked for, as `bytes=10-`; `None` for all.
        user: Whose token came along; `None` without one.
        status: Status of the answer.
        file: `owner/name/path` if the answer's body was that file or a part of it.
    """

    method: str
    path: str
    range: str | None
    user: str | None
    status: int
    file: str | None


@dataclass
class _Fault:
    """Something that goes wrong with the next `times` requests that match."""

    pattern: str
    times: int
    method: str | None = None
    answer: Answer | None = None
    after_bytes: int = 0
    stall: float | None = None

    def strikes(self, request: Request) -> bool:
        matches = self.times > 0 and fnmatchcase(unquote(request.path), self.pattern)
        if not matches or self.method not in {None, request.method}:
            return False
        self.times -= 1
        return True


class HubServer(Addresses):
    """A Hub that is served as long as the context lasts.

    `users` and `repositories` may be read and changed at any time, and outlast `stop` and `start`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[Seen] = []
        """All requests, in the order of their answers."""
        self._faults: list[_Fault] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._servers: list[_Server] = []
        self._ports = [0, 0]

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Serves, after `stop` at the same addresses as before."""
        self._stopped.clear()
        self._servers = [_Server(self, port) for port in self._ports]
        self._ports = [server.server_port for server in self._servers]
        self.url, self.storage_url = (f"http://{_HOST}:{port}" for port in self._ports)

    def stop(self) -> None:
        """Cuts all connections and refuses new ones."""
        self._stopped.set()
        for server in self._servers:
            server.stop()
        self._servers = []

    def fail(
        self,
        path: str,
        *,
        times: int = 1,
        status: int = 503,
        headers: Mapping[str, str] | None = None,
        method: str | None = None,
    ) -> None:
        """Answers the next requests with an error.

        Args:
            path: Pattern of the unquoted path as in a shell, where `*` matches slashes, too.
            times: How many requests.
            status: Status of the answer.
            headers: Its headers, such as `Retry-After`.
            method: Only these requests, such as `HEAD`.
        """
        error = HubError(status, f"The test wants {status}.", headers=headers)
        self._faults.append(_Fault(path, times, method, Answer(status, error.body, error.headers)))

    def mend(self) -> None:
        """Forgets all faults that have not struck yet."""
        self._faults.clear()

    def cut(self, path: str, *, times: int = 1, after_bytes: int, stall: float | None = None) -> None:
        """Closes the connection in the middle of the next files that are downloaded.

        Args:
            path: Pattern of the unquoted path as in a shell, where `*` matches slashes, too.
            times: How many answers.
            after_bytes: How many bytes of the body are sent; a shorter body is sent whole.
            stall: Seconds in which nothing is sent before the connection is closed.
        """
        self._faults.append(_Fault(path, times, "GET", after_bytes=after_bytes, stall=stall))

    @property
    def downloads(self) -> list[str]:
        """`owner/name/path` of the files whose contents were asked for, in order, cut ones once for each try."""
        return [seen.file for seen in self.requests if seen.method == "GET" and seen.file]

    def serve(self, request: Request) -> tuple[Answer, _Fault | None]:
        """The answer to a request, and how it is to be cut."""
        with self._lock:
            failing = next((fault for fault in self._faults if fault.answer and fault.strikes(request)), None)
            answer = failing.answer if failing and failing.answer else self.answer(request)
            seen = Seen(
                request.method,
                unquote(request.path),
                request.headers.get("Range"),
                request.user,
                answer.status,
                answer.file,
            )
            self.requests.append(seen)
            if answer.file is None:
                return answer, None
            cuts = [fault for fault in self._faults if not fault.answer and fault.after_bytes < len(answer.body)]
            return answer, next((fault for fault in cuts if fault.strikes(request)), None)

    def wait(self, seconds: float) -> None:
        """Waits, but no longer than the server runs."""
        self._stopped.wait(seconds)


class _Server(ThreadingHTTPServer):
    """One of the two addresses.

    Args:
        hub: What it serves.
        port: Where; 0 for a free one.
    """

    # Stopping waits for the threads, so that none of them outlives its test.
    daemon_threads = False

    def __init__(self, hub: HubServer, port: int) -> None:
        super().__init__((_HOST, port), _Handler)
        self.hub = hub
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), name=f"hub on {self.server_port}")
        self._thread.start()

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        # The client may leave whenever it likes.
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        self._thread.join()
        for connection in list(self._open):
            _hang_up(connection)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    """Reads requests and writes answers, one after the other over one connection."""

    protocol_version = "HTTP/1.1"
    # Head and body are sent one after the other: the body must not wait until the head is confirmed.
    disable_nagle_algorithm = True
    server: _Server

    def _serve(self) -> None:
        path, _, query = self.path.partition("?")
        hub = self.server.hub
        user = hub.users.get(self.headers.get("Authorization", "").removeprefix("Bearer "))
        answer, cut = hub.serve(Request(self.command, path, query, self.headers, self._body(), user))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        if cut is not None:
            self.wfile.write(answer.body[: cut.after_bytes])
            hub.wait(cut.stall or 0)
            self.close_connection = True
            _hang_up(self.connection)
        elif self.command != "HEAD":
            self.wfile.write(answer.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve  # noqa: N815

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def log_message(self, *_: object) -> None:
        """Nothing: the requests are in `HubServer.requests`."""


def _hang_up(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:  # closed already
        return
