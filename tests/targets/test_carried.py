"""What lies beside the weights arrives: tokenizer files byte for byte, tokens, settings; what cannot is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.core.layout import Content
from neoxconv.errors import CheckpointError
from neoxconv.formats.tokenizer import END, PADDING
from neoxconv.synthetic import tiny
from neoxconv.targets import TARGETS
from tests.little_llamas import little_llama
from tests.toy import toy

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
GENERATION = {"bos_token_id": 0, "eos_token_id": [0, 1], "do_sample": True, "temperature": 0.7}
FOLDERS = [
    Recipe("hf"),
    Recipe("bnb", type="NF4"),
    Recipe("bnb", type="INT8"),
    Recipe("float8"),
    Recipe("hf", dtype="F32"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder with the tokenizer of a chat model in every file that people have."""
    made = run(make_plan(open_checkpoint(toy(tmp_path)), Recipe("hf")), tmp_path / "hf")
    assert isinstance(made, Path)
    names = {"bos_token": END, "eos_token": {"content": PADDING}, "pad_token": PADDING, "unk_token": END}
    files = {
        "tokenizer_config.json": {**names, "padding_side": "left", "add_bos_token": True, "odd": [1, None]},
        "special_tokens_map.json": names,
        "added_tokens.json": {"x": 5},
        "generation_config.json": GENERATION,
    }
    for name, value in files.items():
        (made / name).write_text(json.dumps(value))
    (made / "chat_template.jinja").write_text(TEMPLATE)
    (made / "additional_chat_templates").mkdir()
    (made / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    config = json.loads((made / "config.json").read_text())
    config |= {"eos_token_id": 1, "pad_token_id": 1, "attention_dropout": 0.1, "my_field": {"a": 1}}
    (made / "config.json").write_text(json.dumps(config))
    return made


def content(source: Path, recipe: Recipe) -> Content:
    return TARGETS[recipe.format].make(open_checkpoint(source), recipe)


def table(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(data)
    return found


@pytest.mark.parametrize("recipe", FOLDERS, ids=lambda r: f"{r.format}-{r.type or r.dtype}")
def test_every_file_is_carried_as_it_is(recipe: Recipe, folder: Path) -> None:
    made = content(folder, recipe).sidecars
    others = {"config.json", "README.md", "model.safetensors", "manifest.json", "model.safetensors.index.json"}
    own = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {name: data for name, data in made.items() if name not in others} == {
        name: data for name, data in own.items() if name not in others
    }
    config = table(made["config.json"])
    assert (config["eos_token_id"], config["pad_token_id"], config["attention_dropout"]) == (1, 1, 0.1)
    assert config["my_field"] == {"a": 1}


def test_what_a_conversion_decides_is_not_carried(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    for name, value in {"torch_dtype": "float32", "dtype": "float32", "transformers_version": "4.1"}.items():
        settings[name] = value
    (folder / "config.json").write_text(json.dumps(settings))
    config = table(content(folder, Recipe("hf", dtype="BF16")).sidecars["config.json"])
    assert (config["torch_dtype"], config["dtype"]) == ("bfloat16", "bfloat16")
    assert "transformers_version" not in config


def test_from_bnb_to_hf_no_quantization_is_left(tmp_path: Path) -> None:
    packed = run(make_plan(open_checkpoint(toy(tmp_path)), Recipe("bnb", type="NF4")), tmp_path / "bnb")
    assert "quantization_config" not in table(content(Path(str(packed)), Recipe("hf")).sidecars["config.json"])


def test_gguf_has_what_the_settings_say_and_tells_the_rest(folder: Path, tmp_path: Path) -> None:
    plan = make_plan(open_checkpoint(folder), Recipe("gguf", type="F16"))
    keys = open_checkpoint(run(plan, tmp_path / "x.gguf")).index.settings
    said = {name: keys[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding", "unknown")}
    assert said == {"bos": 0, "eos": 1, "padding": 1, "unknown": 0}
    assert keys["tokenizer.ggml.add_bos_token"] is True
    assert TEMPLATE in str({k: v for k, v in keys.items() if "template" in k})
    assert any("generation_config.json has no place in GGUF" in note for note in plan.notes)


@pytest.mark.parametrize("recipe", [Recipe("slim"), Recipe("safetensors")], ids=lambda r: r.format)
def test_what_has_no_place_is_named(recipe: Recipe, folder: Path) -> None:
    notes = " ".join(content(folder, recipe).notes)
    for name in ("tokenizer_config.json", "chat_template.jinja", "tools.jinja", "generation_config.json"):
        assert name in notes


def test_gguf_to_gguf_keeps_every_key_with_its_type(folder: Path, tmp_path: Path) -> None:
    first = run(make_plan(open_checkpoint(folder), Recipe("gguf", type="F16")), tmp_path / "a.gguf")
    gguf = pytest.importorskip("gguf")
    reader, writer = gguf.GGUFReader(first), gguf.GGUFWriter(tmp_path / "b.gguf", "gptneox")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=inner)
    writer.add_uint8("custom.small", 7)
    writer.add_float64("custom.precise", 0.1)
    writer.add_array("custom.list", [1, 2, 300])
    writer.add_license("apache-2.0")
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    made = run(make_plan(open_checkpoint(tmp_path / "b.gguf"), Recipe("gguf", type="Q8_0")), tmp_path / "c.gguf")
    before, after = (gguf.GGUFReader(path).fields for path in (tmp_path / "b.gguf", made))
    kept = [n for n in before if not n.startswith("GGUF.") and n not in ("general.file_type", "general.size_label")]
    assert {n: (after[n].types, after[n].contents()) for n in kept} == {
        n: (before[n].types, before[n].contents()) for n in kept
    }


def test_an_end_that_nobody_set_is_the_tokenizers(folder: Path) -> None:
    """transformers writes 2 into config.json and generation_config.json where GPT-NeoX's eos was never set."""
    settings = json.loads((folder / "config.json").read_text()) | {"eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text('{"_from_model_config": true, "eos_token_id": 2}')
    made = content(folder, Recipe("hf"))
    assert table(made.sidecars["config.json"])["eos_token_id"] == 1
    assert table(made.sidecars["generation_config.json"])["eos_token_id"] == 1
    assert any(note.startswith("eos_token_id is 2, transformers' default") for note in made.notes)


def test_ids_beyond_the_rows_are_told(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text()) | {"eos_token_id": [1, 70000]}
    (folder / "config.json").write_text(json.dumps(settings))
    assert any("eos_token_id is 70000, but the model has" in note for note in content(folder, Recipe("hf")).notes)


def test_a_git_lfs_pointer_is_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    for recipe in (Recipe("hf"), Recipe("gguf", type="F16")):
        with pytest.raises(CheckpointError, match=r"tokenizer.json: is a git-lfs pointer.*git lfs pull"):
            content(folder, recipe)


def test_an_empty_file_is_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is empty"):
        content(folder, Recipe("hf"))


def test_an_explicit_folder_brings_all_its_files(folder: Path, tmp_path: Path) -> None:
    source = toy(tmp_path / "other")
    made = content(source, Recipe("hf", tokenizer=folder)).sidecars
    assert made["chat_template.jinja"].decode() == TEMPLATE and made["tokenizer.json"] == tiny().data


def test_the_choice_is_told(folder: Path) -> None:
    chosen = content(folder, Recipe("hf")).tokenizer
    assert chosen == {
        "file": str(folder / "tokenizer.json"),
        "tokens": 276,
        "rows": open_checkpoint(folder).config.rows,
    }


@pytest.mark.parametrize(
    "data",
    [b"{", b"[1]", b'{"model": {"vocab": [[[1], 2], 3]}, "added_tokens": 7}', b'{"model": {"vocab": {"a": []}}}',
     b'{"model": {"type": "WordPiece"}, "added_tokens": [{"content": [], "id": {}}, 5]}', b"\xff\xfe", b"[" * 99999],
)  # fmt: skip
@pytest.mark.parametrize("settings", [True, False])
def test_whatever_a_tokenizer_holds_folders_take_it_and_gguf_refuses_it(
    data: bytes, settings: bool, folder: Path
) -> None:
    (folder / "tokenizer.json").write_bytes(data)
    if not settings:
        (folder / "tokenizer_config.json").unlink()
    for recipe in (Recipe("hf"), Recipe("slim"), Recipe("bnb", type="NF4"), Recipe("float8")):
        assert content(folder, recipe).sidecars["tokenizer.json"] == data
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        content(folder, Recipe("gguf", type="F16"))


# --- ids of other families -------------------------------------------------------------------------------------------


def llama_with(folder: Path, **settings: Any) -> Path:
    """A Llama whose config.json says this; its tokenizer's token 0 begins and ends a text, token 1 fills it."""
    source = little_llama(folder)
    (source / "generation_config.json").unlink()
    config = {k: v for k, v in table((source / "config.json").read_bytes()).items() if not k.endswith("_token_id")}
    (source / "config.json").write_text(json.dumps(config | settings))
    return source


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"bos_token_id": 1, "eos_token_id": 2}, {"bos_token_id": 1, "eos_token_id": 0}),  # 1 is special, 2 is a letter
        ({"bos_token_id": 5, "eos_token_id": [5, 6]}, {"bos_token_id": 5, "eos_token_id": [5, 6]}),
        ({"bos_token_id": None, "eos_token_id": 0}, {"bos_token_id": None, "eos_token_id": 0}),
    ],
    ids=["unset", "set", "none"],
)
def test_ids_of_llama_that_nobody_set_are_the_tokenizers(
    said: dict[str, Any], expected: dict[str, Any], tmp_path: Path
) -> None:
    made = content(llama_with(tmp_path / "hf", **said), Recipe("hf"))
    found = table(made.sidecars["config.json"])
    assert {name: found[name] for name in expected} == expected
    assert any("transformers' default" in note for note in made.notes) == (said["eos_token_id"] == 2)


def test_a_llama_without_tokenizer_has_sentencepieces_ids(tmp_path: Path) -> None:
    shards = run(make_plan(open_checkpoint(llama_with(tmp_path / "hf")), Recipe("slim")), tmp_path / "shards")
    source = open_checkpoint(shards, qkv_layout="blocks", rmsnorm="inside")
    with_tokens = table(TARGETS["hf"].make(source, Recipe("hf")).sidecars["config.json"])
    assert (with_tokens["bos_token_id"], with_tokens["eos_token_id"]) == (0, 0)
    for path in shards.rglob("*tokenizer*"):
        path.unlink()
    without = TARGETS["hf"].make(source, Recipe("hf")).sidecars
    assert table(without["generation_config.json"])["eos_token_id"] == 2
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    (tmp_path / "config.json").write_bytes(without["config.json"])
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_no_beginning_is_said_where_the_tokenizer_has_none(tmp_path: Path) -> None:
    """Else transformers would begin a text with its default, which is an ordinary token here."""
    source = llama_with(tmp_path / "hf")
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": END}))
    (source / "special_tokens_map.json").unlink(missing_ok=True)
    file = run(make_plan(open_checkpoint(source), Recipe("gguf", type="F16")), tmp_path / "x.gguf")
    config = table(content(file, Recipe("hf")).sidecars["config.json"])
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 0)
