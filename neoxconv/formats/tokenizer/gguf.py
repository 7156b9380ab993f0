"""A tokenizer in GGUF's words, `tokenizer.ggml.*`.

llama.cpp splits text by the name in `pre`, of which it knows about a hundred. _SPLITTERS has those that cut as a
tokenizers file does: the regular expressions were compared with llama.cpp's (src/llama-vocab.cpp, llm_tokenizer_bpe),
and ids with its own on strings in twenty scripts. llama.cpp never composes characters (NFC), whatever `pre` says.
Tokenizers of sentencepiece's families are in `pieces_json` and `from_spiece`.
What begins and ends a text, and the template, are read as llama.cpp's converter reads them: by gguf's SpecialVocab.
"""

from __future__ import annotations

import logging
import reprlib
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neoxconv.errors import CheckpointError, raise_all
from neoxconv.formats.json_text import as_json
from neoxconv.formats.tokenizer.byte_level import (
    NFC,
    byte_level,
    check_ids,
    check_rows,
    hf_files,
    merge,
    same_splitter,
)
from neoxconv.formats.tokenizer.files import END, JSON, KINDS, SETTINGS, Tokenizer
from neoxconv.formats.tokenizer.from_spiece import of_spiece
from neoxconv.formats.tokenizer.made import BYTE_LEVEL, STRIPPING
from neoxconv.formats.tokenizer.pieces import BPE, UNIGRAM, UNUSED_SCORE, Pieces, as_float32, type_of
from neoxconv.formats.tokenizer.pieces_json import of_json, steps_of
from neoxconv.formats.tokenizer.special import mistaken
from neoxconv.formats.tokenizer.spiece import CONTROL, NORMAL, UNUSED, USER_DEFINED

PREFIX = "tokenizer.ggml."
TYPES = NORMAL, CONTROL, USER_DEFINED, UNUSED  # of tokens; sentencepiece's families have two more
# How settings call a special token, and how GGUF does (gguf.Keys.Tokenizer; `seperator` is its spelling).
KEYS = {kind: f"{kind}_token_id" for kind in KINDS} | {
    "unk": "unknown_token_id", "pad": "padding_token_id", "sep": "seperator_token_id",
}  # fmt: skip

# The split of GPT-4 and Llama 3, which takes up to three digits at a time; Qwen 2's takes one.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_SIGNS = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
GPT_4, QWEN_2 = (rf"{_LETTERS}|\p{{N}}{count}|{_SIGNS}" for count in ("{1,3}", ""))
_CUT = {**BYTE_LEVEL, "use_regex": False}


def _split_by(pattern: str) -> list[dict[str, Any]]:
    """A splitter that cuts by a regular expression before it turns bytes into characters."""
    return [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}, _CUT]


@dataclass(frozen=True)
class _Splitter:
    """A name in `pre`: the steps of tokenizers' pre-tokenizer, and the option of BPE, that do the same."""

    pre: str
    steps: Sequence[Mapping[str, Any]]
    normalizer: Mapping[str, Any] | None = None  # what the name tells us of it; llama.cpp has none
    whole_words: bool = False  # a word that is a token is not merged from its parts (`ignore_merges`)


