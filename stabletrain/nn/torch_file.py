"""Weights files without torch: PyTorch's `.pth` and `.pt`, `.npz` and `.safetensors`, all as NumPy arrays by name.

Both layouts of `torch.save` are read: the zip archive (since PyTorch 1.6) and the older stream of pickles with the raw
storages behind it. Their pickles are read by `torch_pickle`, which runs nothing. The kind of a file is told by its
first bytes, never by its name.
"""

from __future__ import annotations

import contextlib
import io
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from stabletrain.errors import DataError
from stabletrain.nn.torch_pickle import DTYPES, Name, Refused, Storage, Tensor, build

ZIP_MAGIC = b"PK\x03\x04"
PICKLE_MAGIC = b"\x80"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the older layout
LEGACY_PROTOCOL = 1001
MAX_NODES = 1_000_000  # a file that names more things than any network has would be read for ever

SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "C64": "complex64",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
}

# What reading a damaged file can raise; each becomes one DataError that names the file.
DAMAGE = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,  # and with it RecursionError and NotImplementedError
    MemoryError,
    EOFError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)

ReadStorage = Callable[[str], bytes]


def read_arrays(path: str | Path) -> dict[str, np.ndarray]:
    """Every tensor of a weights file by name, of any of the four kinds. The arrays are read-only.

    Nested containers are joined with dots (`{"model": {"w": ...}}` gives `model.w`, a list's positions are numbers);
    what is no tensor is left out. Tensors that shared a storage share memory, and keep their strides.

    Raises: `DataError` of one line: no such file, damaged or cut short, of no known kind, without tensors, or with
    content other than tensors and plain containers.
    """
    with _opened(path) as file:
        arrays = _flat(_read(file))
        if not arrays:
            raise Refused("it holds no tensors")
        return arrays


def read_torch(path: str | Path) -> Any:
    """What `torch.save` wrote, with arrays in place of tensors: the tree of containers, numbers and strings as it was.

    Raises: `DataError`, as `read_arrays` does.
    """
    with _opened(path) as file:
        return _read_torch(file)


