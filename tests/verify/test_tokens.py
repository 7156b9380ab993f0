"""The tokens that models are compared on: what of a tokenizer is not obeyed, and what fails is told of which file."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import open_checkpoint
from neoxconv.core.model import Checkpoint
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats.tokenizer import Tokenizer
from neoxconv.sources.tokenizer import tokenizer_of
from neoxconv.verify.logits.tokens import blamed, encode, library, speller, tokens_for
from neoxconv.verify.logits.trial import Sample
from tests.fuzz_inputs import seeds
from tests.helpers import cli
from tests.oracles import program
from tests.toy import toy

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

TEXT = "The wind turned at last. " * 20
CUT = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
PADDED = {"strategy": {"Fixed": 1 << 40}, "direction": "Left", "pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
HOSTILE = {"type": "Split", "pattern": {"Regex": "(a+)+$|(.*)*b"}, "behavior": "Isolated", "invert": False}
CATCHING = "a" * 60 + "!" + "a" * 5000 + "c\n" * 50


def changed(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A checkpoint whose tokenizer.json is another."""
    source = toy(folder)
    [path] = source.rglob("*tokenizer*.json")
    words = json.loads(path.read_text())
    change(words)
    path.write_text(json.dumps(words))
    return source


def words_of(source: Path) -> Tokenizer:
    found = tokenizer_of(open_checkpoint(source))
    assert found
    return found


def backtracking(words: dict[str, Any]) -> None:
    words["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [HOSTILE, words["pre_tokenizer"]]}


@pytest.mark.parametrize(
    "section", [{"truncation": CUT}, {"padding": PADDED}, {"truncation": {"max_length": -1e99}, "padding": [1]}]
)
def test_truncation_and_padding_are_not_obeyed(section: dict[str, Any], tmp_path: Path) -> None:
    plain = encode(words_of(toy(tmp_path / "plain")), TEXT)
    found = encode(words_of(changed(tmp_path / "cut", lambda words: words.update(section))), TEXT)
    assert len(plain) > 8 and np.array_equal(plain, found)


def test_a_panic_of_the_library_is_one_line_that_names_the_tokenizer(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rust's panics are no Exception, and print a trace."""
    words = words_of(changed(tmp_path, backtracking))
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: the tokenizers library cannot work with it"):
        encode(words, CATCHING)
    assert not capfd.readouterr().err


def test_an_exam_tells_it_too(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = changed(tmp_path, backtracking)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"text": CATCHING + " end"}))
    assert cli("convert", source, tmp_path / "out", "--to", "hf", "--quiet") == 0
    options = "--level", "logits", "--task", "lambada", "--data", data, "--quiet"
    assert cli("verify", source, tmp_path / "out", *options) == 1
    [line] = capfd.readouterr().err.splitlines()
    assert "tokenizer.json" in line


@pytest.mark.parametrize("data", [b'{"model": {"type": "none"}}', b"[]", b"{", b"\xff", b"[" * 100_000])
def test_what_the_library_cannot_build_is_named(data: bytes) -> None:
    with pytest.raises(CheckpointError, match="tokenizers library cannot"):
        library(Tokenizer(data))


def with_sentencepiece(folder: Path) -> Checkpoint:
    """A checkpoint whose tokenizer is sentencepiece's file alone."""
    source = toy(folder)
    [path] = source.rglob("*tokenizer*.json")
    path.unlink()
    path.with_name("spiece.model").write_bytes(seeds("sentencepiece")[1])
    return open_checkpoint(source)


@pytest.mark.oracle
def test_sentencepieces_file_is_asked_of_its_library(tmp_path: Path) -> None:
    made = program("sentencepiece").SentencePieceProcessor(model_proto=seeds("sentencepiece")[1])
    source = with_sentencepiece(tmp_path)
    (tmp_path / "a.txt").write_text("a a b a a")
    found, where = tokens_for(source, Sample(text=tmp_path / "a.txt"))
    assert found.tolist() == [made.encode("a a b a a")] and where == "a.txt"
    assert speller(source)([2, 2]) == "a a"


def test_without_that_library_text_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    source = with_sentencepiece(tmp_path)
    (tmp_path / "a.txt").write_text("a a a")
    with pytest.raises(
        PlanError, match=r"spiece\.model: is sentencepiece's.* pip install sentencepiece, or .*--tokens"
    ):
        tokens_for(source, Sample(text=tmp_path / "a.txt"))
    assert tokens_for(source, Sample())[1] == "invented token ids"
    assert speller(source)([2, 2, 99]) == " a a#99"


@pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError, MemoryError])
def test_what_is_not_the_tokenizers_fault_gets_through(error: type[BaseException]) -> None:
    with pytest.raises(error, match="mine"), blamed(Tokenizer(b"{}")):
        raise error("mine")


def test_line_ends_are_read_as_ever(tmp_path: Path) -> None:
    source = open_checkpoint(toy(tmp_path))
    found = []
    for number, end in enumerate(("\n", "\r\n", "\r")):
        (tmp_path / f"{number}.txt").write_bytes(TEXT.replace(". ", "." + end).encode())
        found.append(tokens_for(source, Sample(text=tmp_path / f"{number}.txt"))[0])
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[0], found[2])


@pytest.mark.parametrize("option", ["text", "tokens", "data"])
def test_what_is_far_too_large_is_refused_unread(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, huge = toy(tmp_path), tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(1 << 40)
    assert cli("convert", source, tmp_path / "out", "--to", "hf", "--quiet") == 0
    more = ("--task", "lambada") if option == "data" else ()
    assert cli("verify", source, tmp_path / "out", "--level", "logits", f"--{option}", huge, *more) == 1
    assert f"{huge}: has {1 << 40} bytes, expected {64 << 20} at most" in capsys.readouterr().err
