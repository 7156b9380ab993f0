"""The checkpoint that most tests can share: two layers, seeded, as gpt-neox shards in a fraction of a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from neoxconv.synthetic import Synthetic, write_checkpoint


def toy(folder: Path, **changes: Any) -> Path:
    """A checkpoint at `folder`/toy (the folder that holds `latest`), a tiny tokenizer inside; TP 2 unless changed.

    `changes` are fields of `Synthetic`: tp=4, sequential=True, dtype="BF16".
    """
    return write_checkpoint(folder / "toy", Synthetic(**changes)).parent
