"""Texts that llama.cpp takes for special tokens, whatever the file says of them.

It looks tokens up by their texts when it loads a vocabulary, of every family (src/llama-vocab.cpp, `auto-detect special
tokens by text` and below), makes them control or user-defined tokens, and then finds them anywhere in a text.
"""

from __future__ import annotations

from collections.abc import Iterable

_PARTS = ("prefix", "suffix", "middle", "pad")  # of code with a hole in it
TAKEN_FOR_SPECIAL = frozenset({
    *(f"<|{name}|>" for name in (
        "eot_id", "im_end", "end", "endoftext", "end_of_text", "eom_id", "return", "call", "flush", "calls",
        "repo_name", "file_sep", "prefix", "suffix", "middle", "code_prefix", "code_suffix", "code_middle",
        "channel", "message", "start", "constrain",
    )),
    *(form.format(name) for form in ("<|fim_{}|>", "<fim-{}>", "<fim_{}>") for name in _PARTS),
    *(f"<{name}>" for name in ("PRE", "SUF", "MID", "EOT", "PAD", "REPO")),
    *(f"▁<{name}>" for name in ("PRE", "SUF", "MID")),
    *(f"<｜{name}｜>" for name in ("end▁of▁sentence", "fim▁begin", "fim▁hole", "fim▁end")),  # noqa: RUF001
    "<|fim_repo|>", "<fim-repo>", "<reponame>", "_<EOT>", "[EOT]", "[EOS]", "[PAD]", "[e~[", "</s>", "<eos>",
    "<end_of_turn>", "<end_of_utterance>", "<turn|>", "<|tool_response>",
})  # fmt: skip


def mistaken(texts: Iterable[str], added: Iterable[str]) -> list[str]:
    """The ordinary tokens among `texts` that llama.cpp takes for special ones; those that are `added` are none."""
    return sorted(TAKEN_FOR_SPECIAL.intersection(texts).difference(added))
