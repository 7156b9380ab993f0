"""A small Hugging Face Hub on loopback, as huggingface_hub's client asks one; what it does not serve is answered 501.

Repositories have commits, which hold files by path. Large files (by `LARGE`, and by their names as `.gitattributes`
says there) are sent to a storage of their own, by SHA-256, before the commit that names them. Files are fetched from
another port, as from the Hub's CDN: the token must not come there.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.far import Quiet

TOKEN = "hf_hunter2secret"
LARGE = 10 << 20  # bytes of a file that is never kept in git itself
LARGE_NAMES = (".safetensors", ".gguf", ".bin", ".pt", ".npz", ".msgpack")
Files = dict[str, bytes]
Answer = tuple[int, dict[str, str], bytes]  # a status, headers and a body


@dataclass
class Repository:
    """A repository: its commits in order, each with all its files."""

    private: bool = False
    gated: bool = False
    commits: list[tuple[str, Files]] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, files: Files, branch: str = "main") -> str:
        """Add a commit and return its name."""
        parent = self.branches.get(branch, "")
        told = "".join(f"{path} {hashlib.sha1(data).hexdigest()}\n" for path, data in sorted(files.items()))
        name = hashlib.sha1(f"{len(self.commits)} {parent} {told}".encode()).hexdigest()
        self.commits.append((name, files))
        self.branches[branch] = name
        return name

    def at(self, revision: str) -> tuple[str, Files] | None:
        """The commit that a revision is, and its files."""
        wanted = self.branches.get(revision, revision)
        return next((commit for commit in self.commits if commit[0] == wanted), None)

    @property
    def files(self) -> Files:
        """What is on the main branch."""
        found = self.at("main")
        return found[1] if found else {}


@dataclass(frozen=True)
class Request:
    """What was asked for: as the Hub itself, or of its storage."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    query: dict[str, list[str]]


@dataclass
class Hub:
    """The Hub: repositories by name, large files by SHA-256; `fault` may answer a request in its place."""

    url: str = ""
    cdn: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    storage: dict[str, bytes] = field(default_factory=dict)
    parts: dict[str, dict[int, bytes]] = field(default_factory=dict)
    chunk: int = 0  # bytes of a part of a large file that is sent in parts; 0 for whole ones
    page: int = 1000  # entries of a page of a listing
    fault: Callable[[Request], Answer | None] = lambda request: None
    log: list[Request] = field(default_factory=list)

    def asked(self, pattern: str, method: str = "") -> list[Request]:
        """The requests for paths that hold the pattern."""
        return [r for r in self.log if re.search(pattern, r.path) and method in ("", r.method)]

    def add(self, name: str, folder: Path, **settings: bool) -> Repository:
        """A repository with what a folder holds."""
        found = self.repositories[name] = Repository(**settings)
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        found.commit({".gitattributes": b"*.safetensors filter=lfs\n", **files})
        return found


# --- what the Hub answers ---------------------------------------------------------------------------------------------


def error(status: int, code: str = "", message: str = "") -> Answer:
    told = {"X-Error-Code": code, "X-Error-Message": message or code}
    return status, {k: v for k, v in told.items() if v}, json.dumps({"error": message or code}).encode()


