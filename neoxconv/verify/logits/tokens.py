"""The tokens that models are compared on: from a text, from a file of token ids, or a text of our own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zipfile import BadZipFile

import numpy as np

from neoxconv.core.model import Checkpoint
from neoxconv.dtypes import Numbers
from neoxconv.errors import CheckpointError, PlanError
from neoxconv.formats.tokenizer import Tokenizer
from neoxconv.sources.tokenizer import tokenizer_of
from neoxconv.storage import check_size, open_storage
from neoxconv.verify.logits.trial import Sample

_SEQUENCES = 2  # of our own text
_STEP, _OFFSET = 1_103_515_245, 12_345  # a linear congruence: the ids where there is no tokenizer

_OF_TRAINING_DATA = ("truncation", "padding")  # sections of a tokenizer.json

# Prose, a table, code and figures, so that many kinds of tokens come up.
_TEXT = """\
The ship had been at anchor for nine days when the wind turned at last. Nobody on deck said a word; they had learned
that hope, spoken aloud, brought only more calm. The cook went on peeling potatoes, the mate wound his watch, and the
boy at the masthead, who could see the line of darker water moving in from the west, counted slowly to a hundred before
he let himself shout.

In 1887 the harbour took in 1,204 vessels, of which 861 carried grain, 233 timber and the rest salt, wool or nothing at
all. Ten years later there were 2,090. "We shall need a second pier," wrote the harbour master, "or fewer captains."

