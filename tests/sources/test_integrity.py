"""`--check`: every byte that a source's own format protects is compared, and what cannot be read is named."""

from __future__ import annotations

import errno
import json
import os
import random
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.engine import publish
from neoxconv.errors import CheckpointError
from neoxconv.formats.pt import read_pt
from neoxconv.formats.pt.zip_headers import CENTRAL, LOCAL
from neoxconv.sources.integrity import Integrity, check, read_stretch, stretches_of
from neoxconv.storage import open_storage
from tests.fixtures import fixture
from tests.helpers import cli, digests
from tests.toy import toy

FIXTURES = ("neox_2022_tp2_pp4", "neox_2022_sequential_tp2", "neox_2026_bf16_tp2_pp2", "trained_tp2_pp4")
FLIPS, CUTS = 200, 50
QKV = "attention.query_key_value.weight"


def weights(source: Path) -> list[Path]:
    return sorted(source.glob("*/*_states.pt"))


def flip(path: Path, at: int, bits: int = 0x10) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        [byte] = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ bits]))


def start_of(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin."""
    with open(path, "rb") as file:
        file.seek(member.header_offset)
        fields = LOCAL.unpack(file.read(LOCAL.size))
    return member.header_offset + LOCAL.size + fields[9] + fields[10]


def member(path: Path, ending: str) -> tuple[str, int]:
    """The name of the member that ends so, and where its bytes begin."""
    [found] = [info for info in zipfile.ZipFile(path).infolist() if info.filename.endswith(ending)]
    return found.filename, start_of(path, found)


def holding(path: Path, tensor: str) -> tuple[str, int]:
    """The record of a tensor alone on its storage, found by its bytes, and where they begin."""
    value = torch.load(path, weights_only=False)
    data = value.get("module", value) if value.get("module", value) else value
    wanted = data[tensor].contiguous().view(torch.uint8).numpy().tobytes()
    archive = zipfile.ZipFile(path)
    [found] = [info for info in archive.infolist() if archive.read(info) == wanted]
    return found.filename, start_of(path, found)


def holds_nothing(path: Path) -> Iterator[int]:
    """Places that nothing is read from: padding in local headers; versions, attributes and disk numbers of members."""
    archive = zipfile.ZipFile(path)
    entry = archive.start_dir
    for info in archive.infolist():
        name = len(info.filename.encode())
        yield from range(info.header_offset + 4, info.header_offset + 6)
        yield from range(info.header_offset + LOCAL.size + name, start_of(path, info))
        for first, stop in ((4, 8), (34, 42)):
            yield from range(entry + first, entry + stop)
        entry += CENTRAL.size + name + len(info.extra) + len(info.comment)
    yield from range(entry + 12, entry + 16)  # zip64's versions, where torch writes zip64


def is_found(path: Path) -> bool:
    """Whether opening a file refuses it, or the check finds something."""
    try:
        read_pt(open_storage(path))
        return any(read_stretch(item, lambda count: None).damage for item in stretches_of(open_storage(path), False))
    except CheckpointError:
        return True


def checked(source: Path) -> Integrity | None:
    """What a check finds; None where opening refuses."""
    try:
        checkpoint = open_checkpoint(source)
    except CheckpointError:
        return None
    return check(checkpoint, jobs=1)


# --- every byte ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("writer", ["torch", "neoxconv"])
def test_every_byte_of_a_file_is_checked_but_those_that_hold_nothing(writer: str, tmp_path: Path) -> None:
    if writer == "torch":
        path = tmp_path / "file.pt"
        torch.save({"a": torch.arange(40.0)}, path)
    else:
        path = weights(toy(tmp_path, hidden=8, heads=2, rows=16))[-3]
    assert not is_found(path)
    draw, missed = random.Random(5), []
    for at in range(path.stat().st_size):
        bits = 1 << draw.randrange(8)
        flip(path, at, bits)
        missed += [] if is_found(path) else [at]
        flip(path, at, bits)
    assert set(missed) <= set(holds_nothing(path))
    assert 0 < len(missed) < path.stat().st_size


def test_flipped_bytes_in_a_checkpoint_are_found(tmp_path: Path) -> None:
    source, draw = toy(tmp_path, layers=1, tp=1), random.Random(7)
    files = weights(source)
    sizes = [path.stat().st_size for path in files]
    found = 0
    for _ in range(FLIPS):
        [path] = draw.choices(files, sizes)
        at, bits = draw.randrange(path.stat().st_size), 1 << draw.randrange(8)
        flip(path, at, bits)
        told = checked(source)
        named = told is None or (len(told.damage) == 1 and told.damage[0].file == path)
        assert named or at in set(holds_nothing(path)), (path.name, at)
        found += named
        flip(path, at, bits)
    assert found >= FLIPS - 10
    assert checked(source)


def test_what_is_cut_short_is_refused_on_opening(tmp_path: Path) -> None:
    source, draw = toy(tmp_path), random.Random(9)
    for _ in range(CUTS):
        path = draw.choice(weights(source))
        data = path.read_bytes()
        os.truncate(path, draw.randrange(len(data)))
        with pytest.raises(CheckpointError, match=path.name):
            open_checkpoint(source)
        path.write_bytes(data)


# --- what it says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sequential", [False, True])
def test_a_finding_names_file_record_tensor_and_both_checksums(
    sequential: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = toy(tmp_path, sequential=sequential)
    name = "mp_rank_01_model_states.pt" if sequential else "layer_03-model_01-model_states.pt"
    [path] = source.glob(f"*/{name}")
    record, at = holding(path, f"sequential.3.{QKV}" if sequential else QKV)
    expected = zipfile.ZipFile(path).getinfo(record).CRC
    flip(path, at + 5)
    assert cli("inspect", source, "--check") == 3
    shown = capsys.readouterr().out
    tensor = f"gpt_neox.layers.1.{QKV} (3.{QKV} of rank 1)"
    assert f"{path}: {record} with {tensor}: " in shown and f"{expected:08x}; download" in shown
    assert "1 finding: the source is damaged" in shown and "not compared" in shown
    assert cli("inspect", source, "--check", "--json") == 3
    facts = json.loads(capsys.readouterr().out)
    assert facts["rank_difference"] is None
    [finding] = facts["check"]["findings"]
    assert finding["tensors"] == [tensor] and finding["file"] == str(path) and finding["record"] == record
    assert finding["expected"] == f"{expected:08x}" != finding["found"] and finding["found"] in finding["message"]


def test_a_member_that_is_no_storage_is_checked_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toy(tmp_path)
    path = weights(source)[0]
    record, at = member(path, "/version")
    flip(path, at)
    assert cli("inspect", source, "--check") == 3
    assert f"{path}: {record}: its 2 bytes have CRC-32 " in capsys.readouterr().out


def test_a_header_that_contradicts_the_directory_is_a_finding(tmp_path: Path) -> None:
    source = toy(tmp_path)
    path = weights(source)[0]
    record, at = member(path, "/data/0")
    flip(path, at + zipfile.ZipFile(path).getinfo(record).file_size + 5)  # the CRC-32 behind the bytes
    told = checked(source)
    assert told and "otherwise than the zip's directory" in str(told.damage[0]) and record in str(told.damage[0])


def test_many_findings_are_listed_up_to_twenty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toy(tmp_path)
    for path in weights(source):
        for info in zipfile.ZipFile(path).infolist():
            if "/data/" in info.filename:
                flip(path, start_of(path, info))
    assert cli("inspect", source, "--check") == 3
    shown = capsys.readouterr().out
    assert shown.count("have CRC-32") == 20 and "    ... and " in shown


def test_a_healthy_source_passes_and_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toy(tmp_path)
    infos = [info for path in weights(source) for info in zipfile.ZipFile(path).infolist()]
    sizes = sum(info.file_size for info in infos)
    assert cli("inspect", source, "--check", "--json", "--jobs", 3) == 0
    assert json.loads(capsys.readouterr().out)["check"] == {
        "files": len(weights(source)),
        "records": len(infos),
        "bytes": sizes,
        "files_without_checksums": 0,
        "records_without_checksum": 0,
        "verdict": "every checksum fits",
        "findings": [],
    }
    assert cli("inspect", source, "--check") == 0
    assert f"{len(infos)} records, {sizes:,} bytes" in capsys.readouterr().out
    assert cli("inspect", source, "--json") == 0
    assert "check" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", FIXTURES)
def test_a_real_checkpoint_passes(name: str) -> None:
    told = checked(fixture(f"{name}/checkpoints"))
    assert told and not told.damage and told.records and not told.bare_files and not told.bare_records


@pytest.mark.parametrize("damaged", [False, True])
def test_threads_change_nothing_and_every_byte_is_counted_once(damaged: bool, tmp_path: Path) -> None:
    source, counts = toy(tmp_path), []
    for path in weights(source) if damaged else ():
        flip(path, member(path, "/version")[1])
    checkpoint = open_checkpoint(source)
    assert check(checkpoint, jobs=1, progress=counts.append) == check(checkpoint, jobs=5)
    assert sum(counts) == sum(path.stat().st_size for path in weights(source))


# --- sources without checksums ---------------------------------------------------------------------------------------


def saved_again(source: Path, **options: Any) -> None:
    for path in weights(source):
        torch.save(torch.load(path, weights_only=True), path, **options)


def test_torch_s_own_files_are_checked(tmp_path: Path) -> None:
    source = toy(tmp_path)
    saved_again(source)
    told = checked(source)
    assert told and told.verdict == "every checksum fits"
    flip(path := weights(source)[1], member(path, "/data/0")[1])
    told = checked(source)
    assert told and len(told.damage) == 1


def test_records_without_a_checksum_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toy(tmp_path)
    torch.serialization.set_crc32_options(False)
    try:
        saved_again(source)
    finally:
        torch.serialization.set_crc32_options(True)
    assert cli("inspect", source, "--check", "--json") == 0
    facts = json.loads(capsys.readouterr().out)["check"]
    assert facts["records_without_checksum"] == facts["records"] > 0
    assert facts["verdict"] == f"every checksum fits; {facts['records']} records without one"


def test_files_older_than_the_zips_have_no_checksums(tmp_path: Path) -> None:
    source = toy(tmp_path)
    saved_again(source, _use_new_zipfile_serialization=False)
    told = checked(source)
    assert told and told.bare_files == told.files > 0 and not told.damage and told.records == 0
    assert told.nbytes == sum(path.stat().st_size for path in weights(source))


@pytest.mark.parametrize("format", ["hf", "safetensors", "gguf"])
def test_formats_without_checksums_are_read_and_said_to_have_none(
    format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = run(make_plan(open_checkpoint(toy(tmp_path)), Recipe(format)), tmp_path / f"model.{format}")
    file = target / "model.safetensors" if target.is_dir() else target
    assert cli("inspect", target, "--check") == 0
    shown = capsys.readouterr().out
    assert "no checksums in this format" in shown and f"1 file, 0 records, {file.stat().st_size:,} bytes" in shown


def test_a_safetensors_file_that_begins_like_a_zip_is_none(tmp_path: Path) -> None:
    target = run(make_plan(open_checkpoint(toy(tmp_path)), Recipe("hf")), tmp_path / "hf")
    file = target / "model.safetensors"
    data = file.read_bytes()
    [length] = struct.unpack("<Q", data[:8])
    wide = int.from_bytes(b"PK", "little")
    file.write_bytes(struct.pack("<Q", wide) + data[8 : 8 + length].ljust(wide) + data[8 + length :])
    assert file.read_bytes()[:2] == b"PK" and cli("inspect", target, "--check") == 0


# --- disks -----------------------------------------------------------------------------------------------------------


def unreadable(patch: pytest.MonkeyPatch, path: Path, place: int) -> None:
    """Every read that covers a place of a file fails from now on."""
    read, inode = os.preadv, path.stat().st_ino

    def failing(file: int, buffers: Any, offset: int) -> int:
        if os.fstat(file).st_ino == inode and offset <= place < offset + len(buffers[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return read(file, buffers, offset)

    patch.setattr(os, "preadv", failing)


@pytest.mark.parametrize("tensor", [QKV, "input_layernorm.weight"])
def test_a_sector_that_cannot_be_read_is_named(
    tensor: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = toy(tmp_path, hidden=256)  # of a file its last 64 KiB are read on opening
    [path] = source.glob("*/layer_02-model_00-*")
    record, at = holding(path, tensor)
    unreadable(monkeypatch, path, at + 9)
    assert cli("inspect", source, "--check") == 3
    told = capsys.readouterr()
    where = f"{path}: {record} with gpt_neox.layers.0.{tensor} (2.{tensor} of rank 0): from byte {at} on"
    assert f"{where} cannot be read (Input/output error)." in told.out and not told.err
    assert cli("convert", source, tmp_path / "out", "--to", "hf", "--check", "--quiet") == 1
    assert f"neoxconv: {where} cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize("format", ["safetensors", "gguf"])
def test_a_sector_of_a_file_without_checksums_is_found(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = open_checkpoint(toy(tmp_path, hidden=256))
    target = run(make_plan(source, Recipe(format)), tmp_path / f"model.{format}")
    size = target.stat().st_size
    monkeypatch.setattr("neoxconv.sources.integrity.SLAB", 1 << 16)
    unreadable(monkeypatch, target, size - 5)
    assert cli("inspect", target, "--check") == 3
    told = capsys.readouterr()
    assert f"{target}: bytes 0 to {size}: from byte {(size - 5) >> 16 << 16} on cannot be read (Input" in told.out
    assert not told.err


def test_a_file_that_shrank_since_it_was_opened_is_found(tmp_path: Path) -> None:
    target = run(make_plan(open_checkpoint(toy(tmp_path)), Recipe("gguf")), tmp_path / "model.gguf")
    checkpoint = open_checkpoint(target)
    os.truncate(target, target.stat().st_size - 1000)
    [damage] = check(checkpoint).damage
    assert str(target) in str(damage) and "when opened" in str(damage)


# --- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_damaged_source_is_refused_before_anything_is_written(
    more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, target = toy(tmp_path), tmp_path / "out"
    places = [
        (path, start_of(path, info))
        for path in weights(source)
        for info in zipfile.ZipFile(path).infolist()
        if "/data/" in info.filename
    ]
    for place in places[:12]:
        flip(*place)
    before, command = digests(tmp_path), ("convert", source, target, "--to", "hf", "--check", *more)
    assert cli(*command) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 11 and all("have CRC-32" in line for line in lines[:10]) and "... and 2 more" in lines[10]
    assert digests(tmp_path) == before and not publish.partial_of(target).exists()
    for place in places[:12]:
        flip(*place)
    assert cli(*command) == 0
    told = capsys.readouterr()
    assert "every checksum fits" in told.err + told.out and target.exists() != bool(more)


def test_a_terminal_sees_the_check_pass_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = toy(tmp_path)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert cli("inspect", source, "--check") == 0
    assert "checking: 100%" in capsys.readouterr().err
    assert cli("inspect", source, "--check", "--json") == 0
    assert not capsys.readouterr().err
