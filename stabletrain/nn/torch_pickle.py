"""The pickle machine without anything that runs: what `torch.save` writes, read as plain containers.

A pickle is a program, and Python's own machine runs whatever it names. Here its instructions are read one by one, and
only those are known that build tensors, dictionaries, lists, tuples, sets, numbers and strings; names are never
imported. What the file asks for beyond that is refused by name.
"""

from __future__ import annotations

import math
import pickletools
from collections import OrderedDict
from dataclasses import dataclass
from typing import IO, Any

import ml_dtypes
import numpy as np

DTYPES: dict[str, Any] = {
    "float64": np.float64,
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
    "complex128": np.complex128,
    "complex64": np.complex64,
    "int64": np.int64,
    "int32": np.int32,
    "int16": np.int16,
    "int8": np.int8,
    "uint64": np.uint64,
    "uint32": np.uint32,
    "uint16": np.uint16,
    "uint8": np.uint8,
    "bool": np.bool_,
}
STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexDoubleStorage": "complex128",
    "ComplexFloatStorage": "complex64",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",  # bytes; the tensor says of what type
}


class Refused(ValueError):
    """The file is whole, but asks for something that is not read here."""


@dataclass(frozen=True)
class NumberType:
    """The type of a NumPy number that stands among plain ones, such as a score beside the tensors."""

    code: str

    def check(self, attributes: Any) -> None:
        """Raises: `Refused` for attributes of anything but a plain little-endian number."""
        if not (
            isinstance(attributes, tuple) and attributes[1:5] in (("<", None, None, None), ("|", None, None, None))
        ):
            raise Refused(f"it has NumPy numbers of type {self.code} that are no plain little-endian ones")


NUMBERS = ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "b1")


@dataclass(frozen=True)
class Storage:
    """A run of `count` values. `start` and `length` cut a part out of it (files of before PyTorch 0.4)."""

    key: str
    dtype: str
    count: int
    start: int
    length: int


