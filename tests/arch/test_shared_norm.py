"""gpt_j_tied: attention and MLP of a layer read one norm, and the other one, which the files have too, is never used.

The shards are made here without the project's joins, and run by transformers' GPT-NeoX with the first norm twice.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from tests.helpers import cli
from tests.oracles import Logits, llama_logits, program, transformers_logits
from tests.relatives import (
    CLOSE,
    LLAMA_CPP,
    Shards,
    by_columns,
    by_rows,
    copies,
    joined,
    logits_of,
    native_logits,
    random_model,
    some_tokens,
    write_shards,
)  # fmt: skip

LAYERS, HIDDEN, HEADS, ROWS = 3, 64, 4, 320
TOKENS = some_tokens(ROWS)
SETTINGS = {
    "num_layers": LAYERS, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "max_position_embeddings": 64,
    "seq_length": 64, "norm": "layernorm", "activation": "gelu", "bias_gelu_fusion": True, "pos_emb": "rotary",
    "rotary_pct": 0.25, "gpt_j_residual": True, "no_weight_tying": True,
}  # fmt: skip
FIRST, SECOND = "input_layernorm", "post_attention_layernorm"
TIED = SETTINGS | {"gpt_j_tied": True}


def model_of(shared: bool) -> Any:
    """A GPTNeoXForCausalLM of random numbers; of a `shared` norm each layer has the same twice."""
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "vocab_size": ROWS}
    config = program("transformers").GPTNeoXConfig(
        **sizes, intermediate_size=4 * HIDDEN, hidden_act="gelu_new", max_position_embeddings=64,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = random_model(config)
    for layer in model.gpt_neox.layers if shared else ():
        getattr(layer, SECOND).load_state_dict(getattr(layer, FIRST).state_dict())
    return model


def shards_of(model: Any, ranks: int, unused: bool) -> Shards:
    """gpt-neox's shards of it: the second norm as it began where it is `unused`, the MLP's output bias on rank 0."""
    torch = program("torch")
    state = model.state_dict()
    groups = [{"0.word_embeddings.weight": by_rows(state["gpt_neox.embed_in.weight"], ranks)}]
    for layer in range(LAYERS):
        at, n = f"gpt_neox.layers.{layer}.", f"{layer + 2}."
        norms = {
            f"{norm}.{kind}": state[f"{at}{norm}.{kind}"] for norm in (FIRST, SECOND) for kind in ("weight", "bias")
        }
        if unused:
            norms |= {f"{SECOND}.weight": torch.ones(HIDDEN), f"{SECOND}.bias": torch.zeros(HIDDEN)}
        groups.append({n + name: copies(tensor, ranks) for name, tensor in norms.items()})
        for name, split in {
            "attention.query_key_value.weight": by_rows, "attention.query_key_value.bias": by_rows,
            "attention.dense.weight": by_columns, "attention.dense.bias": on_one,
            "mlp.dense_h_to_4h.weight": by_rows, "mlp.dense_h_to_4h.bias": by_rows,
            "mlp.dense_4h_to_h.weight": by_columns, "mlp.dense_4h_to_h.bias": on_one,
        }.items():  # fmt: skip
            groups.append({n + name: split(state[at + name], ranks)})
    norm = {
        f"{LAYERS + 3}.norm.{kind}": copies(state[f"gpt_neox.final_layer_norm.{kind}"], ranks)
        for kind in ("weight", "bias")
    }
    head = model.get_output_embeddings().weight.data
    return joined([*groups, norm, {f"{LAYERS + 4}.final_linear.weight": by_rows(head, ranks)}])


def on_one(tensor: Any, ranks: int) -> list[Any]:
    """Whole on the first rank: with a parallel residual the ranks' biases are summed."""
    return [tensor.clone(), *(tensor.clone() * 0 for _ in range(ranks - 1))]


def apart(shards: Shards, noise: float = 0.05) -> Shards:
    """The shards with the first norms of their ranks drifted apart, as in training."""
    torch = program("torch")
    torch.manual_seed(1)
    for rank in shards:
        rank |= {name: t + noise * torch.randn_like(t) for name, t in rank.items() if f".{FIRST}." in name}
    return shards


def error(found: Logits, expected: Logits) -> float:
    return float(np.abs(found - expected).max() / expected.std())


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_norm_acts_for_both(ranks: int, tmp_path: Path) -> None:
    model = model_of(shared=True)
    expected = logits_of(model, TOKENS)
    source = write_shards(tmp_path / "neox", shards_of(model, ranks, unused=True), LAYERS, TIED)
    checkpoint = open_checkpoint(source)
    assert not checkpoint.doubts and not checkpoint.notes
    for merged in (False, True):
        assert error(native_logits(checkpoint, TOKENS, merged), expected) < CLOSE
    folder = run(make_plan(checkpoint, Recipe("hf")), tmp_path / "hf")
    assert error(transformers_logits(folder, TOKENS), expected) < CLOSE
    file = run(make_plan(checkpoint, Recipe("gguf", type="F16")), tmp_path / "x.gguf")
    assert error(llama_logits(file, TOKENS), expected) < LLAMA_CPP
    for target in (folder, file):
        assert verify_weights(checkpoint, open_checkpoint(target)).passed