def median(values: list[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2

| element | symbol | melts at |
|---------|--------|----------|
| tin     | Sn     | 231.9 C  |
| lead    | Pb     | 327.5 C  |
| zinc    | Zn     | 419.5 C  |

What does a language model know of tin? Only that the word comes before others with certain odds. Yet the odds are not
idle: change a sign in one matrix of one layer, and the sentences still sound well while the sums go wrong. That is why
a converted model is asked for its numbers, and not for its opinion.

Der Wind kam aus Westen. Le vent tourna enfin. El barco se movió despacio, como si dudara. (c) 2026; see https://a.b/c?d=e&f=g.
"""


def package_text() -> str:
    """The source of this package: code and plain English, a megabyte of them, the same in every installation of it."""
    root = Path(__file__).parents[2]
    return "".join(file.read_text("utf-8") for file in sorted(root.rglob("*.py")))


def tokens_for(
    checkpoint: Checkpoint, sample: Sample, own: str | None = None, enough: int | None = None
) -> tuple[Numbers, str]:
    """Tokens [sequences, length] and where they are from; sequences are cut to what there is and the model's context.

    Without a text they are from `own`, all of it or as many as are `enough`; by default two sequences of a short one.
    Raises PlanError or CheckpointError where there is no tokenizer, or the ids are not the model's.
    """
    text, sequences = sample.text, sample.sequences
    length = min(sample.length, checkpoint.config.context)
    if sample.tokens:
        return _from_file(checkpoint, sample.tokens, sequences)
    words = tokenizer_of(checkpoint)
    if text is None and (words is None or (words.own_sentencepiece and not find_spec("sentencepiece"))):
        count = (sequences or _SEQUENCES) * length
        return _invented(checkpoint.config.rows, count).reshape(-1, length), "invented token ids"
    if words is None:
        raise PlanError(f"{checkpoint.index.folder}: has no tokenizer; give token ids with --tokens FILE.npy.")
    found = encode(words, sample.lines if text else own or _TEXT)
    if found.max(initial=0) >= checkpoint.config.rows:
        raise CheckpointError(
            f"{words.name}: gives token {found.max()}, but the model has {checkpoint.config.rows} words; "
            "it is another model's."
        )
    of_ours = -(-enough // length) if enough else len(found)
    wanted = sequences or (len(found) if text else of_ours if own else _SEQUENCES)
    if text is None and own is None:
        found = np.tile(found, -(-length * wanted // len(found)))
    rows = min(len(found) // length, wanted)
    if rows == 0:
        length, rows = len(found), 1
    if length < 2:
        raise PlanError(f"{text}: comes to {length} tokens, at least 2 are needed; give a longer text.")
    return found[: rows * length].reshape(rows, length), str(text.name if text else "built-in text")


def mixed(checkpoint: Checkpoint, samples: Sequence[Sample], enough: int) -> tuple[Numbers, str]:
    """The tokens of several samples [sequences, length] in turn, as many of each, and where they are from.

    A sample of nothing is of this package's source, as many tokens as are `enough`.

    Raises what `tokens_for` raises, and PlanError where one sample is too short for sequences of the others' length.
    """
    found = [tokens_for(checkpoint, sample, package_text(), enough) for sample in samples]
    lengths = {tokens.shape[1] for tokens, _ in found}
    if len(lengths) > 1:
        raise PlanError(f"the texts give sequences of {sorted(lengths)} tokens; give longer texts, or a --length.")
    least = min(len(tokens) for tokens, _ in found)
    rows = [tokens[i] for i in range(least) for tokens, _ in found] if len(found) > 1 else list(found[0][0])
    return np.stack(rows), ", ".join(name for _, name in found)


@dataclass(frozen=True)
class _Sentencepiece:
    """sentencepiece's library in the words of the tokenizers library's that are used here; special tokens are text."""

    words: Tokenizer
    made: Any

    def encode(self, text: str, *, add_special_tokens: bool = False) -> Any:
        return SimpleNamespace(ids=self.made.encode(text), offsets=())

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return str(self.made.decode([number for number in ids if number < self.made.get_piece_size()]))

    def token_to_id(self, text: str) -> int | None:
        return self.words.ids.get(text, self.words.special("eos"))


def _sentencepiece(words: Tokenizer) -> _Sentencepiece:
    """Raises PlanError where the library is not installed, CheckpointError where it cannot read the file."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        instead = "pip install sentencepiece, or give token ids with --tokens FILE.npy"
        raise PlanError(f"{words.name}: is sentencepiece's, which is not installed; {instead}.") from error
    try:
        with _without_stderr():
            return _Sentencepiece(words, SentencePieceProcessor(model_proto=words.own_sentencepiece))
    except (RuntimeError, OSError) as error:
        what = f"the sentencepiece library cannot work with it ({str(error)[:200]})"
        raise CheckpointError(f"{words.name}: {what}; give token ids with --tokens FILE.npy.") from error


def library(words: Tokenizer) -> Any:
    """The tokenizers library's own, which neither truncates nor pads: that is of training data, not of the model.

    Of sentencepiece's file its own library. Raises CheckpointError where the library cannot build it, PlanError where
    sentencepiece is not installed.
    """
    if words.own_sentencepiece:
        return _sentencepiece(words)
    import tokenizers

    try:
        text = json.dumps(json.loads(words.data) | dict.fromkeys(_OF_TRAINING_DATA))
    except (ValueError, TypeError, RecursionError):  # no JSON object, which the library says in its own words
        text = words.data.decode("utf-8", "replace")
    with blamed(words):
        return tokenizers.Tokenizer.from_str(text)


@contextmanager
def blamed(words: Tokenizer) -> Iterator[None]:
    """Let the tokenizers library work; what it fails at is told of the tokenizer's file.

    Raises CheckpointError for its errors and its panics (of a regular expression that it gives up on), of which the
    second are no Exception and print a trace of their own.
    """
    try:
        with _without_stderr():
            yield
    except BaseException as error:
        if type(error) is not Exception and type(error).__name__ != "PanicException":
            raise
        what = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{words.name}: the tokenizers library cannot work with it ({what}); "
            "give the model's own tokenizer.json, or token ids with --tokens FILE.npy."
        ) from None


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Nothing is printed to the process's standard error, by whatever library."""
    try:
        kept = os.dup(2)
    except OSError:  # there is none
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        if sys.stderr:
            sys.stderr.flush()
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def encode(words: Tokenizer, text: str) -> Numbers:
    """The ids of a text."""
    made = library(words)
    with blamed(words):
        return np.array(made.encode(text).ids, np.int64)


def _from_file(checkpoint: Checkpoint, path: Path, sequences: int | None) -> tuple[Numbers, str]:
    """Ids [batch, time] or [time] that numpy saved."""
    no_ids = "is no .npy file of token ids; make one with numpy.save."
    check_size(path, open_storage(path).size)
    try:
        loaded = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, MemoryError, BadZipFile) as error:
        raise CheckpointError(f"{path}: {no_ids}") from error
    if not isinstance(loaded, np.ndarray):
        raise CheckpointError(f"{path}: {no_ids}")
    ids = np.atleast_2d(loaded)
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or ids.shape[1] < 2 or not ids.size:
        raise CheckpointError(
            f"{path}: holds {ids.dtype} of shape {list(ids.shape)}, expected whole numbers [batch, time], "
            "two or more in a row; give another file."
        )
    if ids.min() < 0 or ids.max() >= checkpoint.config.rows or ids.shape[1] > checkpoint.config.context:
        raise CheckpointError(
            f"{path}: has ids from {ids.min()} to {ids.max()} in rows of {ids.shape[1]}; the model has "
            f"{checkpoint.config.rows} words and a context of {checkpoint.config.context}. Give another file."
        )
    return ids[:sequences].astype(np.int64), path.name


def _invented(rows: int, count: int) -> Numbers:
    """`count` ids that look random and are always the same."""
    state, found = _OFFSET, []
    for _ in range(count):
        state = (state * _STEP + _OFFSET) % (1 << 31)
        found.append((state >> 8) % rows)
    return np.array(found, np.int64)


def speller(checkpoint: Checkpoint) -> Callable[[Sequence[int]], str]:
    """What token ids stand for: text where there is a tokenizer, else their numbers."""
    words = tokenizer_of(checkpoint)
    if words is None:
        return lambda ids: " ".join(f"#{number}" for number in ids)
    if words.own_sentencepiece and not find_spec("sentencepiece"):
        names = {number: text.replace("▁", " ") for text, number in words.ids.items()}
        return lambda ids: "".join(names.get(number, f"#{number}") for number in ids)
    decode = library(words).decode

    def spelled(ids: Sequence[int]) -> str:
        with blamed(words):
            return str(decode(list(ids), skip_special_tokens=False))

    return spelled
