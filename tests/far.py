"""Stores far away, on loopback: a web server that counts what it gives and fails as it is told, and an S3 server."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

SECRET = "hunter2secret"
MORE = b"x" * 1000


@dataclass(frozen=True)
class Request:
    """What was asked for, and the bytes of a file that were given."""

    method: str
    path: str
    authorized: bool
    nbytes: int = 0

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


Fault = Callable[[Request, int], str]  # of a request, and how many came before it for that file: what goes wrong


def nothing(request: Request, number: int) -> str:
    return ""


@dataclass
class Web:
    """A folder served over HTTP; `fault` says what goes wrong with a request."""

    root: Path
    port: int = 0
    fault: Fault = nothing
    log: list[Request] = field(default_factory=list)  # of what was answered
    arrived: list[Request] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def secret_url(self) -> str:
        return f"http://user:{SECRET}@127.0.0.1:{self.port}"

    def nbytes(self, pattern: str = "") -> int:
        """Bytes given of files whose names hold the pattern."""
        return sum(request.nbytes for request in self.log if re.search(pattern, request.name))


@contextmanager
def web(root: Path) -> Iterator[Web]:
    """A server of what `root` holds, for as long as it is needed."""
    served = Web(root)

    class Handler(Answer):
        web = served

    server = Quiet(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.stalled.set()
        server.shutdown()
        server.server_close()


class Quiet(ThreadingHTTPServer):
    """A server that says nothing of clients that go away."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


class Answer(BaseHTTPRequestHandler):
    """One answer: a folder's page, or a file's range."""

    protocol_version = "HTTP/1.1"
    web: Web

    def log_message(self, *words: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        asked = Request(self.command, path, "Authorization" in self.headers or "sig=" in self.path)
        fault = self.web.fault(asked, sum(old.path == path for old in self.web.arrived))
        self.web.arrived.append(asked)
        place = self.web.root / path.strip("/")
        if place.is_dir() and fault.isdigit():
            self.reply(int(fault))
        elif not place.exists():
            self.reply(404)
        elif place.is_dir():
            self.page(place)
        else:
            asked = self.file(place, asked, fault)
        self.web.log.append(asked)

    def page(self, folder: Path) -> None:
        if not self.path.endswith("/"):
            self.reply(301, Location=self.path + "/")
            return
        names = [path.name + "/" * path.is_dir() for path in folder.iterdir()]
        links = "".join(f'<li><a href="{name}">{name}</a></li>' for name in ["../", "?C=N;O=D", *names])
        self.reply(200, f"<html><ul>{links}</ul></html>".encode(), **{"Content-Type": "text/html; charset=utf-8"})

    def file(self, path: Path, asked: Request, fault: str) -> Request:
        if fault.isdigit():
            self.reply(int(fault))
            return asked
        size = path.stat().st_size
        given = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(given[1]), min(int(given[2]) + 1, size)) if given else (0, size)
        told = {"ETag": f'"{fault or "first"}"' if fault == "changed" else '"first"', "Accept-Ranges": "bytes"}
        if fault == "stall":
            self.web.stalled.wait(5)
        if fault == "whole" or not given:
            self.reply(200, path.read_bytes(), **told)
            return replace(asked, nbytes=size * (self.command == "GET"))
        told["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        with path.open("rb") as stream:
            stream.seek(start)
            body = stream.read(stop - start)
        if fault == "less":
            body = body[: len(body) // 2]
        elif fault == "more":
            body += MORE
        elif fault == "elsewhere":
            told["Content-Range"] = f"bytes {start + 1}-{stop}/{size}"
        elif fault == "drop":
            told["Content-Length"] = str(len(body))
            body = body[: len(body) // 2]
        self.reply(206, body, **told)
        if fault == "drop":
            self.close_connection = True
            self.connection.close()
        return replace(asked, nbytes=len(body))

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        told = {"Content-Type": "application/octet-stream", "Content-Length": str(len(body))} | headers
        for name, value in told.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="session")
def s3() -> Iterator[Any]:
    """boto3's client of an S3 server of our own, which fsspec finds by the environment."""
    pytest.importorskip("s3fs", reason="s3fs is not installed; pip install 'neoxconv[remote]'")
    moto = pytest.importorskip("moto.server", reason="moto is not installed; pip install 'neoxconv[test]'")
    boto3 = pytest.importorskip("boto3", reason="boto3 is not installed; pip install 'neoxconv[test]'")
    server = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    told = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in told.items():
            patch.setenv(name, value)
        client = boto3.client("s3")
        client.create_bucket(Bucket="bucket")
        try:
            yield client
        finally:
            server.stop()


def upload(client: Any, folder: Path, prefix: str) -> str:
    """The URL of a copy of a folder in the bucket."""
    for path in folder.rglob("*"):
        if path.is_file():
            client.upload_file(str(path), "bucket", f"{prefix}/{path.relative_to(folder)}")
    return f"s3://bucket/{prefix}"
