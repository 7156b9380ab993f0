"""Importance matrices: both forms read alike, used as llama.cpp uses them, and another model's refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neoxconv import Recipe, make_plan, open_checkpoint, run, verify_weights
from neoxconv.cli.main import main
from neoxconv.core.encoding import Context, Encoding
from neoxconv.dtypes import Bytes, Floats
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats import imatrix
from neoxconv.quant import ENCODINGS
from neoxconv.quant.ggml.searches import SEARCHES
from tests.golden.make_blocks import ggml_encode
from tests.oracles import ggml_library, llama_logits, write_imatrix
from tests.superblocks import COLUMNS, columns, errors, weighted, weights
from tests.toy import toy

gguf = pytest.importorskip("gguf", reason="gguf is not installed")
searched = pytest.mark.parametrize("encoding", [ENCODINGS[name] for name in SEARCHES], ids=lambda e: e.name)


@pytest.mark.slow
@searched
@pytest.mark.parametrize("kind", ["gauss", "laplace", "student"])
def test_the_error_by_importance_is_no_larger_than_ggmls(encoding: Encoding, kind: str) -> None:
    library = ggml_library()
    assert encoding.search
    rows = weights(kind)
    for spread in ("flat", "usual", "spiky"):
        importance = columns(spread)
        ours = encoding.decode(encoding.search(rows, Context(importance)))
        stored = ggml_encode(library, encoding.name, rows, importance)
        theirs = encoding.decode(stored)
        ratio = weighted(encoding.name, rows, importance, ours) / weighted(encoding.name, rows, importance, theirs)
        assert ratio <= 1, spread
        assert not encoding.wrong(rows, stored, weighted=True).any()


@pytest.mark.parametrize("kind", ["gauss", "laplace"])
def test_a_matrix_makes_no_weights_of_2_bits_smaller(kind: str) -> None:
    """Which cost more than the lesser error brought: layer after layer then puts out too little."""
    rows, encoding = weights(kind, 1 << 16), ENCODINGS["Q2_K"]
    assert encoding.search

    def kept(stored: Bytes, importance: Floats) -> float:
        """What part of the weights is in what is stored, by least squares."""
        return float((encoding.decode(stored) * rows * importance).sum() / (rows**2 * importance).sum())

    usual = columns("usual")
    assert kept(encoding.search(rows, Context(usual)), usual) > kept(encoding.encode(rows), usual) - 0.003


@searched
@pytest.mark.parametrize("context", [Context(columns("usual")), Context(thorough=True)], ids=["importance", "thorough"])
def test_a_searched_encoding_is_finite_and_never_flagged(encoding: Encoding, context: Context) -> None:
    assert encoding.search
    rows = np.vstack([
        weights("student", 8 * COLUMNS),
        weights("gauss", 2 * COLUMNS) * np.float32(1e-6),
        np.zeros((1, COLUMNS)),
        np.full((1, COLUMNS), -1.5),
        np.where(np.arange(COLUMNS) == 77, 300, weights("gauss", COLUMNS)),
        np.full((1, COLUMNS), 1e-42),
    ]).astype(np.float32)  # fmt: skip
    stored = encoding.search(rows, context)
    assert np.isfinite(encoding.decode(stored)).all()
    assert not encoding.wrong(rows, stored, weighted=True).any()
    parts = [encoding.search(rows[i : i + 3], context) for i in range(0, len(rows), 3)]
    assert stored.tobytes() == b"".join(part.tobytes() for part in parts)
    bad = rows.copy()
    bad[2, 100] = np.nan
    assert encoding.wrong(bad, encoding.search(bad, context), weighted=True)[2, 100]


@searched
def test_columns_that_do_not_matter_break_nothing(encoding: Encoding) -> None:
    assert encoding.search
    rows, half = weights("gauss", 4 * COLUMNS), np.where(np.arange(COLUMNS) % 64 < 32, 0, 1).astype(np.float32)
    values = encoding.decode(encoding.search(rows, Context(half)))
    for matter in (half > 0, half == 0):  # whole blocks that do not matter are stored as well as any
        error = np.linalg.norm((values - rows)[:, matter]) / np.linalg.norm(rows[:, matter])
        assert error < {"Q2_K": 0.5, "Q3_K": 0.25}.get(encoding.name, 0.15)
    tiny = Context(columns("usual") * np.float32(1e-30))
    assert np.isfinite(encoding.decode(encoding.search(rows, tiny))).all()


@searched
def test_a_zeroed_step_is_found_in_a_searched_encoding_too(encoding: Encoding) -> None:
    assert encoding.search
    rows = weights("gauss", 4 * COLUMNS)
    stored = encoding.search(rows, Context(columns("usual"))).reshape(-1, encoding.dtype.nbytes)
    at = {"Q2_K": 80, "Q3_K": 108, "Q6_K": 208}.get(encoding.name, 0)
    stored[1, at : at + 2] = 0
    found = encoding.wrong(rows, stored.reshape(len(rows), -1), weighted=True).reshape(len(stored), -1)
    assert found[1].mean() > 0.8 and not np.delete(found, 1, axis=0).any()


@searched
def test_thorough_errs_less(encoding: Encoding) -> None:
    assert encoding.search
    rows = weights("laplace")
    quick, thorough = encoding.encode(rows), encoding.search(rows, Context(thorough=True))
    if encoding.name.endswith(("_0", "_1")):
        assert ((encoding.decode(thorough) - rows) ** 2).sum() < ((encoding.decode(quick) - rows) ** 2).sum()
    else:
        assert errors(encoding, rows, thorough)[0] <= errors(encoding, rows, quick)[0]


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, its F16 file, and importances in both forms."""
    folder = tmp_path_factory.mktemp("imatrix")
    source = toy(folder, hidden=256)
    f16 = run(make_plan(open_checkpoint(source), Recipe("gguf", type="F16")), folder / "f16.gguf")
    forms = {name: folder / f"imatrix.{name}" for name in ("gguf", "dat")}
    for path in forms.values():
        write_imatrix(path, f16)
    return {"source": source, "f16": f16, **forms}


