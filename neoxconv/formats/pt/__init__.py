"""A .pt file, as torch.save writes it: read as byte ranges, and laid out.

    <root>/data.pkl      the pickle: containers, and for each tensor a storage's key, an offset, a shape and strides
    <root>/data/<key>    a storage's numbers, stored uncompressed, at a multiple of 64 bytes
    <root>/version       "3", and in newer files a few more small records
    central directory    each record's place, size and CRC-32

Read: `zips` finds the records, `unpickle` the value and `tensors` the tensors in it; `before_zip` does all of it for
files older than torch 1.6, and `records` tells which bytes have a CRC-32. Written: `pickling` makes the pickle,
`layout` the file. Source: torch/serialization.py and caffe2/serialize/inline_container.cc.
"""

from neoxconv.errors import CheckpointError
from neoxconv.formats.pt.before_zip import read_before_zip
from neoxconv.formats.pt.layout import layout_pt
from neoxconv.formats.pt.tensors import PtFile
from neoxconv.formats.pt.unpickle import Placeholder
from neoxconv.formats.pt.zips import read_zip
from neoxconv.storage import Storage

__all__ = ["Placeholder", "PtFile", "layout_pt", "read_pt"]

ZIP, PICKLE = b"PK", b"\x80"  # what files begin with


def read_pt(file: Storage) -> PtFile:
    """Index a file that torch.save wrote, zip or older; raises CheckpointError where it is neither, or is damaged."""
    start = file.text(0, min(64, file.size))
    if start.startswith(ZIP):
        return read_zip(file)
    if start.startswith(PICKLE):
        return read_before_zip(file)
    raise CheckpointError(
        f"{file.path}: is not a PyTorch checkpoint: it begins with {start[:8]!r}, expected a zip (PK); "
        "download it again."
    )
