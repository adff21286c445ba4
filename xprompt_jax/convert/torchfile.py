"""PyTorch checkpoint files, read without PyTorch, and without ever running what is in them (torchwriter.py writes them).

A checkpoint is a pickle program that builds a dictionary, and the raw bytes of its tensors:

    zip file   NAME/data.pkl  NAME/data/0  NAME/data/1 ...  NAME/byteorder  NAME/version      (torch >= 1.6)
    legacy     five pickles (magic, protocol, system, object, storage keys), then per storage: int64 count, bytes

`TorchFile` follows the program symbolically (`_Interpreter`): it knows the handful of names that tensors are made of, and
a file that names anything else is refused by that name. Tensors are read from the file when they are asked for.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from xprompt_jax.errors import UserError

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64), "FloatStorage": np.dtype(np.float32), "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16), "LongStorage": np.dtype(np.int64), "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16), "CharStorage": np.dtype(np.int8), "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}  # fmt: skip
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(frozen=True)
class _Global:
    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(frozen=True)
class _Storage:
    dtype: np.dtype
    key: str


@dataclass(frozen=True)
class Tensor:
    """Where a tensor lies: a storage, and a strided view of it (offset and strides in elements)."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype:
        """Its type."""
        return self.storage.dtype


class _Mark:
    pass


