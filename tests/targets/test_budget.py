"""Types by what they cost: the best there are within the bytes, by trying all; gradients are autograd's."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from neoxconv import Recipe, make_plan, open_checkpoint, run
from neoxconv.core.encoding import Gradients, Moments
from neoxconv.core.layout import Entry
from neoxconv.core.tensor import in_memory
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats.calibration.read import gradients_in
from neoxconv.quant import ENCODINGS
from neoxconv.targets.budget import ROLES, Costs, Known, choose_within, costs_of
from neoxconv.targets.gguf import gguf_entries
from neoxconv.targets.mixes import GgufTensor
from neoxconv.verify.logits import moments, stream
from neoxconv.verify.logits.gradients import squares_of_gradients
from tests.fixtures import fixture
from tests.helpers import PowerCut, cli
from tests.little_llamas import little_llama
from tests.toy import toy

NAMES = ("Q2_K", "Q3_K", "Q4_K", "Q6_K")


def costs(seed: int, count: int) -> list[Costs]:
    """Matrices of several sizes; a larger type costs fewer nats."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        rows = int(rng.integers(1, 9))
        entry = Entry(f"blk.{number}", "", in_memory(np.zeros((rows, 256), np.float32)), ENCODINGS["Q4_K"])
        falls = rng.uniform(0.1, 10) * np.cumprod(rng.uniform(0.1, 0.9, len(NAMES)))
        found.append(Costs(entry, dict(zip(NAMES, falls.tolist(), strict=True))))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_choice_is_about_the_best_of_all_and_never_a_byte_over(seed: int) -> None:
    matrices = costs(seed, 5)
    least = sum(each.bytes["Q2_K"] for each in matrices)
    most = sum(each.bytes["Q6_K"] for each in matrices)
    for budget in np.linspace(least, most, 7, dtype=int).tolist():
        chosen = choose_within(matrices, budget)
        taken = sum(each.bytes[chosen.types[each.entry.name]] for each in matrices)
        assert taken <= budget
        best = min(
            sum(each.nats[name] for each, name in zip(matrices, names, strict=True))
            for names in itertools.product(NAMES, repeat=5)
            if sum(each.bytes[name] for each, name in zip(matrices, names, strict=True)) <= budget
        )
        assert best <= chosen.nats * (1 + 1e-9) and chosen.nats <= 1.3 * best
    assert choose_within(matrices, most).nats == pytest.approx(sum(each.nats["Q6_K"] for each in matrices))
    with pytest.raises(PlanError, match="at least"):
        choose_within(matrices, least - 1)


def test_a_cost_is_the_sum_over_rows_of_what_their_errors_do() -> None:
    rng = np.random.default_rng(3)
    weights, inputs = (rng.standard_normal((count, 64)).astype(np.float32) for count in (128, 500))
    inputs[:, 7] *= 9
    square = inputs.T @ inputs / np.float32(500)
    entry = Entry("blk.1", "", in_memory(weights), ENCODINGS["Q4_0"])
    tensor = GgufTensor("blk.1", "mlp_in", 1, 2, 64)
    columns = (np.diag(square) * rng.uniform(0.5, 2, 64)).astype(np.float32)
    errors = (weights - ENCODINGS["Q4_0"].decode(ENCODINGS["Q4_0"].encode(weights))).astype(np.float64)
    scale = np.sqrt(columns / np.diag(square))
    known = Known(None, Gradients(np.full(128, 0.25, np.float32), columns), Moments(64, "", square.copy))
    found = costs_of(entry, tensor, known, ("Q4_0", "Q4_K"))
    assert set(found.nats) == {"Q4_0"}, "no row of 64 is Q4_K"
    scaled = errors * scale
    assert found.nats["Q4_0"] == pytest.approx(0.5 * 0.25 * np.trace(scaled @ square @ scaled.T), rel=1e-4)
    alone = costs_of(entry, tensor, Known(None, known.gradients), ("Q4_0",))
    assert alone.nats["Q4_0"] == pytest.approx(0.5 * 0.25 * (errors**2 @ columns).sum(), rel=1e-4)
    without = costs_of(entry, tensor, Known(), ("Q4_0",))
    share = (errors**2).sum() / (weights.astype(np.float64) ** 2).sum()
    assert without.nats["Q4_0"] == pytest.approx(ROLES["mlp_in"] * share, rel=1e-4)


