"""The layout of GGUF files, version 3: keys and tensor descriptions in one header, tensors at multiples of 32 bytes.

    | header: see read.py | zeros up to a multiple of 32 | tensor, zeros | tensor, zeros | ...

Types of keys and the parts of a split file are those of llama.cpp's converter and of gguf-py's GGUFWriter.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from neoxconv.core.layout import Entry, FileLayout, Slot, in_groups
from neoxconv.errors import PlanError
from neoxconv.formats.gguf.read import ALIGNMENT, ARRAY, MAGIC, MAX_DIMS, NUMBERS, SCALARS, STRING

_VERSION = 3
# The types of keys' values, beside STRING and ARRAY; Python's types that have one; the numbers that whole ones hold.
_U8, _U16, _U32, I32, F32, BOOL, _U64, I64 = 0, 2, 4, 5, 6, 7, 10, 11
_KINDS = ((bool, BOOL), (float, F32), (str, STRING), (list, ARRAY))
_RANGES = {_U32: (0, 2**32 - 1), I32: (-(2**31), 2**31 - 1), _U64: (0, 2**64 - 1), I64: (-(2**63), 2**63 - 1)}
# Whole numbers take the first type that holds them; gguf-py gives single ones U32 and those of lists I32.
_SINGLE, _LISTED = (_U32, I32, _U64, I64), (I32, _U32, I64, _U64)
# Keys whose type is not what their value suggests.
_KEY_TYPES = {
    "split.no": _U16, "split.count": _U16, "split.tensors.count": I32, "general.sampling.top_k": I32,
    "general.sampling.penalty_last_n": I32, "general.sampling.mirostat": I32,
}  # fmt: skip
_ITEM_TYPES = {"tokenizer.ggml.precompiled_charsmap": _U8}  # the same of the items of a list
_SECTIONS = {"general": 0, "tokenizer": 2}  # the architecture's keys stand between
_MAX_PARTS = 0xFFFF  # what split.count, a U16, holds


def layout(
    stem: str, keys: Mapping[str, Any], entries: Sequence[Entry], split_size: int | None
) -> tuple[FileLayout, ...]:
    """One file `stem`.gguf, or parts `stem`-00001-of-0000N.gguf of at most `split_size` bytes of tensors each.

    Only the first part has `keys`; a tensor larger than `split_size` has a part to itself. Raises PlanError for a value
    or an encoding that GGUF cannot hold, and for more parts than it can count.
    """
    groups = in_groups(entries, split_size) if split_size else [list(entries)]
    keys = _in_sections(keys)
    if len(groups) == 1:
        return (_one_file(f"{stem}.gguf", keys, groups[0]),)
    count = len(groups)
    if count > _MAX_PARTS:
        raise PlanError(f"{stem}: would be {count} files, at most {_MAX_PARTS} can be; choose a larger --split-size.")
    files = []
    for number, group in enumerate(groups):
        own = {"split.no": number, "split.count": count, "split.tensors.count": len(entries)}
        name = f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"
        files.append(_one_file(name, {**keys, **own} if number == 0 else own, group))
    return tuple(files)


def _in_sections(keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys, general ones first and the tokenizer's last; the alignment is ours, whatever a source file had."""
    ordered = sorted(keys, key=lambda key: _SECTIONS.get(key.split(".")[0], 1))
    return {key: keys[key] for key in ordered if key != "general.alignment"}


def _one_file(name: str, keys: Mapping[str, Any], entries: Sequence[Entry]) -> FileLayout:
    """A file's header as one piece, and its tensors behind it; raises PlanError for what GGUF cannot hold."""
    header = [MAGIC, struct.pack("<I2Q", _VERSION, len(entries), len(keys))]
    header += [_string(key, key) + _typed(key, value) for key, value in keys.items()]
    offset, offsets = 0, []
    for entry in entries:
        header.append(described(entry, offset))
        offsets.append(offset)
        offset += aligned(entry.nbytes)
    text = b"".join(header)
    base = aligned(len(text))
    slots = tuple(Slot(entry, base + at) for entry, at in zip(entries, offsets, strict=True))
    return FileLayout(name, base + offset, ((0, text),), slots)


def aligned(count: int) -> int:
    """`count` rounded up to a multiple of 32."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def described(entry: Entry, offset: int) -> bytes:
    """A tensor's name, extents from the fastest, type, and `offset` from the data's start.

    Raises PlanError for a shape or an encoding that GGUF cannot hold.
    """
    shape, encoding = entry.tensor.shape, entry.encoding
    row = shape[-1] if len(shape) > 1 else 1
    if encoding.name not in NUMBERS or not 1 <= len(shape) <= MAX_DIMS or row % encoding.dtype.block:
        raise PlanError(
            f"{entry.name}: GGUF cannot hold shape {list(shape)} as {encoding.name}; expected 1 to {MAX_DIMS} "
            f"dimensions, rows of a multiple of {encoding.dtype.block} and one of {', '.join(NUMBERS)}."
        )
    extents = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return _string(entry.name, entry.name) + extents + struct.pack("<IQ", NUMBERS[encoding.name], offset)


def _string(key: str, text: str) -> bytes:
    """A length and the bytes of `text`, which belongs to `key`; raises PlanError where it is no Unicode text."""
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise PlanError(f"{key!a:.100}: {text!a:.100} is not Unicode text, GGUF cannot hold it.") from error
    return struct.pack("<Q", len(data)) + data


def _typed(key: str, value: Any) -> bytes:
    """A value behind its type; bytes are one already, as another file has it."""
    if isinstance(value, bytes):
        return value
    kind = _kind_of(key, [value], _SINGLE)
    return struct.pack("<I", kind) + _packed(key, kind, [value])


def _packed(key: str, kind: int, values: Sequence[Any]) -> bytes:
    """Values of one type, without it; an array's are its items' type, their count and the items."""
    if kind == STRING:
        return b"".join(_string(key, value) for value in values)
    if kind != ARRAY:
        return numbers(key, kind, values)
    inner = [_ITEM_TYPES[key] if key in _ITEM_TYPES else _kind_of(key, value, _LISTED) for value in values]
    return b"".join(
        struct.pack("<IQ", kind, len(value)) + _packed(key, kind, value)
        for kind, value in zip(inner, values, strict=True)
    )


def numbers(key: str, kind: int, values: Sequence[Any]) -> bytes:
    """Numbers of one type; raises PlanError for a float too large for float32."""
    try:
        return struct.pack(f"<{len(values)}{SCALARS[kind]}", *values)
    except OverflowError as error:
        raise PlanError(f"{key}: {values!r:.60} does not fit in float32, as which GGUF holds it.") from error


def _kind_of(key: str, values: Sequence[Any], whole: Sequence[int]) -> int:
    """The type in which all `values` are stored; of whole numbers the first of `whole` that holds them.

    Raises PlanError where there is none.
    """
    if key in _KEY_TYPES:
        return _KEY_TYPES[key]
    found = {type(value) for value in values} or {int}
    kinds = [kind for python, kind in _KINDS if found == {python}]
    if found == {int}:
        low, high = min(values, default=0), max(values, default=0)
        kinds = [kind for kind in whole if _RANGES[kind][0] <= low and high <= _RANGES[kind][1]]
    if not kinds:
        names = ", ".join(sorted(kind.__name__ for kind in found))
        raise PlanError(f"{key}: GGUF cannot hold {values!r:.60} ({names}); expected values of one type.")
    return kinds[0]
