"""GPT-NeoX's settings in every format's words: what contradicts is told with both values, what is unread is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.arch.gpt_neox.config import PRESETS, from_hf, from_neox
from neoxconv.arch.gpt_neox.config_gguf import from_gguf
from neoxconv.arch.gpt_neox.evidence import contradictions
from neoxconv.arch.gpt_neox.training import inverse_frequencies
from neoxconv.core.model import Index, Measured, Opening
from neoxconv.core.table import ModelConfig
from neoxconv.core.tensor import in_memory
from neoxconv.dtypes import BF16, F16, F32, DType, narrow, widen
from neoxconv.errors import CheckpointError
from tests.fixtures import fixture
from tests.helpers import cli
from tests.toy import toy

CONFIG = PRESETS["20B"]  # 24 rotary dimensions of base 10000
MEASURED = Measured(layers=44, hidden=6144, ff=24576, rows=50432, tied=False)
NAME = "2.attention.rotary_emb.inv_freq"
FIXTURES = ("neox_2022_tp2_pp4", "neox_2022_sequential_tp2", "neox_2026_bf16_tp2_pp2", "trained_tp2_pp4")


def index(settings: dict[str, Any] | None = None, *, format: str = "hf", **tensors: Any) -> Index:
    ranks = ({name: in_memory(np.asarray(values, np.float32)) for name, values in tensors.items()},)
    return Index(format=format, folder=Path("/model"), files=(), ranks=ranks, settings=settings or {})


def told(stored: ModelConfig, configured: ModelConfig, dtype: DType = F32) -> list[str]:
    """What is said of the frequencies of one configuration, rounded to a type, under another."""
    values = widen(narrow(inverse_frequencies(stored), dtype), dtype)
    return [both for _, _, both in contradictions(index(**{NAME: values}), configured)]


# --- stored frequencies ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("base", [10000, 25000, 500000, 1e6])
def test_frequencies_of_the_configured_base_say_nothing(dtype: DType, base: float) -> None:
    config = replace(CONFIG, rotary_base=base)
    assert not told(config, config, dtype)


@pytest.mark.parametrize(("dtype", "other"), [(F32, 10010), (F16, 10100), (BF16, 11000), (F16, 500000)])
def test_another_base_is_told_as_closely_as_the_type_can(dtype: DType, other: float) -> None:
    [both] = told(CONFIG, replace(CONFIG, rotary_base=other), dtype)
    found = float(both.partition("base ")[2].split()[0])
    assert abs(found / 10000 - 1) < 0.02 and f"rotary_emb_base {other:g} " in both


def test_frequencies_that_were_rounded_before_they_were_widened_are_what_they_were() -> None:
    values = widen(narrow(inverse_frequencies(CONFIG), BF16), BF16)
    assert not list(contradictions(index(**{NAME: values}), CONFIG))


def test_the_length_tells_the_rotary_dimensions() -> None:
    [both] = told(CONFIG, replace(CONFIG, rotary_pct=0.5))
    assert "24 dimensions" in both and "rotary_pct 0.5 (48 dimensions)" in both


def test_one_layer_of_one_rank_is_enough() -> None:
    """Of alike contradictions the first is told."""
    right, other = (inverse_frequencies(replace(CONFIG, rotary_base=base)) for base in (10000, 500000))
    last = NAME.replace("2", "3")
    ranks = [index(**{NAME: right, last: values}).ranks[0] for values in (right, other, other)]
    [(rank, name, both)] = contradictions(replace(index(), ranks=tuple(ranks)), CONFIG)
    assert (rank, name) == (1, last) and "of base 500000 and 24 dimensions" in both


def test_what_can_be_no_frequencies_is_left_alone() -> None:
    assert not list(contradictions(index(**{NAME: np.ones((2, 2))}), CONFIG))
    assert not list(contradictions(index(), CONFIG))
    assert not list(contradictions(index(**{NAME: [0.0, 0.0]}), CONFIG))  # of a file of holes


@pytest.mark.parametrize("values", [[0.0, 1.0], [np.nan, 1.0], [1.0, np.inf], [1.0, -1.0], [1e-38, 1e-38]])
def test_frequencies_of_no_base_are_told(values: list[float]) -> None:
    assert len(list(contradictions(index(**{NAME: values}), CONFIG))) == 1


@pytest.mark.parametrize("name", FIXTURES)
def test_what_gpt_neox_wrote_contradicts_nothing(name: str) -> None:
    assert not open_checkpoint(fixture(f"{name}/checkpoints")).doubts


@pytest.fixture
def contradictory(tmp_path: Path) -> Path:
    """A checkpoint whose YAML was edited after it was saved."""
    source = toy(tmp_path)
    [settings] = source.rglob("*.yml")
    lines = [line for line in settings.read_text().splitlines() if "rotary" not in line or "base" not in line]
    settings.write_text("\n".join(lines).replace("{", '{ "rotary_emb_base": 500000,', 1))
    assert "500000" in settings.read_text()
    return source


def test_neither_a_conversion_nor_a_proof_decides(contradictory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = contradictory.parent / "out"
    for more in ((), ("--dry-run",)):
        assert cli("convert", contradictory, target, "--to", "hf", *more) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert all(
            word in line for word in ("layer_02-model_00", "inv_freq", "500000", "frequencies of base", "--config")
        )
    with pytest.raises(CheckpointError, match="500000"):
        run(make_plan(open_checkpoint(contradictory), Recipe("hf")), target)
    assert not target.exists()
    assert cli("inspect", contradictory) == 0 and "500000" in capsys.readouterr().out


def test_the_yaml_that_is_named_decides(contradictory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [settings] = contradictory.rglob("*.yml")
    options = "--config", settings
    target = contradictory.parent / "out"
    assert cli("convert", contradictory, target, "--to", "hf", *options) == 0
    notes = capsys.readouterr().err
    assert "500000" in notes and "inv_freq" in notes
    assert json.loads((target / "config.json").read_text())["rotary_emb_base"] == 500000
    assert cli("verify", contradictory, target, *options) == 0
    assert cli("verify", contradictory, target) == 1


# --- config.json ----------------------------------------------------------------------------------------------------

HF = {
    "num_hidden_layers": 44, "hidden_size": 6144, "num_attention_heads": 64, "intermediate_size": 24576,
    "vocab_size": 50432,
}  # fmt: skip


def hf(**settings: Any) -> tuple[ModelConfig, tuple[str, ...]]:
    return from_hf(index(HF | settings), MEASURED, Opening(Path()))


@pytest.mark.parametrize(
    "settings",
    [
        {"rotary_emb_base": 20000},
        {"rope_parameters": {"rope_theta": 20000.0}},
        {"rope_scaling": {"rope_theta": 20000, "rope_type": "default"}},
        {"rotary_emb_base": 20000, "rope_parameters": {"rope_theta": 20000.0, "type": "default"}},
        {"rotary_emb_base": 20000, "rope_theta": 20000},
    ],
)
def test_every_spelling_of_the_base_is_read(settings: dict[str, Any]) -> None:
    config, notes = hf(**settings)
    assert (config.rotary_base, config.rotary_pct, notes) == (20000, 0.25, ())


@pytest.mark.parametrize(
    ("settings", "both"),
    [
        ({"rotary_emb_base": 10000, "rope_parameters": {"rope_theta": 20000}}, ("10000", "20000")),
        ({"rotary_pct": 0.25, "rope_parameters": {"partial_rotary_factor": 0.5}}, ("0.25", "0.5")),
        ({"rotary_pct": 1.0, "rope_scaling": {"partial_rotary_factor": 0.5}}, ("rotary_pct is 1", "0.5")),
        ({"rope_parameters": {"rope_theta": 7}, "rope_scaling": {"rope_theta": 9}}, ("is 7", "is 9")),
        ({"rope_theta": 20000}, ("10000", "20000")),  # which no version of transformers reads
        ({"rotary_pct": 0.25, "partial_rotary_factor": 0.5}, ("0.25", "0.5")),
    ],
)
def test_spellings_that_disagree_are_refused_with_both(settings: dict[str, Any], both: tuple[str, str]) -> None:
    with pytest.raises(CheckpointError) as error:
        hf(**settings)
    assert "config.json" in str(error.value) and all(value in str(error.value) for value in both)


@pytest.mark.parametrize("theta", [0, -1, "many", None, True, float("inf")])
def test_a_base_that_is_no_number_is_named_where_it_stands(theta: Any) -> None:
    with pytest.raises(CheckpointError, match=r"rope_parameters\.rope_theta"):
        hf(rope_parameters={"rope_theta": theta})


def test_a_scaling_is_seen_in_either_table() -> None:
    with pytest.raises(CheckpointError, match="rope_type is 'linear'"):
        hf(rope_scaling={"rope_type": "default"}, rope_parameters={"rope_type": "linear", "factor": 2})


def test_a_stale_size_of_the_vocabulary_is_a_note() -> None:
    config, notes = hf(vocab_size=50257)
    assert config.rows == 50432 and len(notes) == 1 and "50257" in notes[0] and "50432" in notes[0]


def test_gpt_neoxs_own_stale_size_is_one_too() -> None:
    settings = {
        "num_layers": 44, "hidden_size": 6144, "num_attention_heads": 64, "max_position_embeddings": 2048,
        "pos_emb": "rotary", "padded_vocab_size": 50304,
    }  # fmt: skip
    config, notes = from_neox(index(settings, format="neox"), MEASURED, Opening(Path()))
    assert config.rows == 50432 and "50304" in notes[0] and "50432" in notes[0]


# --- GGUF -----------------------------------------------------------------------------------------------------------

GGUF = {
    "block_count": 44, "embedding_length": 6144, "attention.head_count": 64, "feed_forward_length": 24576,
    "context_length": 2048, "rope.dimension_count": 24, "attention.layer_norm_epsilon": 1e-5,
}  # fmt: skip


def gguf(tensors: dict[str, Any] | None = None, /, **keys: Any) -> tuple[ModelConfig, tuple[str, ...]]:
    settings = {f"gptneox.{key}": value for key, value in (GGUF | keys).items()}
    return from_gguf(index(settings, format="gguf", **(tensors or {})), MEASURED, Opening(Path()))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.causal", False), ("attention.max_alibi_bias", 8.0), ("attention.clamp_kqv", 6.0),
        ("attention.scale", 0.5), ("attention.sliding_window", 512), ("attention.head_count_kv", 8),
        ("attention.key_length", 64), ("attention.value_length", 64), ("rope.scaling.type", "yarn"),
        ("rope.scaling.factor", 4.0), ("rope.scale_linear", 2.0), ("rope.scaling.attn_factor", 1.5),
        ("rope.scaling.yarn_ext_factor", 1.0), ("rope.freq_base_swa", 500.0), ("expert_count", 8),
        ("expert_used_count", 2), ("logit_scale", 0.25), ("final_logit_softcapping", 30.0),
        ("attn_logit_softcapping", 50.0), ("pooling_type", 1), ("residual_scale", 0.5), ("embedding_scale", 12.0),
    ],
)  # fmt: skip
def test_a_key_that_changes_the_function_is_refused_by_name(key: str, value: Any) -> None:
    with pytest.raises(CheckpointError) as error:
        gguf(**{key: value})
    assert f"gptneox.{key} is {value}" in str(error.value)


def test_their_neutral_values_say_nothing() -> None:
    neutral = {
        "attention.causal": True, "attention.max_alibi_bias": 0.0, "attention.clamp_kqv": 0.0,
        "attention.head_count_kv": 64, "attention.key_length": 96, "attention.value_length": 96,
        "rope.scaling.type": "linear", "rope.scaling.factor": 1.0, "rope.freq_base_swa": 10000.0, "expert_count": 0,
        "logit_scale": 1.0, "pooling_type": 0, "vocab_size": 50432,
    }  # fmt: skip
    assert gguf(**neutral) == gguf()


def test_a_key_that_nothing_reads_is_noted() -> None:
    _, notes = gguf(**{"tensor_data_layout": "reference", "rope.scaling.finetuned": False})
    assert len(notes) == 1 and "gptneox.tensor_data_layout, gptneox.rope.scaling.finetuned" in notes[0]


def test_a_stale_size_in_gguf_is_noted() -> None:
    _, [note] = gguf(vocab_size=50254)
    assert "50254" in note and "50432" in note


def test_rotary_factors_are_refused_unless_all_are_one() -> None:
    assert gguf({"rope_freqs.weight": np.ones(12)}) == gguf()
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight"):
        gguf({"rope_freqs.weight": np.linspace(1, 8, 12)})
