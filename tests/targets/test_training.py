"""The slim target at any degrees and from any source: what goes around comes back, as gpt-neox itself stored it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.arch.gpt_neox.config import PRESETS, from_neox
from neoxconv.arch.gpt_neox.training import inverse_frequencies, to_neox
from neoxconv.cli.main import main
from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.table import ModelConfig
from neoxconv.dtypes import BF16, F16, narrow
from neoxconv.errors import PlanError
from neoxconv.formats.neox.yaml_settings import read_yaml
from neoxconv.quant import floats
from neoxconv.synthetic import tiny
from neoxconv.targets.training import as_yaml, vocabulary
from tests.fixtures import fixture
from tests.helpers import few
from tests.toy import toy

MERGED = ("norm", "attention.dense.bias", "4h_to_h.bias")  # what ranks do not merely hold a part of
OFFICIAL = "hf_official_converter"


def convert(source: Path, target: Path, **recipe: Any) -> Path:
    return run(make_plan(open_checkpoint(source), Recipe(**recipe)), target)


def slim(source: Path, target: Path, **recipe: Any) -> Path:
    return convert(source, target, format="slim", **recipe)


def weights(path: Path) -> dict[str, bytes]:
    """The unified tensors as the bytes of their numbers."""
    tensors = open_checkpoint(path).tensors
    return {name: floats(t.read(0, t.rows), t.dtype).tobytes() for name, t in tensors.items()}


def step_of(folder: Path) -> Path:
    return folder / (folder / "latest").read_text()


def settings_of(folder: Path) -> dict[str, Any]:
    (file,) = (step_of(folder) / "configs").iterdir()
    return {key.replace("-", "_"): value for key, value in read_yaml(file).items()}


def loaded(file: Path) -> Any:
    return torch.load(file, weights_only=True)


def states(folder: Path) -> list[dict[str, Any]]:
    """The mp_rank files, which must be numbered without gaps."""
    found = sorted(step_of(folder).glob("mp_rank_*"))
    assert [file.name for file in found] == [f"mp_rank_{rank:02d}_model_states.pt" for rank in range(len(found))]
    return [loaded(file) for file in found]


def layer_digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in step_of(folder).glob("layer_*")}


# --- what gpt-neox wrote is the oracle ------------------------------------------------------------------------------


@pytest.mark.parametrize("middle", ["hf", "gguf"])
def test_layer_files_are_those_that_gpt_neox_wrote(middle: str, tmp_path: Path) -> None:
    original = fixture("neox_2022_tp2_pp4/checkpoints/global_step10")
    source = fixture(f"neox_2022_tp2_pp4/{OFFICIAL}")
    if middle == "gguf":
        source = convert(source, tmp_path / "x.gguf", format="gguf", type="F16")
    made = step_of(slim(source, tmp_path / "slim", tp=2, pp=4))
    for pattern in ("layer_*", "mp_rank_*"):
        assert {f.name for f in made.glob(pattern)} == {f.name for f in original.glob(pattern)}
    for file in original.glob("layer_*"):
        ours, theirs = loaded(made / file.name), loaded(file)
        assert type(ours) is type(theirs) and list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert ours[name].shape == tensor.shape and ours[name].dtype == tensor.dtype, name
            if not any(part in name for part in MERGED):
                assert torch.equal(ours[name].view(torch.int16), tensor.view(torch.int16)), name


def test_bookkeeping_has_the_keys_that_gpt_neox_wrote(tmp_path: Path) -> None:
    original = fixture("neox_2022_tp2_pp4/checkpoints/global_step10")
    made = slim(fixture(f"neox_2022_tp2_pp4/{OFFICIAL}"), tmp_path / "slim", tp=2, pp=4)
    theirs = torch.load(original / "mp_rank_00_model_states.pt", weights_only=False, map_location="cpu")
    for state in states(made):
        assert set(theirs) - set(state) == {name for name in theirs if "rng" in name}
        assert state["module"] is None and state["iteration"] == 0 and state["mp_world_size"] == 8
        assert state["args"].items() <= {**theirs["args"]}.items()


def test_settings_say_what_the_original_yaml_says(tmp_path: Path) -> None:
    original = fixture("neox_2022_tp2_pp4/checkpoints/global_step10/configs/tiny20B.yml")
    theirs = {key.replace("-", "_"): value for key, value in read_yaml(original).items()}
    made = settings_of(slim(fixture(f"neox_2022_tp2_pp4/{OFFICIAL}"), tmp_path / "slim", tp=2, pp=4))
    erf = {"bias_gelu_fusion"}  # the official converter always writes the erf GELU
    moved = {"vocab_file", "fp16"}
    assert all(made[key] == theirs[key] for key in made.keys() & theirs.keys() - erf - moved)
    assert made["fp16"]["enabled"] is theirs["fp16"]["enabled"] is True
    assert all(type(made[key]) is type(theirs[key]) for key in made.keys() & theirs.keys())


@pytest.mark.parametrize("base", [10000.0, 1000000.0])
def test_frequencies_are_torchs(base: float) -> None:
    for head in range(8, 257, 8):
        config = replace(PRESETS["20B"], hidden=4 * head, heads=4, rotary_pct=1.0, rotary_base=base)
        theirs = 1.0 / (base ** (torch.arange(0, head, 2).float() / head))
        ours = inverse_frequencies(config)
        assert narrow(ours, F16).tobytes() == theirs.half().numpy().tobytes()
        assert narrow(ours, BF16).tobytes() == theirs.bfloat16().view(torch.int16).numpy().tobytes()


# --- round trips ----------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "legacy": {},
    "serial": {"parallel_residual": False, "tanh_gelu": False},
    "new names, bf16": {"generation": 1, "dtype": "BF16"},
    "TransformerEngine": {"generation": 2},
    "sequential": {"sequential": True},
    "head by columns": {"head_by_columns": True},
}


@pytest.mark.parametrize("kind", few(KINDS, "TransformerEngine", "head by columns"))
def test_ranks_there_and_back_give_the_same_weights(kind: str, tmp_path: Path) -> None:
    source = toy(tmp_path, pp=2, **KINDS[kind])
    expected, config = None, open_checkpoint(source).config
    for number, (tp, pp) in enumerate([(1, 1), (4, 2), (2, 0), (2, 2)]):
        source = slim(source, tmp_path / str(number), tp=tp, pp=pp)
        checkpoint = open_checkpoint(source)
        assert checkpoint.config == config and len(checkpoint.index.ranks) == tp
        assert checkpoint.index.sequential == (pp == 0)
        assert [s["mp_world_size"] for s in states(source)] == [tp * max(1, pp)] * (tp * max(1, pp))
        expected = expected or weights(source)
        assert weights(source) == expected
        assert settings_of(source)["pipe_parallel_size"] == pp


@pytest.mark.parametrize("sequential", [False, True])
def test_stages_change_no_tensor(sequential: bool, tmp_path: Path) -> None:
    source = toy(tmp_path, pp=2, sequential=sequential, layers=3)
    one, three = slim(source, tmp_path / "one", pp=1), slim(source, tmp_path / "three", pp=3)
    assert layer_digests(one) == layer_digests(three) != {}
    assert len(states(one)) == 2 and len(states(three)) == 6
    zero = slim(three, tmp_path / "zero", pp=0)
    assert not layer_digests(zero) and layer_digests(slim(zero, tmp_path / "back", pp=3)) == layer_digests(one)
    for rank, state in enumerate(states(zero)):
        for file in step_of(one).glob(f"layer_*-model_{rank:02d}-*"):
            number = int(file.name[6:8])
            for name, tensor in loaded(file).items():
                assert torch.equal(state["module"][f"sequential.{number}.{name}"], tensor)


def test_the_sources_own_degrees_change_nothing(tmp_path: Path) -> None:
    source = toy(tmp_path, pp=2)
    plain, asked = slim(source, tmp_path / "plain"), slim(source, tmp_path / "asked", tp=2, pp=2)
    files = [file.relative_to(plain) for file in plain.rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert all((plain / file).read_bytes() == (asked / file).read_bytes() for file in files)
    assert (step_of(source) / "configs" / "model.yml").read_bytes() == (
        step_of(plain) / "configs/model.yml"
    ).read_bytes()


def test_every_argument_in_the_bookkeeping_is_what_the_yaml_makes_of_it(tmp_path: Path) -> None:
    """gpt-neox's check_checkpoint_args compares each one and stops where one differs."""
    for tp in (1, 2, 4):
        made = slim(toy(tmp_path / str(tp)), tmp_path / f"slim{tp}", tp=tp)
        settings, args = settings_of(made), states(made)[0]["args"]
        assert args.pop("padded_vocab_size") == settings["make_vocab_size_divisible_by"] * tp == 512
        assert args == {name: settings[name] for name in args}


