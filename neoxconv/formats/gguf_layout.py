"""The layout of GGUF files, version 3: keys and tensor descriptions in one header, tensors at multiples of 32 bytes."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from neoxconv.formats.gguf import ALIGNMENT, ARRAY, MAGIC, NUMBERS, SCALARS, STRING
from neoxconv.model import Entry, FileLayout, Slot

U16, U32, I32, F32, BOOL = 2, 4, 5, 6, 7
# Keys whose type is not what their value suggests (whole numbers are U32 elsewhere).
KEY_TYPES = {"split.no": U16, "split.count": U16, "split.tensors.count": I32, "tokenizer.ggml.token_type": I32}


def layout(
    stem: str, keys: Mapping[str, Any], entries: Sequence[Entry], split_size: int | None
) -> tuple[FileLayout, ...]:
    """One file `stem`.gguf, or parts of at most `split_size` bytes of tensors, of which the first has the keys."""
    groups = split(entries, split_size) if split_size else [list(entries)]
    if len(groups) == 1:
        return (one_file(f"{stem}.gguf", keys, groups[0]),)
    count, files = len(groups), []
    for number, group in enumerate(groups):
        own = {"split.no": number, "split.count": count, "split.tensors.count": len(entries)}
        name = f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"
        files.append(one_file(name, {**keys, **own} if number == 0 else own, group))
    return tuple(files)


def split(entries: Sequence[Entry], split_size: int) -> list[list[Entry]]:
    """Entries in order, in groups of at most `split_size` bytes; a larger one has a group to itself."""
    groups: list[list[Entry]] = [[]]
    for entry in entries:
        if groups[-1] and sum(aligned(e.nbytes) for e in groups[-1]) + entry.nbytes > split_size:
            groups.append([])
        groups[-1].append(entry)
    return groups


def aligned(count: int) -> int:
    """`count` rounded up to a multiple of 32."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def one_file(name: str, keys: Mapping[str, Any], entries: Sequence[Entry]) -> FileLayout:
    """A file's header as one piece, and its tensors behind it."""
    header = [MAGIC, struct.pack("<I2Q", 3, len(entries), len(keys))]
    header += [string(key) + value_of(key, value) for key, value in keys.items()]
    offset, offsets = 0, []
    for entry in entries:
        extents = tuple(reversed(entry.tensor.shape))
        number = NUMBERS[entry.encoding.dtype.name]
        header.append(string(entry.name) + struct.pack(f"<I{len(extents)}QIQ", len(extents), *extents, number, offset))
        offsets.append(offset)
        offset += aligned(entry.nbytes)
    text = b"".join(header)
    base = aligned(len(text))
    slots = tuple(Slot(entry, base + at) for entry, at in zip(entries, offsets, strict=True))
    return FileLayout(name, base + offset, ((0, text),), slots)


def string(text: str) -> bytes:
    """A length and the bytes."""
    data = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(data)) + data


def kind_of(key: str, value: Any) -> int:
    """The type in which a value is stored."""
    if key in KEY_TYPES:
        return KEY_TYPES[key]
    for python, kind in ((bool, BOOL), (int, U32), (float, F32), (str, STRING)):
        if isinstance(value, python):
            return kind
    raise TypeError(f"{key}: {type(value).__name__}")


def value_of(key: str, value: Any) -> bytes:
    """A value behind its type."""
    if not isinstance(value, list):
        kind = kind_of(key, value)
        return struct.pack("<I", kind) + item(kind, value)
    kind = kind_of(key, value[0] if value else 0)
    if kind in SCALARS:
        body = struct.pack(f"<{len(value)}{SCALARS[kind]}", *value)
    else:
        body = b"".join(map(string, value))
    return struct.pack("<2IQ", ARRAY, kind, len(value)) + body


def item(kind: int, value: Any) -> bytes:
    """One value without its type."""
    return string(value) if kind == STRING else struct.pack("<" + SCALARS[kind], value)