def test_rows_stand_for_what_they_weigh() -> None:
    """A few rows of a large vocabulary that come often decide."""
    weights = np.random.default_rng(3).standard_normal((4096, 32)).astype(np.float32)
    weights[:1000] *= 10
    rows = np.where(np.arange(4096) < 1000, np.float32(1), np.float32(0))
    entry = Entry("token_embd.weight", "", in_memory(weights), ENCODINGS["Q8_0"])
    known = Known(None, Gradients(rows, np.ones(32, np.float32)))
    found = costs_of(entry, GgufTensor(entry.name, "embedding", None, 2, 32), known, ("Q4_0",))
    errors = weights[:1000] - ENCODINGS["Q4_0"].decode(ENCODINGS["Q4_0"].encode(weights[:1000]))
    assert found.nats["Q4_0"] == pytest.approx(0.5 * np.square(errors, dtype=np.float64).sum(), rel=0.1)


@pytest.mark.parametrize("changes", [{}, {"parallel_residual": False}, {"llama": True, "kv_heads": 2, "ff": 96}])
def test_gradients_are_those_of_autograd(changes: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    checkpoint = open_checkpoint(toy(tmp_path, tp=1, dtype="F32", **changes), qkv_layout=None)
    tokens = np.arange(64, dtype=np.int64).reshape(2, 32) * 5 % 512
    squares: dict[str, np.ndarray] = {}
    found = squares_of_gradients(checkpoint, tokens, outputs=squares.__setitem__)
    assert set(squares) == {name for name in found if ".layers." in name}
    folder = run(make_plan(checkpoint, Recipe("hf")), tmp_path / "hf")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    passed: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hook(name: str) -> Any:
        def seen(module: object, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
            output.retain_grad()
            passed[name + ".weight"] = inputs[0].detach(), output

        return seen

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.register_forward_hook(hook(name))
    predicted = model(torch.from_numpy(tokens), use_cache=False).logits.log_softmax(-1)
    chance = torch.Generator().manual_seed(7)
    labels = torch.cat([torch.multinomial(row.detach().exp(), 1, generator=chance) for row in predicted])
    (-predicted.flatten(0, 1).gather(1, labels).sum()).backward()
    passed = {name if name in found else "embed_out.weight": both for name, both in passed.items()}
    assert set(found) == set(passed)
    for name, gradients in found.items():
        x, output = passed[name]
        assert output.grad is not None
        mean_squares = output.grad.double().square().flatten(0, 1)
        if name.endswith(("embed_in.weight", "embed_tokens.weight")):
            x, mean_squares = mean_squares, one_hot(x.flatten(), 512) * mean_squares.sum(1, keepdim=True)
            columns = x.sum(0) / x.sum()
        else:
            if name.endswith(("embed_out.weight", "lm_head.weight")):
                chances = predicted.detach().double().exp().flatten(0, 1)
                mean_squares = chances * (1 - chances)
            columns = mean_squares.sum(1) @ x.double().square().flatten(0, 1) / mean_squares.sum()
        assert np.allclose(gradients.rows, mean_squares.mean(0), rtol=1e-3, atol=1e-5 * mean_squares.mean()), name
        assert np.allclose(gradients.columns, columns, rtol=1e-3, atol=1e-5 * columns.mean()), name
        if name in squares:
            expected = damped_by_halves(output.grad.double().numpy())
            assert np.allclose(squares[name], expected, rtol=2e-3, atol=1e-4), name


def damped_by_halves(gradients: np.ndarray) -> np.ndarray:
    """What outputs.py's first lines say, token by token, of gradients [sequences, time, rows]."""
    rows = gradients.shape[2]
    most = 16 * (gradients[:, 1:] ** 2).sum(2).mean()
    halves = [np.zeros((rows, rows)), np.zeros((rows, rows))]
    for number, sequence in enumerate(gradients):
        for g in sequence[1:]:
            halves[number % 2] += np.outer(g, g) * min(1, most / (g @ g))
    a, b = (half - np.diag(np.diag(half)) for half in halves)
    signal = (a * b).sum()
    noise = ((a * a).sum() + (b * b).sum()) / 2 - signal
    both = sum(halves) / np.trace(sum(halves)) * rows
    return both + (0.1 + noise / (2 * signal)) * np.eye(rows) if signal > 0 else np.diag(np.diag(both))


def test_gradients_add_up_over_groups_of_sequences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(toy(tmp_path, hidden=64, dtype="F32"))
    tokens = np.arange(96, dtype=np.int64).reshape(3, 32) * 5 % 512
    whole = squares_of_gradients(checkpoint, tokens)
    monkeypatch.setattr(stream, "INSIDE", 1)
    for name, found in squares_of_gradients(checkpoint, tokens).items():
        assert np.allclose(found.rows, whole[name].rows, rtol=1e-3), name
        assert np.allclose(found.columns, whole[name].columns, rtol=1e-3), name


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    source, made = fixture("trained_tp2_pp4/checkpoints"), tmp_path_factory.mktemp("cal") / "cal.gguf"
    text = made.parent / "text.txt"
    text.write_text(Path(__file__).read_text()[:6000])
    options = ("--text", text, "--length", "128", "--gradients")
    assert cli("calibrate", source, "-o", made, *options) == 0
    return source, made


def test_a_file_keeps_within_its_bits_and_its_size(
    calibrated: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, made = calibrated
    shapes = {entry.name: entry.tensor.shape for entry in gguf_entries(open_checkpoint(source), Recipe("gguf"))}
    assert len(gradients_in(made, shapes)) == 34
    words = ("convert", source, tmp_path / "a.gguf", "--to", "gguf", "--calibration", made)
    assert cli(*words, "--bits", "5", "--dry-run") == 0
    assert "predicted KL divergence" in capsys.readouterr().out
    assert cli(*words, "--bits", "5") == 0
    assert f"next: neoxconv verify {source} {tmp_path / 'a.gguf'} --calibration {made}" in capsys.readouterr().out
    plan = make_plan(open_checkpoint(source), Recipe("gguf", calibration=made, bits=5.0))
    assert 0.97 * 5 < 8 * sum(step.nbytes for step in plan.steps) / plan.checkpoint.parameters <= 5
    assert cli("verify", source, tmp_path / "a.gguf", "--calibration", made) == 0
    limit = 6_600_000
    assert cli(*words, "--size", limit, "--overwrite") == 0
    assert 0.97 * limit < (tmp_path / "a.gguf").stat().st_size <= limit
    assert cli(*words, "--size", limit, "--types", "q4_k", "--types", "q3_k", "--overwrite") == 0
    capsys.readouterr()
    for wrong, told in (
        (("--bits", "1"), "are left for them"),
        (("--bits", "4", "--size", "1MB"), "exclude each other"),
        (("--types", "q4_k"), "--bits or --size"),
    ):
        assert cli(*words, *wrong, "--overwrite") == 1
        assert told in capsys.readouterr().err


def test_a_calibration_without_gradients_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = toy(tmp_path, hidden=64)
    np.save(tmp_path / "tokens.npy", np.arange(64).reshape(2, 32))
    made = tmp_path / "cal.gguf"
    assert cli("calibrate", source, "-o", made, "--tokens", tmp_path / "tokens.npy", "--covariance") == 0
    assert cli("convert", source, tmp_path / "a.gguf", "--to", "gguf", "--bits", "5", "--calibration", made) == 1
    assert "calibrate --gradients" in capsys.readouterr().err


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """A toy and its calibration with gradients."""
    source = toy(tmp_path, hidden=64)
    np.save(tmp_path / "tokens.npy", np.arange(64).reshape(2, 32))
    made = tmp_path / "cal.gguf"
    assert cli("calibrate", source, "-o", made, "--tokens", tmp_path / "tokens.npy", "--gradients") == 0
    return source, made


DAMAGED = ("blk.1.ffn_up.weight.gradient", "blk.1.ffn_up.weight.gradient_inputs")


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize(("number", "told"), [(np.nan, "is nan"), (-1.0, "is -1.0"), (np.inf, "is inf")])
def test_gradients_that_are_none_are_named(
    name: str, number: float, told: str, small: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    import gguf

    source, made = small
    tensor = next(t for t in gguf.GGUFReader(made).tensors if t.name == name)
    data = bytearray(made.read_bytes())
    data[tensor.data_offset : tensor.data_offset + 4] = np.float32(number).tobytes()
    made.write_bytes(bytes(data))
    assert cli("convert", source, made.parent / "a.gguf", "--to", "gguf", "--bits", "6", "--calibration", made) == 1
    message = capsys.readouterr().err
    assert name in message and told in message and "cal.gguf" in message and "calibrate again" in message


@pytest.mark.parametrize(("changes", "told"), [
    ({"hidden": 64, "layers": 1}, "is not in the model"),
    ({"hidden": 64, "rows": 1024}, "asks for"),
])  # fmt: skip
def test_gradients_of_another_model_are_refused(
    changes: dict[str, Any], told: str, small: tuple[Path, Path], tmp_path: Path
) -> None:
    _, made = small
    entries = gguf_entries(open_checkpoint(toy(tmp_path / "other", **changes)), Recipe("gguf"))
    with pytest.raises(CheckpointError, match=told):
        gradients_in(made, {entry.name: entry.tensor.shape for entry in entries})


def test_a_run_that_stopped_before_its_gradients_leaves_none(
    small: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, made = small
    words = ("calibrate", source, "-o", made.with_name("cut.gguf"), "--tokens", made.with_name("tokens.npy"))

    def cut(*arguments: object, **named: object) -> None:
        raise PowerCut

    with monkeypatch.context() as patch:
        patch.setattr(moments, "squares_of_gradients", cut)
        with pytest.raises(PowerCut):
            cli(*words, "--gradients")
    shapes = {entry.name: entry.tensor.shape for entry in gguf_entries(open_checkpoint(source), Recipe("gguf"))}
    with pytest.raises(CheckpointError, match="unfinished"):
        gradients_in(made.with_name("cut.gguf.partial"), shapes)
    assert cli(*words, "--covariance") == 1, "it has other places in its file"
    assert "of another calibration" in capsys.readouterr().err
    assert cli(*words, "--gradients") == 0
    assert made.with_name("cut.gguf").read_bytes() == made.read_bytes()


def test_gradients_are_of_tokens_from_all_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = toy(tmp_path, hidden=64)
    rows = np.arange(8)[:, None] + np.zeros((8, 32), int)
    np.save(tmp_path / "tokens.npy", rows)
    seen: list[np.ndarray] = []

    def watched(checkpoint: Any, tokens: np.ndarray, **named: Any) -> Any:
        seen.append(tokens)
        return squares_of_gradients(checkpoint, tokens, **named)

    monkeypatch.setattr(moments, "GRADIENT_TOKENS", 4 * 32)
    monkeypatch.setattr(moments, "squares_of_gradients", watched)
    words = ("--tokens", tmp_path / "tokens.npy", "--gradients")
    assert cli("calibrate", source, "-o", tmp_path / "cal.gguf", *words) == 0
    assert seen[0][:, 0].tolist() == [0, 2, 4, 6]


def test_types_are_chosen_without_a_calibration_too(
    small: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source, made = small
    words = ("convert", source, made.parent / "a.gguf", "--to", "gguf", "--bits", "6", "--overwrite")
    for more, told in (((), "weights alone"), (("--imatrix", made), "the importance matrix")):
        assert cli(*words, *more) == 0
        assert f"types by {told}" in capsys.readouterr().err
        plan = make_plan(open_checkpoint(source), Recipe("gguf", bits=6.0, imatrix=made if more else None))
        assert 8 * sum(step.nbytes for step in plan.steps) / plan.checkpoint.parameters <= 6
        assert cli("verify", source, made.parent / "a.gguf") == 0


def test_a_matrix_that_no_type_fits_keeps_what_the_mix_gives_it(
    small: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of 64, but for the MLP's last of 256."""
    source, made = small
    words = ("convert", source, made.parent / "a.gguf", "--to", "gguf", "--bits", "9", "--types", "q4_k")
    assert cli(*words, "--calibration", made, "--dry-run") == 0
    assert "types by what they cost: 2 Q4_K" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [False, True])
def test_types_of_embedding_and_head_are_chosen_or_asked_for(tied: bool, tmp_path: Path) -> None:
    source = little_llama(tmp_path / "llama", tie_word_embeddings=True) if tied else toy(tmp_path, hidden=64)
    np.save(tmp_path / "tokens.npy", np.arange(64).reshape(2, 32))
    made = tmp_path / "cal.gguf"
    assert cli("calibrate", source, "-o", made, "--tokens", tmp_path / "tokens.npy", "--gradients") == 0
    checkpoint = open_checkpoint(source)

    def types(**asked: Any) -> dict[str, str]:
        plan = make_plan(checkpoint, Recipe("gguf", calibration=made, bits=8.0, types=("Q4_0", "Q5_0"), **asked))
        return {step.entry.name: step.entry.encoding.name for step in plan.steps if "blk" not in step.entry.name}

    head, matrices = "token_embd.weight" if tied else "output.weight", {"token_embd.weight", "output.weight"}
    assert {name for name in types() if types()[name] == "Q5_0"} == ({head} if tied else matrices)
    assert types(output_type="Q8_0")[head] == "Q8_0"
    assert types(embedding_type="Q8_0")["token_embd.weight"] == "Q8_0"


def test_a_tied_matrix_costs_what_both_of_its_uses_do(tmp_path: Path) -> None:
    source, tokens = little_llama(tmp_path / "llama", tie_word_embeddings=True), np.arange(64).reshape(2, 32)
    np.save(tmp_path / "tokens.npy", tokens)
    made = tmp_path / "cal.gguf"
    assert cli("calibrate", source, "-o", made, "--tokens", tmp_path / "tokens.npy", "--gradients") == 0
    checkpoint = open_checkpoint(source)
    shapes = {entry.name: entry.tensor.shape for entry in gguf_entries(checkpoint, Recipe("gguf"))}
    both = gradients_in(made, shapes)["token_embd.weight"]
    found = squares_of_gradients(checkpoint, tokens)
    uses = [found[name] for name in ("lm_head.weight", "model.embed_tokens.weight")]
    expected = sum(each.rows.sum() * each.columns.sum() for each in uses)
    assert both.rows.sum() * both.columns.sum() == pytest.approx(expected, rel=1e-4)
    assert all(each.rows.sum() * each.columns.sum() > 0.01 * expected for each in uses)
