"""Cards: the Hub's own library reads them, they say how to load each target, and nothing of others is overwritten."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.targets import TARGETS
from neoxconv.targets.source_card import parsed
from neoxconv.verify.bytes import verify_bytes
from tests.carded import CARD, hugging_face
from tests.helpers import cli

QUANTIZED = {"bnb": "NF4", "float8": "E4M3", "compressed-tensors": "W8A16", "mlx": "4bit", "ctranslate2": "INT8"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    card = CARD.replace("- causal-lm\n", "- causal-lm\n- 2024\n")
    return hugging_face(tmp_path_factory.mktemp("card") / "tiny-160k", card)


def card_of(source: Path, format: str, **asked: object) -> ModelCard:
    plan = make_plan(open_checkpoint(source), Recipe(format, **asked))  # type: ignore[arg-type]
    text = plan.card.decode()
    assert (plan.sidecars.get("README.md") == plan.card) == (not plan.single)
    found = ModelCard(text)
    found.validate = None  # never asks the Hub
    return found


@pytest.mark.parametrize("format", TARGETS)
def test_the_hubs_library_reads_every_card(format: str, source: Path) -> None:
    card = card_of(source, format, type=QUANTIZED.get(format) or ("Q8_0" if format == "gguf" else None))
    front, target = card.data.to_dict(), TARGETS[format]
    assert front["license"] == "other" and front["license_name"] == "pile" and front["language"] == ["en", "no"]
    assert front["library_name"] == target.loading.library and front["pipeline_tag"] == "text-generation"
    assert front["base_model"] == "EleutherAI/pythia-160m"
    assert front.get("base_model_relation") == (None if format in ("hf", "safetensors", "slim") else "quantized")
    assert front["datasets"] == ["EleutherAI/the_pile_deduplicated", "a/b"]
    assert front["tags"] == [*target.loading.tags, "gpt_neox", "causal-lm", "2024"]
    assert front["author"] == "someone" and "quantized_by" not in front
    plain = make_plan(open_checkpoint(source), Recipe(format)).files[0].name.removesuffix("-F16.gguf")
    assert plain in card.content and "# Pythia" in card.content and "How to load" in card.content


def test_the_users_words_are_in_the_card(source: Path) -> None:
    said = (("general.license", "mit"), ("general.quantized_by", "us"), ("general.tags", "mine"))
    front = card_of(source, "hf", set=said).data.to_dict()
    assert (front["license"], front["quantized_by"], front["tags"]) == ("mit", "us", ["gpt_neox", "mine"])


def test_scores_of_the_source_are_not_those_of_quantized_weights(tmp_path: Path) -> None:
    index = "---\nmodel-index: [{name: x, results: []}]\nextra: {a: 1}\n---\nText"
    source = hugging_face(tmp_path / "hf", card=index)
    plain, packed = (make_plan(open_checkpoint(source), recipe).card.decode() for recipe in (
        Recipe("hf"), Recipe("bnb", type="NF4")
    ))  # fmt: skip
    assert "model-index" in plain and "model-index" not in packed and "extra:" in packed


def test_a_card_of_ours_is_carried_on_once(source: Path, tmp_path: Path) -> None:
    first = run(make_plan(open_checkpoint(source), Recipe("hf")), tmp_path / "tiny-160k")
    second = make_plan(open_checkpoint(first), Recipe("hf")).card.decode()
    assert second.count("neoxconv: files") == 1 and second.count("# Pythia") == 1


@pytest.mark.parametrize(
    ("text", "front", "body"),
    [
        ("---\na: 1\n---\nText\n", {"a": 1}, "Text"),
        ("---\r\na: [x]\r\n---\r\nText", {"a": ["x"]}, "Text"),
        ("---\nlanguage:\n- no\n- en\n---\n", {"language": ["no", "en"]}, ""),
        ("---\nlanguage: no\n---\n", {"language": "no"}, ""),
        ("---\n---\nText", {}, "Text"),
        ("---\n- a\n---\nText", {}, "Text"),
        ("Text\n---\nmore", {}, "Text\n---\nmore"),
        ("---\n{\n---\nText", {}, "Text"),
        ("", {}, ""),
    ],
)
def test_a_sources_card_is_read_as_it_is_written(text: str, front: object, body: str) -> None:
    found = parsed(text)
    assert (found.front, found.text) == (front, body)
    assert bool(found.notes) == ("{\n" in text)


# --- beside single files ---------------------------------------------------------------------------------------------


def convert(source: Path, target: Path, kind: str, *words: str) -> int:
    return cli("convert", source, f"{target}/", "--to", "gguf", "--type", kind, "--quiet", *words)


def rows(folder: Path) -> list[list[str]]:
    lines = (folder / "README.md").read_text().splitlines()
    return [line.strip("| ").split(" | ") for line in lines if ".gguf |" in line]


def test_one_card_tells_every_file_in_its_folder(source: Path, tmp_path: Path) -> None:
    out, report = tmp_path / "out", {"target": "/x/tiny-160K-F16.gguf", "kl": {"mean": 0.00123}}
    assert convert(source, out, "BF16") == 0 and not (out / "README.md").exists()
    assert convert(source, out, "F16", "--card") == 0
    assert [row[:2] for row in rows(out)] == [["tiny-160K-BF16.gguf", "BF16"], ["tiny-160K-F16.gguf", "F16"]]
    (out / "README.md").write_text((out / "README.md").read_text() + "My own words.\n")
    size = (out / "tiny-160K-F16.gguf").stat().st_size
    for nbytes in (size - 1, size):  # what was measured of other bytes is not this file's
        assert "0.0012" not in (out / "README.md").read_text()
        (out / "verify.json").write_text(json.dumps({"targets": [report | {"bytes": nbytes}]}))
        assert cli("card", out) == 0
    assert [row[4:] for row in rows(out)] == [[], ["0.0012"]]
    assert (out / "README.md").read_text().endswith("My own words.\n")
    bits = 8 * (out / "tiny-160K-F16.gguf").stat().st_size / open_checkpoint(source).parameters
    assert rows(out)[1][3] == f"{bits:.2f}"


def test_a_card_of_others_is_left_alone(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "README.md").write_text("# Mine")
    assert convert(source, tmp_path, "F16", "--card") == 1
    assert "none of neoxconv's; leave --card out" in capsys.readouterr().err
    assert cli("card", tmp_path) == 1
    assert "is no card of neoxconv's" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "# Mine"


def test_a_folders_manifest_knows_its_card_anew(source: Path, tmp_path: Path) -> None:
    made = run(make_plan(open_checkpoint(source), Recipe("hf")), tmp_path / "hf")
    size = sum(path.stat().st_size for path in made.glob("*.safetensors"))
    row = {"target": "hf", "bytes": size, "kl": {"mean": 0.5}}
    (tmp_path / "hf.verify.json").write_text(json.dumps({"targets": [row]}))
    assert cli("card", made) == 0
    assert "| 0.5 |" in (tmp_path / "hf" / "README.md").read_text()
    assert verify_bytes(made).passed


def test_several_targets_share_a_card(source: Path, tmp_path: Path) -> None:
    words = ("--to", "gguf", "--type", "F16,BF16", "--card", "--quiet")
    assert cli("convert", source, tmp_path / "out", *words) == 0
    assert [row[1] for row in rows(tmp_path / "out")] == ["BF16", "F16"]


@pytest.mark.parametrize("front", ["language: &a [*a]", "x: !!bool q", "x: !!int ''", "x: !!timestamp foo", "[1, 2]"])
def test_an_odd_front_matter_of_the_source_stops_nothing(front: str) -> None:
    card = parsed(f"---\n{front}\n---\n# Mine\n")
    assert card.text == "# Mine" and not card.front