def test_stages_without_bookkeeping_are_those_of_the_yaml(tmp_path: Path) -> None:
    source = toy(tmp_path, pp=2)
    for file in source.glob("*/mp_rank_*"):
        file.unlink()
    assert len(states(slim(source, tmp_path / "slim"))) == 4


def test_shapes_of_other_stages_are_dropped(tmp_path: Path) -> None:
    source = fixture("neox_2026_bf16_tp2_pp2/checkpoints")
    assert "param_shapes" in states(slim(source, tmp_path / "same"))[0]
    assert "param_shapes" not in states(slim(source, tmp_path / "one", pp=1))[0]


# --- from other formats ---------------------------------------------------------------------------------------------

ROUTES: dict[str, dict[str, Any]] = {
    "hf": {"format": "hf"},
    "safetensors": {"format": "safetensors"},
    "F16.gguf": {"format": "gguf", "type": "F16"},
    "Q8_0.gguf": {"format": "gguf", "type": "Q8_0"},
    "Q4_0.gguf": {"format": "gguf", "type": "Q4_0"},
    "nf4": {"format": "bnb", "type": "NF4"},
    "int8": {"format": "bnb", "type": "INT8"},
    "e4m3": {"format": "float8", "type": "E4M3"},
}


@pytest.mark.parametrize("route", few(ROUTES, "Q4_0.gguf", "nf4", "e4m3"))
def test_every_source_is_split(route: str, tmp_path: Path) -> None:
    quantized = route not in ("hf", "safetensors", "F16.gguf")
    source = convert(toy(tmp_path, hidden=256 if quantized else 64), tmp_path / route, **ROUTES[route])
    checkpoint = open_checkpoint(source)
    plan = make_plan(checkpoint, Recipe("slim", tp=4, pp=2))
    assert any("quantized" in note for note in plan.notes) == quantized
    made = run(plan, tmp_path / "made")
    report = verify_weights(checkpoint, open_checkpoint(made))
    assert report.passed, report.findings[:3]
    assert open_checkpoint(made).config == checkpoint.config
    if route in ("hf", "safetensors"):  # a GGUF's norms and biases are float32, and are rounded
        assert weights(made) == weights(source)
    tensors = [t for file in step_of(made).glob("layer_*") for t in loaded(file).values()]
    assert {tensor.dtype for tensor in tensors} == {torch.float16}
    assert weights(slim(made, tmp_path / "one", tp=1)) == weights(slim(source, tmp_path / "direct"))


