"""PyTorch checkpoint files, written without PyTorch: in one pass, hashed on the way, resumable.

The zip file grows tensor by tensor, and no byte of it is written twice:

    archive/data/0  archive/data/1 ...  | archive/data.pkl  byteorder  version  directory
    tensors, each at a multiple of 64   | when the file is sealed

`mark` notes beside the file how far it has come; what lies behind the newest mark is cut off when a later writer goes on.
"""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.convert.torchfile import STORAGES, contiguous
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path

MARK = ".progress"
"""Behind the name of a file, the name of its mark."""
_ALIGNMENT = 64
_CHUNK = 2**24
_LIMIT = 2**32 - 1
"""A size or an offset from here on stands in a zip64 field, and this number in its place."""
_VERSION, _DATE = 45, 0x21  # zip64; 1 January 1980, so that equal tensors make equal files


class _StoredZip:
    """A zip file of plain entries, written from front to back.

    Python's zipfile goes back to fill in checksums, so that it can neither be hashed on the way nor be cut and continued.
    """

    def __init__(self, path: Path, size: int = 0, entries: list[tuple[str, int, int, int]] | None = None):
        self.entries = entries or []
        """(name, offset of its header, CRC-32, size) of what is there."""
        self.size = size
        self.md5 = hashlib.md5(usedforsecurity=False)
        self._file = path.open("r+b" if size else "wb", buffering=0)  # entries are large, and a buffer would outlive a full disk
        while (left := size - self._file.tell()) > 0:
            if not (chunk := self._file.read(min(_CHUNK, left))):
                raise UserError(f"{path}: shorter than its notes say; remove {path.parent} and convert again")
            self.md5.update(chunk)
        self._file.truncate(size)

    def append(self, name: str, data: bytes | memoryview) -> None:
        """One entry, whose bytes start at a multiple of 64, as PyTorch's own do, so that they can be mapped."""
        crc, size = 0, len(data)
        for start in range(0, size, _CHUNK):
            crc = zlib.crc32(data[start : start + _CHUNK], crc)
        extra = struct.pack("<HHQQ", 1, 16, size, size) if size >= _LIMIT else b""
        pad = -(self.size + 30 + len(name) + len(extra) + 4) % _ALIGNMENT
        extra += struct.pack("<HH", 0x4246, pad) + b"Z" * pad
        short = min(size, _LIMIT)
        self.entries.append((name, self.size, crc, size))
        header = (b"PK\3\4", _VERSION, 0, 0, 0, _DATE, crc, short, short, len(name), len(extra))
        self._write(struct.pack("<4s5H3I2H", *header) + name.encode() + extra)
        self._write(data)

    def finish(self) -> None:
        """The directory; the file is complete."""
        start = self.size
        for name, offset, crc, size in self.entries:
            long = [n for n in (size, size, offset) if n >= _LIMIT]
            extra = struct.pack(f"<HH{len(long)}Q", 1, 8 * len(long), *long) if long else b""
            sizes = (min(size, _LIMIT),) * 2
            entry = (b"PK\1\2", _VERSION, _VERSION, 0, 0, 0, _DATE, crc, *sizes, len(name), len(extra), 0, 0, 0, 0, min(offset, _LIMIT))
            self._write(struct.pack("<4s6H3I5H2I", *entry) + name.encode() + extra)
        end, count = self.size, len(self.entries)
        if end >= _LIMIT or count >= 0xFFFF:
            self._write(struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, _VERSION, _VERSION, 0, 0, count, count, end - start, start))
            self._write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
        counts = (min(count, 0xFFFF),) * 2
        self._write(struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, *counts, min(end - start, _LIMIT), min(start, _LIMIT), 0))
        self._file.close()

    def close(self) -> None:
        """Leaves the file as it is."""
        self._file.close()

    def _write(self, data: bytes | memoryview) -> None:
        self.size += len(data)
        view = memoryview(data)
        while view:
            written = self._file.write(view[:_CHUNK]) or 0
            self.md5.update(view[:written])
            view = view[written:]


