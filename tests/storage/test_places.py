"""A place here and one far away are asked in the same way, and answer alike."""

from __future__ import annotations

import pickle
from pathlib import Path
from uuid import uuid4

import pytest

from neoxconv.errors import CheckpointError
from neoxconv.storage import (
    Place,
    Remote,
    anew,
    holds,
    is_far,
    is_file,
    is_folder,
    is_here,
    open_storage,
    place,
    size_of,
    stream_of,
    together,
    without_dots,
)

pytest.importorskip("fsspec", reason="fsspec is not installed; pip install 'neoxconv[remote]'")
FILES = {"a.txt": b"first", "inner/b.txt": b"second", "inner/deep/c.bin": b""}


@pytest.fixture(params=["here", "far"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """The same files in a folder on the disk and in a store."""
    if request.param == "here":
        for name, data in FILES.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(data)
        return place(str(tmp_path))
    far = place(f"memory://{uuid4().hex}/x")
    assert is_far(far)
    for name, data in FILES.items():
        (far / name).write(data)
    return anew(far)


def test_what_pathlib_offers_both_offer(folder: Place) -> None:
    file = folder / "inner" / "b.txt"
    assert (file.name, file.stem, file.suffix, file.parent.name) == ("b.txt", "b", ".txt", "inner")
    assert file == folder / "inner/b.txt" and file.with_name("c") == folder / "inner" / "c"
    assert file.exists() and file.is_file() and not file.is_dir() and file.parent.is_dir()
    assert not (folder / "none").exists() and not (folder / "none").is_file() and not (folder / "none").is_dir()
    assert file.read_bytes() == b"second" and file.read_text(encoding="utf-8") == "second"
    assert sorted(path.name for path in folder.iterdir()) == ["a.txt", "inner"]
    assert [path.name for path in folder.glob("*.txt")] == ["a.txt"]
    assert sorted(path.name for path in folder.rglob("*") if path.is_file()) == ["a.txt", "b.txt", "c.bin"]
    assert file.resolve() == file.absolute() == file and sorted([file, folder / "a.txt"])[1] == file


def test_what_pathlib_lacks_is_asked_of_functions(folder: Place) -> None:
    file = folder / "inner" / "b.txt"
    assert is_here(folder) != is_far(folder)
    assert is_file(file) and is_folder(folder) and not is_file(folder) and not is_folder(folder / "none")
    assert size_of(file) == open_storage(file).size == 6 and open_storage(file).text(1, 3) == b"eco"
    with stream_of(file) as stream:
        assert stream.read(3) + stream.read() == b"second"
    assert together(lambda path: path.name, folder.rglob("*.txt"), folder) == ["a.txt", "b.txt"]
    assert without_dots(file) == file
    again = pickle.loads(pickle.dumps(file))
    assert again == file and again.read_bytes() == b"second"


def test_what_lies_in_a_folder_is_held_by_it(folder: Place) -> None:
    assert holds(folder, folder) and holds(folder, folder / "inner" / "b.txt") and holds(folder, folder / "none")
    assert not holds(folder / "inner", folder) and not holds(folder / "inn", folder / "inner")


def test_a_folder_here_and_one_in_a_store_hold_nothing_of_each_other(tmp_path: Path) -> None:
    far = place("memory://x")
    assert not holds(far, tmp_path) and not holds(tmp_path, far) and not holds(Path("/"), far)


def test_links_are_followed_and_dots_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert holds(tmp_path / "real", tmp_path / "link" / "inner") and holds(tmp_path / "link", tmp_path / "real")
    monkeypatch.chdir(tmp_path / "real")
    assert without_dots(Path("../link/./inner")) == tmp_path / "link" / "inner"


def test_what_is_remembered_of_a_place_is_forgotten_when_it_is_asked_anew() -> None:
    file = place(f"memory://{uuid4().hex}/x")
    assert isinstance(file, Remote) and not file.exists()
    file.write(b"new")
    assert not file.exists() and anew(file).exists()


def test_a_file_that_is_none_is_named(folder: Place) -> None:
    for path, said in ((folder / "none", "cannot be"), (folder, "is not a file")):
        with pytest.raises(CheckpointError, match=said):
            open_storage(path)
