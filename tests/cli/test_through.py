"""`calibrate --through`: layer after layer, and what `convert` and `verify` make of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from neoxconv import open_checkpoint
from neoxconv.formats.calibration.read import moments_in
from neoxconv.quant import floats
from neoxconv.verify.logits import through
from neoxconv.verify.logits.needs import needs
from neoxconv.verify.logits.stream import running, side
from neoxconv.verify.logits.through import Through, aim, through_of
from tests.helpers import PowerCut, cli, digests
from tests.little_llamas import little_llama
from tests.toy import toy

TOKENS = (np.arange(12 * 64) * 7 % 512).reshape(12, 64)
AIMED = {f"blk.{i}.{name}.weight" for i in range(3) for name in ("attn_output", "ffn_down")}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    np.save(tmp_path / "tokens.npy", TOKENS)
    return toy(tmp_path, hidden=64, layers=3)


def calibration(source: Path, name: str, *words: str) -> Path:
    made = source.parent / name
    assert cli("calibrate", source, "-o", made, "--tokens", source.parent / "tokens.npy", *words) == 0
    return made


def converted(source: Path, made: Path, *words: str) -> Path:
    target = made.with_suffix(".gguf")
    options = ("--to", "gguf", "--type", "q4_0", "--calibration", made, "--overwrite")
    assert cli("convert", source, target, *options, *words) == 0
    return target


def test_an_aim_is_the_ridge_regression_of_what_is_wanted() -> None:
    """Against the least squares of numpy, the ridge as more rows of x."""
    chance = np.random.default_rng(3)
    rows, x, wanted = (chance.normal(size=shape).astype(np.float32) for shape in ((5, 12), (40, 12), (40, 5)))
    second = x.T @ x / len(x)
    ridge = np.sqrt(0.1 * np.diag(second).mean() * len(x)) * np.eye(12)
    expected, *_ = np.linalg.lstsq(np.concatenate([x, ridge]), np.concatenate([wanted, ridge @ rows.T]), rcond=None)
    found = aim(*map(torch.from_numpy, (rows, wanted, x, second)))
    assert np.allclose(found.numpy(), expected.T, atol=1e-5)


def test_a_file_is_what_the_layers_were_run_with(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding in `calibrate` and in `convert` is the same, to the last bit."""
    rounded: dict[str, np.ndarray] = {}
    run = Through._rounded

    def kept(self: Through, name: str, *rest: object) -> torch.Tensor:
        found: torch.Tensor = run(self, name, *rest)  # type: ignore[arg-type]
        rounded[name] = found.numpy()
        return found

    monkeypatch.setattr(Through, "_rounded", kept)
    target = open_checkpoint(converted(source, calibration(source, "cal", "--through", "q4_0")))
    assert len(rounded) == 12
    for name, values in rounded.items():
        stored = target.tensors[name]
        assert np.array_equal(floats(stored.read(0, stored.rows), stored.dtype), values), name


def test_streams_stay_closer_than_without(source: Path) -> None:
    """Behind the last layer, on the tokens that it was made of."""
    exact = stream_of(source)
    alone, layered = (
        np.square(stream_of(converted(source, calibration(source, name, *words))) - exact).sum()
        for name, words in (("alone", ("--covariance",)), ("through", ("--through", "q4_0")))
    )
    assert layered < 0.8 * alone


def stream_of(source: Path) -> np.ndarray:
    """The stream behind the last layer."""
    checkpoint = open_checkpoint(source)
    with running(TOKENS, "cpu") as (pool, ids):
        model = side(checkpoint, pool, merged=True)
        streams = model.embed(ids)
        for number in range(checkpoint.config.layers):
            streams = model.layer(number, streams)
    return streams[0].numpy()


def test_only_what_writes_to_the_stream_has_an_aim(source: Path) -> None:
    alone, layered = calibration(source, "alone", "--covariance"), calibration(source, "through", "--through", "q4_0")
    before, after = moments_in(alone), moments_in(layered)
    assert {name for name, found in after.items() if found.aim} == AIMED and before.keys() == after.keys()
    for name in before.keys() - AIMED:
        assert np.allclose(before[name].read(), after[name].read(), rtol=1e-4, atol=1e-6), name
    assert not np.allclose(before["blk.2.ffn_down.weight"].read(), after["blk.2.ffn_down.weight"].read(), rtol=1e-4)