class TorchWriter:
    """Writes a checkpoint that `torch.load(..., weights_only=True)` reads, tensor by tensor, in little memory.

    Use as a context manager; the file is complete when the block ends well. Names are keys of one flat dictionary, or of a
    dictionary under `root` (as in Lightning's {"state_dict": {...}}). Where an earlier writer of `path` left a mark, this one
    goes on from there.
    """

    def __init__(self, path: str | Path, *, root: str | None = None):
        self.path, self._root = Path(path), root
        self._note = self.path.with_name(self.path.name + MARK)
        noted: dict[str, Any] = json.loads(self._note.read_text()) if self._note.exists() else {"size": 0, "zip": [], "tensors": []}
        self._tensors = [(name, np.dtype(STORAGES[kind]), tuple(shape)) for name, kind, shape in noted["tensors"]]
        self._zip = _StoredZip(self.path, noted["size"], [tuple(entry) for entry in noted["zip"]])

    def __contains__(self, name: str) -> bool:
        return any(name == there for there, _, _ in self._tensors)

    def __enter__(self) -> TorchWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.seal() if kind is None else self._zip.close()

    def write(self, name: str, value: np.ndarray) -> None:
        """Appends one tensor."""
        value = np.asarray(value, order="C")
        if value.dtype not in _KINDS:
            raise ValueError(f"{name}: PyTorch has no {value.dtype}")
        self._zip.append(f"archive/data/{len(self._tensors)}", value.reshape(-1).view(np.uint8).data)
        self._tensors.append((name, value.dtype, value.shape))

    def mark(self) -> None:
        """Notes what is there, for a writer that goes on after this one was killed."""
        tensors = [[name, _KINDS[dtype], shape] for name, dtype, shape in self._tensors]
        with atomic_path(self._note) as temporary:
            temporary.write_text(json.dumps({"size": self._zip.size, "zip": self._zip.entries, "tensors": tensors}))

    def seal(self) -> str:
        """Completes the file and returns its MD5, 32 hex digits. A mark stays behind, for whoever asked for it to remove."""
        self._zip.append("archive/data.pkl", _program(self._tensors, self._root))
        self._zip.append("archive/byteorder", b"little")
        self._zip.append("archive/version", b"3\n")
        self._zip.finish()
        return self._zip.md5.hexdigest()

    def close(self) -> None:
        """Leaves the file unfinished."""
        self._zip.close()


_KINDS = {dtype: name for name, dtype in STORAGES.items()}


def _program(entries: list[tuple[str, np.dtype, tuple[int, ...]]], root: str | None) -> bytes:
    """The pickle that builds {name: tensor}: only the names torch's `weights_only` reader knows."""
    text = lambda s: b"X" + struct.pack("<I", len(s.encode())) + s.encode()
    # LONG1 holds any int; a tuple of any length is MARK ... TUPLE.
    number = lambda n: b"\x8a" + bytes([len(b := int(n).to_bytes((int(n).bit_length() // 8) + 1, "little", signed=True))]) + b
    numbers = lambda ns: b"(" + b"".join(map(number, ns)) + b"t"
    out = [b"\x80\x02}("]
    if root is not None:
        out += [text(root), b"}("]
    for i, (name, dtype, shape) in enumerate(entries):
        count = int(np.prod(shape, dtype=np.int64))
        storage = b"(" + text("storage") + f"ctorch\n{_KINDS[dtype]}\n".encode() + text(str(i)) + text("cpu") + number(count) + b"tQ"
        arguments = (
            b"(" + storage + number(0) + numbers(shape) + numbers(contiguous(shape)) + b"\x89" + b"ccollections\nOrderedDict\n)R" + b"t"
        )
        out += [text(name), b"ctorch._utils\n_rebuild_tensor_v2\n", arguments, b"R"]
    return b"".join([*out, b"u" if root is None else b"uu", b"."])
