"""A stand-in for the Hub on this machine: it answers the real client's requests and notes them.

It speaks what `huggingface_hub` asks when a repository is made, filled and read: whoami,
validate-yaml, preupload, the LFS batch with its uploads, commit, revision, tree and resolve.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LARGE = (".safetensors", ".bin", ".pt", ".gguf")
"""What a fresh repository's .gitattributes gives to LFS."""
FRESH = {".gitattributes": "".join(f"*{x} filter=lfs\n" for x in LARGE).encode()}
"""What is in a repository that was just made."""


class Refusal(Exception):
    """An answer that is none."""

    def __init__(self, status: int, code: str = "", message: str = "", **values: Any) -> None:
        super().__init__(message)
        self.status, self.values = status, {"error": message or code or "no", **values}
        self.headers = {"x-error-code": code} if code else {}
        if message:
            self.headers["x-error-message"] = message


@dataclass
class Repo:
    """A repository: its commits, each with all of its files."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes]) -> str:
        """Add a commit to main."""
        sha = hashlib.sha1(repr((len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.refs["main"] = sha
        return sha

    def find(self, revision: str) -> str:
        """The commit of a branch, a tag or a commit."""
        sha = self.refs.get(revision, revision)
        if sha not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    @property
    def files(self) -> dict[str, bytes]:
        """Those of the main branch."""
        return self.commits[self.refs["main"]] if self.refs else {}


class Server:
    """The state of the stand-in, and what was asked."""

    def __init__(self, status: int) -> None:
        self.status = status
        self.address = ""
        self.repos: dict[str, Repo] = {}
        self.tokens: dict[str, str] = {}
        """Token -> who it belongs to; with none in it everybody may do everything."""
        self.objects: dict[str, bytes] = {}
        self.refused_objects: set[str] = set()
        """Hashes of large files whose storage refuses them."""
        self.created: dict[str, Any] = {}
        self.requests: list[str] = []

    def add(self, repo_id: str, files: dict[str, bytes], *, private: bool = False) -> Repo:
        """A repository with one commit."""
        self.repos[repo_id] = repo = Repo(private)
        repo.commit(files)
        return repo

    def count(self, part: str) -> int:
        """How many requests had `part` in their line."""
        return sum(part in request for request in self.requests)

    def answer(
        self, method: str, target: str, headers: Any, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        self.requests.append(f"{method} {target}")
        try:
            if self.status != 200:
                raise Refusal(self.status, "RepoNotFound" if self.status == 404 else "")
            found = self._route(method, urlsplit(target), self._user(headers), body)
        except Refusal as refusal:
            return refusal.status, refusal.headers, json.dumps(refusal.values).encode()
        if isinstance(found, tuple):
            return 200, found[0], found[1]
        return 200, {"content-type": "application/json"}, json.dumps(found).encode()

    def _user(self, headers: Any) -> str | None:
        said = headers.get("authorization", "").removeprefix("Bearer ")
        if said and self.tokens and said not in self.tokens:
            raise Refusal(401, message="Invalid username or password.")
        return self.tokens.get(said) if self.tokens else "anybody"

    def _repo(self, name: str, user: str | None, *, write: bool = False) -> Repo:
        repo = self.repos.get(name)
        owns = user == "anybody" or user == name.partition("/")[0]
        if repo is None or (repo.private and not owns):
            # to strangers the Hub does not say which of the two it is
            raise Refusal(404 if user else 401, "RepoNotFound", "Repository not found")
        if write and not owns:
            raise Refusal(403, message="You don't have the rights to write here.")
        return repo

    def _route(self, method: str, url: Any, user: str | None, body: bytes) -> Any:
        path = unquote(url.path)
        if path == "/api/whoami-v2":
            if user is None:
                raise Refusal(401)
            return {"name": user, "type": "user", "orgs": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body), user)
        if path == "/api/validate-yaml":
            return _validated(json.loads(body)["content"])
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._repo(found[1], user, write=True)
            return self._batch(json.loads(body))
        if found := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self._store(found[1], body)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(self._repo(found[1], user), found[2], found[3])
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+)(?:/(.*))?)?", path):
            write = found[2] in ("preupload", "commit")
            return self._model(found, self._repo(found[1], user, write=write), body)
        raise Refusal(404, "EntryNotFound", f"{method} {path}")

    def _create(self, asked: dict[str, Any], user: str | None) -> Any:
        self.created = asked
        owner = asked.get("organization") or user
        name = f"{owner}/{asked['name']}"
        if user not in ("anybody", owner):
            raise Refusal(
                401 if user is None else 403, message="You may not create this repository."
            )
        if name in self.repos:
            raise Refusal(
                409, message="You already created this model repo", url=f"{self.address}/{name}"
            )
        # the client says it in one of two ways, by its version
        private = bool(asked.get("private")) or asked.get("visibility") == "private"
        self.add(name, dict(FRESH), private=private)
        return {"url": f"{self.address}/{name}", "name": name, "id": name}

    def _batch(self, asked: dict[str, Any]) -> Any:
        objects: list[dict[str, Any]] = []
        for wanted in asked["objects"]:
            oid = wanted["oid"]
            actions = {"upload": {"href": f"{self.address}/lfs/{oid}"}}
            # what has arrived is not asked for again
            objects.append(wanted if oid in self.objects else {**wanted, "actions": actions})
        return {"transfer": "basic", "objects": objects}

    def _store(self, oid: str, body: bytes) -> Any:
        if oid in self.refused_objects:
            raise Refusal(403, message="The upload's address has expired.")
        if hashlib.sha256(body).hexdigest() != oid:
            raise Refusal(400, message="not the announced content")
        self.objects[oid] = body
        return {}

    def _resolve(self, repo: Repo, revision: str, name: str) -> Any:
        sha = repo.find(revision)
        if name not in repo.commits[sha]:
            raise Refusal(404, "EntryNotFound", f"{name} does not exist")
        content = repo.commits[sha][name]
        return {"x-repo-commit": sha, "etag": f'"{_etag(name, content)}"'}, content

    def _model(self, found: re.Match[str], repo: Repo, body: bytes) -> Any:
        name, what, revision = found[1], found[2], found[3] or "main"
        if what == "preupload":
            asked = json.loads(body)["files"]
            return {"files": [_upload_mode(file) for file in asked]}
        if what == "commit":
            return self._commit(name, repo, [json.loads(line) for line in body.splitlines()])
        if what == "tree":
            return [_entry(*item) for item in repo.commits[repo.find(revision)].items()]
        if what in (None, "revision"):
            sha = repo.find(revision)
            siblings = [{"rfilename": file} for file in repo.commits[sha]]
            return {"id": name, "sha": sha, "private": repo.private, "siblings": siblings}
        raise Refusal(404, "EntryNotFound", f"{what} is not spoken here")

    def _commit(self, name: str, repo: Repo, operations: list[dict[str, Any]]) -> Any:
        files = dict(repo.files)
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.objects:
                    raise Refusal(400, message=f"{value['path']} was not uploaded")
                files[value["path"]] = self.objects[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files)
        url = f"{self.address}/{name}/commit/{sha}"
        return {"commitUrl": url, "commitOid": sha, "success": True}


def _validated(content: str) -> Any:
    """What the Hub says of a card's front matter."""
    found = re.match(r"---\n(.*?)\n---", content, re.S)
    if found is None:
        return {"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]}
    front = yaml.safe_load(found[1])
    if "base_model" in front and not _HUB_ID.fullmatch(str(front["base_model"])):
        message = f'"base_model" with value "{front["base_model"]}" is not valid'
        raise Refusal(400, errors=[{"message": message}], warnings=[])
    return {"errors": [], "warnings": []}


def _upload_mode(file: dict[str, Any]) -> dict[str, Any]:
    mode = "lfs" if file["path"].endswith(LARGE) else "regular"
    return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}


def _etag(name: str, content: bytes) -> str:
    """As git and LFS call it."""
    if name.endswith(LARGE):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    entry = {"type": "file", "path": name, "oid": _etag(name, content), "size": len(content)}
    if name.endswith(LARGE):
        entry["lfs"] = {"oid": _etag(name, content), "size": len(content), "pointerSize": 134}
    return entry


@contextmanager
def hub(status: int = 200) -> Iterator[Server]:
    """Run the stand-in while inside; with another status than 200 it answers nothing else."""
    server = Server(status)

    class Handler(BaseHTTPRequestHandler):
        def do(self) -> None:
            body = self.body()
            code, headers, content = server.answer(self.command, self.path, self.headers, body)
            self.send_response(code)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def body(self) -> bytes:
            if "chunked" not in self.headers.get("transfer-encoding", ""):
                return self.rfile.read(int(self.headers.get("content-length", 0)))
            found = b""
            while size := int(self.rfile.readline(), 16):
                found += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return found

        do_GET = do_POST = do_HEAD = do_PUT = do

        def log_message(self, format: str, *args: Any) -> None:
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