def test_folding_keeps_the_function_of_ranks_apart(tmp_path: Path) -> None:
    source = write_shards(tmp_path / "neox", apart(shards_of(model_of(shared=True), 2, unused=True)), LAYERS, TIED)
    as_trained = native_logits(open_checkpoint(source), TOKENS)
    folded, mean = open_checkpoint(source, norms="fold"), open_checkpoint(source)
    assert error(native_logits(folded, TOKENS, merged=True), as_trained) < 10 * CLOSE
    assert error(native_logits(mean, TOKENS, merged=True), as_trained) > 0.01
    at = "gpt_neox.layers.1."
    first, second = (folded.tensors[f"{at}{norm}.weight"].floats(0, HIDDEN) for norm in (FIRST, SECOND))
    assert np.array_equal(first, second)


@pytest.mark.parametrize("said", [{}, {"gpt_j_tied": False}])
def test_a_norm_that_was_never_used_tells_what_the_setting_does_not(said: dict[str, Any], tmp_path: Path) -> None:
    """Code of December 2022 tested it the wrong way around."""
    model = model_of(shared=True)
    source = write_shards(tmp_path / "neox", shards_of(model, 2, unused=True), LAYERS, SETTINGS | said)
    checkpoint = open_checkpoint(source)
    assert any("gpt-neox never used it" in note for note in checkpoint.notes)
    assert error(native_logits(checkpoint, TOKENS), logits_of(model, TOKENS)) < CLOSE
    given = tmp_path / "given.yml"
    given.write_text(yaml.safe_dump(SETTINGS | {"gpt_j_tied": False, "model_parallel_size": 2}))
    overruled = open_checkpoint(source, config=[given])
    assert not overruled.config.shared_norm
    assert error(native_logits(overruled, TOKENS), logits_of(model, TOKENS)) > 0.1


def test_a_norm_of_one_layer_that_was_trained_was_used(tmp_path: Path) -> None:
    shards = shards_of(model_of(shared=False), 1, unused=True)
    shards[0][f"{LAYERS + 1}.{SECOND}.bias"][3] = 1e-3
    source = write_shards(tmp_path / "neox", shards, LAYERS, SETTINGS)
    assert not open_checkpoint(source).config.shared_norm


def test_a_trained_norm_contradicts_the_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Either code of December 2022 wrote it, or the YAML is another model's: nobody can tell but the user."""
    model = model_of(shared=False)
    source = write_shards(tmp_path / "neox", shards_of(model, 2, unused=False), LAYERS, TIED)
    assert cli("convert", source, tmp_path / "x", "--to", "hf") == 1
    told = capsys.readouterr().err
    assert "layer_02-model_00-model_states.pt" in told and "gpt_j_tied is true" in told and "--config" in told
    for tied in (True, False):
        given = tmp_path / f"{tied}.yml"
        given.write_text(yaml.safe_dump(SETTINGS | {"gpt_j_tied": tied, "model_parallel_size": 2}))
        assert open_checkpoint(source, config=[given]).config.shared_norm is tied
        assert cli("convert", source, tmp_path / f"{tied}", "--to", "hf", "--config", given) == 0
    found = transformers_logits(tmp_path / "False", TOKENS)
    assert error(found, logits_of(model, TOKENS)) < CLOSE


def test_with_a_serial_residual_the_setting_is_not_read(tmp_path: Path) -> None:
    settings = TIED | {"gpt_j_residual": False, "use_bias_in_norms": False}  # the latter gpt-neox reads nowhere
    source = write_shards(tmp_path / "neox", shards_of(model_of(shared=False), 1, unused=False), LAYERS, settings)
    assert not open_checkpoint(source).config.shared_norm and not open_checkpoint(source).doubts


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_slim_keeps_the_setting_and_the_function(ranks: int, tmp_path: Path) -> None:
    model = model_of(shared=True)
    source = write_shards(tmp_path / "neox", shards_of(model, 2, unused=True), LAYERS, TIED)
    target = run(make_plan(open_checkpoint(source), Recipe("slim", tp=ranks)), tmp_path / "slim")
    (config,) = target.rglob("*.yml")
    assert yaml.safe_load(config.read_text())["gpt_j_tied"] is True
    again = open_checkpoint(target)
    assert again.config.shared_norm and not again.doubts
    assert error(native_logits(again, TOKENS), logits_of(model, TOKENS)) < CLOSE
    assert verify_weights(open_checkpoint(source), again).passed
    if ranks == 2:
        name = "global_step10/layer_02-model_01-model_states.pt"
        torch = program("torch")
        assert torch.equal(torch.load(target / name)[f"{SECOND}.weight"], torch.ones(HIDDEN))


def test_slim_of_a_folder_has_both_norms(tmp_path: Path) -> None:
    """Hugging Face's class has no such setting, so what is made of its folder has the norm twice and says nothing."""
    model = model_of(shared=True)
    source = write_shards(tmp_path / "neox", shards_of(model, 2, unused=True), LAYERS, TIED)
    folder = run(make_plan(open_checkpoint(source), Recipe("hf")), tmp_path / "hf")
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gpt_neox"
    target = run(make_plan(open_checkpoint(folder), Recipe("slim", dtype="BF16")), tmp_path / "slim")
    again = open_checkpoint(target)
    assert not again.config.shared_norm and not again.doubts


def test_transformer_engines_mlp_has_its_own_norm(tmp_path: Path) -> None:
    """Whatever the setting is: gpt-neox's layer leaves it to that module."""
    model = model_of(shared=False)
    renamed = [
        {name.replace(f"{SECOND}.", "mlp.layer_norm_"): tensor for name, tensor in rank.items()}
        for rank in shards_of(model, 2, unused=False)
    ]
    checkpoint = open_checkpoint(write_shards(tmp_path / "neox", renamed, LAYERS, TIED))
    assert not checkpoint.config.shared_norm and not checkpoint.doubts
    assert error(native_logits(checkpoint, TOKENS), logits_of(model, TOKENS)) < CLOSE
