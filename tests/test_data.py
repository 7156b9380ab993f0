"""What the repository holds of real checkpoints: small, described, and found without anything beside it."""

import re

from tests.fixtures import DATA, places, unpacked

MOST = 10_000_000  # bytes of tests/data


def test_the_data_stay_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < MOST


def test_every_archive_is_described() -> None:
    described = re.findall(r"^\| `(\w+)`", (DATA / "README.md").read_text(), re.MULTILINE)
    assert sorted(f"{name}.tar.xz" for name in described) == sorted(path.name for path in DATA.glob("*.tar.xz"))


def test_what_is_packed_is_found() -> None:
    assert unpacked() in places()
    assert [*unpacked().glob("*/checkpoints/latest")] and (unpacked() / "tokenizers" / "20B_tokenizer.json").exists()
