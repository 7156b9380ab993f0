"""The bytes level beside the weights level: what that reads is hashed then, and not read again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.engine.manifest import Range
from neoxconv.storage import Storage
from neoxconv.verify import bytes as level
from neoxconv.verify.bytes import Seen, verify_bytes
from tests.far import web
from tests.helpers import cli
from tests.toy import toy

TARGETS = {
    "hf": Recipe("hf", dtype="F16", shard_size=200_000),
    "q8.gguf": Recipe("gguf", type="Q8_0"),
    "nf4": Recipe("bnb", type="NF4"),
    "ct": Recipe("compressed-tensors", type="W4A16"),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy(tmp_path_factory.mktemp("bytes"), hidden=128)


@pytest.mark.parametrize("name", TARGETS)
def test_what_the_weights_level_reads_is_not_read_again(
    name: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target = run(make_plan(open_checkpoint(source), TARGETS[name]), tmp_path / name)
    again: list[Range] = []
    hashed = level.hash_range

    def noted(stream: Any, part: Range) -> str:
        again.append(part)
        return hashed(stream, part)

    monkeypatch.setattr(level, "hash_range", noted)
    assert cli("verify", source, target) == 0
    assert "bytes ok, weights ok" in capsys.readouterr().out
    assert all("qkv" in part.name for part in again if part.name)  # in GGUF their rows are read in another order
    assert name == "q8.gguf" or not [part for part in again if part.name]


@pytest.mark.parametrize("name", TARGETS)
def test_a_flipped_bit_is_found_by_both_levels(
    name: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = run(make_plan(open_checkpoint(source), TARGETS[name]), tmp_path / name)
    file = max(target.glob("*.safetensors"), key=lambda path: path.stat().st_size) if target.is_dir() else target
    data = bytearray(file.read_bytes())
    data[-3] ^= 0x40
    file.write_bytes(data)
    assert cli("verify", source, target) == 3
    assert re.search("FAIL: bytes differ, weights (differ|not checked)", capsys.readouterr().out)
    assert not verify_bytes(target).passed


def test_reads_in_any_order_and_size_give_the_digest_or_none(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    target = run(make_plan(open_checkpoint(toy(tmp_path)), Recipe("safetensors")), tmp_path / "x.safetensors")
    manifest = level.read_manifest(target)
    assert manifest
    for order in ("ascending", "overlapping", "any"):
        seen = Seen(target, manifest)
        size = target.stat().st_size
        file = Storage(target, size, watch=seen)
        starts = np.arange(0, size, 5000)
        for start in rng.permutation(starts) if order == "any" else starts:
            file.read(int(start), min(7000 if order == "overlapping" else 5000, size - int(start)))
        assert verify_bytes(target, manifest=manifest, seen=seen).passed
        found = [seen.digest(target, number) for number in range(len(manifest["files"][0]["ranges"]))]
        assert (order == "any") == (None in found)


def test_what_is_far_away_is_sent_once(source: Path, tmp_path: Path) -> None:
    target = run(make_plan(open_checkpoint(source), TARGETS["hf"]), tmp_path / "hf")
    with web(tmp_path) as server:
        assert cli("verify", source, f"{server.url}/hf") == 0
        assert server.nbytes("safetensors") < 1.5 * sum(path.stat().st_size for path in target.glob("*.safetensors"))
