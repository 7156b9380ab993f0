"""Requests to a store that fsspec reaches: repeated where that can help, their answers checked, failures in our words.

What fsspec and the libraries under it say of a failure may hold a URL with its credentials: none of it is shown, and no
error of theirs is chained to ours.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from html import unescape
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urljoin, urlsplit

from neoxconv.errors import CheckpointError

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before each repetition of a request
TIMEOUT = 60.0  # seconds that an answer may take
LARGEST = 8 << 20  # bytes of one answer
PART, MOST_PARTS = 16 << 20, 9000  # of an object that is written; S3 takes 10,000
PAGE = 16 << 20  # bytes of a listing in HTML
FOLDER, FILE = "directory", "file"
# What tells one content from another under the same name: the first that a store gives is kept.
VERSIONS = ("ETag", "etag", "generation", "blob_id", "md5Hash", "LastModified", "last_modified", "mtime", "created")
LINK = re.compile(r"""<a\s[^>]*?href\s*=\s*["']?([^"'\s>]+)""", re.IGNORECASE)
RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")
CHANGED = "has changed since it was opened; run the command again, on a source that stays"
AGAIN = (408, 425, 429)  # besides all from 500 on
REFUSED = (401, 403, 407)
MISSING = (404, 410)

Answered = TypeVar("Answered")


@dataclass(frozen=True)
class Facts:
    """What a store says of a path: its kind, and of a file its bytes and what tells its content from another."""

    kind: str
    size: int | None = None
    version: str = ""


class Absent(CheckpointError):
    """A path where a store has nothing, or nothing that may be seen."""

    def __init__(self, problem: str, *, refused: bool) -> None:
        super().__init__(problem)
        self.refused = refused


class Unusable(Exception):
    """An answer that came, and is not what was asked for."""

    def __init__(self, what: str, *, again: bool = True) -> None:
        super().__init__(what)
        self.again = again


def changed(before: Facts, now: Facts) -> bool:
    """Whether a file is not the one that it was, as far as the store tells."""
    versions = before.version and now.version and before.version != now.version
    return bool(versions) or None is not now.size != before.size


def persist(where: object, ask: Callable[[], Answered], deed: str = "read") -> Answered:
    """What `ask` gives, asked again after a pause where a failure may pass; `deed` is what it does.

    Raises CheckpointError: Absent where there is nothing, or nothing for us.
    """
    for count, pause in enumerate((*PAUSES, None), 1):
        try:
            return ask()
        except Exception as error:
            what, again = judged(error, deed)
            if (status := status_of(error)) in MISSING + REFUSED:
                raise Absent(f"{where}: {what}.", refused=status in REFUSED) from None
            if not again or pause is None:
                tries = f" ({count} times asked; run the same command again to continue)" if count > 1 else ""
                raise CheckpointError(f"{where}: {what}{tries}.") from None
        time.sleep(pause)
    raise AssertionError(where)


def judged(error: Exception, deed: str) -> tuple[str, bool]:
    """What went wrong, in words that hold nothing of the request, and whether it may pass."""
    status, kind = status_of(error), type(error).__name__
    if isinstance(error, Unusable):
        return str(error), error.again
    if status in MISSING:
        return f"is not there ({status}); correct the address", False
    if status in REFUSED:
        return f"may not be {deed} ({status}); give credentials that may, in the way fsspec takes them", False
    if status == 416:
        return CHANGED, False  # what was asked for lay inside of it
    if status:
        return f"the server answers {status}", status in AGAIN or status >= 500
    if isinstance(error, TimeoutError) or "Timeout" in kind:
        return f"no answer within {TIMEOUT:g} seconds", True
    if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
        return f"cannot be {deed}: a file and a folder would have one name; give another", False
    if isinstance(error, TypeError | ValueError | LookupError | NotImplementedError | AttributeError):
        return f"cannot be {deed} by way of fsspec ({kind})", False
    return f"the connection fails ({kind})", True


def status_of(error: BaseException | None) -> int:
    """The HTTP status that an error of any library stands for; 0 where it stands for none."""
    if error is None or isinstance(error, Unusable):
        return 0
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        response = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    found = getattr(error, "status", None) or getattr(response, "status_code", response)
    if isinstance(found, int):
        return found
    if isinstance(error, FileNotFoundError):
        return MISSING[0]
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return REFUSED[1]
    return status_of(error.__cause__)


def ask(fs: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """What a method of a file system gives, in bounded time."""
    if fs.async_impl:
        return wait_for(fs, getattr(fs, f"_{method}"), *arguments, **options)
    return getattr(fs, method)(*arguments, **options)


def wait_for(fs: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a coroutine function gives, run where the file system's others run."""
    from fsspec.asyn import sync

    return sync(fs.loop, function, *arguments, timeout=TIMEOUT, **options)


def is_http(fs: Any) -> bool:
    """Whether a file system is a plain web server: it lists in HTML, and answers in HTTP."""
    return "http" in fs.protocol or "https" in fs.protocol


def look(fs: Any, path: str) -> Facts:
    """What is at a path."""
    if is_http(fs):
        found: Facts = wait_for(fs, http_facts, fs, path)
        return found
    return facts_of(ask(fs, "info", path))


def facts_of(entry: Mapping[str, Any]) -> Facts:
    """What fsspec's description of a path says."""
    if entry["type"] != FILE:
        return Facts(FOLDER)
    version = next((str(entry[key]) for key in VERSIONS if entry.get(key)), "")
    return Facts(FILE, entry.get("size"), version)


def entries(fs: Any, path: str) -> dict[str, Facts]:
    """What is in a folder, by name and in the order of names; a web server tells no sizes."""
    if is_http(fs):
        found = wait_for(fs, http_entries, fs, path)
    else:
        listed = ((entry["name"].rstrip("/"), entry) for entry in ask(fs, "ls", path, detail=True))
        found = {name.rpartition("/")[2]: facts_of(entry) for name, entry in listed if name != path}
    return dict(sorted(found.items()))


def part(fs: Any, path: str, start: int, stop: int, known: Facts) -> bytes:
    """The bytes of a file from `start` to `stop`, of the file that is `known` and of no other."""
    if is_http(fs):
        data, found = wait_for(fs, http_part, fs, path, start, stop)
    elif hasattr(fs, "_call_s3"):
        data, found = wait_for(fs, s3_part, fs, path, start, stop)
    elif fs.async_impl:
        data, found = ask(fs, "cat_file", path, start=start, end=stop), known
    else:  # fsspec's own opens the file, and would read ahead
        data, found = fs.cat_file(path, start, stop, cache_type="none"), known
    if changed(known, found):
        raise Unusable(CHANGED, again=False)
    if len(data) != stop - start:
        raise Unusable(f"bytes {start} to {stop} were asked for, and {len(data)} bytes came")
    whole: bytes = data
    return whole


def store(fs: Any, path: str, source: BinaryIO, size: int, stop: threading.Event) -> None:
    """Write an object of `size` bytes in parts; it appears when all of it is there, and not at all if `stop` is set."""
    block = max(PART, size // MOST_PARTS)
    target = fs.open(path, "wb", block_size=block)
    try:
        while data := source.read(block):
            if stop.is_set():
                raise Unusable("was stopped", again=False)
            target.write(data)
    except BaseException:
        with suppress(Exception):
            target.discard()
        with suppress(AttributeError):
            target.forced = target.closed = True  # else what was written so far would be sent as if it were all
        raise
    target.close()
    found = look(fs, path)
    if found.size not in (None, size):
        raise Unusable(f"{size} bytes were sent, and {found.size} are there")


def headers(fs: Any, **more: str) -> dict[str, Any]:
    """The options of a request: the user's, and headers of ours; answers as they are stored, since ranges count so."""
    given: dict[str, Any] = fs.kwargs
    return given | {"headers": {**given.get("headers", {}), "Accept-Encoding": "identity", **more}}


async def http_facts(fs: Any, url: str) -> Facts:
    """What a web server says of a file, asked for its first byte where it does not say it otherwise."""
    session = await fs.set_session()
    async with session.head(fs.encode_url(url), **headers(fs) | {"allow_redirects": True}) as answer:
        if answer.status < 300 and "Content-Length" in answer.headers:
            return http_answer(answer)
    async with session.get(fs.encode_url(url), **headers(fs, Range="bytes=0-0")) as answer:
        if answer.status != 416:  # of an empty file
            answer.raise_for_status()
        return http_answer(answer)


def http_answer(answer: Any) -> Facts:
    """What an answer's head says of the whole file; a page is what a server shows of a folder."""
    told = answer.headers
    whole = told.get("Content-Range", "").rpartition("/")[2] or told.get("Content-Length", "")
    version = told.get("ETag") or told.get("Last-Modified") or ""
    if answer.content_type == "text/html":
        return Facts(FOLDER)
    return Facts(FILE, int(whole) if whole.isdigit() else None, version)


async def http_part(fs: Any, url: str, start: int, stop: int) -> tuple[bytes, Facts]:
    """A range of a file, and what the answer says of the whole; never more than the range is taken in."""
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **headers(fs, Range=f"bytes={start}-{stop - 1}")) as answer:
        answer.raise_for_status()
        if answer.status == 200 and start == 0 and answer.content_length == stop:
            return await body(answer, stop), http_answer(answer)
        if answer.status != 206:
            told = "gives no ranges of bytes, only whole files; download it, or put it on another server"
            raise Unusable(f"the server {told}", again=False)
        told = answer.headers.get("Content-Range", "")
        found = RANGE.fullmatch(told)
        if not found or (int(found[1]), int(found[2])) != (start, stop - 1):
            raise Unusable(f"bytes {start} to {stop} were asked for, and others came")
        return await body(answer, stop - start), http_answer(answer)


async def body(answer: Any, most: int) -> bytes:
    """The bytes of an answer; it is given up where they are too many."""
    data = bytearray()
    async for chunk in answer.content.iter_any():
        data += chunk
        if len(data) > most:
            raise Unusable(f"more came than the {most} bytes that were asked for")
    return bytes(data)


async def http_entries(fs: Any, url: str) -> dict[str, Facts]:
    """What the page of a folder links to that lies in it."""
    session = await fs.set_session()
    where, question, query = url.partition("?")
    async with session.get(fs.encode_url(where.rstrip("/") + "/" + question + query), **headers(fs)) as answer:
        answer.raise_for_status()
        if answer.content_type != "text/html":
            return {}
        page, base = await body(answer, PAGE), str(answer.url)
    return dict(linked(page.decode("utf-8", "replace"), base))


def linked(page: str, base: str) -> Iterator[tuple[str, Facts]]:
    """Names in the folder at `base` that a page links to; those of folders end in a slash there."""
    folder = urlsplit(base).path.rpartition("/")[0] + "/"
    for link in LINK.findall(page):
        path = urlsplit(urljoin(base, unescape(link))).path
        name = path.removeprefix(folder).rstrip("/")
        if path.startswith(folder) and name and "/" not in name:
            yield name, Facts(FOLDER if path.endswith("/") else FILE)


async def s3_part(fs: Any, path: str, start: int, stop: int) -> tuple[bytes, Facts]:
    """A range of an object, and what the answer says of the whole."""
    bucket, key, version = fs.split_path(path)
    more = {"VersionId": version} if version else {}
    found = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **more)
    whole = str(found.get("ContentRange", "")).rpartition("/")[2]
    if not whole.isdigit():
        raise Unusable("the store gives no ranges of bytes, only whole objects", again=False)
    async with found["Body"] as body:
        return await body.read(), Facts(FILE, int(whole), str(found.get("ETag", "")))
