"""sentencepiece's precompiled map of characters: at each place the longest text that it has gives way to another.

    size: u32 | units: u32 each, `size` bytes, a trie as a double array | the other texts, each ended by a zero byte

A unit is the Darts library's: bits 0 to 7 and 31 its byte, bit 8 that a text ends here, bits 10 to 30 how far off its
children are (in 256ths with bit 9). Below an end, at byte 0, bits 0 to 30 of a unit say where the other text begins.
llama.cpp and sentencepiece read it so; the tokenizers library takes the first text of a cluster of characters instead,
which matters for decomposed accents and jamo.
"""

from __future__ import annotations

import struct

import numpy as np

# White space that is not made a space would be cut off or kept otherwise by llama.cpp than by others.
_SPACES = "\t\n\r\xa0\u2003\u2028\u3000▁"


def fits(charsmap: bytes) -> bool:
    """Whether llama.cpp takes the bytes for a map."""
    if len(charsmap) < 4:
        return False
    (size,) = struct.unpack_from("<I", charsmap)
    return size % 4 == 0 and 4 <= size < len(charsmap) - 4 and charsmap[-1] == 0


def makes_spaces(charsmap: bytes) -> bool:
    """Whether white space of other kinds, and ▁, becomes a plain space."""
    return fits(charsmap) and all(replaced(charsmap, char) == " " for char in _SPACES)


def replaced(charsmap: bytes, text: str) -> str | None:
    """What the whole of `text` becomes; None where the map does not have it."""
    (size,) = struct.unpack_from("<I", charsmap)
    units = np.frombuffer(charsmap, "<u4", size // 4, 4)
    unit, at = int(units[0]), 0
    for byte in text.encode():
        at ^= _children(unit) ^ byte
        unit = int(units[at]) if at < len(units) else 0
        if unit & 0x8000_00FF != byte:
            return None
    at ^= _children(unit)
    if not unit & 0x100 or at >= len(units):
        return None
    start = 4 + size + (int(units[at]) & 0x7FFF_FFFF)
    return charsmap[start : charsmap.find(b"\0", start)].decode(errors="replace")


def _children(unit: int) -> int:
    return (unit >> 10) << ((unit & 0x200) >> 6)
