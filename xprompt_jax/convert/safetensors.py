"""Safetensors files: all of a folder as one mapping, and a writer that needs no more memory than one tensor."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors

from xprompt_jax.errors import UserError

_NAMES = {
    np.dtype(np.float64): "F64", np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.bfloat16): "BF16",
    np.dtype(np.int64): "I64", np.dtype(np.int32): "I32", np.dtype(np.uint8): "U8", np.dtype(np.bool_): "BOOL",
}  # fmt: skip
_READ = ("F64", "F32", "F16", "BF16")
INDEX = "model.safetensors.index.json"


class Tensors(Mapping[str, np.ndarray]):
    """The tensors of a folder's *.safetensors by name; a tensor is read when it is asked for.

    Where there is an index, it says which file a tensor is in; files that it does not name add what it lacks.

    Raises:
      UserError: there are none, one that the index names is missing, one is damaged, two hold tensors of one name, or a tensor that is
        asked for is quantised.
    """

    def __init__(self, folder: Path):
        self.folder, self.files = folder, sorted(folder.glob("*.safetensors"))
        if not self.files:
            raise UserError(f"{folder}: no *.safetensors files; give a folder with safetensors weights")
        told = _weight_map(folder / INDEX) if (folder / INDEX).exists() else {}
        missing = sorted(set(told.values()) - {f.name for f in self.files})
        if missing:
            raise UserError(f"{folder}: {missing[0]} is missing; download the folder again")
        self._where: dict[str, Path] = {}
        for file in self.files:
            try:
                with safetensors.safe_open(file, "numpy") as f:
                    names = set(f.keys())
            except (safetensors.SafetensorError, OSError) as e:
                raise UserError(f"{file}: not a readable safetensors file ({e}); download it again") from None
            for name in sorted(names - told.keys()):
                if name in self._where:
                    raise UserError(
                        f"{folder}: {self._where[name].name} and {file.name} both hold {name}; remove the one that is not meant"
                    )
                self._where[name] = file
            lacking = sorted(name for name, of in told.items() if of == file.name and name not in names)
            if lacking:
                raise UserError(f"{file}: has no tensor {lacking[0]}, which {INDEX} says is there; download the folder again")
        self._where |= {name: folder / file for name, file in told.items()}

    def __contains__(self, name: object) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._where:
            raise UserError(f"{self.folder}: no tensor {name}; the weights and config.json do not belong together")
        try:
            with safetensors.safe_open(self._where[name], "numpy") as f:
                kind = f.get_slice(name).get_dtype()
                if kind in _READ:
                    return f.get_tensor(name)
        except (safetensors.SafetensorError, OSError) as e:
            raise UserError(f"{self._where[name]}: cannot read {name} ({e}); download the file again") from None
        raise UserError(f"{self._where[name]}: {name} is of type {kind}; quantised weights are not read: get them in bfloat16 or float32")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        return dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{index}: not a readable index; download the folder again") from None


class Writer:
    """Writes one safetensors file, tensor by tensor. Use as a context manager; the file is complete when the block ends.

    The header stands before the data and is known after it, so room is left for it and filled up with spaces, as the
    format allows.

    Args:
      path: of the file.
      names: of all tensors that will be written; they bound the header.
    """

    def __init__(self, path: Path, names: tuple[str, ...]):
        self._path = path
        room = 256 + sum(len(name) + 160 for name in names)
        self._room = room + -room % 8
        self._header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        self._at = 0

    def __enter__(self) -> Writer:
        self._file = self._path.open("wb")
        self._file.write(bytes(8 + self._room))
        return self

    def write(self, name: str, value: np.ndarray) -> None:
        """Appends one tensor."""
        value = np.asarray(value, order="C")
        end = self._at + value.nbytes
        self._header[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [self._at, end]}
        self._file.write(value.reshape(-1).view(np.uint8).data)
        self._at = end

    def __exit__(self, kind, error, trace) -> None:
        with self._file:
            if kind is None:
                text = json.dumps(self._header, separators=(",", ":")).encode()
                self._file.seek(0)
                self._file.write(struct.pack("<Q", self._room) + text.ljust(self._room))
