"""A .pt file as byte ranges, and the layout of one.

    <root>/data.pkl      the pickle: containers, and for each tensor a storage's key, an offset, a shape and strides
    <root>/data/<key>    a storage's numbers, stored uncompressed, at a multiple of 64 bytes
    <root>/version       "3", and in newer files a few more small records
    central directory    each record's place, size and CRC-32

Files older than torch 1.6 are no zips: five pickles, then each storage as a count and its bytes.
"""

from neoxconv.errors import CheckpointError
from neoxconv.formats.pt.before_zip import read_legacy
from neoxconv.formats.pt.layout import layout_pt
from neoxconv.formats.pt.tensors import PtFile
from neoxconv.formats.pt.unpickle import Placeholder
from neoxconv.formats.pt.zips import read_zip
from neoxconv.storage.files import Storage

__all__ = ["Placeholder", "PtFile", "layout_pt", "read_pt"]


def read_pt(file: Storage) -> PtFile:
    """Index a file that torch.save wrote, zip or older; raises CheckpointError where it is neither, or is damaged."""
    start = file.text(0, min(64, file.size))
    if start[:2] == b"PK":
        return read_zip(file)
    if start[:1] == b"\x80":
        return read_legacy(file)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{file.path}: is a git-lfs pointer, not the file itself; run `git lfs pull`.")
    raise CheckpointError(
        f"{file.path}: is not a PyTorch checkpoint: it begins with {start[:8]!r}, expected a zip (PK); "
        "download it again."
    )