def test_gguf_comes_back_from_gpt_neox_as_it_was(tmp_path: Path) -> None:
    folder = convert(toy(tmp_path), tmp_path / "hf", format="hf")  # norms and biases that float16 holds
    gguf = convert(folder, tmp_path / "a.gguf", format="gguf", type="F16")
    back = convert(slim(gguf, tmp_path / "slim", tp=2, pp=2), tmp_path / "b.gguf", format="gguf", type="F16")
    assert open_checkpoint(back).index.settings == open_checkpoint(gguf).index.settings
    assert weights(back) == weights(gguf)


@pytest.mark.parametrize(
    ("stored", "dtype", "written", "noted"),
    [("F16", None, "F16", False), ("BF16", None, "BF16", False), ("F32", None, "F16", True),
     ("F32", "BF16", "BF16", False), ("F16", "BF16", "BF16", False)],
)  # fmt: skip
def test_weights_get_sixteen_bits(stored: str, dtype: str | None, written: str, noted: bool, tmp_path: Path) -> None:
    source = convert(toy(tmp_path, dtype=stored), tmp_path / "hf", format="hf")
    plan = make_plan(open_checkpoint(source), Recipe("slim", dtype=dtype))
    assert any("16 bits" in note for note in plan.notes) == noted
    made = run(plan, tmp_path / "made")
    assert plan.encodings.keys() == {written}
    precision = {"F16": {"fp16": {"enabled": True}}, "BF16": {"precision": "bfloat16"}}[written]
    assert precision.items() <= settings_of(made).items()


def test_a_tied_model_has_no_head(tmp_path: Path) -> None:
    folder = convert(toy(tmp_path, parallel_residual=False), tmp_path / "hf", format="hf")
    tensors = load_file(folder / "model.safetensors")
    del tensors["embed_out.weight"]
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    made = slim(folder, tmp_path / "slim", tp=2, pp=2)
    assert not list(step_of(made).glob("layer_06*")) and settings_of(made)["no_weight_tying"] is False
    assert verify_weights(open_checkpoint(folder), open_checkpoint(made)).passed


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    folder = convert(toy(tmp_path), tmp_path / "hf", format="hf")
    made = slim(folder, tmp_path / "with")
    assert (made / "tokenizer.json").read_bytes() == tiny().data
    assert settings_of(made)["vocab_file"] == "./tokenizer.json"
    for file in folder.glob("*token*"):
        file.unlink()
    plan = make_plan(open_checkpoint(folder), Recipe("slim"))
    assert any("no tokenizer" in note for note in plan.notes)
    assert "vocab_file" not in settings_of(run(plan, tmp_path / "without"))


