"""One request, repeated where that can help: what may pass, what a failure means, in our words.

What fsspec and the libraries under it say of a failure may hold a URL with its credentials: none of it is shown, and no
error of theirs is chained to ours.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from neoxconv.errors import CheckpointError, NeoxconvError

PAUSES = (0.5, 1.0, 2.0, 4.0)  # seconds before each repetition of a request
TIMEOUT = 60.0  # seconds that an answer may take
_LONGEST_WAIT = 600  # seconds, if a server asks for it; the Hub counts requests over 300
_RATE = re.compile(r"r\s*=\s*0\s*;\s*t\s*=\s*(\d+)")  # of RateLimit: none remain for so many seconds
FOLDER, FILE = "directory", "file"
# What tells one content from another under the same name: the first that a store gives is kept.
VERSIONS = ("ETag", "etag", "generation", "blob_id", "md5Hash", "LastModified", "last_modified", "mtime", "created")
CHANGED = "has changed since it was opened; run the command again, on a source that stays"
_AGAIN = (408, 425, 429)  # besides all from 500 on
_REFUSED = (401, 403, 407)
_MISSING = (404, 410)
_LOG = logging.getLogger(__name__)
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


class Refused(Exception):
    """A request that a store refuses with `status`, and what to do."""

    def __init__(self, status: int, what_to_do: str) -> None:
        super().__init__(what_to_do)
        self.status = status


def changed(before: Facts, now: Facts) -> bool:
    """Whether a file is not the one that it was, as far as the store tells."""
    if before.version and now.version and before.version != now.version:
        return True
    return now.size is not None and now.size != before.size


def retrying(where: object, request: Callable[[], Answered], deed: str = "read") -> Answered:
    """What `request` gives, sent again after a pause where a failure may pass; `deed` is what it does.

    Where the server says how long to wait, that long. Raises CheckpointError: Absent where there is nothing, or nothing
    for us.
    """
    for count, pause in enumerate((*PAUSES, None), 1):
        try:
            return request()
        except NeoxconvError:
            raise
        except Exception as error:
            what, again = _judged(error, deed)
            if (status := status_of(error)) in _MISSING + _REFUSED:
                raise Absent(f"{where}: {what}.", refused=status in _REFUSED) from None
            if not again or pause is None:
                tries = f" ({count} times asked; run the same command again to continue)" if count > 1 else ""
                raise CheckpointError(f"{where}: {what}{tries}.") from None
            wait = _wait_of(error)
            if wait > _LONGEST_WAIT:
                raise CheckpointError(f"{where}: {what}, and asks to wait {wait} seconds; continue then.") from None
            if wait:
                _LOG.warning("%s: %s, and asks to wait %d seconds", where, what, wait)
        time.sleep(wait or pause)
    raise AssertionError(where)


def _judged(error: Exception, deed: str) -> tuple[str, bool]:
    """What went wrong, in words that hold nothing of the request, and whether it may pass."""
    status, kind = status_of(error), type(error).__name__
    if isinstance(error, Unusable):
        return str(error), error.again
    if status in _MISSING:
        return f"is not there ({status}); correct the address", False
    if status in _REFUSED:
        told = str(error) if isinstance(error, Refused) else "give credentials that may, in the way fsspec takes them"
        return f"may not be {deed} ({status}); {told}", False
    if status == 416:
        return CHANGED, False  # what was asked for lay inside of it
    if status:
        return f"the server answers {status}", status in _AGAIN or status >= 500
    if isinstance(error, TimeoutError) or "Timeout" in kind:
        return f"no answer within {TIMEOUT:g} seconds", True
    if isinstance(error, FileExistsError | IsADirectoryError | NotADirectoryError):
        return f"cannot be {deed}: a file and a folder would have one name; give another", False
    if isinstance(error, TypeError | ValueError | LookupError | NotImplementedError | AttributeError):
        return f"cannot be {deed} by way of fsspec ({kind})", False
    return f"the connection fails ({kind})", True


def _wait_of(error: Exception) -> int:
    """The seconds after which a server that has enough of requests takes the next one; 0 where it does not tell."""
    told = getattr(getattr(error, "response", None), "headers", None) or getattr(error, "headers", None)
    if status_of(error) not in (429, 503) or not isinstance(told, Mapping):
        return 0
    given = {name.lower(): str(value) for name, value in told.items()}
    rate, after = _RATE.search(given.get("ratelimit", "")), given.get("retry-after", "").strip()
    seconds = rate[1] if rate else after
    return int(seconds) + 1 if re.fullmatch("[0-9]{1,9}", seconds) else 0


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
        return _MISSING[0]
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        return _REFUSED[1]
    return status_of(error.__cause__)


def call(fs: Any, method: str, *arguments: Any, **options: Any) -> Any:
    """What a method of a file system gives, in bounded time."""
    if fs.async_impl:
        return wait_for(fs, getattr(fs, f"_{method}"), *arguments, **options)
    return getattr(fs, method)(*arguments, **options)


def wait_for(fs: Any, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a coroutine function gives, run where the file system's others run."""
    from fsspec.asyn import sync

    return sync(fs.loop, function, *arguments, timeout=TIMEOUT, **options)