def planned(made: dict[str, Path], matrix: Path | None, **recipe: Any) -> Any:
    return make_plan(open_checkpoint(made["source"]), Recipe("gguf", imatrix=matrix, **recipe))


def test_both_forms_are_read_alike(made: dict[str, Path]) -> None:
    written = write_imatrix(made["gguf"], made["f16"])
    for form in ("gguf", "dat"):
        matrix = imatrix.read(made[form])
        assert matrix.chunks == 5 and set(matrix.entries) == set(written)
        for name, values in written.items():
            assert np.allclose(matrix.entries[name], values / values.mean(), rtol=1e-5), name


@pytest.mark.parametrize("mix", ["Q4_K_M", "IQ4_XS", "Q4_0", "Q5_1", "Q2_K"])
def test_a_file_made_with_a_matrix_is_verified_and_read_by_llama_cpp(
    mix: str, made: dict[str, Path], tmp_path: Path
) -> None:
    target = run(planned(made, made["gguf"], type=mix), tmp_path / "with.gguf")
    assert verify_weights(open_checkpoint(made["source"]), open_checkpoint(target)).passed
    entries = {step.entry.name: step.entry for step in planned(made, made["gguf"], type=mix).steps}
    for tensor in gguf.GGUFReader(target).tensors:
        entry = entries[tensor.name]
        rows = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if entry.search and entry.context:
            weights = entry.tensor.floats(0, entry.tensor.rows)
            assert np.array_equal(
                rows.view(np.uint32), entry.encoding.decode(entry.search(weights, entry.context)).view(np.uint32)
            )
    without = run(planned(made, None, type=mix), tmp_path / "without.gguf")
    assert target.read_bytes() != without.read_bytes()
    assert np.isfinite(llama_logits(target, np.arange(64).reshape(1, 64))).all()


def test_what_has_no_importances_is_named(made: dict[str, Path]) -> None:
    notes = planned(made, made["gguf"], type="Q4_K_M").notes
    assert any("2 tensors without importances" in note and "token_embd.weight, output.weight" in note for note in notes)
    assert any(imatrix.read(made["gguf"]).sha256 in note for note in notes)


def test_the_matrix_and_the_effort_decide_the_bytes_and_so_the_fingerprint(made: dict[str, Path]) -> None:
    plans = [
        planned(made, matrix, type="Q4_K_S", effort=effort)
        for matrix in (None, made["gguf"])
        for effort in ("normal", "high")
    ]
    assert len({plan.fingerprint for plan in plans}) == 4
    write_imatrix(made["dat"].with_name("other.dat"), made["f16"], seed=1)
    assert planned(made, made["dat"].with_name("other.dat"), type="Q4_K_S").fingerprint != plans[2].fingerprint


def test_high_effort_is_verified(made: dict[str, Path], tmp_path: Path) -> None:
    for mix in ("Q4_0", "Q5_1", "Q4_K_M"):
        target = run(planned(made, None, type=mix, effort="high"), tmp_path / mix)
        assert verify_weights(open_checkpoint(made["source"]), open_checkpoint(target)).passed