@contextlib.contextmanager
def _opened(path: str | Path) -> Iterator[IO[bytes]]:
    """The file, and every way in which reading can fail as one readable line."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            yield file
    except Refused as error:
        raise DataError(f"{path} cannot be used: {error}") from error
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except DAMAGE as error:
        reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        raise DataError(f"{path} is damaged or cut short ({reason}): get the file again") from error


def _start(file: IO[bytes]) -> bytes:
    start = file.read(16)
    file.seek(0)
    return start


def _read(file: IO[bytes]) -> Any:
    start = _start(file)
    if start[8:9] == b"{" and not start.startswith(PICKLE_MAGIC):
        return _read_safetensors(file)
    if start.startswith(ZIP_MAGIC):
        with zipfile.ZipFile(file) as archive:
            is_npz = all(name.endswith(".npy") for name in archive.namelist())
        file.seek(0)
        if is_npz:
            return _read_npz(file)
    return _read_torch(file)


def _read_torch(file: IO[bytes]) -> Any:
    start = _start(file)
    if not start:
        raise ValueError("it is empty")
    if start.startswith(ZIP_MAGIC):
        return _read_zip(file)
    if start.startswith(PICKLE_MAGIC):
        return _read_legacy(file)
    raise Refused("its first bytes are not those of a .pth, .pt, .npz or .safetensors file")


def _flat(tree: Any) -> dict[str, np.ndarray]:
    arrays: dict[str, np.ndarray] = {}
    waiting: list[tuple[str, Any]] = [("", tree)]
    nodes = 0
    while waiting:
        name, node = waiting.pop()
        nodes += 1
        if nodes > MAX_NODES:
            raise Refused(f"it holds more than {MAX_NODES:,} things")
        if isinstance(node, np.ndarray):
            if name in arrays:
                raise Refused(f"two tensors are both called {name!r}")
            arrays[name or "tensor"] = node
        elif isinstance(node, (dict, list, tuple)):
            children = list(node.items() if isinstance(node, dict) else enumerate(node))
            waiting += [(f"{name}.{key}" if name else str(key), child) for key, child in reversed(children)]
    return arrays


# --- the other kinds ------------------------------------------------------------------------------------------


def _read_npz(file: IO[bytes]) -> dict[str, np.ndarray]:
    with np.load(file, allow_pickle=False) as members:
        try:
            arrays = {name: members[name] for name in members.files}
        except ValueError as error:
            if "allow_pickle" in str(error):
                raise Refused("it holds Python objects, which are not read") from error
            raise
    for array in arrays.values():
        array.flags.writeable = False
    return arrays


def _read_safetensors(file: IO[bytes]) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError, deserialize

    try:
        tensors = deserialize(file.read())
    except SafetensorError as error:
        raise ValueError(str(error)) from error
    arrays = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in SAFETENSORS_DTYPES:
            raise Refused(f"tensor {name!r} is of type {tensor['dtype']}, which is not known")
        dtype = np.dtype(DTYPES[SAFETENSORS_DTYPES[tensor["dtype"]]])
        arrays[name] = _values(bytes(tensor["data"]), dtype, "little").reshape(tensor["shape"])
    return arrays


# --- PyTorch's two layouts ------------------------------------------------------------------------------------


def _read_zip(file: IO[bytes]) -> Any:
    with zipfile.ZipFile(file) as archive:
        names = set(archive.namelist())
        roots = [name.removesuffix("data.pkl") for name in names if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise Refused("it is a zip archive that neither torch.save nor numpy.savez wrote")
        root = roots[0]
        if f"{root}constants.pkl" in names:
            raise Refused("it is a TorchScript program, not a state dict; save its state_dict() with torch.save")

        def record(name: str) -> bytes:
            info = archive.getinfo(root + name)
            if info.compress_type != zipfile.ZIP_STORED:
                raise Refused(f"its record {name} is compressed, which torch.save never does")
            return archive.read(info)

        order = record("byteorder").decode() if f"{root}byteorder" in names else "little"
        if order not in ("little", "big"):
            raise ValueError(f"byte order {order!r}")
        tree = build(io.BytesIO(record("data.pkl")))
        return _Arrays(lambda key: record(f"data/{key}"), order).resolve(tree)


def _read_legacy(file: IO[bytes]) -> Any:
    if build(file) != LEGACY_MAGIC:
        raise Refused("it is a pickle that torch.save did not write")
    protocol = build(file)
    if protocol != LEGACY_PROTOCOL:
        raise Refused(f"its protocol is {protocol}, the one known is {LEGACY_PROTOCOL}")
    build(file)  # sizes and byte order of the machine that wrote it; the storages are little-endian on any
    storages: dict[str, Storage] = {}
    tree = build(file, storages)
    raw: dict[str, bytes] = {}
    for key in build(file):
        (count,) = struct.unpack("<q", _exactly(file, 8))
        if key not in storages:
            raise ValueError(f"storage {key} belongs to no tensor")
        if count != storages[key].count:
            raise ValueError(f"storage {key} has {count} values instead of {storages[key].count}")
        raw[key] = _exactly(file, count * np.dtype(DTYPES[storages[key].dtype]).itemsize)
    return _Arrays(raw.__getitem__, "little").resolve(tree)


def _exactly(file: IO[bytes], count: int) -> bytes:
    position = file.tell()
    left = file.seek(0, io.SEEK_END) - position
    if not 0 <= count <= left:
        raise ValueError(f"{count} bytes are announced at byte {position}, {left} are left")
    file.seek(position)
    return file.read(count)


def _values(data: bytes, dtype: np.dtype, order: str) -> np.ndarray:
    """Bytes that lie in the byte order `order`, as a read-only array of one dimension."""
    if len(data) % dtype.itemsize:
        raise ValueError(f"{len(data)} bytes are no whole number of {dtype.name} values")
    if order == sys.byteorder or dtype.itemsize == 1:
        return np.frombuffer(data, dtype)
    width = dtype.itemsize // 2 if dtype.kind == "c" else dtype.itemsize
    swapped = np.frombuffer(data, f"u{width}").byteswap().view(dtype)
    swapped.flags.writeable = False
    return swapped


class _Arrays:
    """Arrays in place of tensors. A storage is read once, and a container built once, however often they occur."""

    def __init__(self, read: ReadStorage, order: str) -> None:
        self._read = read
        self._order = order
        self._storages: dict[tuple[str, str], np.ndarray] = {}
        self._resolved: dict[int, Any] = {}

    def resolve(self, node: Any) -> Any:
        if id(node) not in self._resolved:
            self._resolved[id(node)] = self._resolve(node)
        return self._resolved[id(node)]

    def _resolve(self, node: Any) -> Any:
        if isinstance(node, Tensor):
            return self._array(node)
        if isinstance(node, dict):
            return type(node)((key, self.resolve(child)) for key, child in node.items())
        if isinstance(node, (list, tuple)):
            return type(node)(self.resolve(child) for child in node)
        if isinstance(node, (Name, Storage, set, frozenset)):
            self._check_plain(node)
        return node

    def _check_plain(self, node: Any) -> None:
        for member in node if isinstance(node, (set, frozenset)) else [node]:
            if isinstance(member, (Name, Storage, Tensor)):
                what = member.qualified if isinstance(member, Name) else f"a {type(member).__name__.lower()} by itself"
                raise Refused(f"it holds {what}, and only tensors and plain containers are read")

    def _array(self, tensor: Tensor) -> np.ndarray:
        dtype = np.dtype(DTYPES[tensor.dtype])
        values = self._storage(tensor.storage, tensor.dtype)[tensor.offset :]
        if not all(tensor.shape):
            return np.zeros(tensor.shape, dtype)
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides, strict=True))
        if last >= len(values):
            raise ValueError(f"a tensor of shape {tensor.shape} reaches beyond its storage {tensor.storage.key}")
        strides = tuple(stride * dtype.itemsize for stride in tensor.strides)
        return np.lib.stride_tricks.as_strided(values, tensor.shape, strides, writeable=False)

    def _storage(self, storage: Storage, dtype: str) -> np.ndarray:
        """The values of a storage. One of bytes holds values of the tensor's own type."""
        if (storage.key, dtype) not in self._storages:
            data = self._read(storage.key)
            expected = storage.count * np.dtype(DTYPES[storage.dtype]).itemsize
            if len(data) != expected:
                raise ValueError(f"storage {storage.key} has {len(data)} bytes instead of {expected}")
            self._storages[storage.key, dtype] = _values(data, np.dtype(DTYPES[dtype]), self._order)
        values = self._storages[storage.key, dtype]
        return values[storage.start : storage.start + storage.length] if storage.dtype == dtype else values
