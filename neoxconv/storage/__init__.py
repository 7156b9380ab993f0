"""Bytes, here or far away."""

from neoxconv.storage.address import place
from neoxconv.storage.bounded import check_size, read_bounded
from neoxconv.storage.files import Storage, Stream, open_storage, opener_of, size_of, stream_of, watched, write_all
from neoxconv.storage.places import (
    Place,
    anew,
    at_once,
    holds,
    is_far,
    is_file,
    is_folder,
    is_here,
    is_shared,
    keep_bands,
    origin_of,
    together,
    without_dots,
)
from neoxconv.storage.remote import Remote

__all__ = [
    "Place",
    "Remote",
    "Storage",
    "Stream",
    "anew",
    "at_once",
    "check_size",
    "holds",
    "is_far",
    "is_file",
    "is_folder",
    "is_here",
    "is_shared",
    "keep_bands",
    "open_storage",
    "opener_of",
    "origin_of",
    "place",
    "read_bounded",
    "size_of",
    "stream_of",
    "together",
    "watched",
    "without_dots",
    "write_all",
]
