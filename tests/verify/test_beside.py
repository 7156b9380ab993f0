"""`verify` compares what lies beside the weights by meaning: planted faults are named, other words for it are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.synthetic import tiny
from neoxconv.verify.beside import verify_beside
from tests.toy import toy

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The toy, and what it becomes in each format that has a place for a tokenizer."""
    folder = tmp_path_factory.mktemp("made")
    source = toy(folder)
    recipes = {"hf": Recipe("hf"), "gguf": Recipe("gguf", type="Q8_0"), "slim": Recipe("slim", tp=1)}
    targets = {
        name: Path(str(run(make_plan(open_checkpoint(source), r), folder / name))) for name, r in recipes.items()
    }
    return {"source": source, **targets}


def findings(source: Path, target: Path) -> list[str]:
    report = verify_beside(open_checkpoint(source), open_checkpoint(target))
    return [str(finding) for finding in report.findings] if report else []


@pytest.mark.parametrize("a", ["source", "hf", "gguf", "slim"])
@pytest.mark.parametrize("b", ["hf", "gguf", "slim"])
def test_what_we_write_is_the_same_from_any_format_to_any(a: str, b: str, made: dict[str, Path]) -> None:
    assert findings(made[a], made[b]) == []


def copied(made: dict[str, Path], tmp_path: Path, name: str, change: Change) -> Path:
    target = tmp_path / "hf"
    shutil.copytree(made["hf"], target)
    table = json.loads((target / name).read_text())
    change(table)
    (target / name).write_text(json.dumps(table))
    return target


def swap(table: dict[str, Any]) -> None:
    vocab = table["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


FAULTS: dict[str, tuple[str, Change, str]] = {
    "ids": ("tokenizer.json", swap, "tokens: item"),
    "merges": ("tokenizer.json", lambda t: t["model"]["merges"].pop(), "merges: item 13"),
    "order of merges": ("tokenizer.json", lambda t: t["model"]["merges"].reverse(), "merges: item 0"),
    "normalizer": ("tokenizer.json", lambda t: t.update(normalizer=None), "normalizer"),
    "splitter": ("tokenizer.json", lambda t: t["pre_tokenizer"].update(use_regex=False), "pre_tokenizer"),
    "special": ("tokenizer.json", lambda t: t["added_tokens"][1].update(special=False), "special tokens"),
    "end": ("config.json", lambda t: t.update(eos_token_id=5), "config.json's eos_token_id is 5, the source's 0"),
    "beginning": ("config.json", lambda t: t.update(bos_token_id=None), "bos_token_id is missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_named(fault: str, made: dict[str, Path], tmp_path: Path) -> None:
    name, change, words = FAULTS[fault]
    found = findings(made["source"], copied(made, tmp_path, name, change))
    assert len(found) == 1 and words in found[0]


def test_settings_that_only_the_source_has_are_missed(made: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(made["hf"], source)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings |= {"pad_token": "<|padding|>", "add_bos_token": True, "chat_template": "{{ x }}"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "generation_config.json").write_text('{"temperature": 0.5, "eos_token_id": [0, 1]}')
    told = " ".join(findings(source, made["hf"]))
    for words in (
        "pad_token",
        "add_bos_token",
        "chat template",
        "temperature",
        "eos_token_id is 0, the source's [0, 1]",
    ):
        assert words in told
    told = " ".join(findings(source, made["gguf"]))
    for words in ("padding_token_id is missing", "add_bos_token", "tokenizer.chat_template is missing"):
        assert words in told


def test_a_tokenizer_in_other_words_is_the_same(made: dict[str, Path], tmp_path: Path) -> None:
    """As transformers saves it again: merges as pairs, other white space, another order of keys."""

    def respelled(table: dict[str, Any]) -> None:
        table["model"]["merges"] = [merge.split(" ") for merge in table["model"]["merges"]]
        table["model"] = dict(reversed(table["model"].items()))

    assert findings(made["source"], copied(made, tmp_path, "tokenizer.json", respelled)) == []


def test_a_target_without_one_is_named_once(made: dict[str, Path], tmp_path: Path) -> None:
    target = tmp_path / "hf"
    shutil.copytree(made["hf"], target)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (target / name).unlink()
    assert findings(made["source"], target) == [f"{target}: the tokenizer is missing, and the source has one"]


def test_a_source_without_one_asks_for_nothing(made: dict[str, Path], tmp_path: Path) -> None:
    source = tmp_path / "hf"
    shutil.copytree(made["hf"], source)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink()
    assert findings(source, made["hf"]) == []
    assert tiny().count == 276


HOSTILE = (
    b"{",
    b"[1]",
    b'{"model": {"vocab": [[[1], 2], 3]}, "added_tokens": 7}',
    b'{"model": {"vocab": {"a": []}, "merges": 5}}',
    b'{"model": {"merges": [1, [2]]}}',
    b'{"model": {"type": "WordPiece"}, "added_tokens": [{"content": [], "id": {}}, 5]}',
    b'{"model": {"type": "Unigram", "vocab": {}}}',
    b'{"model": {"type": "BPE", "byte_fallback": true}}',
)


@pytest.mark.parametrize("data", HOSTILE)
def test_whatever_a_tokenizer_holds_is_compared(data: bytes, made: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "hf"
    shutil.copytree(made["hf"], other)
    (other / "tokenizer.json").write_bytes(data)
    assert findings(made["source"], other) and findings(other, made["hf"])
    findings(other, made["gguf"])  # raises nothing
