"""Plain values and tensors as a pickle, opcode by opcode, with no object of torch's in sight."""

from __future__ import annotations

import math
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from neoxconv.errors import PlanError
from neoxconv.formats.pt.unpickle import Size


@dataclass(frozen=True)
class TensorRef:
    """How a tensor is pickled: contiguous, alone on the storage `key` of torch's class `storage`."""

    key: str
    storage: str
    shape: tuple[int, ...]


def dump_pickle(value: Any, refer: Callable[[Any], TensorRef | None], name: str) -> bytes:
    """`value` in pickle protocol 2, as torch.save writes it; `refer` tells which leaves are tensors.

    Raises PlanError, naming the path inside `value`, for a value of any other kind.
    """
    return b"\x80\x02" + Emitter(refer).code(value, name) + b"."


@dataclass(frozen=True)
class Emitter:
    """Values as opcodes; names and strings that come again are fetched from the memo."""

    refer: Callable[[Any], TensorRef | None]
    memo: dict[bytes, int] = field(default_factory=dict)

    def code(self, value: Any, path: str) -> bytes:
        """The opcodes that build `value`."""
        if tensor := self.refer(value):
            return self.tensor(tensor)
        if type(value) not in EMIT:
            raise PlanError(f"{path}: a {type(value).__name__} cannot be written into a checkpoint.")
        return EMIT[type(value)](self, value, path)

    def once(self, code: bytes) -> bytes:
        """`code` the first time, a reference to its result from then on."""
        known = code in self.memo
        number = self.memo.setdefault(code, len(self.memo))
        short = number < 256
        index = bytes([number]) if short else struct.pack("<I", number)
        return (b"h" if short else b"j") + index if known else code + (b"q" if short else b"r") + index

    def name(self, module: str, name: str) -> bytes:
        return self.once(f"c{module}\n{name}\n".encode())

    def text(self, text: str, path: str = "") -> bytes:
        data = text.encode("utf-8", "surrogatepass")
        return self.once(b"X" + struct.pack("<I", len(data)) + data)

    def data(self, data: bytes, path: str) -> bytes:
        return self.name("_codecs", "encode") + self.text(data.decode("latin1")) + self.text("latin1") + b"\x86R"

    def items(self, values: Any, path: str) -> bytes:
        """The values, one after the other, behind a mark."""
        return b"(" + b"".join(self.code(value, f"{path}[{i}]") for i, value in enumerate(values))

    def mapping(self, value: dict[Any, Any], path: str) -> bytes:
        pairs = (self.code(key, path) + self.code(item, f"{path}[{key!r}]") for key, item in value.items())
        return b"}(" + b"".join(pairs) + b"u"

    def ordered(self, value: dict[Any, Any], path: str) -> bytes:
        return self.name("collections", "OrderedDict") + b")R" + self.mapping(value, path)[1:]

    def list(self, value: Any, path: str) -> bytes:
        return b"]" + self.items(value, path) + b"e"

    def tuple(self, value: Any, path: str) -> bytes:
        return self.items(value, path) + b"t"

    def set(self, value: Any, path: str) -> bytes:
        return self.name("__builtin__", "set") + self.list(sorted(value, key=repr), path) + b"\x85R"

    def size(self, value: Size, path: str) -> bytes:
        return self.name("torch", "Size") + self.tuple(value, path) + b"\x85R"

    def tensor(self, tensor: TensorRef) -> bytes:
        """`torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
        shape = tensor.shape
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        pid = (
            b"(", self.text("storage"), self.name("torch", tensor.storage), self.text(tensor.key), self.text("cpu"),
            scalar(math.prod(shape)), b"tQ",
        )  # fmt: skip
        rebuild = self.name("torch._utils", "_rebuild_tensor_v2") + b"(" + b"".join(pid)
        place = scalar(0) + self.tuple(shape, "") + self.tuple(strides, "")
        return rebuild + place + b"\x89" + self.name("collections", "OrderedDict") + b")RtR"


def scalar(value: Any) -> bytes:
    """The opcodes of a number, a truth value or None: a whole pickle without its frame."""
    return pickle.dumps(value, 2)[2:-1]


EMIT: dict[type, Callable[[Emitter, Any, str], bytes]] = {
    **dict.fromkeys((int, float, bool, type(None)), lambda emitter, value, path: scalar(value)),
    str: Emitter.text,
    bytes: Emitter.data,
    dict: Emitter.mapping,
    OrderedDict: Emitter.ordered,
    list: Emitter.list,
    tuple: Emitter.tuple,
    set: Emitter.set,
    Size: Emitter.size,
}
