"""Mixes: per-tensor types equal to llama-quantize's at every depth and width, and what overrides them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.divergence import divergence, log_probabilities
from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.cli.formats import catalog
from neoxconv.cli.main import main
from neoxconv.engine.plan import Plan
from neoxconv.errors import PlanError
from neoxconv.names import MIXES as MIX_NAMES
from neoxconv.names import TYPES
from neoxconv.quant import ENCODINGS, SCALED
from neoxconv.targets.compressed_tensors import DYNAMIC
from neoxconv.targets.divergences import DIVERGENCES
from neoxconv.targets.gguf import gguf_entries
from neoxconv.targets.mixes import MIXES
from tests.fixtures import real
from tests.little_llamas import little_llama
from tests.oracles import llama_logits, llama_quantize, llama_types, program, write_imatrix
from tests.toy import toy

PACKED = [name for name in MIXES if name not in ("F32", "F16", "BF16")]

# What the 20B model takes with llama-quantize's types, in GiB, and by the recipe until early 2025.
CURRENT = {
    "Q8_0": 20.35, "Q6_K": 15.71, "Q5_K_M": 13.93, "Q5_K_S": 13.21, "Q4_K_M": 12.25, "Q4_K_S": 10.99, "Q3_K_L": 11.54,
    "Q3_K_M": 10.06, "Q3_K_S": 8.35, "Q2_K": 7.69, "IQ4_XS": 10.37, "IQ4_NL": 10.94, "Q4_0": 10.85, "Q4_1": 12.03,
    "Q5_0": 13.21, "Q5_1": 14.39,
}  # fmt: skip
CLASSIC = {"Q4_K_M": 12.23, "Q5_K_M": 14.24, "Q3_K_M": 10.03, "Q3_K_L": 10.96, "Q2_K": 7.22}


def planned(source: Path, **recipe: Any) -> Plan:
    return make_plan(open_checkpoint(source), Recipe("gguf", **recipe))


def types(plan: Plan) -> dict[str, str]:
    return {step.entry.name: step.entry.encoding.name for step in plan.steps}


def assert_types_are_llama_quantizes(source: Path, folder: Path) -> None:
    """Of every mix, with an importance matrix and without; `folder` is for files."""
    f16 = run(planned(source, type="F16"), folder / "f16.gguf")
    matrix = folder / "imatrix.gguf"
    importances = write_imatrix(matrix, f16)
    for given in (None, importances):
        for mix in PACKED:
            expected = llama_types(f16, mix, given)
            recipe = Recipe("gguf", type=mix, imatrix=matrix if given else None)
            entries = gguf_entries(open_checkpoint(source), recipe)
            assert {entry.name: entry.encoding.name for entry in entries} == expected, mix


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "hidden"), [(3, 256), (17, 256), (2, 96), (2, 40)], ids=["shallow", "deep", "narrow", "odd"]
)
def test_types_are_those_of_llama_quantize(layers: int, hidden: int, tmp_path: Path) -> None:
    source = toy(tmp_path, layers=layers, hidden=hidden, heads=4, rows=512)
    assert_types_are_llama_quantizes(source, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
@pytest.mark.parametrize(("layers", "keys"), [(6, 8), (24, 4), (24, 2), (80, 8), (80, 4), (80, 1)])
def test_types_of_separate_queries_keys_and_values_are_those_of_llama_quantize(
    layers: int, keys: int, tied: bool, tmp_path: Path
) -> None:
    source = little_llama(
        tmp_path / "hf", hidden_size=256, intermediate_size=256, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=keys, tie_word_embeddings=tied, vocab_size=300,
    )  # fmt: skip
    assert_types_are_llama_quantizes(source, tmp_path)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "Q6_K"),
        ({"output_type": "Q5_K"}, "Q5_K"),
        ({"output_type": "Q5_K", "embedding_type": "Q8_0"}, "Q8_0"),
        ({"pure": True}, "Q4_K"),
    ],
    ids=["mix", "output", "both", "pure"],
)
def test_an_embedding_that_is_the_head_too_counts_as_both(
    options: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    source = little_llama(tmp_path / "hf", hidden_size=256, tie_word_embeddings=True)
    plan = planned(source, type="Q4_K_M", **options)
    assert types(plan)["token_embd.weight"] == expected and "output.weight" not in types(plan)
    assert not any("no effect" in note for note in plan.notes)


def test_a_dry_run_tells_the_types_that_a_file_gets(tmp_path: Path) -> None:
    gguf = program("gguf")
    f16 = run(planned(toy(tmp_path, layers=3, hidden=256, heads=4), type="F16"), tmp_path / "f16.gguf")
    llama_quantize(f16, tmp_path / "theirs.gguf", "Q3_K_M")
    found = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "theirs.gguf").tensors}
    assert found == llama_types(f16, "Q3_K_M")


def test_names_are_those_of_the_tables() -> None:
    assert set(MIX_NAMES) == set(MIXES) and set(TYPES) == {e for e in ENCODINGS if not e.startswith("F8")}


def test_sizes_of_the_20b_model_are_those_measured() -> None:
    sizes = {row.type: row.nbytes / 2**30 for row in catalog() if row.format == "gguf"}
    for mix, expected in CURRENT.items():
        assert abs(sizes[mix] - expected) < 0.0051, mix


def test_the_classic_recipe_has_its_sizes() -> None:
    from neoxconv.cli.formats import shapes

    model = shapes("20B")
    for mix, expected in CLASSIC.items():
        size = sum(entry.nbytes for entry in gguf_entries(model, Recipe("gguf", type=mix, mix="classic"))) / 2**30
        assert abs(size - expected) < 0.0051, mix


@pytest.mark.parametrize("mix", ["IQ3_XXS", "IQ2_M", "IQ1_S", "Q2_K_S"])
def test_what_needs_an_importance_matrix_is_refused_by_name_without_one(mix: str, tmp_path: Path) -> None:
    source = toy(tmp_path, hidden=256)
    with pytest.raises(PlanError, match=r"importance matrix: blk\.0\..*--imatrix FILE .* IQ3_S or Q2_K"):
        planned(source, type=mix)
    matrix = tmp_path / "imatrix.gguf"
    write_imatrix(matrix, run(planned(source, type="F16"), tmp_path / "f16.gguf"))
    assert types(planned(source, type=mix, imatrix=matrix))["token_embd.weight"] in ("Q2_K", "IQ3_S")


def test_embedding_and_head_need_no_matrix(tmp_path: Path) -> None:
    plan = planned(toy(tmp_path, hidden=256), type="Q8_0", embedding_type="IQ2_S", output_type="IQ3_XXS")
    assert {"IQ2_S", "IQ3_XXS"} < set(types(plan).values())
    with pytest.raises(PlanError, match=r"1 tensor .* blk\.0\.ffn_up\.weight \(IQ2_S\)"):
        planned(toy(tmp_path / "again", hidden=256), type="Q8_0", tensor_type=((r"blk\.0\.ffn_up", "IQ2_S"),))


def test_overrides_win_in_their_order(tmp_path: Path) -> None:
    source = toy(tmp_path, hidden=256)
    options = {
        "output_type": "Q8_0",
        "embedding_type": "Q5_K",
        "tensor_type": ((r"blk\.1\.ffn", "Q6_K"), ("ffn_up", "IQ4_XS")),
    }
    found = types(planned(source, type="Q4_K_S", **options))
    assert (found["output.weight"], found["token_embd.weight"]) == ("Q8_0", "Q5_K")
    assert (found["blk.0.ffn_up.weight"], found["blk.1.ffn_up.weight"]) == ("IQ4_XS", "Q6_K")
    assert found["blk.1.ffn_up.bias"] == "F32" and found["blk.0.attn_qkv.weight"] == "Q5_K"


def test_pure_is_one_type_for_every_matrix(tmp_path: Path) -> None:
    found = types(planned(toy(tmp_path, hidden=256), type="Q3_K_M", pure=True))
    assert set(found.values()) == {"Q3_K", "F32"}


def test_what_stands_in_is_told(tmp_path: Path) -> None:
    notes = planned(toy(tmp_path, hidden=96), type="Q4_K_M").notes
    assert notes[0].startswith("7 tensors as Q5_0: no rows of Q4_K's 256 weights: token_embd.weight, ")
    assert not [note for note in planned(toy(tmp_path / "wide", hidden=256), type="Q4_K_M").notes if " as " in note]


@pytest.mark.parametrize(
    ("option", "message"),
    [({"output_type": "Q9"}, "type Q9"), ({"tensor_type": (("(", "Q8_0"),)}, "is not a regular expression")],
)
def test_nonsense_is_refused(option: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        planned(toy(tmp_path), type="Q4_0", **option)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("nomatch", r"nomatch: no tensor's name holds it; there are token_embd\.weight, .*blk\.N\.attn_qkv"),
        (r"blk\.7\.", "no tensor's name holds it"),
        ("attn_norm", r"attn_norm: matches only vectors \(blk\.0\.attn_norm\.weight\)"),
    ],
)
def test_a_pattern_with_nothing_to_give_a_type_to_is_refused(pattern: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=message):
        planned(toy(tmp_path), type="F16", tensor_type=(("ffn", "Q8_0"), (pattern, "Q8_0")))


def test_the_first_pattern_wins_and_what_it_leaves_nothing_to_is_told(tmp_path: Path) -> None:
    overrides = (("ffn", "Q8_0"), ("ffn_up", "Q4_0"), ("output.weight", "Q8_0"))
    plan = planned(toy(tmp_path), type="F16", tensor_type=overrides, output_type="BF16", embedding_type="Q8_0")
    assert types(plan)["blk.0.ffn_up.weight"] == "Q8_0" == types(plan)["output.weight"]
    assert [note for note in plan.notes if "no effect" in note] == [
        "--tensor-type ffn_up=Q4_0 has no effect: ffn=Q8_0 before it took all that it matches",
        "--output-type BF16 has no effect: --tensor-type decides output.weight",
    ]


def test_the_command_line_takes_them_in_any_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = str(toy(tmp_path, hidden=256))
    words = ["convert", source, str(tmp_path / "x.gguf"), "--to", "gguf", "--type", "q4_k_m", "--mix", "classic"]
    assert main([*words, "--tensor-type", "ffn_up=q8_0", "--output-type", "f16", "--quiet"]) == 0
    assert main(["verify", source, str(tmp_path / "x.gguf")]) == 0
    assert "Q5_K" in capsys.readouterr().out
    assert main([*words, "--tensor-type", "ffn_up"]) == 2
    assert "is no PATTERN=TYPE" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["Q4_K_M", "Q2_K"])
def test_the_divergences_that_formats_lists_are_about_those_of_a_few_sequences(mix: str, tmp_path: Path) -> None:
    fixture = real("trained_tp2_pp4")
    tokens = np.load(fixture / "reference" / "tokens.npy")[:4]
    exact, file = (
        llama_logits(run(planned(fixture / "checkpoints", type=name), tmp_path / name), tokens) for name in ("F16", mix)
    )
    found = divergence(log_probabilities(exact), file).mean()
    assert abs(np.log(found / DIVERGENCES[mix])) < np.log(1.3)
    others = {e for e in ENCODINGS if e.startswith("F8")} | {DYNAMIC}
    assert set(DIVERGENCES) == (set(MIXES) - {"F32"}) | set(SCALED) | others


def test_what_a_quantized_source_costs_is_told(tmp_path: Path) -> None:
    first = run(planned(toy(tmp_path, hidden=256), type="Q8_0"), tmp_path / "q8.gguf")
    again = planned(first, type="Q4_K_M").notes
    assert "the source is quantized (Q8_0): its weights are not the original ones" in again
    assert any(note.startswith("WARNING: 10 tensors quantized a second time") for note in again)
    back = make_plan(open_checkpoint(first), Recipe("hf")).notes
    assert any("is quantized" in note for note in back) and not any("second time" in note for note in back)
    assert not any("second time" in note for note in planned(first, type="Q8_0").notes)  # bytes are copied
