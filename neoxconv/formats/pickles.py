"""Pickles without their power: an unpickler that knows a handful of names, and an emitter for plain trees.

Nothing is imported or called on a file's word. A class that is not admitted becomes an inert `Placeholder`, whatever is
called, built or appended on it. Opcodes that allocate by a claimed size are refused, and so is a tree that is deeper or
larger, with every reference followed, than any checkpoint.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from neoxconv.dtypes import BF16, BOOL, F16, F32, F64, I8, I16, I32, I64, U8, DType
from neoxconv.errors import CheckpointError, PlanError

STORAGES: dict[str, DType] = {
    "HalfStorage": F16,
    "BFloat16Storage": BF16,
    "FloatStorage": F32,
    "DoubleStorage": F64,
    "LongStorage": I64,
    "IntStorage": I32,
    "ShortStorage": I16,
    "CharStorage": I8,
    "ByteStorage": U8,
    "BoolStorage": BOOL,
    "UntypedStorage": U8,
}
TORCH_DTYPES: dict[str, DType] = {
    "float16": F16, "bfloat16": BF16, "float32": F32, "float64": F64,
    "int64": I64, "int32": I32, "int16": I16, "int8": I8, "uint8": U8, "bool": BOOL,
}  # fmt: skip
MAX_DEPTH = 64
MAX_NODES = 2_000_000
MAX_READ = 64 << 20
KEYS = (str, int, float, bool, bytes, type(None))
UNPICKLING_ERRORS = (
    pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError, LookupError, MemoryError,
    NameError, OverflowError, RecursionError, struct.error, TypeError, ValueError,
)  # fmt: skip


class Size(tuple[int, ...]):
    """A torch.Size, told apart from other tuples so that it can be written again."""


class Placeholder:
    """What stands for an object of a class that is not admitted; it takes any treatment and does nothing."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        return self

    def append(self, item: Any) -> None:
        """Ignore what a pickle adds."""

    def extend(self, items: Any) -> None:
        """Ignore what a pickle adds."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore what a pickle adds."""


@dataclass(frozen=True)
class StorageRef:
    """A storage that a pickle refers to: `numel` numbers of `dtype` under `key`, from its number `start` on."""

    key: str
    dtype: DType
    numel: int
    start: int = 0


MakeTensor = Callable[[StorageRef, int, tuple[int, ...], tuple[int, ...]], Any]


def load_pickle(stream: Any, make_tensor: MakeTensor, name: str) -> Any:
    """The value of the pickle in `stream`, tensors made by `make_tensor(storage, offset, size, stride)`.

    Raises CheckpointError, naming the file `name`, for whatever is malformed.
    """
    try:
        value = Unpickler(Bounded(stream), make_tensor).load()
        check_tree(value)
    except UNPICKLING_ERRORS as error:
        raise CheckpointError(f"{name}: its pickle is damaged ({type(error).__name__}: {error}).") from error
    return value


