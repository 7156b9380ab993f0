"""What targets say of the model: llama.cpp's converter's keys, names that its downloader finds, the user's words."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.arch.gpt_neox.weights import GPT_NEOX
from neoxconv.arch.released import RELEASES, released
from neoxconv.engine.plan import Plan
from neoxconv.errors import PlanError
from neoxconv.formats import imatrix
from neoxconv.targets import TARGETS
from neoxconv.targets.metadata import file_stem, hub_name, words_of
from tests.carded import hugging_face
from tests.helpers import cli, few
from tests.oracles import llama_convert, program
from tests.toy import toy

SAID = {
    "general.author": "me",
    "general.quantized_by": "us",
    "general.tags": ["a", "b"],
    "general.url": "https://example.org/gguf",
    "general.base_models": [{"name": "One", "repo_url": "https://huggingface.co/x/One"}],
}


def plan_of(source: Path, format: str = "gguf", **asked: Any) -> Plan:
    asked = {"type": "F16"} | asked if format == "gguf" else asked
    return make_plan(open_checkpoint(source), Recipe(format, **asked))


def keys_of(source: Path, **asked: Any) -> dict[str, Any]:
    return dict(words_of(open_checkpoint(source), Recipe("gguf", **asked)).keys)


def read_back(path: Path) -> dict[str, Any]:
    return open_checkpoint(path).index.settings


# --- beside llama.cpp ------------------------------------------------------------------------------------------------


@pytest.mark.oracle
@pytest.mark.parametrize(
    "name", few(("pythia-160m-deduped", "Tiny-Pythia-160K-v1.2-chat"), "Tiny-Pythia-160K-v1.2-chat")
)
def test_every_general_key_is_that_of_llama_cpps_converter(name: str, tmp_path: Path) -> None:
    gguf, source = program("gguf"), hugging_face(tmp_path / name)
    run(plan_of(source), tmp_path / "ours.gguf")
    llama_convert(source, tmp_path / "theirs.gguf")
    ours, theirs = (
        {key: (field.types, field.contents()) for key, field in gguf.GGUFReader(tmp_path / file).fields.items()}
        for file in ("ours.gguf", "theirs.gguf")
    )
    general = [key for key in ours | theirs if key.startswith("general.") and key != "general.file_type"]
    assert len(general) > 28
    assert {key: ours.get(key) for key in general} == {key: theirs.get(key) for key in general}


def found_by_llama_cpp(files: list[str], tag: str) -> str | None:
    """The file that `-hf REPO:TAG` takes: find_best_model and get_gguf_split_info of common/download.cpp."""
    aside = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
    for path in files:
        name = path.rpartition("/")[2]
        if not path.endswith(".gguf") or any(word in name for word in aside):
            continue
        if re.search(f"{tag}[.-]", path, re.IGNORECASE):
            part = re.fullmatch(r"(.+)-([0-9]{5})-of-([0-9]{5})", path.removesuffix(".gguf"))
            if part is None or int(part[2]) == 1:
                return path
    return None


def tag_of(path: str) -> str:
    """The tag under which llama.cpp keeps a file."""
    stem = path.removesuffix(".gguf")
    part = re.fullmatch(r"(.+)-([0-9]{5})-of-([0-9]{5})", stem)
    found = re.search(r"[-.]([A-Z0-9_]+)$", part[1] if part else stem, re.IGNORECASE)
    return found[1].upper() if found else ""


def test_llama_cpp_finds_each_type_by_its_tag(tmp_path: Path) -> None:
    source = toy(tmp_path, hidden=256, layers=1)
    types = ("Q8_0", "Q4_K_M", "Q4_K_S", "IQ4_XS", "F16", "Q4_0")
    whole = {kind: [plan_of(source, type=kind).name] for kind in types}
    parts = {kind: [f.name for f in plan_of(source, type=kind, split_size=200_000).files] for kind in types}
    for names in (whole, parts):
        files = [name for each in names.values() for name in each]
        for kind in types:
            assert found_by_llama_cpp(files, kind) == names[kind][0]
            assert {tag_of(name) for name in names[kind]} == {kind}
    assert all(len(names) > 1 for names in parts.values())


def test_types_chosen_by_their_costs_are_named_by_their_bits(tmp_path: Path) -> None:
    name = plan_of(toy(tmp_path, hidden=256, layers=1), type=None, bits=6.0).name
    assert re.fullmatch(r"GPT-NeoX-1\.1M-[56]_\dBPW\.gguf", name) and tag_of(name).endswith("BPW")


# --- names -----------------------------------------------------------------------------------------------------------


def test_released_models_are_named_by_their_own_size() -> None:
    def name(title: str, kind: str = "Q8_0") -> str:
        return file_stem({"general.name": title}, kind)

    assert name("gpt-neox-20b") == "gpt-neox-20B-Q8_0"  # 20.55 B parameters, which round to 21
    assert name("pythia-160m-deduped") == "pythia-160M-deduped-Q8_0"
    assert name("../odd: \n name") == "odd-name-Q8_0"


def test_a_folder_that_is_not_called_like_a_model_has_no_say(tmp_path: Path) -> None:
    first, second = (hugging_face(tmp_path / name / "out", card="") for name in ("a", "b"))
    assert plan_of(first).files[0].pieces == plan_of(second).files[0].pieces
    assert keys_of(first)["general.name"] == "GPT-NeoX 166K"
    telling = hugging_face(tmp_path / "c" / "tiny-160k", card="")
    assert keys_of(telling)["general.name"] == "Tiny 160k"


def test_a_snapshot_of_the_hubs_cache_is_called_by_its_repository(tmp_path: Path) -> None:
    folder = tmp_path / "models--me--tiny-160k" / "snapshots"
    folder.mkdir(parents=True)
    source = hugging_face(folder / "0123abc", card="")
    assert hub_name(open_checkpoint(source).index) == "me/tiny-160k"
    keys = keys_of(source)
    assert (keys["general.organization"], keys["general.size_label"]) == ("Me", "160K")


def test_a_file_goes_into_a_folder_under_its_default_name(tmp_path: Path) -> None:
    source = toy(tmp_path)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "mine.txt").write_text("kept")
    for target in (tmp_path / "models", f"{tmp_path}/new/"):
        assert cli("convert", source, target, "--to", "gguf", "--type", "F16", "--quiet") == 0
    for folder in ("models", "new"):
        assert (tmp_path / folder / "GPT-NeoX-166K-F16.gguf").is_file()
    assert (tmp_path / "models" / "mine.txt").read_text() == "kept"
    assert run(plan_of(source), f"{tmp_path}/new/", overwrite=True) == tmp_path / "new" / "GPT-NeoX-166K-F16.gguf"


def test_a_folder_of_ours_is_no_place_for_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = hugging_face(tmp_path / "hf")
    made = run(plan_of(source, "hf"), tmp_path / "again")
    assert cli("convert", source, made, "--to", "gguf", "--type", "F16") == 1
    assert "is a folder" in capsys.readouterr().err


# --- released models -------------------------------------------------------------------------------------------------


def test_a_released_model_is_told_by_name_step_or_preset_and_never_by_shapes_alone() -> None:
    twenty, small = GPT_NEOX.presets["20B"], GPT_NEOX.presets["pythia-160m"]

    def repo(config: Any, *names: str, preset: str | None = None, step: int | None = None) -> str | None:
        found = released(GPT_NEOX, config, names, preset, step)
        return found.repo if found else None

    assert repo(twenty) is repo(twenty, "mine", step=10) is repo(small, "gpt-neox-20b") is None
    assert repo(twenty, step=150_000) == repo(twenty, preset="20B") == "EleutherAI/gpt-neox-20b"
    assert repo(twenty, "GPT-NeoX-20B") == "EleutherAI/gpt-neox-20b"
    assert repo(small, step=143_000) is None  # two models have these
    assert repo(small, "pythia-160m-deduped") == "EleutherAI/pythia-160m-deduped"
    assert repo(small, preset="pythia-160m") == "EleutherAI/pythia-160m"
    assert len({release.repo for release in RELEASES}) == len(RELEASES)


def test_what_is_known_of_a_released_model_is_filled_in(tmp_path: Path) -> None:
    source = toy(tmp_path, hidden=128, layers=6, heads=4, rows=50304, tp=1)
    words = words_of(open_checkpoint(source, preset="pythia-14m"), Recipe("hf"))
    assert words.repo == "EleutherAI/pythia-14m" and words.bases == ["EleutherAI/pythia-14m"]
    assert words.datasets == ["EleutherAI/pile"]
    keys = {key.removeprefix("general."): value for key, value in words.keys.items()}
    assert (keys["license"], keys["languages"], keys["size_label"]) == ("apache-2.0", ["en"], "14M")
    assert keys["source.repo_url"] == "https://huggingface.co/EleutherAI/pythia-14m"
    assert any("taken for EleutherAI/pythia-14m" in note for note in words.notes)


# --- the user's words ------------------------------------------------------------------------------------------------


def test_the_users_words_stand_above_the_card(tmp_path: Path) -> None:
    source, file = hugging_face(tmp_path / "tiny-160k"), tmp_path / "said.json"
    file.write_text(json.dumps(SAID | {"mine.number": 3, "mine.list": [1, 2]}))
    pairs = (("general.author", "her"), ("general.languages", "de, fr"), ("general.license.name", ""))
    run(plan_of(source, metadata=file, set=pairs), tmp_path / "x.gguf")
    keys = read_back(tmp_path / "x.gguf")
    assert keys["general.author"] == "her" and keys["general.quantized_by"] == "us"
    assert keys["general.languages"] == ["de", "fr"] and keys["general.tags"] == ["a", "b"]
    assert (keys["general.base_model.count"], keys["general.base_model.0.name"]) == (1, "One")
    assert "general.base_model.0.organization" not in keys  # the card's is replaced
    assert "general.license.name" not in keys and keys["general.license"] == "other"
    assert (keys["mine.number"], keys["mine.list"]) == (3, [1, 2])


def test_a_gguf_sources_own_words_are_kept_but_for_what_is_said(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "tiny-160k")
    run(plan_of(source), tmp_path / "x.gguf")
    run(plan_of(tmp_path / "x.gguf", set=(("general.author", "her"), ("general.url", ""))), tmp_path / "y.gguf")
    before, after = read_back(tmp_path / "x.gguf"), read_back(tmp_path / "y.gguf")
    assert after == before | {"general.author": "her"}


@pytest.mark.parametrize(
    "key", ["general.architecture", "general.file_type", "gptneox.block_count", "tokenizer.ggml.model", "split.count"]
)
def test_what_the_weights_decide_cannot_be_set(key: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=f"--set {key}: {key} follows from the model"):
        plan_of(toy(tmp_path), set=((key, "1"),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "holds no JSON object"),
        ('{"general.sampling.top_k": "many"}', "expected a whole number"),
        ('{"mine.table": {"a": 1}}', "expected a text"),
        ('{"author": "me"}', "is no key"),
    ],
)
def test_a_file_of_words_that_cannot_be_understood_is_named(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "said.json").write_text(content)
    with pytest.raises(PlanError, match=message) as error:
        plan_of(toy(tmp_path), metadata=tmp_path / "said.json")
    assert "said.json" in str(error.value)


def test_no_path_gets_into_a_target(tmp_path: Path) -> None:
    source = hugging_face(tmp_path / "tiny-160k")
    for format in TARGETS:
        plan = plan_of(source, format)
        pieces = b"".join(piece for file in plan.files for _, piece in file.pieces)
        assert str(tmp_path).encode() not in pieces + plan.card + b"".join(plan.sidecars.values())
    config = json.loads((source / "config.json").read_text()) | {"_name_or_path": str(source)}
    (source / "config.json").write_text(json.dumps(config))
    assert keys_of(source)["general.name"] == "Tiny 160k"


def test_an_importance_matrix_is_told_as_llama_quantize_tells_it(tmp_path: Path) -> None:
    source = toy(tmp_path, hidden=256, layers=1)
    (tmp_path / "deep").mkdir()
    path = tmp_path / "deep" / "m.gguf"
    imatrix.write(path, {"blk.0.ffn_up.weight": np.ones(256)}, np.zeros((3, 8), np.int64), "wiki.txt")
    dat = struct.pack("<2i2s2i256f", 1, 2, b"up", 1, 256, *[1.0] * 256) + struct.pack("<2i4s", 5, 4, b"wiki")
    (tmp_path / "m.dat").write_bytes(dat)
    assert imatrix.read(tmp_path / "m.dat").dataset == "wiki" and imatrix.read(tmp_path / "m.dat").chunks == 5
    run(plan_of(source, type="Q4_K_M", imatrix=path), tmp_path / "x.gguf")
    keys = {key: value for key, value in read_back(tmp_path / "x.gguf").items() if key.startswith("quantize.")}
    wanted = {"file": "m.gguf", "dataset": "wiki.txt", "entries_count": 1, "chunks_count": 3}
    assert keys == {f"quantize.imatrix.{name}": value for name, value in wanted.items()}
