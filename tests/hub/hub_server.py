"""A stand-in for the Hub on this machine: it answers the real client's requests and notes them."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any


class Server:
    """What was asked, and what is answered: `status` to all, or as the Hub would with 200."""

    def __init__(self, status: int, files: dict[str, bytes]) -> None:
        self.status = status
        self.files = dict(files)
        self.requests: list[str] = []
        self.created: dict[str, Any] = {}
        self.address = ""

    def answer(self, path: str, body: bytes) -> Any:
        """The JSON that the Hub would send."""
        if path.endswith("/repos/create"):
            self.created = json.loads(body)
            return {"url": f"{self.address}/owner/name", "id": "owner/name"}
        if "/preupload/" in path:
            asked = json.loads(body)["files"]
            told = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
            ]
            return {"files": told}
        if "/commit/" in path:
            for line in body.decode().splitlines():
                self._apply(json.loads(line))
            oid = "0" * 40
            return {
                "commitUrl": f"{self.address}/owner/name/commit/{oid}",
                "commitOid": oid,
                "success": True,
            }
        if "/tree/" in path:
            return [
                {"type": "file", "path": p, "oid": "1", "size": len(x)}
                for p, x in self.files.items()
            ]
        return {
            "id": "owner/name",
            "sha": "0" * 40,
            "siblings": [{"rfilename": p} for p in self.files],
        }

    def _apply(self, operation: dict[str, Any]) -> None:
        value = operation["value"]
        if operation["key"] == "file":
            self.files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "deletedFile":
            del self.files[value["path"]]


@contextmanager
def hub(status: int = 200, files: dict[str, bytes] | None = None) -> Iterator[Server]:
    """Run the stand-in while inside."""
    server = Server(status, files or {})

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            server.requests.append(f"{self.command} {self.path}")
            answer = server.answer(self.path, body) if status == 200 else {"error": "no"}
            text = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            if status == 404:
                self.send_header("x-error-code", "RepoNotFound")
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_HEAD = do

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.address = f"http://127.0.0.1:{http.server_address[1]}"
    thread = Thread(target=http.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
