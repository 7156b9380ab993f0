"""The tokenizer of sentencepiece's own file, as llama.cpp can have it.

Compared with the sentencepiece library on the strings of tests/formats/test_spiece.py, and with its source
(normalizer.cc, unigram_model.cc, bpe_model.cc). llama.cpp's Unigram merges spaces only with one before the text, and
puts none before a text of spaces alone; its BPE (model `llama`) replaces no characters, merges no spaces, and needs a
token for every byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations

from neoxconv.errors import CheckpointError
from neoxconv.formats.tokenizer.charsmap import fits, replaced
from neoxconv.formats.tokenizer.files import Tokenizer
from neoxconv.formats.tokenizer.pieces import BPE, BYTES, SPACE, UNIGRAM, Pieces, type_of
from neoxconv.formats.tokenizer.special import mistaken
from neoxconv.formats.tokenizer.spiece import (
    BPE_MODEL,
    BYTE,
    CONTROL,
    UNIGRAM_MODEL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Spiece,
)

_MODELS = {UNIGRAM_MODEL: UNIGRAM, BPE_MODEL: BPE}
_TIES = (
    "llama.cpp adds scores up in float64, sentencepiece in float32: of two equally good ways to cut a run of signs it "
    "may take the other"
)


def of_spiece(tokenizer: Tokenizer, file: Spiece) -> Pieces:
    """What sentencepiece's file says. Raises CheckpointError where its model is neither Unigram nor BPE."""
    if file.model not in _MODELS:
        what = f"is sentencepiece's {file.kind}, and llama.cpp has its Unigram and its BPE"
        raise CheckpointError(f"{tokenizer.name}: {what}; choose another target, or another --tokenizer.")
    model = _MODELS[file.model]
    types = {piece.text: piece.type for piece in file.pieces}
    ids = {text: i for i, text in enumerate(types)}
    misplaced = [*_add(tokenizer, ids, types)]
    return Pieces(
        model,
        ids,
        scores={piece.text: piece.score for piece in file.pieces},
        unknown=next(text for text, kind in types.items() if kind == UNKNOWN),
        types=types,
        prefix=file.prefix,
        faults=(
            *misplaced,
            *file.odd,
            *(_unigram_faults(file) if model == UNIGRAM else _bpe_faults(file, types)),
            *_type_faults(file, types),
            *_mistaken(types),
        ),
        merged=file.merged and model == UNIGRAM,
        charsmap=file.charsmap if model == UNIGRAM and fits(file.charsmap) else b"",
        told=(_TIES,) if model == UNIGRAM else (),
    )


def _add(tokenizer: Tokenizer, ids: dict[str, int], types: dict[str, int]) -> Iterator[str]:
    """Put the tokens that stand in files beside it to its own; yields a fault for each that has no place."""
    names = {i: text for text, i in ids.items()}
    for token in tokenizer.added:
        text, i = token["content"], token["id"]
        if ids.get(text, i) != i or names.get(i, text) != text:
            yield f"an added token {text!r} as {i}, which is another's place or not its own"
            continue
        if text not in ids or token.get("special"):
            types[text] = type_of(token)
        ids[text] = i
        names[i] = text


def _unigram_faults(file: Spiece) -> Iterator[str]:
    if file.byte_fallback:
        yield "byte_fallback"
    if file.prefix and not file.merged:
        yield "a space also before a text of spaces alone (add_dummy_prefix without remove_extra_whitespaces)"
    if file.merged and not file.prefix:
        yield "spaces that are merged, and none before a text (remove_extra_whitespaces without add_dummy_prefix)"
    if file.merged and file.prefix and not (fits(file.charsmap) and replaced(file.charsmap, SPACE) == " "):
        yield f"a {SPACE} that is cut off where it ends a text (remove_extra_whitespaces)"
    if file.charsmap and not fits(file.charsmap):
        yield "a map of characters that is damaged (precompiled_charsmap)"


def _bpe_faults(file: Spiece, types: Mapping[str, int]) -> Iterator[str]:
    lacking = [text for text in BYTES if types.get(text) != BYTE]
    if lacking or not file.byte_fallback:
        yield f"no token {lacking[0] if lacking else 'taken'} for a byte of a character that is no token"
    if file.charsmap:
        yield "characters that are replaced in BPE (precompiled_charsmap)"
    if file.merged:
        yield "spaces that are merged in BPE (remove_extra_whitespaces)"


def _type_faults(file: Spiece, types: Mapping[str, int]) -> Iterator[str]:
    if UNUSED in types.values():
        yield "pieces that are never used"
    own = [text for text, kind in types.items() if kind == USER_DEFINED]
    if own and (file.prefix or file.merged):
        yield f"a token of the user's ({own[0]!r}), and no space before the text behind it"
    if spaced := [text for text in own if " " in text or SPACE in text]:
        yield f"a token of the user's with spaces ({spaced[0]!r})"
    if crossing := next((pair for pair in permutations(own, 2) if _cross(*pair)), None):
        yield f"tokens of the user's that can overlap ({crossing[0]!r} and {crossing[1]!r})"


def _mistaken(types: Mapping[str, int]) -> Iterator[str]:
    if ordinary := mistaken(types, [text for text, kind in types.items() if kind in (CONTROL, UNKNOWN)]):
        yield f"{', '.join(map(repr, ordinary[:3]))} as ordinary tokens and not special ones"


def _cross(one: str, other: str) -> bool:
    """Whether a text can hold both, the longer beginning inside the other: llama.cpp takes the longest first.

    Runs of one sign do no harm.
    """
    behind = any(other.startswith(one[i:]) for i in range(1, len(one)))
    return behind and len(one) <= len(other) and len({*one, *other}) > 1
