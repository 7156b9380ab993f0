"""Make the archives of this folder from the whole fixtures: `python -m tests.data.make_data FOLDER` (see README.md)."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from hashlib import sha256
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
MASTERS = HERE.parent / "golden" / "masters.json"  # {fixture: {"RANK N.name": SHA-256 of the fp32 numbers}}
#                            left out                                       rows of tokens and logits that are kept
KEPT = {
    "neox_2022_tp2_pp4": ((), [0, 4]),
    "neox_2022_sequential_tp2": (("*optim_states.pt",), [0, 1]),
    "neox_2026_bf16_tp2_pp2": ((), [0, 2]),
    "llama_2026_bf16_tp2_pp2": ((), [0, 2]),
    "llama_2024_bf16_tp2_pp2": (("*optim_states.pt",), [0, 2]),
}
UNREAD = ("optimizer_state_*", "logits_native_*", "*stored_inv_freq.npy")
TOKENIZERS = "trained_tp2_pp4/tokenizer.json", "tokenizers/20B_tokenizer.json"  # the second lies beside the fixtures


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    """A file of nobody and of no time, so that the same fixtures make the same archive."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(data), 0o444
    archive.addfile(entry, io.BytesIO(data))


def first_rows(path: Path, rows: list[int]) -> bytes:
    data = io.BytesIO()
    np.save(data, np.load(path)[rows])
    return data.getvalue()


def pack(folder: Path, left_out: tuple[str, ...], rows: list[int]) -> None:
    """Write NAME.tar.xz: every file as it is, but for what no test reads and for rows of the recorded logits."""
    with tarfile.open(HERE / f"{folder.name}.tar.xz", "w:xz", preset=9, format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            if not any(path.match(pattern) for pattern in (*left_out, *UNREAD)):
                data = first_rows(path, rows) if path.suffix == ".npy" else path.read_bytes()
                add(archive, str(path.relative_to(folder.parent)), data)


def masters(folder: Path) -> dict[str, str]:
    """What the live optimizers held: the digest of each parameter's fp32 numbers, by tensor-parallel rank and name."""
    found = {}
    for file in sorted((folder / "reference").glob("optimizer_state_mp_rank_*.npz")):
        with np.load(file) as held:
            for key in held.files:
                if key.endswith("|fp32"):
                    name = key.removesuffix("|fp32").removeprefix("sequential.")
                    found[f"{int(file.stem[-2:]) % 2} {name}"] = sha256(held[key].tobytes()).hexdigest()
    return found


def main() -> None:
    source = Path(sys.argv[1])
    for name, (left_out, rows) in KEPT.items():
        pack(source / name, left_out, rows)
    with tarfile.open(HERE / "tokenizers.tar.xz", "w:xz", preset=9, format=tarfile.PAX_FORMAT) as archive:
        for name, folder in zip(TOKENIZERS, (source, source.parent), strict=True):
            add(archive, name, (folder / name.removeprefix("tokenizers/")).read_bytes())
    digests = {name: masters(source / name) for name in KEPT}
    MASTERS.write_text(json.dumps({name: found for name, found in digests.items() if found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
