"""What a command line calls a place: a path, or a URL of any protocol that fsspec knows."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from neoxconv.errors import PlanError
from neoxconv.storage.hub import HUB, pinned, repository
from neoxconv.storage.places import Place
from neoxconv.storage.protocols import WEB
from neoxconv.storage.remote import Remote
from neoxconv.storage.requests import Absent, retrying

URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)(::|://)")
_LOCAL = ("file", "local")
_INSTALL, _INSTALLED = "pip install 'neoxconv[remote]'", (*WEB, "s3", "s3a")


def place(text: Place | str) -> Place:
    """The place that a command line means: a path, or a URL of any protocol that fsspec knows.

    Raises PlanError where a package is missing that the protocol needs.
    """
    if isinstance(text, Remote) and text.is_moving:
        return _on_the_hub(text.path)
    if not isinstance(text, str):
        return text
    match = URL.match(text)
    if not match:
        return Path(text)
    protocol = match[1].lower()
    url = _parse_url(text)
    if url is None or match[2] == "::":
        raise PlanError(f"{protocol}: {_misread(text)}.")
    if protocol in _LOCAL:
        return Path(url.path)
    if {".", ".."} & set(url.path.split("/")):
        raise PlanError(f"{protocol}: a store knows no `.` and no `..`; write the URL without them.")
    shown = f"{protocol}://{(url.netloc.rpartition('@')[2] + url.path).rstrip('/')}"
    if protocol == HUB:
        return _on_the_hub(shown.partition("://")[2])
    kind = _file_system(protocol, shown)
    if protocol in WEB:
        return Remote(shown, protocol, f"{protocol}://{url.netloc}{url.path}".rstrip("/"), query=url.query)
    options = {key: value for key, value in kind._get_kwargs_from_urls(text).items() if isinstance(value, str | int)}
    found = Remote(shown, protocol, kind._strip_protocol(text).rstrip("/"), options=tuple(sorted(options.items())))
    return found.anew()  # fsspec may know it from earlier


def _on_the_hub(path: str) -> Remote:
    """A place in a repository, at the commit that it has now; where none is to be seen, as it was written."""
    where = repository(path)
    asked = Remote(f"{HUB}://{where.path}", HUB, where.path)
    try:
        return replace(asked, path=retrying(asked, lambda: pinned(asked.path)))
    except Absent:
        return asked


def _parse_url(text: str) -> SplitResult | None:
    """The parts of a URL; None where a password may be in a part where it is not looked for."""
    try:
        url = urlsplit(text, allow_fragments=False)
        doubtful = url.port == 0 or (url.scheme in WEB and ("@" in url.path or not url.hostname))
    except ValueError:
        return None
    return None if doubtful else url


def _misread(text: str) -> str:
    """Why a URL cannot be understood; nothing of it is shown where a password may be in it."""
    server = re.fullmatch(r"\w+://([^/?@]*?)(?::([^/?@:]*))?(?:[/?].*)?", text)
    if "@" in text or not server:
        return "this URL cannot be understood; write a password's odd characters as %40, %2F and so on"
    host, port = server[1], server[2] or ""
    if not host:
        return "this URL names no host; write it as http://HOST/PATH"
    if not (port.isdecimal() and 1 <= int(port) <= 65535):
        return f"{port!r} is no port of {host}; they go from 1 to 65535"
    return "this URL cannot be understood; correct it"


def _file_system(protocol: str, shown: str) -> Any:
    """fsspec's class for a protocol."""
    try:
        from fsspec import get_filesystem_class
    except ImportError:
        raise PlanError(f"{shown}: needs fsspec; {_INSTALL}.") from None
    try:
        return get_filesystem_class(protocol)
    except ImportError as error:
        how = _INSTALL if protocol in _INSTALLED else str(error)
        raise PlanError(f"{shown}: {protocol} needs a package that is not installed; {how}.") from None
    except ValueError:
        raise PlanError(f"{shown}: fsspec knows no protocol {protocol}.") from None
