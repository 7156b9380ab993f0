"""What a command line calls a place: a path, or a URL, refused with a clear word and without its credentials."""

from __future__ import annotations

from pathlib import Path

import pytest

from neoxconv.errors import PlanError
from neoxconv.storage import place
from tests.far import SECRET
from tests.helpers import cli

pytest.importorskip("aiohttp", reason="aiohttp is not installed; pip install 'neoxconv[remote]'")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nowhere://a/b", "nowhere://a/b: fsspec knows no protocol nowhere"),
        (f"https://user:{SECRET}/x@host/b", "this URL cannot be understood"),
        (f"https://user:1/{SECRET}@host/b", "this URL cannot be understood"),
        (f"simplecache::https://user:{SECRET}@host/b", "this URL cannot be understood"),
        ("dropbox://a/b", "dropbox needs a package that is not installed"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli("inspect", url, "-v") == 1
    error = capsys.readouterr().err
    assert expected in error and SECRET not in error


def test_without_fsspec_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(PlanError, match=r"^s3://a/b: needs fsspec; pip install 'neoxconv\[remote\]'.$"):
        place("s3://a/b")
    assert place("a/b") == Path("a/b") and place("file:///a/b") == Path("/a/b")
