"""How made-up data is made: pictures, tables, tars, archives with a password, HDF5."""

import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import PIL.Image

N = 4
"""Pairs of a split."""


def pixels(seed, size=(20, 28)):
    rng = np.random.default_rng(seed)
    return np.kron(rng.integers(0, 256, (size[0] // 4, size[1] // 4, 3)), np.ones((4, 4, 1))).astype(np.uint8)


def coded(seed, format="PNG"):
    stream = io.BytesIO()
    PIL.Image.fromarray(pixels(seed)).save(stream, format)
    return stream.getvalue()


def write(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, int):
        content = coded(content, "JPEG" if path.suffix == ".jpg" else "PNG")
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def picture(path: Path, array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(array).save(path)


def folders(*parts, names=lambda i: (f"{i:03d}", f"{i:03d}"), suffix=".png", n=N):
    """parts: (split, inputs, outputs)."""

    def make(root):
        for split, inputs, outputs in parts:
            for i in range(n):
                before, after = names(i)
                write(root / inputs / f"{before}{suffix}", hash_of(split, i, 0))
                write(root / outputs / f"{after}{suffix}", hash_of(split, i, 1))
        return {split: n for split, _, _ in parts}

    return make


def hash_of(*parts):
    return zlib.crc32(repr(parts).encode())


def table(root, pattern, rows, shards=2):
    import pyarrow
    import pyarrow.parquet

    per = -(-len(rows) // shards)
    for shard in range(shards):
        path = root / pattern.format(shard, shards)
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[shard * per : (shard + 1) * per]), path, row_group_size=2)


def struct(seed):
    return {"bytes": coded(seed), "path": f"{seed}.png"}


def tar(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def jsonl(path, rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def h5(seed):
    import pytest

    h5py = pytest.importorskip("h5py")
    stream = io.BytesIO()
    with h5py.File(stream, "w") as file:
        file["rgb"], file["depth"] = pixels(seed).transpose(2, 0, 1), metres(seed)
    return stream.getvalue()


def metres(seed, size=(20, 28)):
    return np.random.default_rng(seed).uniform(0.5, 9.5, size).astype(np.float32)


def normal_map(seed):
    n = np.random.default_rng(seed).normal(size=(20, 28, 3))
    n /= np.linalg.norm(n, axis=-1, keepdims=True)
    rgb = np.rint((n + 1) / 2 * 255).astype(np.uint8)
    rgb[:2] = 0 if seed % 2 else 255  # unknown, as one or the other marks it
    return rgb


def zip_crypto(path, files, password):
    """A zip archive under the traditional PKWARE encryption, stored; Python only reads these."""
    table = [_crc_entry(i) for i in range(256)]

    def encrypt(data, check):
        keys = [0x12345678, 0x23456789, 0x34567890]

        def update(byte):
            keys[0] = table[(keys[0] ^ byte) & 255] ^ (keys[0] >> 8)
            keys[1] = ((keys[1] + (keys[0] & 255)) * 134775813 + 1) & 0xFFFFFFFF
            keys[2] = table[(keys[2] ^ (keys[1] >> 24)) & 255] ^ (keys[2] >> 8)

        for byte in password:
            update(byte)
        out = bytearray()
        for byte in bytes(11) + bytes([check]) + data:
            word = keys[2] | 2
            out.append(byte ^ ((word * (word ^ 1)) >> 8 & 255))
            update(byte)
        return bytes(out)

    body, directory = bytearray(), bytearray()
    for name, data in files.items():
        crc, coded_name = zlib.crc32(data), name.encode()
        secret = encrypt(data, crc >> 24)
        common = b"".join(v.to_bytes(n, "little") for v, n in (
            (20, 2), (1, 2), (0, 2), (0, 2), (33, 2), (crc, 4), (len(secret), 4), (len(data), 4), (len(coded_name), 2), (0, 2)
        ))  # fmt: skip
        directory += b"PK\x01\x02\x14\0" + common + bytes(10) + len(body).to_bytes(4, "little") + coded_name
        body += b"PK\x03\x04" + common + coded_name + secret
    end = b"".join(v.to_bytes(n, "little") for v, n in (
        (0, 2), (0, 2), (len(files), 2), (len(files), 2), (len(directory), 4), (len(body), 4), (0, 2)
    ))  # fmt: skip
    write(path, bytes(body + directory + b"PK\x05\x06" + end))


def _crc_entry(value):
    for _ in range(8):
        value = value >> 1 ^ (0xEDB88320 if value & 1 else 0)
    return value
