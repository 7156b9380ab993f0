"""Repositories of the Hugging Face Hub, read by way of huggingface_hub; asked as fsspec's file systems are.

The path of a place is ORG/NAME[@REVISION][/PATH], with `datasets/` or `spaces/` before it for those. A repository is
read at one commit: `pinned` asks once which one a revision is, and what a commit holds is listed once in a process.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from neoxconv.errors import PlanError
from neoxconv.storage.requests import FILE, FOLDER, TIMEOUT, Refused, Unusable, status_of
from neoxconv.storage.windows import Windows

HUB = "hf"
_REF = re.compile("refs/(?:pr|convert)/[^/@]+")  # the revisions that are written with their slashes
_ADDRESS = re.compile(rf"((?:datasets|spaces|models)/)?([\w.-]+/[\w.-]+)(?:@({_REF.pattern}|[^/@]+))?(?:/(.*))?")
_COMMIT = re.compile("[0-9a-f]{40}")
_LISTING = threading.Lock()
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
Entry = dict[str, Any]  # a file or a folder, as fsspec describes it


@dataclass(frozen=True)
class Repository:
    """A place in a repository: of which kind and name, at which revision ("" for main), and the path in it."""

    kind: str
    name: str
    revision: str = ""
    inside: str = ""

    @property
    def path(self) -> str:
        """The place as `repository` reads it."""
        kind = "" if self.kind == "model" else f"{self.kind}s/"
        revision = self.revision if _REF.fullmatch(self.revision) else quote(self.revision, safe="")
        return "/".join(filter(None, (f"{kind}{self.name}{'@' * bool(revision)}{revision}", self.inside)))

    @property
    def commit(self) -> str:
        """The commit that the revision is; "" where it is the name of one, which may move."""
        return self.revision if _COMMIT.fullmatch(self.revision) else ""


def repository(path: str) -> Repository:
    """The place that a path means. Raises PlanError where it names no repository."""
    found = _ADDRESS.fullmatch(path)
    if not found:
        raise PlanError(
            f"{HUB}://{path}: names no repository of the Hugging Face Hub; write hf://ORG/NAME[@REV][/PATH]."
        )
    kind, name, revision, inside = found.groups(default="")
    return Repository(kind.rstrip("s/") or "model", name, unquote(revision), inside.strip("/"))


def api() -> Any:
    """huggingface_hub's client, which finds its endpoint and token by itself.

    Raises PlanError where it is missing or too old.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise PlanError("hf:// needs huggingface_hub; pip install huggingface_hub.") from None
    if (version := huggingface_hub.__version__).startswith("0."):
        raise PlanError(f"hf:// needs huggingface_hub 1.0, found {version}; pip install -U huggingface_hub.")
    logger = logging.getLogger("huggingface_hub.utils._http")
    if _has_no_url not in logger.filters:
        logger.addFilter(_has_no_url)
    return huggingface_hub.HfApi()


def _has_no_url(record: logging.LogRecord) -> bool:
    """Whether what huggingface_hub says of a request may be shown: that it waits; not the URL, which may be signed."""
    return "://" not in record.getMessage()


@contextmanager
def told() -> Iterator[None]:
    """Failures in it that only huggingface_hub can explain are raised so that `retrying` can tell what to do."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        status = status_of(error)
        if status in (401, 403):
            raise Refused(status, _what_to_do(type(error).__name__, status)) from None
        if type(error).__name__ == "OfflineModeIsEnabled":
            raise Unusable("may not be asked for: HF_HUB_OFFLINE is set; unset it", again=False) from None
        if status == 412:
            raise Unusable("others commit to it all the time; run the same command again to continue") from None
        raise
    except ValueError as error:
        raise Unusable(f"is refused by huggingface_hub: {error}", again=False) from None


def _what_to_do(kind: str, status: int) -> str:
    """What helps where the Hub refuses."""
    if kind == "GatedRepoError":
        return f"it is gated: accept its terms on its page at the Hub, then {_LOG_IN}"
    if status == 401:
        return f"it is private, gated, or not there; {_LOG_IN}"
    return f"the token in use has no right to that; {_LOG_IN}, with a token that has"


def pinned(path: str) -> str:
    """The path at the commit that its revision is now. Raises what `told` does, or huggingface_hub's error."""
    where = repository(path)
    if where.commit:
        return path
    with told():
        info = api().repo_info(
            where.name, repo_type=where.kind, revision=where.revision or None, timeout=TIMEOUT, expand=["sha"]
        )
    return replace(where, revision=info.sha).path


