"""What a target says of the model beside its weights: names, sizes, provenance."""

from __future__ import annotations

from neoxconv.core.model import Checkpoint
from neoxconv.version import __version__


def title(checkpoint: Checkpoint) -> str:
    """A name that depends on the model alone."""
    return f"{checkpoint.architecture.title} {size_label(checkpoint.parameters)}"


def size_label(count: int) -> str:
    """A count of parameters as llama.cpp rounds it: 20554567680 -> 21B, 10500000 -> 10M, 1400000000 -> 1.4B."""
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count > scale or suffix == "K":
            value = count / scale
            return f"{value:.{max(0, 2 - len(str(round(value)).lstrip('0')))}f}{suffix}"
    raise AssertionError(count)


def provenance(checkpoint: Checkpoint) -> list[tuple[str, str]]:
    """Where a model comes from, in lines for its card."""
    index, config = checkpoint.index, checkpoint.config
    lines = [
        ("Source", f"{index.format} checkpoint, {len(index.files)} files, tensor parallelism {len(index.ranks)}"),
        ("Parameters", f"{checkpoint.parameters:,}"),
        (
            "Shape",
            f"{config.layers} layers, hidden {config.hidden}, {config.heads} heads, {config.rows} vocabulary rows",
        ),
        *([("Weights", "the optimizer's fp32 masters")] if index.replaced else []),
        ("Norms of the ranks", checkpoint.norms if len(index.ranks) > 1 else "one rank"),
        ("Converted by", f"neoxconv {__version__}"),
    ]
    return lines + [("Note", note) for note in checkpoint.notes]