def with_other(change: Callable[[dict[str, Floats]], dict[str, Floats]], path: Path, source: Path) -> Path:
    """The .dat form of other entries."""
    rows = [struct.pack("<i", len(n)) + n.encode() + struct.pack("<ii", 1, v.size) + v.tobytes()
            for n, v in change(dict(imatrix.read(source).entries)).items()]  # fmt: skip
    path.write_bytes(struct.pack("<i", len(rows)) + b"".join(rows))
    return path


OTHERS: dict[str, tuple[Callable[[dict[str, Floats]], dict[str, Floats]], str]] = {
    "another width": (
        lambda e: {name: values[:128] for name, values in e.items()},
        "blk.0.attn_qkv.weight has importances of 128 columns, the model's has 256",
    ),
    "more layers": (lambda e: e | {"blk.9.ffn_up.weight": e["blk.0.ffn_up.weight"]}, "blk.9.ffn_up.weight is not in"),
    "another family": (
        lambda e: {"blk.0.attn_q.weight": e["blk.0.ffn_up.weight"]},
        "attn_q.weight is not in the model",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_models_matrix_is_refused(name: str, made: dict[str, Path], tmp_path: Path) -> None:
    change, message = OTHERS[name]
    with pytest.raises(PlanError, match=message):
        planned(made, with_other(change, tmp_path / "other.dat", made["dat"]), type="Q4_K_M")


def test_a_tensor_whose_importances_are_all_zero_has_none(made: dict[str, Path], tmp_path: Path) -> None:
    zeros = with_other(
        lambda e: e | {"blk.0.ffn_up.weight": e["blk.0.ffn_up.weight"] * 0}, tmp_path / "m.dat", made["dat"]
    )
    assert any("3 tensors without importances" in note for note in planned(made, zeros, type="Q4_K_M").notes)


def test_the_chunks_are_found_behind_a_name_that_is_there_twice(tmp_path: Path) -> None:
    row = struct.pack("<i", 1) + b"a" + struct.pack("<ii2f", 1, 2, 1.0, 3.0)
    (tmp_path / "m.dat").write_bytes(struct.pack("<i", 2) + 2 * row + struct.pack("<ii", 7, 0))
    matrix = imatrix.read(tmp_path / "m.dat")
    assert matrix.chunks == 7 and matrix.entries["a"].tolist() == [0.5, 1.5]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_a_value_that_is_no_importance_is_named(bad: float, made: dict[str, Path], tmp_path: Path) -> None:
    def change(entries: dict[str, Floats]) -> dict[str, Floats]:
        values = entries["blk.1.ffn_down.weight"].copy()
        values[7] = bad
        return entries | {"blk.1.ffn_down.weight": values}

    with pytest.raises(CheckpointError, match=r"blk\.1\.ffn_down\.weight: the importance of column 7 is"):
        imatrix.read(with_other(change, tmp_path / "bad.dat", made["dat"]))


def test_every_truncation_of_a_matrix_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    for form, tail in (("dat", 12), ("gguf", 32)):  # .dat: chunks and the text's name may lack; GGUF: padding
        data = made[form].read_bytes()
        for end in np.linspace(0, len(data) - tail - 1, 60).astype(int):
            cut = tmp_path / "cut"
            cut.write_bytes(data[:end])
            with pytest.raises(CheckpointError, match="cut"):
                imatrix.read(cut)


@pytest.mark.parametrize("kind", ["a model", "text", "empty"])
def test_a_file_that_is_no_matrix_is_refused(kind: str, made: dict[str, Path], tmp_path: Path) -> None:
    path = made["f16"]
    if kind != "a model":
        path = tmp_path / "other"
        path.write_text("some text that goes on for a while" if kind == "text" else "")
    with pytest.raises(CheckpointError, match=r"importance matrix|general\.type"):
        imatrix.read(path)


def test_the_command_line_takes_a_matrix(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.gguf"
    command = ["convert", str(made["source"]), str(target), "--to", "gguf", "--type", "q4_k_m"]
    assert main([*command, "--imatrix", str(made["gguf"]), "--effort", "high"]) == 0
    assert "without importances" in capsys.readouterr().err
    assert main(["verify", str(made["source"]), str(target)]) == 0
    notes = json.loads(target.with_name("model.gguf.manifest.json").read_text())["notes"]
    assert any(note.startswith("importance matrix of 8 tensors, sha256 ") for note in notes)
    assert main([*command[:2], str(tmp_path / "x"), "--to", "hf", "--imatrix", str(made["gguf"])]) == 2
    assert main([*command[:2], str(tmp_path / "x.gguf"), *command[3:], "--imatrix", str(tmp_path / "none")]) == 1
    assert "none: cannot be opened" in capsys.readouterr().err