def head(where: Repository) -> tuple[str, bool]:
    """The commit at which a repository is now, and whether it is private; raises as `pinned` does."""
    with told():
        info = api().repo_info(where.name, repo_type=where.kind, timeout=TIMEOUT, expand=["sha", "private"])
    return str(info.sha), bool(info.private)


def listing(where: Repository) -> dict[str, dict[str, Entry]]:
    """What every folder of a commit holds, by name; asked once in a process, as a commit never changes."""
    with _LISTING, told():
        client = api()
        return _listed(client.endpoint, replace(where, inside=""))


@lru_cache(maxsize=16)
def _listed(endpoint: str, where: Repository) -> dict[str, dict[str, Entry]]:
    folders: dict[str, dict[str, Entry]] = {"": {}}
    for item in api().list_repo_tree(where.name, recursive=True, revision=where.revision, repo_type=where.kind):
        above, _, name = item.path.rpartition("/")
        is_file = hasattr(item, "blob_id")
        entry: Entry = {"name": replace(where, inside=item.path).path, "type": FILE if is_file else FOLDER}
        if is_file:
            entry |= {"size": item.size, "blob_id": item.blob_id, "sha256": item.lfs.sha256 if item.lfs else ""}
        else:
            folders.setdefault(item.path, {})
        folders.setdefault(above, {})[name] = entry
    return folders


class Hub:
    """What protocols.py asks of a file system, of repositories."""

    async_impl = False
    protocol = (HUB,)

    def __init__(self) -> None:
        self.windows = Windows(_opened)

    def info(self, path: str) -> Entry:
        """What is at a path. Raises FileNotFoundError where nothing is."""
        where = repository(pinned(path))
        folders = listing(where)
        above, _, name = where.inside.rpartition("/")
        if where.inside and name not in folders.get(above, {}):
            raise FileNotFoundError(path)
        return folders[above][name] if where.inside else {"name": path, "type": FOLDER}

    def ls(self, path: str, detail: bool = True) -> list[Entry]:
        """What is in a folder. Raises FileNotFoundError where there is none."""
        where = repository(pinned(path))
        folders = listing(where)
        if where.inside not in folders:
            raise FileNotFoundError(path)
        return list(folders[where.inside].values())

    def cat_file(self, path: str, start: int, stop: int, ahead: int = 0) -> bytes:
        """The bytes of a file from `start` to `stop`; `ahead` more may be asked for next, and then come sooner."""
        with told():
            return self.windows.read(path, start, stop, stop + ahead)

    def invalidate_cache(self) -> None:
        """Nothing: what is kept is of commits."""


@contextmanager
def _opened(path: str, start: int, stop: int) -> Iterator[Iterator[bytes]]:
    """The bytes of a file from `start` to `stop` as they come. Raises Unusable where others would."""
    import huggingface_hub.utils
    from huggingface_hub import hf_hub_url

    utils: Any = huggingface_hub.utils

    where, client = repository(pinned(path)), api()
    url = hf_hub_url(where.name, where.inside, repo_type=where.kind, revision=where.revision, endpoint=client.endpoint)
    headers = {**utils.build_hf_headers(), "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    with utils.get_session().stream("GET", url, headers=headers, timeout=TIMEOUT, follow_redirects=True) as answer:
        utils.hf_raise_for_status(answer)
        expected = f"bytes {start}-{stop - 1}/"
        if answer.status_code != 206 or not answer.headers.get("Content-Range", "").startswith(expected):
            raise Unusable(f"bytes {start} to {stop} were asked for, and others came")
        yield answer.iter_raw()


HUB_FILES = Hub()