@dataclass(frozen=True)
class Tensor:
    """A view of a storage: `offset` and `strides` count values."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class Name:
    """A name that the file asks for; nothing is imported."""

    qualified: str


_MARK = object()


def build(file: IO[bytes], storages: dict[str, Storage] | None = None) -> Any:
    """The object of the pickle that begins here; the file stands behind it afterwards.

    Storages that it refers to are put into `storages` by their key.

    Raises: `Refused` for an instruction, a name or a call that is not known; `ValueError` and the like for damage.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        items: list[Any] = []
        while (item := stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                (result,) = stack
                return result
            case "MARK":
                stack.append(_MARK)
            case "POP":
                stack.pop()
            case "POP_MARK":
                since_mark()
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4" | "BINFLOAT" | "BINUNICODE" | "SHORT_BINUNICODE"
                | "BINUNICODE8" | "BINSTRING" | "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8"
            ):  # fmt: skip
                stack.append(argument)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "EMPTY_SET":
                stack.append(set())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(opcode.name[-1])
                if len(stack) < size:
                    raise ValueError("its pickle takes more than it put")
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND":
                item = stack.pop()
                _of(list, stack[-1]).append(item)
            case "APPENDS":
                items = since_mark()
                _of(list, stack[-1]).extend(items)
            case "ADDITEMS":
                items = since_mark()
                _of(set, stack[-1]).update(items)
            case "FROZENSET":
                stack.append(frozenset(since_mark()))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _of(dict, stack[-1])[key] = value
            case "SETITEMS":
                items = since_mark()
                _of(dict, stack[-1]).update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(Name(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(Name(f"{module}.{name}"))
            case "BINPERSID":
                storage = _storage(stack.pop())
                stack.append(storage)
                if storages is not None:
                    storages[storage.key] = storage
            case "REDUCE" | "NEWOBJ":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_call(function, arguments))
            case "BUILD":  # the attributes of an OrderedDict (a state dict's version numbers), or of a number's type
                attributes = stack.pop()
                if isinstance(stack[-1], NumberType):
                    stack[-1].check(attributes)
                else:
                    _of(OrderedDict, stack[-1])
            case name:
                raise Refused(f"its pickle has the instruction {name}, which builds no tensor or plain container")
    raise ValueError("its pickle has no end")


def _of(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise Refused(f"its pickle changes {_described(value)} as if it were of type {kind.__name__}")
    return value


def _described(value: Any) -> str:
    return value.qualified if isinstance(value, Name) else f"a {type(value).__name__}"


def _storage(identity: Any) -> Storage:
    """`("storage", type, key, device, count)`, and in the older layout a sixth: None, or (key, start, length)."""
    if not (isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage"):
        raise Refused("it refers to something other than a tensor's storage")
    _, kind, key, _, count, *view = identity
    name = _described(kind).rpartition(".")[2]
    if not (isinstance(kind, Name) and kind.qualified.startswith("torch.") and name in STORAGES):
        raise Refused(f"it has a storage of type {_described(kind)}, which is not known")
    start, length = (view[0][1], view[0][2]) if view and view[0] is not None else (0, count)
    if not (isinstance(key, str) and all(_is_count(number) for number in (count, start, length))):
        raise ValueError("a storage is described wrongly")
    return Storage(key, STORAGES[name], count, start, length)


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _call(function: Any, arguments: Any) -> Any:
    """The few functions that torch.save writes for tensors and containers."""
    if not (isinstance(function, Name) and isinstance(arguments, tuple)):
        raise Refused(f"its pickle calls {_described(function)}")
    match function.qualified, arguments:
        case "collections.OrderedDict", ():
            return OrderedDict()
        case "collections.OrderedDict", (list() as pairs,):
            return OrderedDict(pairs)
        case (("builtins.set" | "__builtin__.set"), (list() as members,)):
            return set(members)
        case (("builtins.complex" | "__builtin__.complex"), (float() as real, float() as imaginary)):
            return complex(real, imaginary)
        case "_codecs.encode", (str() as text, "latin1"):  # how protocol 2 writes bytes
            return text.encode("latin1")
        case "numpy.dtype", (str() as code, *_) if code in NUMBERS:
            return NumberType(code)
        case (
            ("numpy.core.multiarray.scalar" | "numpy._core.multiarray.scalar"),
            (NumberType() as kind, bytes() as data),
        ):
            (value,) = np.frombuffer(data, f"<{kind.code}").tolist()
            return value
        case "torch.Size", (tuple() as sizes,):
            return sizes
        case "torch._utils._rebuild_tensor", (storage, offset, shape, strides):
            return _tensor(storage, offset, shape, strides)
        case "torch._utils._rebuild_tensor_v2", (storage, offset, shape, strides, _, _, *metadata):
            return _tensor(storage, offset, shape, strides, metadata=metadata)
        case "torch._utils._rebuild_tensor_v3", (storage, offset, shape, strides, _, _, dtype, *metadata):
            return _tensor(storage, offset, shape, strides, dtype=dtype, metadata=metadata)
        case "torch._utils._rebuild_parameter", (Tensor() as tensor, _, _):
            return tensor
        case "torch._utils._rebuild_parameter_with_state", (Tensor() as tensor, _, _, _):
            return tensor
        case "torch._tensor._rebuild_from_type_v2", (inner, Name(), tuple() as inner_arguments, _):
            return _call(inner, inner_arguments)
    raise Refused(f"its pickle calls {function.qualified}, and only tensors and plain containers are read")


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *, dtype: Any = None, metadata: Any = ()) -> Tensor:
    if any(metadata):  # conjugate and negative views, which are not what the storage holds
        raise Refused(f"a tensor carries the marks {metadata[0]}, which are not known")
    if not isinstance(storage, Storage):
        raise Refused(f"a tensor lies on {_described(storage)} instead of a storage")
    if not (isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides)):
        raise ValueError("a tensor's shape and strides do not fit")
    if not all(_is_count(number) for number in (offset, *shape, *strides)):
        raise ValueError(f"a tensor has the shape {shape}, strides {strides} and offset {offset}")
    if math.prod(shape) >= 2**62:
        raise ValueError(f"a tensor has the shape {shape}")
    name = storage.dtype
    if dtype is not None:
        name = _described(dtype).removeprefix("torch.")
        if name not in DTYPES:
            raise Refused(f"a tensor is of type {_described(dtype)}, which is not known")
    return Tensor(storage, name, offset, shape, strides)
