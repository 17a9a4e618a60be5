"""A model hub on 127.0.0.1: the few endpoints that huggingface_hub asks, and faults on demand."""

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "c0ffee" * 6 + "c0de"
NAME = "owner/model"


class Hub:
    """One repository, what was asked of it, and how it misbehaves.

    Attributes:
        folder: the files of the only commit.
        branches: names of it.
        asked: (method, path) of every request; `ranges` and `tokens` are those sent along.
        refuse: status and X-Error-Code that every request is answered with.
        cut_after: bytes of a weight file after which the connection breaks, once per file.
        broken: files whose content is answered with status 500.
        pause_s: pause before each 64 KiB of a weight file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.branches = {"main", "v1"}
        self.asked: list[tuple[str, str]] = []
        self.ranges: list[str] = []
        self.tokens: set[str | None] = set()
        self.refuse: tuple[int, str] | None = None
        self.cut_after: int | None = None
        self.cut: set[str] = set()
        self.broken: set[str] = set()
        self.pause_s = 0.0
        self.url = ""

    def files(self) -> dict[str, Path]:
        found = (path for path in sorted(self.folder.rglob("*")) if path.is_file())
        return {str(path.relative_to(self.folder)): path for path in found}

    def fetched(self) -> set[str]:
        """Name the files whose content was asked for."""
        start = f"/{NAME}/resolve/{COMMIT}/"
        return {p.removeprefix(start) for m, p in self.asked if m == "GET" and p.startswith(start)}

    def tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
            for name, path in self.files().items()
        ]


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve(folder: Path) -> Iterator[Hub]:
    """Run a hub for the files of `folder`; its address is `hub.url`."""
    hub = Hub(folder)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.hub, unquote(self.path.partition("?")[0])
        hub.asked.append((self.command, path))
        hub.tokens.add(self.headers.get("Authorization"))
        if hub.refuse:
            return self._answer(hub.refuse[0], b"{}", {"X-Error-Code": hub.refuse[1]})
        if not path.startswith((f"/api/models/{NAME}/", f"/{NAME}/")):
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if match := re.fullmatch(f"/api/models/{NAME}/(revision|tree)/([^/]+)", path):
            if match[2] not in hub.branches | {COMMIT}:
                return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
            info = {"id": NAME, "sha": COMMIT, "siblings": [], "private": False}
            return self._answer(
                200, json.dumps(info if match[1] == "revision" else hub.tree()).encode()
            )
        file = hub.files().get(path.removeprefix(f"/{NAME}/resolve/{COMMIT}/"))
        if file is None:
            return self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound"})
        return self._send(file)

    def _send(self, file: Path) -> None:
        if self.command == "GET" and file.name in self.hub.broken:
            return self._answer(500, b"")
        data, start = file.read_bytes(), 0
        headers = {"ETag": f'"{etag(file)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted:
            self.hub.ranges.append(wanted)
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        return self._answer(
            206 if wanted else 200, data[start:], headers, weights=file.suffix == ".safetensors"
        )

    def _answer(
        self,
        status: int,
        data: bytes,
        headers: dict[str, str] | None = None,
        *,
        weights: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        hub = self.hub
        cut = hub.cut_after if weights and self.path not in hub.cut else None
        try:
            if cut is not None:
                hub.cut.add(self.path)
                self.wfile.write(data[:cut])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(2)
                return
            for at in range(0, len(data), 1 << 16):
                if weights and hub.pause_s:
                    time.sleep(hub.pause_s)
                self.wfile.write(data[at : at + (1 << 16)])
        except OSError:
            self.close_connection = True  # the other side has hung up
