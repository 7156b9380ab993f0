"""`verify --text` compares the ids of a text on both sides: natively, and by the program that will run the target."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.verify import ids
from neoxconv.verify.logits.trial import Engine, Sample
from neoxconv.verify.report import Report
from tests.helpers import cli, few
from tests.oracles import program
from tests.toy import toy

Change = Callable[[Any], Any]
PLAIN = "hello <|endoftext|> the wind  in\tthe 12 trees<|padding|>and\r\n   a caf\u00e9 \u6771\u4eac \U0001f680\n"
DECOMPOSED = PLAIN.replace("\u00e9", "e\u0301")
ENGINES = {"hf": "transformers", "gguf": "llama.cpp"}
PACKAGES = {"transformers": "transformers", "llama.cpp": "llama_cpp"}
Pair = dict[str, Path]
Written = Callable[[str], Path]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """The toy with a token for 12 in place of its last, and what it becomes."""
    folder = tmp_path_factory.mktemp("ids")
    source = toy(folder)
    [path] = source.rglob("*tokenizer*.json")
    words = json.loads(path.read_text())
    words["model"]["vocab"]["12"] = words["model"]["vocab"].pop("ing")
    words["model"]["merges"][-1] = "1 2"
    path.write_text(json.dumps(words))
    recipes = {"hf": Recipe("hf"), "gguf": Recipe("gguf", type="F16"), "slim": Recipe("slim", tp=1)}
    recipes["safetensors"] = Recipe("safetensors")
    names = {"gguf": "model.gguf", "safetensors": "model.safetensors"}
    targets = {
        kind: Path(str(run(make_plan(open_checkpoint(source), recipe), folder / names.get(kind, kind))))
        for kind, recipe in recipes.items()
    }
    return {"source": source, **targets}


@pytest.fixture
def text(tmp_path: Path) -> Callable[[str], Path]:
    """A file with a text in it."""

    def written(content: str) -> Path:
        (tmp_path / "text.txt").write_bytes(content.encode())
        return tmp_path / "text.txt"

    return written


def compared(source: Path, target: Path, text: Path, engine: str = "native") -> Report:
    if engine != "native":
        program(PACKAGES[engine])
    opened = open_checkpoint(source), open_checkpoint(target)
    return ids.verify_ids(*opened, Sample(text), target=target, engine=Engine(engine))


def told(report: Report) -> list[str]:
    return [str(finding) for finding in report.findings]


# --- planted faults ---------------------------------------------------------------------------------------------------


def changed_folder(made: Pair, folder: Path, change: Change) -> Path:
    """The Hugging Face folder with another tokenizer.json."""
    target = folder / "hf"
    shutil.copytree(made["hf"], target)
    words = json.loads((target / "tokenizer.json").read_text())
    change(words)
    (target / "tokenizer.json").write_text(json.dumps(words))
    return target


def changed_gguf(made: Pair, folder: Path, key: str, change: Change) -> Path:
    """The GGUF file with another value of a key."""
    gguf = program("gguf")
    reader = gguf.GGUFReader(made["gguf"])
    writer = gguf.GGUFWriter(folder / "changed.gguf", "gptneox")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = field.contents()
        value = change(value) if name == f"tokenizer.ggml.{key}" else value
        writer.add_key_value(name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data.copy(), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "changed.gguf"


END, PADDING, H, W = 0, 1, 73, 88  # ids


def put(items: list[Any], changes: dict[int, Any]) -> list[Any]:
    return [changes.get(i, item) for i, item in enumerate(items)]


BOTH = ["tokenizers", "transformers"]
# What is changed in a tokenizer.json, where the ids part, and who sees it.
IN_FOLDER: dict[str, tuple[Change, str, list[str]]] = {
    "merge": (
        lambda words: words["model"]["merges"].remove("h e"),
        "token 0 is 73, the source's 261 (51 ids, the source's 47), at character 0, in 'hello <|endoftext|> the '",
        BOTH,
    ),
    "moved": (
        lambda words: words["model"]["vocab"].update(h=W, w=H),
        "token 8 is 73, the source's 88, at character 24, in 'hello <|endoftext|> the wind  in\\tthe 12 trees<|p'",
        BOTH,
    ),
    "special token": (  # which transformers adds again, as the end of a text
        lambda words: words["added_tokens"].pop(0),
        "token 5 is 29, the source's 0 (58 ids, the source's 47), at character 6, in 'hello <|endoftext|> the wind  '",
        ["tokenizers"],
    ),
}


@pytest.mark.oracle
@pytest.mark.parametrize("fault", few(IN_FOLDER, "merge"))
def test_another_tokenizer_in_a_folder(fault: str, made: Pair, tmp_path: Path, text: Written) -> None:
    change, what, seen_by = IN_FOLDER[fault]
    target = changed_folder(made, tmp_path, change)
    found = told(compared(made["source"], target, text(PLAIN), "transformers"))
    assert found == [f"{target}: the ids of text.txt differ by {name}: {what}" for name in seen_by]


ALL = ["tokenizers", "llama.cpp"]
# A key of GGUF, what is changed there, where the ids part, and who sees it.
IN_GGUF: dict[str, tuple[str, Change, str, list[str]]] = {
    "merge": ("merges", lambda merges: [pair for pair in merges if pair != "h e"], "0 is 73, the source's 261", ALL),
    "moved": ("tokens", lambda tokens: put(tokens, {H: "w", W: "h"}), "8 is 73, the source's 88", ALL),
    "padding's kind": ("token_type", lambda kinds: put(kinds, {PADDING: 1}), "21 is 29, the source's 1", ALL),
    # llama.cpp takes this text for a special token whatever the file says
    "end's kind": ("token_type", lambda kinds: put(kinds, {END: 1}), "5 is 29, the source's 0", ["tokenizers"]),
    "splitter": ("pre", lambda pre: "starcoder", "17 is 18, the source's 271", ALL),
    "splitter that is only llama.cpp's": (
        "pre",
        lambda pre: "deepseek-coder",
        "17 is 18, the source's 271",
        ["llama.cpp"],
    ),
}


@pytest.mark.oracle
@pytest.mark.parametrize("fault", IN_GGUF)
def test_another_tokenizer_in_a_gguf_file(fault: str, made: Pair, tmp_path: Path, text: Written) -> None:
    key, change, what, seen_by = IN_GGUF[fault]
    target = changed_gguf(made, tmp_path, key, change)
    report = compared(made["source"], target, text(PLAIN), "llama.cpp")
    assert len(report.findings) == len(seen_by)
    for finding, name in zip(told(report), seen_by, strict=True):
        assert f"the ids of text.txt differ by {name}: token {what}" in finding
    assert bool(report.lines) == ("only" in fault)  # it says why the library cannot tell


@pytest.mark.oracle
def test_llama_cpp_does_not_compose_characters(made: Pair, text: Written) -> None:
    """Read back as a tokenizer.json the file is right: only the program that will run it tells."""
    assert not compared(made["source"], made["gguf"], text(DECOMPOSED)).findings
    [finding] = told(compared(made["source"], made["gguf"], text(DECOMPOSED), "llama.cpp"))
    assert "differ by llama.cpp: token 32 is 70, the source's 129 (48 ids, the source's 47), at character 69" in finding
    assert r"in '<|padding|>and\r\n   a cafe\u0301 " in finding
    assert not compared(made["gguf"], made["gguf"], text(DECOMPOSED), "llama.cpp").findings  # a source that it runs


# --- good pairs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", ["source", "hf", "gguf"])
@pytest.mark.parametrize("b", ["hf", "gguf", "slim"])
def test_what_we_write_has_the_same_ids(a: str, b: str, made: Pair, text: Written) -> None:
    report = compared(made[a], made[b], text(PLAIN))
    assert report.passed and report.facts["ids"] == {"tokenizers": 47}


@pytest.mark.oracle
@pytest.mark.parametrize("kind", ENGINES)
def test_programs_give_the_same_ids(kind: str, made: Pair, text: Written) -> None:
    report = compared(made["source"], made[kind], text(PLAIN), ENGINES[kind])
    assert report.passed and report.checked == f"47 ids of text.txt by tokenizers and {ENGINES[kind]}"


# --- texts ------------------------------------------------------------------------------------------------------------


def test_of_a_long_text_the_first_part_is_compared(made: Pair, text: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ids, "_MOST", 1000)
    report = compared(made["source"], made["hf"], text("a;" * 1000))
    assert report.checked == "1,000 ids of text.txt's first 1,000 characters by tokenizers"
    assert report.facts["characters"] == 1000


@pytest.mark.parametrize(("content", "message"), [
    (b"\xff\xfe", "is not UTF-8 text (invalid start byte at byte 0)"),
    (b"a\xc3", "is not UTF-8 text (unexpected end of data at byte 1)"),
    (b"", "is empty; give a text"),
])  # fmt: skip
def test_what_is_no_text_is_told(
    content: bytes, message: str, made: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").write_bytes(content)
    assert cli("verify", made["source"], made["hf"], "--level", "tokenizer", "--text", tmp_path / "x") == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"neoxconv: {tmp_path / 'x'}: {message}")


@pytest.mark.parametrize(
    "content", ["\ufeffhello\0 a \0\0 b\U0010ffff\ufffd\r\r\n\n" + "<|endoftext|>" * 9, "\r\r\n\n"]
)
@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.oracle
def test_strange_texts_reach_the_programs_as_they_are(kind: str, content: str, made: Pair, text: Written) -> None:
    assert not compared(made["source"], made[kind], text(content), ENGINES[kind]).findings


def test_a_text_comes_through_a_pipe_once(made: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    """The ids are compared, and the logits after them."""
    read, write = os.pipe()
    os.write(write, PLAIN.encode())
    os.close(write)
    assert cli("verify", made["source"], made["hf"], "--level", "logits", "--text", f"/dev/fd/{read}", "--json") == 0
    os.close(read)
    *_, tokenizer, logits = json.loads(capsys.readouterr().out)["levels"]
    assert tokenizer["level"] == "tokenizer" and tokenizer["ids"] == {"tokenizers": 47}
    assert logits["level"] == "logits" and logits["length"] == 46  # line ends as Python reads them


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_level_runs_by_itself(made: Pair, text: Written, capsys: pytest.CaptureFixture[str]) -> None:
    words = "verify", made["source"], made["hf"], "--json"
    assert cli(*words, "--level", "tokenizer") == 0
    assert [level["level"] for level in json.loads(capsys.readouterr().out)["levels"]] == ["tokenizer"]
    assert cli(*words, "--text", text(PLAIN)) == 0
    *_, weights, tokenizer = json.loads(capsys.readouterr().out)["levels"]
    assert weights["level"] == "weights" and tokenizer["text"] == "text.txt"


def test_other_ids_fail_and_the_logits_are_compared(
    made: Pair, tmp_path: Path, text: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    target = changed_folder(made, tmp_path, IN_FOLDER["moved"][0])
    (target / "manifest.json").unlink()
    page = tmp_path / "page.html"
    words = "--level", "logits", "--text", text(PLAIN), "--html", page
    assert cli("verify", made["source"], target, *words) == 3
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL: weights ok, tokenizer differ, logits ok"
    assert "the ids of text.txt differ by tokenizers: token 8 is 73" in page.read_text()


@pytest.mark.parametrize(("words", "message"), [
    (["{source}", "{hf}", "--level", "bytes", "--text", "x"], "--text compares TARGET with SRC"),
    (["{hf}", "--text", "x"], "--text compares TARGET with SRC"),
    (["{source}", "{hf}", "--engine", "transformers"], "--engine is for --level logits, or for the ids of a text"),
    (["{hf}", "--level", "tokenizer"], "--level tokenizer needs the source too"),
])  # fmt: skip
def test_options_that_do_not_go_together(
    words: list[str], message: str, made: Pair, capsys: pytest.CaptureFixture[str]
) -> None:
    names = {name: str(path) for name, path in made.items()}
    assert cli("verify", *(word.format(**names) for word in words)) == 2
    assert message in capsys.readouterr().err


def test_where_there_is_nothing_to_compare(made: Pair, text: Written, capsys: pytest.CaptureFixture[str]) -> None:
    source, single = made["source"], made["safetensors"]
    assert cli("verify", source, single, "--text", text(PLAIN)) == 0
    assert "no ids of text.txt, as the target has no tokenizer" in capsys.readouterr().out
    assert cli("verify", source, single, "--level", "tokenizer") == 1
    assert "there is no tokenizer and no setting to compare" in capsys.readouterr().err
    assert cli("verify", single, made["hf"], "--level", "tokenizer", "--preset", "pythia-14m") == 1


def test_a_source_without_a_tokenizer(
    made: Pair, tmp_path: Path, text: Written, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "hf"
    shutil.copytree(made["hf"], source)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (source / name).unlink()
    assert cli("verify", source, made["hf"], "--text", text(PLAIN)) == 1
    out, err = capsys.readouterr()
    assert "has no tokenizer; leave --text out" in err
    assert out.splitlines()[-1] == "FAIL: bytes ok, weights ok, tokenizer not checked"


def test_a_tokenizer_that_the_library_cannot_build_is_a_finding(made: Pair, tmp_path: Path, text: Written) -> None:
    target = changed_folder(made, tmp_path, lambda words: words.update(version="9.0"))
    [finding] = told(compared(made["source"], target, text(PLAIN)))
    assert "the tokenizers library cannot work with it" in finding


def test_the_death_of_a_program_leaves_the_other_verdicts(
    made: Pair, tmp_path: Path, text: Written, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """llama.cpp is asked for the ids of another family's tokenizer, of which it aborts."""
    program("llama_cpp")
    target = changed_gguf(made, tmp_path, "model", lambda model: "llama")
    words = "--level", "logits", "--text", text(PLAIN), "--engine", "llama.cpp"
    assert cli("verify", made["source"], target, *words) == 1
    out, err = capfd.readouterr()
    assert f"{target}: llama.cpp died of SIGABRT" in err
    assert out.splitlines()[-1] == "FAIL: weights ok, tokenizer differ, logits not checked"
