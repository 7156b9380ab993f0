"""Requests to a store that fsspec reaches: repeated where that can help, their answers checked, failures in our words.

What fsspec and the libraries under it say of a failure may hold a URL with its credentials: none of it is shown, and no
error of theirs is chained to ours.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from html import unescape
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

from neoxconv.storage.hub import Hub
from neoxconv.storage.requests import CHANGED, FILE, FOLDER, VERSIONS, Facts, Unusable, call, changed, wait_for

WEB = ("http", "https")  # a web server's listings may lack what it has
LARGEST = 8 << 20  # bytes of one answer
_PART, _MOST_PARTS = 16 << 20, 9000  # of an object that is written; S3 takes 10,000
_PAGE = 16 << 20  # bytes of a listing in HTML
_LINK = re.compile(r"""<a\s[^<>]*?href\s*=\s*["']?([^"'\s>]+)""", re.IGNORECASE)
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


def _is_http(fs: Any) -> bool:
    """Whether a file system is a plain web server: it lists in HTML, and answers in HTTP."""
    return any(name in fs.protocol for name in WEB)


def facts_at(fs: Any, path: str) -> Facts:
    """What is at a path."""
    if _is_http(fs):
        found: Facts = wait_for(fs, _http_facts, fs, path)
        return found
    return _facts_of(call(fs, "info", path))


def _facts_of(entry: Mapping[str, Any]) -> Facts:
    """What fsspec's description of a path says."""
    if entry["type"] != FILE:
        return Facts(FOLDER)
    version = next((str(entry[key]) for key in VERSIONS if entry.get(key)), "")
    return Facts(FILE, entry.get("size"), version)


def entries(fs: Any, path: str) -> dict[str, Facts]:
    """What is in a folder, by name and in the order of names; a web server tells no sizes."""
    if _is_http(fs):
        found = wait_for(fs, _http_entries, fs, path)
    else:
        listed = ((entry["name"].rstrip("/"), entry) for entry in call(fs, "ls", path, detail=True))
        found = {name.rpartition("/")[2]: _facts_of(entry) for name, entry in listed if name != path}
    return dict(sorted(found.items()))


def read_range(fs: Any, path: str, *, start: int, stop: int, known: Facts, ahead: int = 0) -> bytes:
    """The bytes of a file from `start` to `stop`, of the file that is `known` and of no other.

    `ahead` more are wanted next, which may be asked for at once. Raises Unusable where others came, or not all of them.
    """
    if _is_http(fs):
        data, found = wait_for(fs, _http_range, fs, path, start, stop)
    elif hasattr(fs, "_call_s3"):
        data, found = wait_for(fs, _s3_range, fs, path, start, stop)
    elif isinstance(fs, Hub):
        data, found = fs.cat_file(path, start, stop, ahead), known
    elif fs.async_impl:
        data, found = call(fs, "cat_file", path, start=start, end=stop), known
    else:  # fsspec's own opens the file, and would read ahead
        data, found = fs.cat_file(path, start, stop, cache_type="none"), known
    if changed(known, found):
        raise Unusable(CHANGED, again=False)
    if len(data) != stop - start:
        raise Unusable(f"bytes {start} to {stop} were asked for, and {len(data)} bytes came")
    whole: bytes = data
    return whole


def write_object(fs: Any, path: str, source: BinaryIO, *, size: int, stop: threading.Event) -> None:
    """Write an object of `size` bytes in parts; it appears when all of it is there, and not at all if `stop` is set.

    Raises Unusable where it was stopped, or where the store then has another size.
    """
    block = max(_PART, size // _MOST_PARTS)
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
    found = facts_at(fs, path)
    if found.size not in (None, size):
        raise Unusable(f"{size} bytes were sent, and {found.size} are there")


def headers(fs: Any, **more: str) -> dict[str, Any]:
    """The options of a request: the user's, and headers of ours; answers as they are stored, since ranges count so."""
    given: dict[str, Any] = fs.kwargs
    return given | {"headers": {**given.get("headers", {}), "Accept-Encoding": "identity", **more}}


async def _http_facts(fs: Any, url: str) -> Facts:
    """What a web server says of a file, asked for its first byte where it does not say it otherwise."""
    session = await fs.set_session()
    async with session.head(fs.encode_url(url), **headers(fs) | {"allow_redirects": True}) as answer:
        if answer.status < 300 and "Content-Length" in answer.headers:
            return _http_answer(answer)
    async with session.get(fs.encode_url(url), **headers(fs, Range="bytes=0-0")) as answer:
        if answer.status != 416:  # of an empty file
            answer.raise_for_status()
        return _http_answer(answer)


def _http_answer(answer: Any) -> Facts:
    """What an answer's head says of the whole file; a page is what a server shows of a folder."""
    told = answer.headers
    whole = told.get("Content-Range", "").rpartition("/")[2] or told.get("Content-Length", "")
    version = told.get("ETag") or told.get("Last-Modified") or ""
    if answer.content_type == "text/html":
        return Facts(FOLDER)
    return Facts(FILE, int(whole) if whole.isdigit() else None, version)


async def _http_range(fs: Any, url: str, start: int, stop: int) -> tuple[bytes, Facts]:
    """A range of a file, and what the answer says of the whole; never more than the range is taken in."""
    session = await fs.set_session()
    async with session.get(fs.encode_url(url), **headers(fs, Range=f"bytes={start}-{stop - 1}")) as answer:
        answer.raise_for_status()
        if answer.status == 200 and start == 0 and answer.content_length == stop:
            return await _body(answer, stop), _http_answer(answer)
        if answer.status != 206:
            told = "gives no ranges of bytes, only whole files; download it, or put it on another server"
            raise Unusable(f"the server {told}", again=False)
        told = answer.headers.get("Content-Range", "")
        found = _RANGE.fullmatch(told)
        if not found or (int(found[1]), int(found[2])) != (start, stop - 1):
            raise Unusable(f"bytes {start} to {stop} were asked for, and others came")
        return await _body(answer, stop - start), _http_answer(answer)


async def _body(answer: Any, most: int) -> bytes:
    """The bytes of an answer to a request for a range; it is given up where they are too many."""
    data = await _at_most(answer, most)
    if data is None:
        raise Unusable(f"more came than the {most} bytes that were asked for")
    return data


async def _page(answer: Any) -> str:
    """A listing's text; it is given up, and not asked for again, where it has no end or is far too long."""
    data = await _at_most(answer, _PAGE)
    if data is None:
        told = f"lists the folder in more than {_PAGE} bytes; give another folder, or download it"
        raise Unusable(f"the server {told}", again=False)
    return data.decode("utf-8", "replace")


async def _at_most(answer: Any, most: int) -> bytes | None:
    """The bytes of an answer; None where more than `most` came."""
    data = bytearray()
    async for chunk in answer.content.iter_any():
        data += chunk
        if len(data) > most:
            return None
    return bytes(data)


async def _http_entries(fs: Any, url: str) -> dict[str, Facts]:
    """What the page of a folder links to that lies in it."""
    session = await fs.set_session()
    where, question, query = url.partition("?")
    async with session.get(fs.encode_url(where.rstrip("/") + "/" + question + query), **headers(fs)) as answer:
        answer.raise_for_status()
        if answer.content_type != "text/html":
            return {}
        page, base = await _page(answer), str(answer.url)
    return dict(_linked(page, base))


def _linked(page: str, base: str) -> Iterator[tuple[str, Facts]]:
    """Names in the folder at `base` that a page links to; those of folders end in a slash there."""
    folder = urlsplit(base).path.rpartition("/")[0] + "/"
    for link in _LINK.findall(page):
        path = urlsplit(urljoin(base, unescape(link))).path
        name = path.removeprefix(folder).rstrip("/")
        if path.startswith(folder) and name and "/" not in name:
            yield name, Facts(FOLDER if path.endswith("/") else FILE)


async def _s3_range(fs: Any, path: str, start: int, stop: int) -> tuple[bytes, Facts]:
    """A range of an object, and what the answer says of the whole."""
    bucket, key, version = fs.split_path(path)
    more = {"VersionId": version} if version else {}
    found = await fs._call_s3("get_object", Bucket=bucket, Key=key, Range=f"bytes={start}-{stop - 1}", **more)
    whole = str(found.get("ContentRange", "")).rpartition("/")[2]
    if not whole.isdigit():
        raise Unusable("the store gives no ranges of bytes, only whole objects", again=False)
    if found.get("ContentLength") != stop - start:
        raise Unusable(f"{stop - start} bytes were asked for, and the store would give {found.get('ContentLength')}")
    async with found["Body"] as body:
        return await body.read(), Facts(FILE, int(whole), str(found.get("ETag", "")))