def test_both_residuals_add_row_biases_once(tmp_path: Path) -> None:
    for parallel in (True, False):
        folder = convert(
            toy(tmp_path / str(parallel), parallel_residual=parallel), tmp_path / f"hf{parallel}", format="hf"
        )
        made = step_of(slim(folder, tmp_path / f"slim{parallel}", tp=4))
        biases = [
            loaded(made / f"layer_02-model_{rank:02d}-model_states.pt")["attention.dense.bias"] for rank in range(4)
        ]
        whole = load_file(folder / "model.safetensors")["gpt_neox.layers.0.attention.dense.bias"]
        expected = [whole, *[torch.full_like(whole, -0.0)] * 3] if parallel else [whole] * 4
        assert all(torch.equal(a.view(torch.int16), b.view(torch.int16)) for a, b in zip(biases, expected, strict=True))


# --- the YAML -------------------------------------------------------------------------------------------------------

configs = st.builds(
    lambda layers, heads, head, rows, context, pct, base, eps, parallel, tanh, tied: ModelConfig(
        layers=layers, hidden=heads * head, heads=heads, ff=4 * heads * head, rows=rows, context=context,
        rotary_pct=pct, rotary_base=float(base), norm_eps=eps, parallel_residual=parallel,
        activation="gelu_tanh" if tanh else "gelu", tied=tied,
    ),
    st.integers(1, 200), st.integers(1, 128), st.integers(1, 512), st.integers(1, 1 << 20), st.integers(1, 1 << 20),
    st.floats(0, 1, exclude_min=True), st.integers(1, 10**9), st.floats(1e-30, 1), st.booleans(), st.booleans(),
    st.booleans(),
)  # fmt: skip


@given(configs)
def test_a_yaml_gives_back_the_model_that_it_was_written_for(config: ModelConfig) -> None:
    settings = yaml.safe_load(as_yaml(to_neox(config) | vocabulary(config, 1)))
    index = Index("neox", Path("x"), (), ({},), settings)
    measured = Measured(config.layers, config.hidden, config.ff, config.rows, config.tied)
    assert from_neox(index, measured, Opening(Path())) == (config, ())
    assert type(settings["rotary_emb_base"]) is int  # gpt-neox's validate_types wants exactly that
    assert all(type(settings[name]) is float for name in ("rotary_pct", "layernorm_epsilon"))


@pytest.mark.parametrize(
    ("change", "words"), [({"ff": 100}, "4 x hidden size"), ({"rotary_base": 0.5}, "whole number")]
)
def test_what_gpt_neox_cannot_say_is_refused(change: Mapping[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        to_neox(replace(PRESETS["20B"], **change))


# --- the command line -----------------------------------------------------------------------------------------------


def refusal(capsys: pytest.CaptureFixture[str], source: Path, *words: object) -> str:
    target = source.parent / "refused"
    assert main(["convert", str(source), str(target), "--to", "slim", *map(str, words)]) == 1
    assert not target.exists()
    return capsys.readouterr().err


def test_degrees_that_do_not_fit_are_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = convert(toy(tmp_path, rows=510, tp=1, heads=8), tmp_path / "hf", format="hf")
    told = refusal(capsys, folder, "--tp", 4, "--pp", 3)
    assert "does not divide 510 vocabulary rows" in told and "all that is split: 1, 2." in told
    assert "--pp 3: there are 2 layers" in told and "attention heads" not in told
    assert "4 attention heads" in refusal(capsys, toy(tmp_path / "other"), "--tp", 8)


def test_the_command_line_takes_degrees_and_verifies_the_ranks(tmp_path: Path) -> None:
    folder, made = convert(toy(tmp_path), tmp_path / "hf", format="hf"), tmp_path / "slim"
    assert main(["convert", str(folder), str(made), "--to", "slim", "--tp", "2", "--pp", "2", "--quiet"]) == 0
    for level in ("weights", "logits"):
        words = ["--level", level, *(["--length", "32"] if level == "logits" else [])]
        assert main(["verify", str(folder), str(made), *words, "--quiet"]) == 0
        assert main(["verify", str(made), str(folder), *words, "--quiet"]) == 0
    assert main(["verify", str(made), "--quiet"]) == 0