class Bounded:
    """A stream of which nobody reads more than 64 MiB at once, nor less than asked."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    def read(self, count: int) -> bytes:
        if not 0 <= count <= MAX_READ:
            raise ValueError(f"an item claims {count} bytes")
        data: bytes = self.stream.read(count)
        if len(data) != count:
            raise EOFError("it ends early")
        return data

    def readline(self) -> bytes:
        line: bytes = self.stream.readline(1 << 16)
        return line


def refuse(unpickler: Any) -> None:
    """Stop at an opcode that no checkpoint needs."""
    raise ValueError("it uses an operation that no checkpoint needs")


class Unpickler(pickle._Unpickler):  # type: ignore[name-defined,misc]  # Python's own in Python: its memo is a dict
    """Loads numbers, strings, containers and tensors; everything else becomes a placeholder."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def __init__(self, stream: Any, make_tensor: MakeTensor) -> None:
        super().__init__(stream, encoding="utf-8", errors="replace")
        self.make_tensor = make_tensor

    def find_class(self, module: str, name: str) -> Any:
        where = f"{module}.{name}"
        if module in ("torch", "torch.storage") and name in STORAGES:
            return STORAGES[name]
        if module == "torch" and name in TORCH_DTYPES:
            return TORCH_DTYPES[name]
        admitted: dict[str, Any] = {
            "collections.OrderedDict": make_ordered,
            "torch.Size": make_size,
            "__builtin__.set": make_set,
            "builtins.set": make_set,
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.typed_tensor,
            "torch._utils._rebuild_parameter": first_of,
            "torch._utils._rebuild_parameter_with_state": first_of,
        }
        return admitted.get(where) or Placeholder(where)

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        if not isinstance(storage, StorageRef):
            raise TypeError(f"a tensor lies on {storage!r}, not on a storage")
        return self.make_tensor(storage, natural(offset), naturals(size), naturals(stride))

    def typed_tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        dtype = rest[2] if len(rest) > 2 else None
        if not isinstance(dtype, DType) or not isinstance(storage, StorageRef):
            return Placeholder(f"tensor of {dtype!r}")
        return self.tensor(StorageRef(storage.key, dtype, storage.numel // dtype.nbytes), offset, size, stride)

    def persistent_load(self, pid: Any) -> StorageRef:
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or not isinstance(pid[1], DType):
            raise ValueError(f"it refers to {str(pid)[:60]}, not to a storage")
        view = pid[5] if len(pid) == 6 else None  # files older than the zip: (key, first number, count)
        start = natural(view[1]) if isinstance(view, tuple) and len(view) == 3 else 0
        return StorageRef(str(pid[2]), pid[1], natural(pid[4]), start)

    def load_build(self) -> None:
        """Drop the state: an OrderedDict's is `_metadata`, a placeholder's is nobody's business."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict | Placeholder | set):
            raise TypeError(f"it gives a state to a {type(self.stack[-1]).__name__}")

    def load_newobj(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.stack.append(cls(*args))

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][plain_key(key)] = value

    def load_setitems(self) -> None:
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][plain_key(key)] = value

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({plain_key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})


Unpickler.dispatch[pickle.BUILD[0]] = Unpickler.load_build
Unpickler.dispatch[pickle.NEWOBJ[0]] = Unpickler.load_newobj
Unpickler.dispatch[pickle.SETITEM[0]] = Unpickler.load_setitem
Unpickler.dispatch[pickle.SETITEMS[0]] = Unpickler.load_setitems
Unpickler.dispatch[pickle.DICT[0]] = Unpickler.load_dict
for opcode in (
    pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4,
    pickle.NEWOBJ_EX, pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET, pickle.PERSID, pickle.INST, pickle.OBJ,
):  # fmt: skip
    Unpickler.dispatch[opcode[0]] = refuse


def plain_key(key: Any) -> Any:
    """A dictionary's key, if it can be hashed in no time."""
    if not isinstance(key, KEYS):
        raise TypeError(f"a dictionary has a key of type {type(key).__name__}")
    return key


def make_ordered(items: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((plain_key(key), value) for key, value in items)


def make_set(items: Any = ()) -> set[Any]:
    return {plain_key(item) for item in items}


def make_size(items: Any = ()) -> Size:
    return Size(naturals(items))


def first_of(value: Any, *rest: Any) -> Any:
    return value


def natural(value: Any) -> int:
    """A count or a position."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{str(value)[:40]} stands where a count is expected")
    return value


def naturals(values: Any) -> tuple[int, ...]:
    """A shape or strides."""
    if not isinstance(values, tuple | list) or len(values) > 16:
        raise ValueError("a shape is not a short tuple")
    return tuple(map(natural, values))


def children(value: Any) -> list[Any]:
    """What a container holds."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple | set) else []


def check_tree(value: Any) -> None:
    """Raise ValueError where a value is deeper or larger, every reference followed, than any checkpoint's."""
    level, nodes = [value], 0
    for _ in range(MAX_DEPTH):
        nodes += len(level)
        if nodes > MAX_NODES:
            raise ValueError("it holds more values than any checkpoint")
        level = [child for node in level for child in children(node)][: MAX_NODES + 1]
        if not level:
            return
    raise ValueError("it is nested deeper than any checkpoint")


@dataclass(frozen=True)
class TensorRef:
    """How a tensor is pickled: contiguous, alone on the storage `key` of torch's class `storage`."""

    key: str
    storage: str
    shape: tuple[int, ...]


def dump_pickle(value: Any, refer: Callable[[Any], TensorRef | None], name: str) -> bytes:
    """`value` in pickle protocol 2, as torch.save writes it; `refer` tells which leaves are tensors.

    Raises PlanError for a value of any other kind.
    """
    out = io.BytesIO()
    out.write(b"\x80\x02")
    emit(value, refer, out, name)
    out.write(b".")
    return out.getvalue()


def emit(value: Any, refer: Callable[[Any], TensorRef | None], out: io.BytesIO, path: str) -> None:
    """Write the opcodes that build `value`."""

    def each(items: Any, before: bytes, after: bytes) -> None:
        out.write(before)
        for number, item in enumerate(items):
            emit(item, refer, out, f"{path}[{number}]")
        out.write(after)

    if tensor := refer(value):
        emit_tensor(tensor, out)
    elif isinstance(value, dict):
        ordered = isinstance(value, OrderedDict)
        out.write(b"ccollections\nOrderedDict\n)R" if ordered else b"}")
        each((item for pair in value.items() for item in pair), b"(", b"u")
    elif isinstance(value, list):
        each(value, b"](", b"e")
    elif isinstance(value, set):
        each(sorted(value, key=repr), b"c__builtin__\nset\n](", b"e\x85R")
    elif isinstance(value, Size):
        each(tuple(value), b"ctorch\nSize\n(", b"t\x85R")
    elif isinstance(value, tuple):
        each(value, b"(", b"t")
    else:
        out.write(scalar(value, path))


def scalar(value: Any, path: str) -> bytes:
    """The opcodes of a number, a string, a truth value or None."""
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, int):
        return b"J" + struct.pack("<i", value) if -(1 << 31) <= value < 1 << 31 else long_integer(value)
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(text)) + text
    raise PlanError(f"{path}: a {type(value).__name__} cannot be written into a checkpoint.")


def long_integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def emit_tensor(tensor: TensorRef, out: io.BytesIO) -> None:
    """`torch._utils._rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())`."""
    strides = [1]
    for extent in reversed(tensor.shape[1:]):
        strides.insert(0, strides[0] * extent)
    numel = strides[0] * tensor.shape[0] if tensor.shape else 1

    def ints(values: Any) -> bytes:
        return b"(" + b"".join(scalar(value, "") for value in values) + b"t"

    storage = f"ctorch\n{tensor.storage}\n".encode()
    pid = (
        b"(" + scalar("storage", "") + storage + scalar(tensor.key, "") + scalar("cpu", "") + scalar(numel, "") + b"tQ"
    )
    place = scalar(0, "") + ints(tensor.shape) + ints(strides[: len(tensor.shape)])
    out.write(b"ctorch._utils\n_rebuild_tensor_v2\n(" + pid + place + b"\x89ccollections\nOrderedDict\n)RtR")