def test_verify_holds_the_file_to_its_aims(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import gguf

    made = calibration(source, "cal", "--through", "q4_0")
    target = converted(source, made)
    assert cli("verify", source, target) == 0
    assert cli("verify", source, target, "--calibration", made) == 0
    tensor = next(t for t in gguf.GGUFReader(target).tensors if t.name == "blk.1.ffn_down.weight")
    data = bytearray(target.read_bytes())
    data[int(tensor.data_offset) + 40 * 18 + 2 + 5] ^= 1  # a code
    target.write_bytes(bytes(data))
    for manifest in target.parent.glob("*manifest*"):
        manifest.unlink()
    capsys.readouterr()
    assert cli("verify", source, target, "--calibration", made) == 3
    assert "layers.1.mlp.dense_4h_to_h.weight" in capsys.readouterr().out


def test_aims_far_from_their_weights_are_no_fault(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a real model some were 5 steps away, where codes chosen together are allowed 4."""

    def far(rows: torch.Tensor, *rest: object) -> torch.Tensor:
        moved = rows.clone()
        moved[3, :32] /= 10
        return moved

    monkeypatch.setattr(through, "aim", far)
    made = calibration(source, "cal", "--through", "q4_0")
    target = converted(source, made)
    assert cli("verify", source, target) == 0
    assert cli("verify", source, target, "--calibration", made) == 0


def test_other_formats_refuse_it(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = calibration(source, "cal", "--through", "q4_0")
    assert cli("convert", source, source.parent / "bnb", "--to", "bnb", "--type", "nf4", "--calibration", made) == 1
    assert "was made through a type of GGUF" in capsys.readouterr().err


def test_a_run_that_was_cut_goes_on_to_the_same_bytes(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = digests(calibration(source, "whole", "--through", "q4_0"))
    run, counted = Through.layer, []

    def cut(self: Through, number: int, *rest: object) -> list[torch.Tensor]:
        counted.append(number)
        if len(counted) == 3:
            raise PowerCut
        return run(self, number, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Through, "layer", cut)
    with pytest.raises(PowerCut):
        calibration(source, "cut", "--through", "q4_0")
    assert cli("calibrate", source, "-o", source.parent / "cut", "--tokens", source.parent / "tokens.npy",
               "--through", "q4_1") == 1  # fmt: skip
    assert digests(calibration(source, "cut", "--through", "q4_0")) == whole
    assert counted == [0, 1, 2, 2]


def test_llama_has_aims_too(tmp_path: Path) -> None:
    """A gated MLP, rows in GGUF's own order, a residual that is serial."""
    source = little_llama(tmp_path / "llama")
    np.save(tmp_path / "tokens.npy", TOKENS)
    made = calibration(source, "cal", "--through", "q4_0")
    assert cli("verify", source, converted(source, made), "--calibration", made) == 0


@pytest.mark.parametrize(("through", "kind", "message"), [
    ("q4_0", "q4_1", "was made through"),
    ("f16", "q4_0", "no codes to choose"),
])  # fmt: skip
def test_wrong_types_are_told(
    through: str, kind: str, message: str, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = source.parent / "cal"
    words = ("calibrate", source, "-o", made, "--tokens", source.parent / "tokens.npy", "--through", through)
    if cli(*words) == 0:
        assert cli("convert", source, source.parent / "m.gguf", "--to", "gguf", "--type", kind, "--calibration", made)
    assert message in capsys.readouterr().err


def test_what_it_takes_is_told_beforehand(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = open_checkpoint(source)
    made = calibration(source, "cal", "--through", "q4_0")
    assert "of memory" in capsys.readouterr().err
    told = needs(checkpoint, TOKENS.size, through=through_of(checkpoint, "Q4_0")).file
    assert told < made.stat().st_size < told + 60_000
