"""Plain values and tensors as a pickle, opcode by opcode, with no object of torch's in sight.

Opcodes have Python's names for them (module `pickle`); what each does is told in `pickletools`.
"""

from __future__ import annotations

import math
import pickle
import pickle as op
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from neoxconv.errors import PlanError
from neoxconv.formats.pt.unpickle import Size

_PROTOCOL = 2


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
    return op.PROTO + bytes([_PROTOCOL]) + _Emitter(refer).code(value, name) + op.STOP


@dataclass(frozen=True)
class _Emitter:
    """Values as opcodes; names and strings that come again are fetched from the memo."""

    refer: Callable[[Any], TensorRef | None]
    memo: dict[bytes, int] = field(default_factory=dict)  # opcodes of a name or string -> its number

    def code(self, value: Any, path: str) -> bytes:
        """The opcodes that build `value`; raises PlanError where there are none."""
        if tensor := self.refer(value):
            return self.tensor(tensor)
        if type(value) not in _EMIT:
            raise PlanError(f"{path}: a {type(value).__name__} cannot be written into a checkpoint.")
        return _EMIT[type(value)](self, value, path)

    def mapping(self, value: dict[Any, Any], path: str) -> bytes:
        return op.EMPTY_DICT + self.pairs(value, path)

    def ordered(self, value: dict[Any, Any], path: str) -> bytes:
        """`collections.OrderedDict()`, then its items."""
        return self.name("collections", "OrderedDict") + op.EMPTY_TUPLE + op.REDUCE + self.pairs(value, path)

    def pairs(self, value: dict[Any, Any], path: str) -> bytes:
        """The keys and items of a dictionary, set on what the opcodes before built."""
        pairs = (self.code(key, path) + self.code(item, f"{path}[{key!r}]") for key, item in value.items())
        return op.MARK + b"".join(pairs) + op.SETITEMS

    def list(self, value: Any, path: str) -> bytes:
        return op.EMPTY_LIST + self.items(value, path) + op.APPENDS

    def tuple(self, value: Any, path: str) -> bytes:
        return self.items(value, path) + op.TUPLE

    def items(self, values: Any, path: str) -> bytes:
        """The values, one after the other, behind a mark."""
        return op.MARK + b"".join(self.code(value, f"{path}[{i}]") for i, value in enumerate(values))

    def set(self, value: Any, path: str) -> bytes:
        """`set([...])`, in an order that does not depend on hashes."""
        return self.name("__builtin__", "set") + self.list(sorted(value, key=repr), path) + op.TUPLE1 + op.REDUCE

    def size(self, value: Size, path: str) -> bytes:
        """`torch.Size((...))`."""
        return self.name("torch", "Size") + self.tuple(value, path) + op.TUPLE1 + op.REDUCE

    def data(self, data: bytes, path: str) -> bytes:
        """`_codecs.encode(text, "latin1")`: protocol 2 has no bytes."""
        encode = self.name("_codecs", "encode")
        return encode + self.text(data.decode("latin1")) + self.text("latin1") + op.TUPLE2 + op.REDUCE

    def text(self, text: str, path: str = "") -> bytes:
        data = text.encode("utf-8", "surrogatepass")
        return self.once(op.BINUNICODE + struct.pack("<I", len(data)) + data)

    def name(self, module: str, name: str) -> bytes:
        """What Python calls `module.name`."""
        return self.once(op.GLOBAL + f"{module}\n{name}\n".encode())

    def once(self, code: bytes) -> bytes:
        """`code` the first time, a reference to its result from then on."""
        if code in self.memo:
            return numbered(op.BINGET, op.LONG_BINGET, self.memo[code])
        self.memo[code] = len(self.memo)
        return code + numbered(op.BINPUT, op.LONG_BINPUT, self.memo[code])

    def tensor(self, tensor: TensorRef) -> bytes:
        """`torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`.

        The storage is the persistent id `("storage", class, key, "cpu", count of numbers)`.
        """
        shape = tensor.shape
        strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        storage = (
            op.MARK, self.text("storage"), self.name("torch", tensor.storage), self.text(tensor.key),
            self.text("cpu"), _scalar(math.prod(shape)), op.TUPLE, op.BINPERSID,
        )  # fmt: skip
        rebuild = self.name("torch._utils", "_rebuild_tensor_v2") + op.MARK + b"".join(storage)
        view = _scalar(0) + self.tuple(shape, "") + self.tuple(strides, "")
        hooks = self.name("collections", "OrderedDict") + op.EMPTY_TUPLE + op.REDUCE
        return rebuild + view + op.NEWFALSE + hooks + op.TUPLE + op.REDUCE


def numbered(short: bytes, long: bytes, number: int) -> bytes:
    """An opcode on an entry of the memo: `short` with a number of one byte, `long` with one of four."""
    return short + bytes([number]) if number < 256 else long + struct.pack("<I", number)


def _scalar(value: Any) -> bytes:
    """The opcodes of a number, a truth value or None: a whole pickle without its first two bytes and its last."""
    return pickle.dumps(value, _PROTOCOL)[2:-1]


_EMIT: dict[type, Callable[[_Emitter, Any, str], bytes]] = {
    **dict.fromkeys((int, float, bool, type(None)), lambda emitter, value, path: _scalar(value)),
    str: _Emitter.text,
    bytes: _Emitter.data,
    dict: _Emitter.mapping,
    OrderedDict: _Emitter.ordered,
    list: _Emitter.list,
    tuple: _Emitter.tuple,
    set: _Emitter.set,
    Size: _Emitter.size,
}