_DIGITS = {"type": "Digits", "individual_digits": True}
_SPLITTERS = (
    _Splitter("olmo", [BYTE_LEVEL], NFC),
    _Splitter("gpt-2", [BYTE_LEVEL]),
    _Splitter("mpt", [BYTE_LEVEL], NFC),
    _Splitter("starcoder", [_DIGITS, BYTE_LEVEL]),
    _Splitter("llama-bpe", _split_by(GPT_4), whole_words=True),
    _Splitter("dbrx", _split_by(GPT_4)),
    _Splitter("qwen2", _split_by(QWEN_2)),
)
# Other names of the same: llama.cpp has one case for each line.
_ALSO = {
    "gpt-2": ("phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "gigachat", "a.x-4.0", "mellum", "exaone4",
              "modern-bert", "jais", "trillion", "granite-docling"),
    "starcoder": ("smollm", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    "dbrx": ("smaug-bpe",),
    "qwen2": ("deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open"),
}  # fmt: skip
_BY_NAME = {splitter.pre: splitter for splitter in _SPLITTERS}
SPLITTERS = {
    **_BY_NAME,
    "default": _BY_NAME["gpt-2"],
    **{name: _BY_NAME[pre] for pre, names in _ALSO.items() for name in names},
}
_FAMILIES = {UNIGRAM: "Unigram", BPE: "BPE with byte fallback", None: "byte-level BPE"}  # what messages call them
_UNSAID = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")  # options of BPE


def gguf_keys(
    tokenizer: Tokenizer, rows: int, config: Mapping[str, Any] | None = None, *, others: bool = False
) -> dict[str, Any]:
    """The keys as llama.cpp's converter writes them, for an embedding of `rows` rows; `config` is config.json's.

    Types in GGUF: model and pre string; tokens and merges arrays of strings; token_type array of int32; ids uint32;
    scores array of float32; add_* bool. Raises CheckpointError where the tokenizer does what GGUF cannot say (with
    `others` the nearest is said, see `differences`), has an id beyond `rows`, or where nothing tells which token ends a
    text.
    """
    vocabulary = _vocabulary_keys(tokenizer, rows, others=others)
    files = _sentencepiece_files(tokenizer) if tokenizer.own_sentencepiece else hf_files(tokenizer, 0)
    special = _special_keys(tokenizer, {**files, "config.json": as_json(config or {})}, rows)
    ids = {key: value for key, value in special.items() if key.endswith("_token_id")}
    if PREFIX + "eos_token_id" not in ids:
        what = f"nothing says which token ends a text, and there is no {END}"
        raise CheckpointError(f"{tokenizer.name}: {what}; name it in {SETTINGS} as eos_token.")
    silent = {PREFIX + "add_bos_token": False, PREFIX + "add_eos_token": _class_adds_end(tokenizer)}
    return {**vocabulary, **ids, **silent, **special}


def _sentencepiece_files(tokenizer: Tokenizer) -> dict[str, bytes]:
    """The files beside sentencepiece's, with its texts and their ids where gguf looks for them."""
    texts = [{"id": i, "content": text} for text, i in tokenizer.ids.items()]
    return {**tokenizer.beside, JSON: as_json({"added_tokens": texts}), SETTINGS: as_json(tokenizer.settings)}


def _class_adds_end(tokenizer: Tokenizer) -> bool:
    """Whether transformers' class for sentencepiece's file ends a text: T5's does, with no setting that says so."""
    kind = str(tokenizer.settings.get("tokenizer_class"))
    return bool(tokenizer.own_sentencepiece) and kind.removesuffix("Fast") == "T5Tokenizer"


def _vocabulary_keys(tokenizer: Tokenizer, rows: int, *, others: bool = False) -> dict[str, Any]:
    """The keys of the tokens, their types and merges or scores, and of how text is split."""
    found = _pieces(tokenizer)
    faults, family = () if others else _differences(tokenizer, found), _FAMILIES[found.model if found else None]
    raise_all(CheckpointError, (
        f"{tokenizer.name}: it is {family} and has {fault}, which llama.cpp does not have. Choose another "
        "target, another --tokenizer, or --allow-other-tokens for the nearest."
        for fault in faults
    ))  # fmt: skip
    return _piece_keys(tokenizer, found, rows) if found else _byte_level_keys(tokenizer, rows)


def _pieces(tokenizer: Tokenizer) -> Pieces | None:
    """What a tokenizer of sentencepiece's families says; None for byte-level BPE."""
    file = tokenizer.sentencepiece
    return of_spiece(tokenizer, file) if file else of_json(tokenizer)


def told(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Where few texts get other ids from llama.cpp, though it has all that the tokenizer has: notes."""
    found = _pieces(tokenizer)
    return found.told if found else ()


def differences(tokenizer: Tokenizer) -> list[str]:
    """What this tokenizer has that llama.cpp, with the keys we write, has not; none: its ids are the library's.

    Raises CheckpointError where it is of no family that llama.cpp has.
    """
    return _differences(tokenizer, _pieces(tokenizer))


def _differences(tokenizer: Tokenizer, found: Pieces | None) -> list[str]:
    """The same, with what a tokenizer of sentencepiece's families says."""
    if tokenizer.own_sentencepiece and found:
        return [*found.faults]
    own = found.faults if found else _byte_level_faults(byte_level(tokenizer))
    parsed = tokenizer.parsed
    framing = _framing(parsed.get("post_processor"))
    strange = sorted(framing - {_content(tokenizer, "bos"), _content(tokenizer, "eos")})
    greedy = [token["content"] for token in parsed["added_tokens"] if any(token.get(key) for key in STRIPPING)]
    ordinary = mistaken(tokenizer.ids, [token["content"] for token in parsed["added_tokens"]])
    common = (
        (strange, f"a post_processor that adds {', '.join(map(repr, strange))}, which neither begins nor ends a text,"),
        (greedy, f"added tokens that take neighbouring characters ({greedy[:3]})"),
        (ordinary, f"{', '.join(map(repr, ordinary[:3]))} as ordinary tokens and not special ones"),
    )
    return [*own, *(fault for wrong, fault in common if wrong)]


def _byte_level_keys(tokenizer: Tokenizer, rows: int) -> dict[str, Any]:
    """The keys of byte-level BPE; where no name in `pre` cuts as it does, that of GPT-2."""
    parsed = byte_level(tokenizer)
    ids = check_rows(tokenizer, rows)
    texts = {index: text for text, index in ids.items()}
    types = dict.fromkeys(texts, NORMAL) | {ids[token["content"]]: type_of(token) for token in parsed["added_tokens"]}
    keys = {
        "model": "gpt2",
        "pre": (_splitter(parsed) or SPLITTERS["gpt-2"]).pre,
        "tokens": [texts.get(i, f"[PAD{i}]") for i in range(rows)],
        "token_type": [types.get(i, UNUSED) for i in range(rows)],
        "merges": [merge(pair) for pair in parsed["model"]["merges"]],
    }
    return {PREFIX + key: value for key, value in keys.items()}


def _piece_keys(tokenizer: Tokenizer, found: Pieces, rows: int) -> dict[str, Any]:
    """The keys of sentencepiece's families; `pre` is their converter's, and says nothing."""
    check_ids(tokenizer, found.ids, rows)
    texts = {index: text for text, index in found.ids.items()}
    keys = {
        "model": found.model,
        "pre": "default",
        "tokens": [texts.get(i, f"[PAD{i}]") for i in range(rows)],
        "scores": [as_float32(found.scores.get(texts[i], 0.0)) if i in texts else UNUSED_SCORE for i in range(rows)],
        "token_type": [found.types.get(texts[i], NORMAL) if i in texts else UNUSED for i in range(rows)],
        **({"unknown_token_id": found.ids[found.unknown]} if found.unknown else {}),
        "add_space_prefix": found.prefix,
        "remove_extra_whitespaces": found.merged,
        **({"precompiled_charsmap": [*found.charsmap]} if found.charsmap else {}),
    }
    return {PREFIX + key: value for key, value in keys.items()}


def _special_keys(tokenizer: Tokenizer, files: Mapping[str, bytes], rows: int) -> dict[str, Any]:
    """What begins, ends and fills a text, what is added by itself, and the template, as gguf reads them from `files`.

    `files` are those of a Hugging Face folder. Raises CheckpointError where gguf cannot read them, or an id is beyond
    `rows`.
    """
    found = _read_special(tokenizer, files)
    raise_all(CheckpointError, (
        f"{tokenizer.name}: the settings call token {number} {kind}, but the model has {rows} rows; correct them."
        for kind, number in found.special_token_ids.items() if number >= rows
    ))  # fmt: skip
    from gguf import GGUFWriter

    writer = GGUFWriter(None, "")
    found.add_to_gguf(writer, quiet=True)
    return {key: value.value for key, value in writer.kv_data[0].items() if key.startswith("tokenizer.")}


def _read_special(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> Any:
    """gguf's SpecialVocab of the files of a folder."""
    from gguf import SpecialVocab

    logger = logging.getLogger("gguf.vocab")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="neoxconv-") as folder:
            for name, data in files.items():
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                (Path(folder) / name).write_bytes(data)
            return SpecialVocab(folder)
    except OSError:
        raise
    except Exception as error:  # whatever strange JSON makes it do
        what = f"gguf cannot read its settings ({type(error).__name__})"
        raise CheckpointError(f"{tokenizer.name}: {what}; compare {SETTINGS} with a model's that works.") from error
    finally:
        logger.setLevel(level)


def _splitter(parsed: Mapping[str, Any]) -> _Splitter | None:
    """The name in `pre` that cuts text as this tokenizer does."""
    found, whole_words = steps_of(parsed, "pre_tokenizer", "pretokenizers"), bool(parsed["model"].get("ignore_merges"))
    for splitter in _SPLITTERS:
        fits = len(found) == len(splitter.steps) and all(map(_same_step, found, splitter.steps))
        single = len(splitter.steps) == 1
        if fits and whole_words == splitter.whole_words and (not single or _normalizer(parsed) == splitter.normalizer):
            return splitter
    return None


def _same_step(found: Any, wanted: Mapping[str, Any]) -> bool:
    return same_splitter(found, wanted) if wanted["type"] == "ByteLevel" else found == wanted


def _normalizer(parsed: Mapping[str, Any]) -> Any:
    """The normalizer; a sequence of one is that one, of none is none."""
    found = parsed.get("normalizer")
    if isinstance(found, dict) and found.get("type") == "Sequence":
        inner = found.get("normalizers") or [None]
        return inner[0] if len(inner) == 1 else found
    return found


def _byte_level_faults(parsed: Mapping[str, Any]) -> list[str]:
    """What this tokenizer does that llama.cpp's gpt-2 family does not do."""
    options = [key for key in _UNSAID if parsed["model"].get(key)]
    normalizer, splitter = _normalizer(parsed), parsed.get("pre_tokenizer")
    whole_words = " with ignore_merges" if parsed["model"].get("ignore_merges") else ""
    unknown = _splitter(parsed) is None and normalizer in (None, NFC)
    faults = (
        (normalizer not in (None, NFC), f"normalizer {reprlib.repr(normalizer)}"),
        (unknown, f"pre_tokenizer {reprlib.repr(splitter)}{whole_words}"),
        (options, f"BPE with {', '.join(options)}"),
    )
    return [fault for wrong, fault in faults if wrong]


def _content(tokenizer: Tokenizer, kind: str) -> str:
    """The text of a special token."""
    token = tokenizer.settings.get(f"{kind}_token", END)
    return str(token.get("content") if isinstance(token, Mapping) else token)


def _framing(after: Any) -> set[str]:
    """The tokens that a post_processor adds to a text."""
    if not isinstance(after, dict):
        return set()
    if after.get("type") == "Sequence":
        return {text for step in after.get("processors") or () for text in _framing(step)}
    if after.get("type") == "TemplateProcessing":
        parts = [part.get("SpecialToken") for part in after.get("single") or () if isinstance(part, dict)]
        return {str(part.get("id")) for part in parts if isinstance(part, dict)}
    return set() if after.get("type") == "ByteLevel" else {str(after.get("type"))}