class _Interpreter:
    """Follows a pickle program on plain values. Calls are recognised by name and never made."""

    def __init__(self, path: Path):
        self.path = path

    def run(self, source: BinaryIO) -> Any:
        """The value that the program leaves; `source` stands behind it afterwards."""
        stack: list[Any] = []
        memo: dict[int, Any] = {}
        try:
            for opcode, argument, _ in pickletools.genops(source):
                self._step(opcode.name, argument, stack, memo)
            return stack.pop()
        except UserError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, AttributeError, EOFError, struct.error) as e:
            raise UserError(f"{self.path}: not a readable PyTorch file ({type(e).__name__}: {e}); fetch it again") from None

    def _step(self, op: str, argument: Any, stack: list[Any], memo: dict[int, Any]) -> None:
        def since_mark() -> list[Any]:
            at = max(i for i, value in enumerate(stack) if isinstance(value, _Mark))
            values = stack[at + 1 :]
            del stack[at:]
            return values

        match op:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "MARK":
                stack.append(_Mark())
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[op])
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(op[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "DICT":
                values = since_mark()
                stack.append(dict(zip(values[::2], values[1::2], strict=True)))
            case "LIST":
                stack.append(since_mark())
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "SETITEMS":
                values = since_mark()
                stack[-1].update(zip(values[::2], values[1::2], strict=True))
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = since_mark()
                stack[-1].extend(values)
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                memo[int(argument)] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(memo[int(argument)])
            case "GLOBAL":
                stack.append(self._known(_Global(*argument.split(" ", 1))))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(self._known(_Global(module, name)))
            case "BINPERSID":
                stack.append(self._storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(self._call(function, arguments))
            case "BUILD":
                state = stack.pop()  # attributes of an OrderedDict (state_dict's _metadata): of no use here
                if not isinstance(stack[-1], dict) or not isinstance(state, dict):
                    raise UserError(f"{self.path}: sets the state of an object, which a file of tensors has no need for; refused")
            case "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT":
                stack.append(argument)
            case "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "STRING" | "BINSTRING" | "SHORT_BINSTRING":
                stack.append(argument)
            case "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case _:
                raise UserError(f"{self.path}: pickle instruction {op}, which a file of tensors has no need for; refused")

    def _known(self, name: _Global) -> _Global:
        tensors = {
            ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch._utils", "_rebuild_parameter"),
            ("torch", "Size"), ("torch.storage", "UntypedStorage"),
        }  # fmt: skip
        known = (name.module, name.name) in tensors or (name.module == "torch" and (name.name in STORAGES or name.name in _DTYPES))
        if not known:
            raise UserError(f"{self.path}: would run {name} when unpickled; this is refused, and nothing was run. "
                            "Ask for the weights as safetensors")  # fmt: skip
        return name

    def _call(self, function: Any, arguments: tuple) -> Any:
        match str(function):
            case "collections.OrderedDict":
                return dict(*arguments)
            case "torch.Size":
                return tuple(*arguments)
            case "torch._utils._rebuild_parameter":
                return arguments[0]
            case "torch._utils._rebuild_tensor_v2":
                storage, offset, shape, strides = arguments[:4]
                if not isinstance(storage, _Storage):
                    raise TypeError("a tensor without a storage")
                return Tensor(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))
        raise UserError(f"{self.path}: would call {function} when unpickled; this is refused, and nothing was run")

    def _storage(self, identity: Any) -> _Storage:
        kind, storage, key = identity[:3]
        if kind != "storage" or not isinstance(storage, _Global) or storage.name not in STORAGES:
            raise UserError(f"{self.path}: a storage of unknown type {storage}; ask for the weights as safetensors")
        if len(identity) > 5 and identity[5] is not None:
            raise UserError(f"{self.path}: storages that are views of others (a very old file); save it again with a newer PyTorch")
        return _Storage(STORAGES[storage.name], str(key))


_DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


class TorchFile(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint file by name; nested dictionaries are joined with dots. A tensor is read when asked for.

    Args:
      path: a `.pth`, `.pt`, `.ckpt` or `.bin` file.

    Raises:
      UserError: the file cannot be read, is damaged, or names something that is not part of a tensor.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            zipped = zipfile.is_zipfile(self.path)
            self._where, program = self._open_zip() if zipped else self._open_legacy()
        except (OSError, zipfile.BadZipFile, struct.error) as e:
            raise UserError(f"{self.path}: not a readable PyTorch file ({e}); fetch it again") from None
        self.tensors: dict[str, Tensor] = {}
        self._collect(program, "")

    def __getitem__(self, name: str) -> np.ndarray:
        """A contiguous copy of one tensor."""
        tensor = self.tensors[name]
        start, size = self._where[tensor.storage.key]
        items = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)) if all(tensor.shape) else 0
        width = tensor.dtype.itemsize
        if (tensor.offset + items) * width > size or min((tensor.offset, *tensor.strides)) < 0:
            raise UserError(f"{self.path}: {name} reaches beyond its storage; the file is damaged: fetch it again")
        with self.path.open("rb") as file:
            file.seek(start + tensor.offset * width)
            flat = np.fromfile(file, tensor.dtype, items)
            if len(flat) < items:
                raise UserError(f"{self.path}: ends in the middle of {name}; fetch it again")
        if items == int(np.prod(tensor.shape)) and tensor.strides == contiguous(tensor.shape):
            return flat.reshape(tensor.shape)
        strides = tuple(s * width for s in tensor.strides)
        return np.array(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides), order="C")

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def _collect(self, value: Any, prefix: str) -> None:
        for key, inner in value.items() if isinstance(value, dict) else ():
            name = f"{prefix}{key}"
            if isinstance(inner, Tensor):
                self.tensors[name] = inner
            elif isinstance(inner, dict):
                self._collect(inner, f"{name}.")

    def _open_zip(self) -> tuple[dict[str, tuple[int, int]], Any]:
        with zipfile.ZipFile(self.path) as archive, self.path.open("rb") as raw:
            program = next((n for n in archive.namelist() if n.endswith("/data.pkl") or n == "data.pkl"), None)
            if program is None:
                raise UserError(f"{self.path}: a zip file without data.pkl; not a PyTorch checkpoint")
            root = program.removesuffix("data.pkl")
            if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
                raise UserError(f"{self.path}: big-endian numbers; save it again on a common machine")
            where = {}
            for info in archive.infolist():
                if info.filename.startswith(f"{root}data/"):
                    if info.compress_type != zipfile.ZIP_STORED:
                        raise UserError(f"{self.path}: compressed storages; save it again with PyTorch, which stores them plain")
                    raw.seek(info.header_offset + 26)
                    name_length, extra_length = struct.unpack("<HH", raw.read(4))
                    where[info.filename.removeprefix(f"{root}data/")] = info.header_offset + 30 + name_length + extra_length, info.file_size
            return where, _Interpreter(self.path).run(io.BytesIO(archive.read(program)))

    def _open_legacy(self) -> tuple[dict[str, tuple[int, int]], Any]:
        with self.path.open("rb") as file:
            interpreter = _Interpreter(self.path)
            if interpreter.run(file) != _LEGACY_MAGIC:
                raise UserError(f"{self.path}: not a PyTorch checkpoint; fetch it again")
            _protocol, system = interpreter.run(file), interpreter.run(file)
            if not isinstance(system, dict) or not system.get("little_endian", True):
                raise UserError(f"{self.path}: big-endian numbers; save it again on a common machine")
            program = interpreter.run(file)
            width = {s.key: s.dtype.itemsize for s in _storages_of(program)}
            where = {}
            for key in interpreter.run(file):
                count = struct.unpack("<q", file.read(8))[0]
                if key not in width:
                    raise UserError(f"{self.path}: storage {key} belongs to no tensor; the file is damaged")
                where[key] = file.tell(), count * width[key]
                file.seek(count * width[key], 1)
            return where, program


def contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a dense tensor, in elements."""
    return tuple(int(np.prod(shape[d + 1 :], dtype=np.int64)) for d in range(len(shape)))


def _storages_of(value: Any) -> Iterator[_Storage]:
    if isinstance(value, Tensor):
        yield value.storage
    elif isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _storages_of(inner)
