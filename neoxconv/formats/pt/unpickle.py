"""Pickles without their power: an unpickler that knows a handful of names.

Nothing is imported or called on a file's word. A class that is not admitted becomes an inert `Placeholder`, whatever is
called, built or appended on it. Opcodes that allocate by a claimed size are refused, and so is a tree that is deeper or
larger, with every reference followed, than any checkpoint.
"""

from __future__ import annotations

import pickle
import reprlib
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

from neoxconv.dtypes import BF16, BOOL, F16, F32, F64, I8, I16, I32, I64, U8, DType
from neoxconv.errors import CheckpointError
from neoxconv.formats.pt.streams import Bounded

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
_TORCH_DTYPES: dict[str, DType] = {
    "float16": F16, "bfloat16": BF16, "float32": F32, "float64": F64,
    "int64": I64, "int32": I32, "int16": I16, "int8": I8, "uint8": U8, "bool": BOOL,
}  # fmt: skip
_MAX_DEPTH = 64  # of containers in containers
_MAX_NODES = 2_000_000  # values, every reference followed
MAX_AXES = 16  # of a tensor
_SET_STEPS, _KEY_STEPS = 16, 1000  # what an empty set, and a key of a huge number, cost of Bounded's steps
_KEYS = (str, int, float, bool, bytes, type(None))  # what a dictionary's keys may be
# What Python's unpickler, and calls with arguments from a file, raise for a malformed pickle.
_UNPICKLING_ERRORS = (
    pickle.UnpicklingError, AttributeError, EOFError, ImportError, IndexError, KeyError, LookupError, MemoryError,
    NameError, OverflowError, RecursionError, struct.error, TypeError, ValueError,
)  # fmt: skip


class Size(tuple[int, ...]):
    """A torch.Size, told apart from other tuples so that it can be written again."""


@dataclass(frozen=True, eq=False, repr=False)
class Placeholder:
    """What stands for an object of a class that is not admitted; it takes any treatment and does nothing."""

    name: str

    def __repr__(self) -> str:
        return f"<{self.name}, not loaded>"

    def __call__(self, *args: Any, **kwargs: Any) -> Placeholder:
        return Placeholder(self.name)

    def append(self, item: Any) -> None:
        """Ignore what a pickle adds."""

    def extend(self, items: Any) -> None:
        """Ignore what a pickle adds."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Ignore what a pickle adds."""


@dataclass(frozen=True, eq=False, repr=False)
class StorageRef(Placeholder):
    """A storage that a pickle refers to: `numel` numbers of `dtype` under `key`, from its number `start` on.

    Left in a tree on its own it is a placeholder like any other.
    """

    key: str
    dtype: DType
    numel: int
    start: int = 0


_MakeTensor = Callable[[StorageRef, int, tuple[int, ...], tuple[int, ...]], Any]


