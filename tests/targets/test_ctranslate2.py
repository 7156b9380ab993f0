"""The CTranslate2 target: its own converter's bytes, its own logits, and what cannot be said in its words."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.core.layout import Entry
from neoxconv.core.tensor import LazyTensor
from neoxconv.dtypes import F32
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats.ctranslate2.read import CONFIG, MODEL, VOCABULARY, Model, read_model
from neoxconv.formats.ctranslate2.write import layout
from neoxconv.formats.tokenizer import hf_files
from neoxconv.names import CTRANSLATE2_TYPES
from neoxconv.quant import ENCODINGS
from neoxconv.synthetic import tiny
from tests.helpers import cli, digests
from tests.oracles import ctranslate2_convert, ctranslate2_logits, program
from tests.relatives import CLOSE, native_logits, random_model, saved, some_tokens
from tests.toy import toy

Source = Callable[[Path], Path]
WORDS = 276  # of the tiny tokenizer: for GPT-2 and GPT-J its converter wants one for every row
TOKENS = some_tokens(WORDS)


def made(source: Path, target: Path, type: str | None = None, **changes: Any) -> Path:
    return run(make_plan(open_checkpoint(source), Recipe("ctranslate2", type=type, **changes)), target)


def hf(source: Path, target: Path) -> Path:
    return run(make_plan(open_checkpoint(source), Recipe("hf")), target)


def values(model: Model) -> dict[str, tuple[str, bytes]]:
    """The type and the bytes of every tensor, by its own name and by those that mean it, and every single number."""
    tensors = {name: (t.dtype.name, t.read(0, t.rows).tobytes()) for name, t in model.tensors.items()}
    scales = {f"{alias}_scale": f"{name}_scale" for alias, name in model.aliases.items()}
    both = model.aliases | {alias: name for alias, name in scales.items() if name in tensors}
    named = {alias: tensors[name] for alias, name in both.items()}
    return {**tensors, **named, **{name: ("", str(value).encode()) for name, value in model.scalars.items()}}


def from_transformers(name: str, **changes: Any) -> Source:
    """A model of transformers' own with random numbers, in float16, with the tiny tokenizer and settings for it."""

    def make(folder: Path) -> Path:
        sizes = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0} | changes
        model = random_model(getattr(program("transformers"), f"{name}Config")(**sizes)).half()
        source = saved(model, folder.with_name("of transformers 5"))
        for file, data in hf_files(tiny(), 64).items():
            (source / file).write_bytes(data)
        return hf(source, folder)  # whose settings transformers 4 reads too

    return make


def from_toy(**changes: Any) -> Source:
    return lambda folder: hf(toy(folder.parent, **changes), folder)


OF_GPT2 = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 64}
OF_LLAMA = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
OF_MISTRAL = {"num_key_value_heads": 2, "max_position_embeddings": 64, **OF_LLAMA}
SOURCES: dict[str, Source] = {
    "gpt_neox": from_toy(),
    "serial": from_toy(parallel_residual=False, rotary_pct=1.0),
    "erf": from_toy(tanh_gelu=False),
    "gpt2": from_transformers("GPT2", **OF_GPT2),
    "gptj": from_transformers("GPTJ", rotary_dim=6, **OF_GPT2),
    "llama": from_transformers("Llama", num_key_value_heads=2, rope_theta=5e5, rms_norm_eps=1e-6, **OF_LLAMA),
    "tied llama": from_transformers("Llama", tie_word_embeddings=True, attention_bias=True, **OF_LLAMA),
}
every = pytest.mark.parametrize("name", SOURCES)


@every
def test_a_folder_is_read_back_and_ctranslate2_gives_its_logits(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path / "hf")
    target = made(source, tmp_path / "made", "FLOAT32")
    checkpoint, again = open_checkpoint(source), open_checkpoint(target)
    assert again.architecture is checkpoint.architecture and again.config == checkpoint.config
    assert verify_weights(checkpoint, again).passed
    program("ctranslate2")
    ours, theirs = native_logits(checkpoint, TOKENS), ctranslate2_logits(target, TOKENS)
    assert np.abs(theirs - ours).max() < CLOSE * ours.std()


