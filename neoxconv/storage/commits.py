"""What is written to a repository of the Hugging Face Hub, by way of huggingface_hub.

Large files go first, each by itself, into the storage behind the repository, where nobody sees them. Then one commit
names them all, with the small files in it. So a reader finds nothing of them, or everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neoxconv.storage.hub import Repository, api, told


@dataclass(frozen=True)
class Large:
    """A file in the storage: what it is found by there."""

    sha256: str
    size: int


def has_token() -> bool:
    """Whether huggingface_hub has a token to send."""
    from huggingface_hub import get_token

    return get_token() is not None


def make(where: Repository, *, private: bool) -> None:
    """Make the repository where it is missing. Raises where files may not be sent to it."""
    from huggingface_hub import CommitOperationAdd

    with told():
        api().create_repo(where.name, repo_type=where.kind, private=private or None, exist_ok=True)
        nothing = CommitOperationAdd("config.json", b"")  # the answer to it says whether we may write
        api().preupload_lfs_files(where.name, [nothing], repo_type=where.kind)


def send(where: Repository, path: str, file: Path) -> Large | None:
    """Put a file into the storage, to be committed at `path`; None where the Hub wants it in the commit itself.

    What the storage has already is not sent again.
    """
    from huggingface_hub import CommitOperationAdd

    addition = CommitOperationAdd(path, file)
    with told(), _without_bars():
        api().preupload_lfs_files(where.name, [addition], repo_type=where.kind, gitignore_content="")
    if addition.path_or_fileobj != b"":  # what was sent is taken out of it
        return None
    return Large(addition.upload_info.sha256.hex(), addition.upload_info.size)


def kept(where: Repository, files: Mapping[str, Large]) -> set[str]:
    """Which of the files, by any name, the storage still has."""
    from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

    if not files:
        return set()
    infos = [UploadInfo(each.size, b"", bytes.fromhex(each.sha256)) for each in files.values()]
    with told():
        wanted, failed, _ = post_lfs_batch_info(
            infos, token=None, repo_type=where.kind, repo_id=where.name, endpoint=api().endpoint
        )
    missing = {entry["oid"] for entry in (*wanted, *failed) if "error" in entry or entry.get("actions")}
    return {name for name, each in files.items() if each.sha256 not in missing}


def commit(
    where: Repository, small: Mapping[str, bytes | Path], large: Mapping[str, Large], *, message: str, parent: str
) -> None:
    """Commit files by their paths in the repository; `large` ones were sent before, and nothing else may be in between
    the commit `parent` and this one.
    """
    from huggingface_hub import CommitOperationAdd

    additions = [_sent(path, each) for path, each in large.items()]
    additions += [CommitOperationAdd(path, content) for path, content in small.items()]
    with told(), _without_bars():
        api().create_commit(
            where.name, additions, commit_message=message, repo_type=where.kind, parent_commit=parent or None
        )


def _sent(path: str, file: Large) -> Any:
    """The addition of a file that was sent, perhaps by an earlier run, and is not here any more.

    huggingface_hub offers no other way to make one. Were its fields named otherwise, it would ask the storage for the
    file by its SHA-256, and find it there.
    """
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    addition = CommitOperationAdd(path, b"")
    addition.upload_info = UploadInfo(file.size, b"", bytes.fromhex(file.sha256))
    addition._upload_mode, addition._is_uploaded = "lfs", True
    return addition


@contextmanager
def _without_bars() -> Iterator[None]:
    """huggingface_hub's bars are off in it: we have our own."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils
    off = utils.are_progress_bars_disabled()
    utils.disable_progress_bars()
    try:
        yield
    finally:
        if not off:
            utils.enable_progress_bars()
