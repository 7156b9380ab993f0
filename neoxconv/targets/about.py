"""What a target says of the model beside its weights: names, sizes, provenance, the tokenizer and its tokens."""

from __future__ import annotations

from neoxconv.core.model import Checkpoint
from neoxconv.formats.tokenizer import END, Tokenizer, check_rows
from neoxconv.version import __version__


def token_ids(checkpoint: Checkpoint, tokenizer: Tokenizer | None) -> dict[str, int]:
    """The tokens at which text begins and ends: as the source says, else the tokenizer's, else 0."""
    end = check_rows(tokenizer, checkpoint.config.rows)[END] if tokenizer else 0
    settings = checkpoint.index.settings
    names = ("bos_token_id", "eos_token_id")
    found = {name: settings.get(name, settings.get(f"tokenizer.ggml.{name}")) for name in names}
    return {name: value if type(value) is int else end for name, value in found.items()}


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