@every
@pytest.mark.slow
def test_tensors_are_those_of_its_own_converter(name: str, tmp_path: Path) -> None:
    source = SOURCES[name](tmp_path / "hf")
    made_there = ctranslate2_convert(source, tmp_path / "theirs", *map(str.lower, CTRANSLATE2_TYPES))
    for kind in CTRANSLATE2_TYPES:
        theirs = made_there / kind.lower()
        ours = made(source, tmp_path / f"ours {kind}", kind)
        assert values(read_model(ours / MODEL)) == values(read_model(theirs / MODEL)), kind
        assert json.loads((ours / VOCABULARY).read_text()) == json.loads((theirs / VOCABULARY).read_text())
        told, expected = (json.loads((folder / CONFIG).read_text()) for folder in (ours, theirs))
        assert told.pop("max_position_embeddings") == open_checkpoint(source).config.context
        assert told == {key: value or (None if "eps" in key else "") for key, value in expected.items()}
        found = verify_weights(open_checkpoint(source), open_checkpoint(theirs)).findings
        assert all("context is" in str(finding) for finding in found), found  # which nothing there tells


@pytest.mark.slow
def test_one_file_of_its_own_converter_byte_for_byte(tmp_path: Path) -> None:
    """Where no two tensors are equal: of equal ones its converter stores one."""
    source = hf(toy(tmp_path), tmp_path / "hf")
    theirs = ctranslate2_convert(source, tmp_path / "theirs", "int8") / "int8"
    ours = made(source, tmp_path / "ours")
    for name in (MODEL, VOCABULARY):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes()


# --- what cannot be said, and what is damaged -------------------------------------------------------------------------


def changed(folder: Path, **changes: Any) -> Path:
    """The folder with other settings in its config.json."""
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_what_its_own_converter_leaves_out_is_said_truly(tmp_path: Path) -> None:
    """The rotary base and the epsilon, of which it takes its defaults."""
    program("ctranslate2")
    rope = {"rope_theta": 500.0, "partial_rotary_factor": 0.25, "rope_type": "default"}
    said = {"rotary_emb_base": 500.0, "rope_parameters": rope, "layer_norm_eps": 0.01}
    source = changed(hf(toy(tmp_path), tmp_path / "hf"), **said)
    target = made(source, tmp_path / "made", "FLOAT32")
    checkpoint = open_checkpoint(source)
    ours = native_logits(checkpoint, TOKENS)
    assert np.abs(ctranslate2_logits(target, TOKENS) - ours).max() < CLOSE * ours.std()
    assert open_checkpoint(target).config == checkpoint.config