def told(value: Any, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()


def is_large(path: str, size: int) -> bool:
    return path.endswith(LARGE_NAMES) or size > LARGE


@lru_cache(maxsize=1000)
def sha256_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@lru_cache(maxsize=1000)
def git_oid(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def described(path: str, data: bytes) -> dict[str, Any]:
    """A file as listings have it."""
    found: dict[str, Any] = {"type": "file", "path": path, "size": len(data), "oid": git_oid(data)}
    if is_large(path, len(data)):
        found["lfs"] = {"oid": sha256_of(data), "size": len(data), "pointerSize": 134}
    return found


def ranged(data: bytes, request: Request, **headers: str) -> Answer:
    """A file, or the range of it that is asked for."""
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    if not found:
        return 200, headers, data
    start, stop = int(found[1]), min(int(found[2]) + 1, len(data))
    return 206, {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"}, data[start:stop]


def create(hub: Hub, request: Request) -> Answer:
    given = json.loads(request.body)
    name = f"{given['organization']}/{given['name']}"
    url = {"url": f"{hub.url}/{name}", "name": name}
    if name.startswith("others/"):
        return error(403, message="You don't have the rights to create a model under the namespace others")
    if name in hub.repositories:
        return told({**url, "error": "You already created this model repo"}, 409)
    hub.repositories[name] = Repository(private=given.get("visibility") == "private")
    hub.repositories[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"})
    return told(url)


def info(hub: Hub, request: Request, name: str, revision: str = "main") -> Answer:
    found = hub.repositories[name].at(unquote(revision))
    if not found:
        return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    siblings = [{"rfilename": path} for path in found[1]]
    facts = {"_id": "1", "id": name, "sha": found[0], "private": hub.repositories[name].private, "siblings": siblings}
    wanted = request.query.get("expand")
    return told({k: v for k, v in facts.items() if not wanted or k in ("_id", "id", *wanted)})


def tree(hub: Hub, request: Request, name: str, revision: str, inside: str = "") -> Answer:
    found = hub.repositories[name].at(unquote(revision))
    if not found:
        return error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    above = f"{unquote(inside)}/" if inside else ""
    files = {path: data for path, data in found[1].items() if path.startswith(above)}
    folders = {path.rsplit("/", n)[0] for path in files for n in range(1, path.removeprefix(above).count("/") + 1)}
    listed = [{"type": "directory", "path": path, "size": 0, "oid": git_oid(path.encode())} for path in folders]
    listed = sorted([*listed, *(described(path, data) for path, data in files.items())], key=lambda e: str(e["path"]))
    if request.query.get("recursive", [""])[0].lower() != "true":
        listed = [entry for entry in listed if "/" not in str(entry["path"]).removeprefix(above)]
    begin = int(request.query.get("cursor", ["0"])[0])
    more = {}
    if begin + hub.page < len(listed):
        more = {"Link": f'<{hub.url}{request.path}?recursive=true&cursor={begin + hub.page}>; rel="next"'}
    return told(listed[begin : begin + hub.page], **more)


def resolve(hub: Hub, request: Request, name: str, revision: str, path: str) -> Answer:
    found = hub.repositories[name].at(unquote(revision))
    data = found[1].get(unquote(path)) if found else None
    if found is None or data is None:
        return error(404, "EntryNotFound" if found else "RevisionNotFound")
    headers = {"X-Repo-Commit": found[0], "ETag": f'"{git_oid(data)}"', "Accept-Ranges": "bytes"}
    if not is_large(path, len(data)):
        return ranged(data, request, **headers)
    sha256 = sha256_of(data)
    linked = {"X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256}"'}
    hub.storage.setdefault(sha256, data)
    return 302, {**headers, **linked, "Location": f"{hub.cdn}/{sha256}?Signature=of-the-cdn"}, b""


def preupload(hub: Hub, request: Request, name: str, revision: str) -> Answer:
    if revision not in hub.repositories[name].branches:
        return error(404, "RevisionNotFound")
    ignored = hub.repositories[name].files.get(".gitignore", b"").decode().split()
    modes = [
        {
            "path": file["path"],
            "uploadMode": "lfs" if is_large(file["path"], file["size"]) else "regular",
            "shouldIgnore": file["path"] in ignored,
        }
        for file in json.loads(request.body)["files"]
    ]
    return told({"files": modes})


def batch(hub: Hub, request: Request, name: str) -> Answer:
    return told({"transfer": "basic", "objects": [action(hub, asked) for asked in json.loads(request.body)["objects"]]})


def action(hub: Hub, asked: dict[str, Any]) -> dict[str, Any]:
    """How a large file is to be sent; nothing where it is there."""
    oid, size = asked["oid"], asked["size"]
    if oid in hub.storage:
        return {"oid": oid, "size": size}
    verify = {"href": f"{hub.url}/lfs-verify"}
    if not hub.chunk or size <= hub.chunk:
        return {
            "oid": oid,
            "size": size,
            "actions": {"upload": {"href": f"{hub.cdn}/{oid}?X-Signature=x"}, "verify": verify},
        }
    count = -(-size // hub.chunk)
    urls = {str(n): f"{hub.cdn}/{oid}?part={n}&X-Signature=x" for n in range(1, count + 1)}
    upload = {"href": f"{hub.url}/lfs-complete", "header": {"chunk_size": str(hub.chunk), **urls}}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}


def complete(hub: Hub, request: Request) -> Answer:
    given = json.loads(request.body)
    parts = hub.parts.pop(given["oid"])
    assert [part["partNumber"] for part in given["parts"]] == sorted(parts)
    return stored(hub, given["oid"], b"".join(parts[n] for n in sorted(parts)))


def stored(hub: Hub, oid: str, data: bytes) -> Answer:
    if hashlib.sha256(data).hexdigest() != oid:
        return error(400, message="the content has another SHA-256")
    hub.storage[oid] = data
    return 200, {"ETag": '"whole"'}, b""


def verify(hub: Hub, request: Request) -> Answer:
    given = json.loads(request.body)
    there = hub.storage.get(given["oid"])
    return told({}) if there is not None and len(there) == given["size"] else error(404)


def commit(hub: Hub, request: Request, name: str, branch: str) -> Answer:
    lines = [json.loads(line) for line in request.body.splitlines()]
    head, repository = lines[0]["value"], hub.repositories[name]
    if head.get("parentCommit", repository.branches[branch]) != repository.branches[branch]:
        return error(412, message="A commit has happened since. Please refresh and try again.")
    files = dict(repository.files)
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile" and len(hub.storage.get(value["oid"], b"")) == value["size"]:
            files[value["path"]] = hub.storage[value["oid"]]
        else:
            return error(400, message=f"{value['path']}: no such large file")
    made = repository.commit(files, branch)
    return told({"success": True, "commitOid": made, "commitUrl": f"{hub.url}/{name}/commit/{made}"})


def check_card(hub: Hub, request: Request) -> Answer:
    return told({"errors": [], "warnings": []})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES: tuple[tuple[str, str, Callable[..., Answer]], ...] = (
    ("POST", "/api/repos/create", create),
    ("POST", "/api/validate-yaml", check_card),
    ("GET", f"/api/models/{NAME}", info),
    ("GET", f"/api/models/{NAME}/revision/([^/]+)", info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)(?:/(.+))?", tree),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", resolve),
    ("POST", f"/api/models/{NAME}/preupload/([^/]+)", preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", batch),
    ("POST", "/lfs-complete", complete),
    ("POST", "/lfs-verify", verify),
    ("POST", f"/api/models/{NAME}/commit/([^/]+)", commit),
)
OPEN = (create, check_card, complete, verify)  # which are of no repository


def answer(hub: Hub, request: Request) -> Answer:
    """What the Hub itself answers."""
    for method, pattern, function in ROUTES:
        found = re.fullmatch(pattern, request.path)
        if found and (request.method == method or (request.method, method) == ("HEAD", "GET")):
            words = [word for word in found.groups() if word is not None]
            return refused(hub, request, words[0] if function not in OPEN else "") or function(hub, request, *words)
    return error(501, message=f"{request.method} {request.path} is not served")


def refused(hub: Hub, request: Request, name: str) -> Answer | None:
    """Why a request may not be made: the repository is not there, or not for everyone."""
    token = request.headers.get("authorization")
    known = token == f"Bearer {TOKEN}"
    if token and not known:
        return error(401, message="Invalid credentials in Authorization header")
    if request.path == "/lfs-complete":
        return None  # its URL is signed
    if not name:
        return None if known else error(401, message="Invalid username or password.")
    found = hub.repositories.get(name)
    if found is None or (found.private and not known):
        return error(404 if known else 401, "RepoNotFound", "Repository not found")
    if found.gated and "/api/" not in request.path:
        return error(403 if known else 401, "GatedRepo", f"Access to model {name} is restricted.")
    if request.method == "POST" and not known:
        return error(401, message="Invalid username or password.")
    if request.method == "POST" and name.startswith("others/"):
        return error(403, message="Forbidden: you must have write access")
    return None


def answer_of_storage(hub: Hub, request: Request) -> Answer:
    """What the storage of large files answers, whose URLs are signed: a token in a request to it is a fault."""
    assert "authorization" not in request.headers
    oid = request.path.strip("/")
    if request.method in ("GET", "HEAD"):
        return ranged(hub.storage[oid], request)
    if part := request.query.get("part"):
        hub.parts.setdefault(oid, {})[int(part[0])] = request.body
        return 200, {"ETag": f'"{part[0]}"'}, b""
    return stored(hub, oid, request.body)


# --- the servers ------------------------------------------------------------------------------------------------------


def handler(hub: Hub, answers: Callable[[Hub, Request], Answer]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1

        def log_message(self, *words: Any) -> None:
            pass

        def reply(self) -> None:
            url = urlsplit(self.path)
            headers = {name.lower(): value for name, value in self.headers.items()}
            body = self.chunks() if "chunked" in headers.get("transfer-encoding", "") else self.whole(headers)
            request = Request(self.command, url.path, headers, body, parse_qs(url.query))
            hub.log.append(request)
            status, more, data = hub.fault(request) or answers(hub, request)
            self.send_response(status)
            for name, value in {**more, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data if self.command != "HEAD" else b"")

        do_GET = do_POST = do_PUT = do_HEAD = reply

        def whole(self, headers: dict[str, str]) -> bytes:
            return self.rfile.read(int(headers.get("content-length", "0")))

        def chunks(self) -> bytes:
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data

    return Handler


@contextmanager
def served(hub: Hub, answers: Callable[[Hub, Request], Answer]) -> Iterator[str]:
    """The URL of a server, for as long as it is needed."""
    server = Quiet(("127.0.0.1", 0), handler(hub, answers))
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """A Hub that huggingface_hub takes for the real one, with a token; without Xet."""
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    found = Hub()
    with served(found, answer) as found.url, served(found, answer_of_storage) as cdn:
        found.cdn = cdn.replace("127.0.0.1", "localhost")  # another host: tokens stay behind
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants._HF_DEFAULT_ENDPOINT, found.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield found
