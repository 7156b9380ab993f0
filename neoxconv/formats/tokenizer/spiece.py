"""sentencepiece's own file: a message of Google's protocol buffers, `ModelProto` of sentencepiece_model.proto.

    message:    fields, one after the other
    field:      key: varint = 8 * number + kind    value by kind: 0 varint, 1 eight bytes, 2 length: varint and bytes,
                                                                  5 four bytes
    varint:     seven bits a byte, the lowest first; the last byte is below 128

A field that is there twice counts by its last value; a message that is there twice is both, one after the other.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from neoxconv.errors import CheckpointError

# Types of pieces, which are GGUF's types of tokens too.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
UNIGRAM_MODEL, BPE_MODEL = 1, 2
_MODELS = {UNIGRAM_MODEL: "Unigram", BPE_MODEL: "BPE", 3: "WORD", 4: "CHAR"}

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5
_SIZES = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}
_MOST_FIELDS = 1 << 22  # of one message; a quarter of a million pieces are many
# Numbers of fields. Of a model: its pieces, settings of training, of how texts are normalized, and of decoded ones.
_PIECES, _TRAINER, _NORMALIZER, _DENORMALIZER = 1, 2, 3, 5
_TEXT, _SCORE, _TYPE = 1, 2, 3  # of a piece
_MODEL, _SUFFIX, _FALLBACK = 3, 24, 35  # of the trainer
_NAMES = {"unk": (45, "<unk>"), "bos": (46, "<s>"), "eos": (47, "</s>"), "pad": (48, "<pad>")}  # with their defaults
_CHARSMAP, _PREFIX, _MERGED, _ESCAPED = 2, 3, 4, 5  # of the normalizers

_Value = int | bytes


class Piece(NamedTuple):
    """A text, its score and its type; its place in the file is its id."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class Spiece:
    """What decides ids. `prefix` puts a space before a text, `merged` removes spaces that others stand before or after.

    `charsmap` replaces characters, see `charsmap.py`; `special` are the texts of unk, bos, eos and pad where it has
    them; `odd` what hardly any file has, in words.
    """

    pieces: tuple[Piece, ...]
    model: int
    prefix: bool
    merged: bool
    byte_fallback: bool
    charsmap: bytes = b""
    special: dict[str, str] = field(default_factory=dict)
    odd: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The family's name."""
        return _MODELS.get(self.model, f"model {self.model}")


def read(data: bytes, where: str) -> Spiece:
    """What the file says. Raises CheckpointError where its bytes are damaged, or its pieces are no vocabulary."""
    model = _Message(data, where)
    trainer, normalizer = (model.inner(number) for number in (_TRAINER, _NORMALIZER))
    pieces = tuple(_piece(_Message(inner, where)) for inner in model.all(_PIECES))
    _check(pieces, where)
    control = {piece.text for piece in pieces if piece.type in (CONTROL, UNKNOWN)}
    names = {kind: trainer.text(number, usual) for kind, (number, usual) in _NAMES.items()}
    odd = (
        (trainer.number(_SUFFIX, 0), "a space after a text instead of one before it"),
        (not normalizer.number(_ESCAPED, 1), "spaces that are not written as ▁"),
        (model.inner(_DENORMALIZER).data(_CHARSMAP), "characters that are replaced in what it decodes"),
    )
    return Spiece(
        pieces,
        model=trainer.number(_MODEL, UNIGRAM_MODEL),
        prefix=bool(normalizer.number(_PREFIX, 1)),
        merged=bool(normalizer.number(_MERGED, 1)),
        byte_fallback=bool(trainer.number(_FALLBACK, 0)),
        charsmap=normalizer.data(_CHARSMAP),
        special={kind: text for kind, text in names.items() if text in control},
        odd=tuple(words for found, words in odd if found),
    )


def _piece(message: _Message) -> Piece:
    score = message.data(_SCORE) or bytes(4)
    if len(score) != 4:
        raise message.damaged("a score is no float32")
    number = float(struct.unpack("<f", score)[0])
    if not abs(number) < 1e30:
        raise message.damaged(f"a score is {number}")
    return Piece(message.text(_TEXT, ""), number, message.number(_TYPE, NORMAL))


def _check(pieces: tuple[Piece, ...], where: str) -> None:
    """Raise CheckpointError where sentencepiece itself would not take the pieces."""
    texts = {piece.text for piece in pieces}
    unknown = sum(piece.type == UNKNOWN for piece in pieces)
    strange = {piece.type for piece in pieces} - {NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE}
    problem = (
        "has no pieces" if not pieces
        else "has a piece without a text" if "" in texts
        else f"has {len(pieces)} pieces but {len(texts)} texts" if len(texts) < len(pieces)
        else f"has {unknown} pieces of type unknown, not one" if unknown != 1
        else f"has a piece of type {min(strange)}" if strange
        else None
    )  # fmt: skip
    if problem:
        raise CheckpointError(f"{where}: {problem}; it is no file of sentencepiece's, or damaged: give another.")


class _Message:
    """The fields of a message by their numbers."""

    def __init__(self, data: bytes, where: str) -> None:
        self.where = where
        self.fields: dict[int, list[_Value]] = {}
        for count, (number, value) in enumerate(self._read(data)):
            if count == _MOST_FIELDS:
                raise self.damaged(f"has more than {_MOST_FIELDS} fields")
            self.fields.setdefault(number, []).append(value)

    def damaged(self, problem: str) -> CheckpointError:
        """The error for what is no such message."""
        return CheckpointError(f"{self.where}: is no file of sentencepiece's, or damaged ({problem}); give another.")

    def all(self, number: int) -> list[bytes]:
        """Every value of a field of bytes."""
        return [self._bytes(value) for value in self.fields.get(number, [])]

    def data(self, number: int) -> bytes:
        """The value of a field of bytes; empty where there is none."""
        return [b"", *self.all(number)][-1]

    def inner(self, number: int) -> _Message:
        """A message in the message; of no fields where there is none."""
        return _Message(b"".join(self.all(number)), self.where)

    def text(self, number: int, usual: str) -> str:
        try:
            return self.data(number).decode() if number in self.fields else usual
        except UnicodeDecodeError as error:
            raise self.damaged("a text is not UTF-8") from error

    def number(self, number: int, usual: int) -> int:
        value = self.fields.get(number, [usual])[-1]
        if isinstance(value, bytes):
            raise self.damaged(f"field {number} is not a number")
        return value

    def _bytes(self, value: _Value) -> bytes:
        if isinstance(value, int):
            raise self.damaged("a number stands where bytes are expected")
        return value

    def _read(self, data: bytes) -> Iterator[tuple[int, _Value]]:
        """The number and the value of each field."""
        at = 0
        while at < len(data):
            key, at = self._varint(data, at)
            kind = key & 7
            if kind == _VARINT:
                value, at = self._varint(data, at)
                yield key >> 3, value
                continue
            if kind != _BYTES and kind not in _SIZES:
                raise self.damaged(f"a field of kind {kind} at byte {at}")
            size, at = self._varint(data, at) if kind == _BYTES else (_SIZES[kind], at)
            if size > len(data) - at:
                raise self.damaged(f"ends at byte {len(data)}, expected {at + size}")
            yield key >> 3, data[at : at + size]
            at += size

    def _varint(self, data: bytes, at: int) -> tuple[int, int]:
        """The number at a place of at most ten bytes, and where the next thing begins."""
        value = 0
        for shift, byte in enumerate(data[at : at + 10]):
            value |= (byte & 127) << (7 * shift)
            if byte < 128:
                return value, at + shift + 1
        raise self.damaged(f"a number at byte {at} has no end")