@pytest.mark.parametrize(
    ("name", "changes", "problem"),
    [
        ("Mistral", {"sliding_window": 16, **OF_MISTRAL}, "attend to the 16 before them"),
        (
            "GPTNeo",
            {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "attention_types": [[["global"], 2]]},
            "no gpt_neo",
        ),
    ],
)
def test_what_it_cannot_say_is_refused_by_name(
    name: str, changes: dict[str, Any], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = from_transformers(name, **changes)(tmp_path / "hf")
    assert cli("convert", source, tmp_path / "made", "--to", "ctranslate2") == 1
    assert problem in capsys.readouterr().err and not (tmp_path / "made").exists()


def test_a_mistral_that_attends_to_all_is_a_llama(tmp_path: Path) -> None:
    program("ctranslate2")
    source = from_transformers("Mistral", sliding_window=64, **OF_MISTRAL)(tmp_path / "hf")
    target = made(source, tmp_path / "made", "FLOAT32")
    ours = native_logits(open_checkpoint(source), TOKENS)
    assert np.abs(ctranslate2_logits(target, TOKENS) - ours).max() < CLOSE * ours.std()
    assert verify_weights(open_checkpoint(source), open_checkpoint(target)).passed


def test_a_source_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    source = hf(toy(tmp_path), tmp_path / "hf")
    for file in source.glob("*token*"):
        file.unlink()
    with pytest.raises(PlanError, match="needs the texts of all tokens"):
        make_plan(open_checkpoint(source), Recipe("ctranslate2"))


def test_a_tensor_of_4_gib_is_refused() -> None:
    def unread(start: int, stop: int) -> Any:
        raise AssertionError

    large = LazyTensor((1 << 16, 1 << 14), F32, unread, F32)
    entry = Entry("decoder/embeddings/weight", "gpt_neox.embed_in.weight", large, ENCODINGS["F32"])
    with pytest.raises(PlanError, match=r"decoder/embeddings/weight: is .* of F32, 4,294,967,296 bytes"):
        layout([entry], {}, {})
    assert layout([replace(entry, encoding=ENCODINGS["F16"])], {}, {}).size > 1 << 31


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return made(toy(tmp_path), tmp_path / "made")


def patched(target: Path, before: bytes, after: bytes) -> Path:
    """The folder without its manifest, other bytes in the one place of its model.bin that had those."""
    data = (target / MODEL).read_bytes()
    assert data.count(before) == 1, before
    (target / MODEL).write_bytes(data.replace(before, after))
    (target / "manifest.json").unlink()
    return target


def scalar(name: str, type: int, value: np.generic) -> bytes:
    """A single number as the file has it."""
    return name.encode() + bytes([0, 0, type]) + len(value.tobytes()).to_bytes(4, "little") + value.tobytes()


ROTARY = "decoder/layer_1/self_attention/rotary_"
DAMAGES: dict[str, tuple[bytes, bytes, str]] = {
    "version": (b"\6\0\0\0\x17\0Trans", b"\5\0\0\0\x17\0Trans", "is version 5 of CTranslate2's files; expected 6"),
    "kind": (b"TransformerDecoderSpec", b"TransformerEncoderSpec", "is 'TransformerEncoderSpec', revision 8; expected"),
    "alibi": (
        scalar("decoder/alibi", 1, np.int8(0)),
        scalar("decoder/alibi", 1, np.int8(1)),
        "decoder/alibi is 1, which is not supported here; expected 0",
    ),
    "another base in one layer": (
        scalar(ROTARY + "base", 0, np.float32(1e4)),
        scalar(ROTARY + "base", 0, np.float32(1e3)),
        "layer_1/self_attention/rotary_base is 1000, which is not supported here; expected 10000",
    ),
    "quick gelu": (
        scalar("decoder/activation", 1, np.int8(1)),
        scalar("decoder/activation", 1, np.int8(4)),
        "decoder/activation is 4.0; expected one of 1 (gelu_tanh)",
    ),
    "unknown number": (b"decoder/scale_alibi\0", b"decoder/scale_alibu\0", "decoder/scale_alibu is 0, which changes"),
    "unknown tensor": (
        b"decoder/layer_norm/gamma\0",
        b"decoder/layer_nurm/gamma\0",
        "decoder/layer_nurm/gamma is not a",
    ),
    "type": (b"decoder/layer_norm/gamma\0\1\x40\0\0\0\4", b"decoder/layer_norm/gamma\0\1\x40\0\0\0\6", "is of type 6"),
    "shape": (b"decoder/layer_norm/gamma\0\1\x40", b"decoder/layer_norm/gamma\0\1\x41", "not as many bytes"),
    "no scales": (b"decoder/projection/weight_scale", b"decoder/projection/weight_scala", "weight_scale missing"),
    "heads": (
        scalar("decoder/num_heads", 2, np.int16(4)),
        scalar("decoder/num_heads", 2, np.int16(3)),
        "decoder/num_heads is 3, which does not divide the 64 columns",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_or_foreign_file_is_refused_by_name(name: str, target: Path) -> None:
    before, after, problem = DAMAGES[name]
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(patched(target, before, after))
    assert problem in str(error.value) and MODEL in str(error.value)


def test_a_file_cut_short_and_one_too_long_are_refused(target: Path) -> None:
    data = (target / MODEL).read_bytes()
    for wrong in (data[:-1], data[: len(data) // 2], data + b"\0", data[:40]):
        (target / MODEL).write_bytes(wrong)
        with pytest.raises(CheckpointError, match=MODEL):
            open_checkpoint(target)


def test_planted_faults_are_found(tmp_path: Path, target: Path) -> None:
    """A moved code, a doubled scale and a flipped bit of a norm, without the manifest."""
    source, data = open_checkpoint(tmp_path / "toy"), (target / MODEL).read_bytes()
    (target / "manifest.json").unlink()
    assert verify_weights(source, open_checkpoint(target)).passed
    heads = (b"layer_0/ffn/linear_1/weight\0", b"layer_1/ffn/linear_0/weight_scale\0", b"decoder/layer_norm/beta\0")
    for head, place, bit in zip(heads, (14 + 200, 10 + 2, 10 + 5), (2, 7, 3), strict=True):
        at = data.index(head) + len(head) + place
        (target / MODEL).write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
        findings = verify_weights(source, open_checkpoint(target)).findings
        assert len(findings) == 1, (head, findings)


def test_codes_chosen_together_are_proved_and_a_moved_one_is_found(tmp_path: Path, target: Path) -> None:
    source, by = tmp_path / "toy", tmp_path / "cal.gguf"
    np.save(tmp_path / "tokens.npy", (np.arange(6 * 64) * 7 % 256).reshape(6, 64))
    assert cli("calibrate", source, "-o", by, "--tokens", tmp_path / "tokens.npy", "--covariance", "--quiet") == 0
    chosen = made(source, tmp_path / "chosen", calibration=by)
    plain, ours = (values(read_model(folder / MODEL)) for folder in (target, chosen))
    changed = {name for name in plain if plain[name] != ours[name]}
    assert len(changed) == 9 and "decoder/embeddings/weight" not in changed  # of 2 layers and the head, the codes alone
    opened = open_checkpoint(source)
    assert verify_weights(opened, open_checkpoint(chosen), calibration=by).passed
    data, head = (chosen / MODEL).read_bytes(), b"layer_0/ffn/linear_1/weight\0"
    at = data.index(head) + len(head) + 14 + 200
    (chosen / MODEL).write_bytes(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    [finding] = verify_weights(opened, open_checkpoint(chosen), calibration=by).findings
    assert finding.where == "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"
    with pytest.raises(PlanError, match="--calibration is for the types of 8 bits; found FLOAT16"):
        made(source, tmp_path / "x", "FLOAT16", calibration=by)


def test_it_goes_on_to_other_formats_and_back(tmp_path: Path, target: Path) -> None:
    back = made(hf(target, tmp_path / "hf"), tmp_path / "back")
    assert (back / MODEL).read_bytes() == (target / MODEL).read_bytes()
    gguf = run(make_plan(open_checkpoint(target), Recipe("gguf", type="F16")), tmp_path / "x.gguf")
    again = made(gguf, tmp_path / "again")
    assert (again / MODEL).read_bytes() == (target / MODEL).read_bytes()
    assert digests(again)[VOCABULARY] == digests(target)[VOCABULARY]


def test_every_level_of_verify_finds_it_right(tmp_path: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    program("ctranslate2")
    words = ["verify", tmp_path / "toy", target, "--level", "logits", "--length", "32"]
    assert cli(*words) == 0 and cli(*words, "--engine", "ctranslate2") == 0
    told = capsys.readouterr().out
    assert told.count("PASS: bytes ok, weights ok, tokenizer ok, logits ok") == 2 and "CT2_INT8 by ctranslate2" in told
    vocabulary = json.loads((target / VOCABULARY).read_text())
    vocabulary[7], vocabulary[8] = vocabulary[8], vocabulary[7]
    (target / VOCABULARY).write_text(json.dumps(vocabulary))
    assert cli("verify", tmp_path / "toy", target, "--level", "tokenizer") == 3
    assert "vocabulary.json: item 7 is" in capsys.readouterr().out
