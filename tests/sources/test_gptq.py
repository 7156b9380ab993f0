"""GPTQ's folders, as AutoGPTQ and GPTQModel store them: the numbers of the same codes in compressed-tensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from neoxconv import Recipe, open_checkpoint
from neoxconv.errors import CheckpointError
from neoxconv.verify.logits.compare import compare_predictions
from tests.fixtures import real
from tests.scaled import CONFIG, FILE, L0, PACKED, Change, compared, edited, made, put, small, vllm_logits, weights

WEIGHT = L0 + "weight"


def codes_in(words: Any, bits: int) -> Any:
    """The codes in rows of words, of which the first is in the lowest bits."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    spread = words.numpy().view(np.uint32)[..., None] >> shifts & np.uint32((1 << bits) - 1)
    return spread.reshape(len(words), -1)


def words_of(codes: Any, bits: int) -> torch.Tensor:
    """The way back."""
    per = 32 // bits
    parts = [codes[:, i::per].astype(np.uint32) << np.uint32(bits * i) for i in range(per)]
    return torch.from_numpy(np.bitwise_or.reduce(parts).view(np.int32))


def down_columns(codes: Any, bits: int) -> torch.Tensor:
    """Words [columns * bits / 32, rows] of codes [rows, columns], as GPTQModel's pack makes them: a code after another
    is shifted into the word of its column."""
    rows, columns = codes.shape
    words = np.zeros((columns * bits // 32, rows), np.uint32)
    for column in range(columns):
        words[column * bits // 32] |= codes[:, column].astype(np.uint32) << np.uint32(column * bits % 32)
    return torch.from_numpy(words.view(np.int32))


def gptq(folder: Path, target: Path, bits: int, version: int, order: torch.Tensor | None = None) -> Path:
    """A folder of compressed-tensors' as GPTQ has it; `order` are the groups of the columns of attention.dense."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("manifest.json"))
    tensors = load_file(folder / FILE)
    for name in [name for name in tensors if name.endswith("weight_packed")]:
        module = name.removesuffix("weight_packed")
        packed, scale, _ = (tensors.pop(module + part) for part in ("weight_packed", "weight_scale", "weight_shape"))
        rows, groups, columns = len(scale), scale.shape[1], packed.shape[1] * 32 // bits
        zeros = np.full((groups, rows), 1 << (bits - 1), np.uint32)
        zero = tensors.pop(module + "weight_zero_point", None)
        if zero is not None:
            zeros = codes_in(zero.T.contiguous(), bits)[:, :rows]
        groups_of = torch.arange(columns, dtype=torch.int32) // (columns // groups)
        found = order if order is not None and module == L0 else groups_of
        stored = (zeros - (version == 1)) % (1 << bits)
        tensors |= {
            module + "qweight": down_columns(codes_in(packed, bits), bits),
            module + "qzeros": words_of(stored, bits),
            module + "scales": scale.T.contiguous(),
            module + "g_idx": found,
        }
    save_file(tensors, target / FILE, {"format": "pt"})
    config = json.loads((target / CONFIG).read_text())
    told = {"quant_method": "gptq", "bits": bits, "group_size": columns // groups, "desc_act": False, "sym": True}
    told |= {"checkpoint_format": "gptq_v2" if version == 2 else "gptq", "lm_head": False, "pack_dtype": "int32"}
    (target / CONFIG).write_text(json.dumps(config | {"quantization_config": told}))
    return target


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small(tmp_path_factory.mktemp("source"), hidden=128)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", PACKED)
def test_the_numbers_are_those_of_the_same_codes(name: str, version: int, source: Path, tmp_path: Path) -> None:
    packed = made(source, tmp_path / "packed", PACKED[name])
    folder = gptq(packed, tmp_path / "gptq", int(name[1]), version)
    expected, found = weights(packed), weights(folder)
    assert len(expected) == 8 and found.keys() == expected.keys()
    assert all(np.array_equal(values, expected[weight]) for weight, values in found.items())
    assert (
        compared(source, folder, foreign=True).passed
        and compared(folder, made(folder, tmp_path / "hf", Recipe("hf"))).passed
    )


def test_columns_in_the_order_of_activations_are_read(source: Path, tmp_path: Path) -> None:
    packed = made(source, tmp_path / "packed", PACKED["W4A16 64"])
    order = torch.arange(128, dtype=torch.int32).flip(0) // 64
    found, tensors = weights(gptq(packed, tmp_path / "gptq", 4, 1, order))[WEIGHT], load_file(packed / FILE)
    codes = codes_in(tensors[L0 + "weight_packed"], 4).astype(np.float32) - 8
    assert np.array_equal(found, codes * tensors[L0 + "weight_scale"].float().numpy()[:, order.numpy()])


def drop(part: str) -> Change:
    return lambda tensors: tensors.pop(L0 + part)


def config_without_bits(folder: Path) -> None:
    config = json.loads((folder / CONFIG).read_text())
    del config["quantization_config"]["bits"]
    (folder / CONFIG).write_text(json.dumps(config))


MISFITS: dict[str, tuple[Change, str]] = {
    "no zeros": (drop("qzeros"), "lacks HERE.qzeros"),
    "no scales": (drop("scales"), "HERE.qweight is I32 [16, 128]; expected two axes, scales of two axes"),
    "floats": (put("qweight", lambda t: t.float(), L0), "HERE.qweight is F32 [16, 128]; expected I32"),
    "flat": (put("qweight", lambda t: t.reshape(-1), L0), "HERE.qweight is I32 [2048]"),
    "short zeros": (put("qzeros", lambda t: t[:, :-1].contiguous(), L0), "HERE.qzeros is I32 [2, 15]; expected"),
    "odd groups": (put("scales", lambda t: t[:1].repeat(3, 1), L0), "HERE.scales has 3 groups, which do not divide"),
    "far order": (put("g_idx", lambda t: t + 1, L0), "HERE.g_idx has groups beyond the 2 that have scales"),
    "no order": (put("g_idx", lambda t: t.float(), L0), "HERE.g_idx is F32 [128]; expected I32 [128]"),
    "a weight too": (lambda tensors: tensors.update({WEIGHT: torch.zeros(128, 128)}), "no weight beside it"),
}


def test_parts_that_do_not_fit_are_named(source: Path, tmp_path: Path) -> None:
    right = gptq(made(source, tmp_path / "packed", PACKED["W4A16 64"]), tmp_path / "right", 4, 1)
    for case, (change, expected) in MISFITS.items():
        folder = edited(right, tmp_path / case, change)
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        assert expected.replace("HERE.", L0) in str(caught.value) and str(folder) in str(caught.value), case
    config_without_bits(right)
    with pytest.raises(CheckpointError, match="of gptq with bits among 2, 3, 4, 8"):
        open_checkpoint(right)


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_vllm_predicts_as_the_weights_that_are_read(version: int, tmp_path: Path) -> None:
    model = real("trained_tp2_pp4")
    packed = made(model / "checkpoints", tmp_path / "packed", Recipe("compressed-tensors", group="128"))
    folder = gptq(packed, tmp_path / "gptq", 4, version)
    tokens, read = np.load(model / "reference" / "tokens.npy")[:2, :64], open_checkpoint(folder)
    logits = vllm_logits(folder, read, tokens)
    assert compare_predictions(read, read, tokens, engine="vllm", logits=logits).figures.mean < 1e-5  # in float16
