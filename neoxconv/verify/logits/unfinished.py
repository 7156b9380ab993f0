"""How far a calibration has come, beside it on disk, so that a run that was interrupted goes on."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Floats, Numbers
from neoxconv.engine.side_file import whole
from neoxconv.errors import PlanError
from neoxconv.formats.calibration.names import source_digest

_MAX_TOLD = 16 << 20  # bytes of the first line


@dataclass(frozen=True)
class Progress:
    """How far a calibration has come: the layers that are done, the streams after them and the digests so far.

    A line of JSON, then the streams as float32.
    """

    path: Path
    key: str  # of all that decides the calibration

    def save(self, layers: int, streams: list[Tensor], digests: Mapping[str, str]) -> None:
        """Write it whole, in place of what was there."""
        data = [x.cpu().numpy().reshape(-1) for x in streams]
        told = {"key": self.key, "layers": layers, "sha256": _sha256(data), "digests": dict(digests)}
        with whole(self.path) as partial, open(partial, "wb") as file:
            file.write(json.dumps(told).encode() + b"\n")
            for values in data:
                file.write(values.data)
            file.flush()
            os.fsync(file.fileno())

    def load(self, shape: tuple[int, ...], ranks: int, layers: int) -> tuple[int, list[Tensor], dict[str, str]] | None:
        """What was saved by a run that was asked for the same, of so many layers and streams of a shape.

        None where there is none, or it cannot be read or is damaged.
        """
        count = math.prod(shape)
        try:
            with open(self.path, "rb") as file:
                line = file.readline(_MAX_TOLD)
                told = json.loads(line)
                if told["key"] != self.key or self.path.stat().st_size != len(line) + 4 * count * ranks:
                    return None
                data = [np.fromfile(file, np.float32, count) for _ in range(ranks)]
            done, digests = told["layers"], told["digests"]
            if told["sha256"] != _sha256(data) or type(done) is not int or not 0 <= done <= layers:
                return None
            return done, [torch.from_numpy(values.reshape(shape)) for values in data], dict(digests)
        except (OSError, ValueError, TypeError, LookupError, RecursionError):
            return None


def _sha256(data: list[Floats]) -> str:
    """The SHA-256 of the bytes of arrays, one after the other."""
    digest = hashlib.sha256()
    for values in data:
        digest.update(values.data)
    return digest.hexdigest()


def refuse_strangers(*paths: Path) -> None:
    """Raise PlanError where a file of ours would take the place of one that is not known to be ours."""
    for path in paths:
        if path.exists() or path.is_symlink():
            raise PlanError(
                f"{path}: is there already, of another calibration or not ours; remove it, or give another -o."
            )


def key_of(checkpoint: Checkpoint, tokens: Numbers, keys: Mapping[str, Any]) -> str:
    """SHA-256 over all that decides a calibration: the source, how it was opened, the tokens."""
    digest = hashlib.sha256(np.ascontiguousarray(tokens).data)
    digest.update(source_digest(checkpoint).encode())
    digest.update(json.dumps({**keys, **checkpoint.config.facts}, sort_keys=True).encode())
    return digest.hexdigest()