def load_pickle(stream: Any, make_tensor: _MakeTensor, name: str) -> Any:
    """The value of the pickle in `stream`, tensors made by `make_tensor(storage, offset, size, stride)`.

    Raises CheckpointError, naming the file `name`, for whatever is malformed.
    """
    try:
        value = _Unpickler(Bounded(stream), make_tensor).load()
        _check_tree(value)
    except _UNPICKLING_ERRORS as error:
        what = error if type(error) in (EOFError, TypeError, ValueError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{name}: its pickle is damaged ({what}); download it again.") from error
    return value


def refuse(unpickler: Any) -> NoReturn:
    """Stop at an opcode that no checkpoint needs."""
    raise ValueError("it uses an operation that no checkpoint needs")


class _Unpickler(pickle._Unpickler):  # Python's own in Python: its memo is a dict
    """Loads numbers, strings, containers and tensors; everything else becomes a placeholder."""

    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]
    read: Callable[[int], bytes]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, stream: Bounded, make_tensor: _MakeTensor) -> None:
        super().__init__(stream, encoding="utf-8", errors="replace")
        self.make_tensor, self.spend = make_tensor, stream.spend

    def find_class(self, module: str, name: str) -> Any:
        """What stands for `module.name`: a function of ours, or a placeholder. Nothing is imported."""
        where = f"{module}.{name}"
        admitted: dict[str, Any] = {
            "collections.OrderedDict": self.ordered,
            "torch.Size": _make_size,
            "__builtin__.set": self.set_of,
            "builtins.set": self.set_of,
            "__builtin__.bytes": self.encoded,
            "builtins.bytes": self.encoded,
            "_codecs.encode": self.encoded,
            "torch._utils._rebuild_tensor": self.tensor,
            "torch._utils._rebuild_tensor_v2": self.tensor,
            "torch._utils._rebuild_tensor_v3": self.typed_tensor,
            "torch._utils._rebuild_parameter": _first_of,
            "torch._utils._rebuild_parameter_with_state": _first_of,
        }
        return admitted.get(where) or Placeholder(where)

    def key(self, key: Any) -> Any:
        """A dictionary's key, if it can be hashed in no time. From 2^61 on integers may share a hash: a few only."""
        if not isinstance(key, _KEYS):
            raise TypeError(f"a dictionary has a key of type {type(key).__name__}")
        if isinstance(key, int) and key.bit_length() > 60:
            self.spend(_KEY_STEPS)
        return key

    def ordered(self, items: Any = ()) -> OrderedDict[Any, Any]:
        """An OrderedDict of pairs."""
        self.spend(len(items))
        return OrderedDict((self.key(key), value) for key, value in items)

    def set_of(self, items: Any = ()) -> set[Any]:
        """A set of items that can be hashed."""
        self.spend(len(items))
        return set(map(self.key, items))

    def encoded(self, text: str = "", encoding: str = "latin1") -> Any:
        """Bytes, as protocol 2 spells them."""
        if not isinstance(text, str) or encoding != "latin1":
            return Placeholder("_codecs.encode")
        self.spend(len(text) // 64)
        return text.encode("latin1")

    def tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        """A tensor; `rest` is requires_grad, hooks and metadata, which says that numbers are to be negated."""
        lazy_negation = rest[2] if len(rest) > 2 else None
        if not isinstance(storage, StorageRef) or lazy_negation:
            return Placeholder("torch.Tensor")
        return self.make_tensor(storage, _natural(offset), _naturals(size), _naturals(stride))

    def typed_tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *rest: Any) -> Any:
        """A tensor on a storage of bytes, its type given after requires_grad and hooks."""
        has_dtype = len(rest) > 2 and isinstance(rest[2], Placeholder)
        dtype = _TORCH_DTYPES.get(rest[2].name.removeprefix("torch.")) if has_dtype else None
        if dtype is None or not isinstance(storage, StorageRef):
            return Placeholder("torch.Tensor")
        typed = StorageRef(storage.name, storage.key, dtype, storage.numel // dtype.nbytes)
        return self.tensor(typed, offset, size, stride, *rest[:2], *rest[3:])

    def persistent_load(self, pid: Any) -> Placeholder:
        """The storage that `('storage', class, key, location, numel)` names; a placeholder for types not known here."""
        is_storage = (
            isinstance(pid, tuple)
            and len(pid) in (5, 6)
            and pid[0] == "storage"
            and isinstance(pid[1], Placeholder)
            and isinstance(pid[2], str)
        )
        if not is_storage:
            raise ValueError("it refers to something that is not a storage")
        kind = pid[1].name
        dtype = STORAGES.get(kind.removeprefix("torch.").removeprefix("storage."))
        part = pid[5] if len(pid) == 6 else None  # files older than the zip: (key, first number, count)
        start = _natural(part[1]) if isinstance(part, tuple) and len(part) == 3 else 0
        return StorageRef(kind, pid[2], dtype, _natural(pid[4]), start) if dtype else Placeholder(kind)

    def load_frame(self) -> None:
        """Pass over a frame's length: what it holds is read through `Bounded` like everything else."""
        self.read(8)

    def load_build(self) -> None:
        """Drop the state: an OrderedDict's is `_metadata`, a placeholder's is nobody's business."""
        self.stack.pop()
        if not isinstance(self.stack[-1], OrderedDict | Placeholder | set):
            raise TypeError(f"it gives a state to a {type(self.stack[-1]).__name__}")

    def load_reduce(self) -> None:
        """A call's arguments are copied, however often a pickle refers to them."""
        args, function = self.stack.pop(), self.stack.pop()
        self.spend(len(args))
        self.append(function(*args))

    def load_newobj_ex(self) -> None:
        """Make a placeholder, whatever the arguments."""
        _, _, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(cls if isinstance(cls, Placeholder) else Placeholder("object"))

    def load_empty_set(self) -> None:
        """A set takes far more memory than the byte that asks for it."""
        self.spend(_SET_STEPS)
        self.append(set())

    def load_frozenset(self) -> None:
        """Make a placeholder; no checkpoint has one."""
        self.pop_mark()
        self.append(Placeholder("builtins.frozenset"))

    def load_additems(self) -> None:
        """Add to a set; a placeholder takes nothing."""
        items = self.pop_mark()
        if isinstance(self.stack[-1], set):
            self.stack[-1].update(map(self.key, items))
        elif not isinstance(self.stack[-1], Placeholder):
            raise TypeError(f"it adds to a {type(self.stack[-1]).__name__} as to a set")

    def load_setitem(self) -> None:
        """Set one item of a dictionary, or of what stands for one."""
        value, key = self.stack.pop(), self.stack.pop()
        self.stack[-1][self.key(key)] = value

    def load_setitems(self) -> None:
        """Set items of a dictionary, or of what stands for one."""
        items = self.pop_mark()
        for key, value in zip(items[::2], items[1::2], strict=True):
            self.stack[-1][self.key(key)] = value

    def load_dict(self) -> None:
        """Make a dictionary of keys and values in turns."""
        items = self.pop_mark()
        self.append({self.key(key): value for key, value in zip(items[::2], items[1::2], strict=True)})


# What Python's unpickler does otherwise, or would do and is refused.
for opcode, load in {
    pickle.FRAME: _Unpickler.load_frame,
    pickle.BUILD: _Unpickler.load_build,
    **dict.fromkeys((pickle.REDUCE, pickle.NEWOBJ), _Unpickler.load_reduce),
    pickle.NEWOBJ_EX: _Unpickler.load_newobj_ex,
    pickle.EMPTY_SET: _Unpickler.load_empty_set,
    pickle.FROZENSET: _Unpickler.load_frozenset,
    pickle.ADDITEMS: _Unpickler.load_additems,
    pickle.SETITEM: _Unpickler.load_setitem,
    pickle.SETITEMS: _Unpickler.load_setitems,
    pickle.DICT: _Unpickler.load_dict,
    **dict.fromkeys((pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2,
                     pickle.EXT4, pickle.PERSID, pickle.INST, pickle.OBJ), refuse),
}.items():  # fmt: skip
    _Unpickler.dispatch[opcode[0]] = load


def _make_size(items: Any = ()) -> Size:
    """A torch.Size; raises ValueError where the items are no shape."""
    return Size(_naturals(items))


def _first_of(value: Any, *rest: Any) -> Any:
    """A parameter's tensor, without what torch adds to it."""
    return value


def _natural(value: Any) -> int:
    """A count or a position; raises ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 62:
        raise ValueError(f"{reprlib.repr(value):.40} stands where a count is expected")
    return value


def _naturals(values: Any) -> tuple[int, ...]:
    """A shape or strides; raises ValueError for anything else."""
    if not isinstance(values, tuple | list) or len(values) > MAX_AXES:
        raise ValueError("a shape is not a short tuple")
    return tuple(map(_natural, values))


def _check_tree(value: Any) -> None:
    """Raise ValueError where a value is deeper or larger, every reference followed, than any checkpoint's."""
    level, nodes = [value], 0
    for _ in range(_MAX_DEPTH):
        containers = [node for node in level if isinstance(node, dict | list | tuple | set)]
        nodes += sum(map(len, containers))
        if nodes > _MAX_NODES:
            raise ValueError("it holds more values than any checkpoint")
        level = [child for node in containers for child in (node.values() if isinstance(node, dict) else node)]
        if not level:
            return
    raise ValueError("it is nested deeper than any checkpoint")
