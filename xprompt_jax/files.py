"""Writing files whole or not at all; small files: JSON lines, tensors with a header."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, writer: int | None = None) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well and vanishes when it does not.

    The block may make a file or a folder there. An existing folder at `path` is replaced; of a link to one, what it leads to. `writer`
    is in the name; the default is a name that no other process has, on no other machine.

    Raises:
      UserError: the place cannot be written (no such folder, no permission, disk full).
    """
    path = real_folder(path)
    temporary = temporary_name(path, secrets.token_hex(6) if writer is None else writer)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if path.is_dir() and temporary.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except OSError as e:
        raise UserError(f"{path}: cannot write: {e.strerror or e}; free space or choose another place") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # it never came to be, or was a folder
            temporary.unlink()


def temporary_name(path: Path, writer: str | int) -> Path:
    """Beside `path`; of a long name the start alone, for a name has 255 bytes at most, on some file systems 143."""
    start = os.fsencode(path.name)[:100].decode(errors="ignore")
    return path.with_name(f".{start}.{writer}.partial")


def real_folder(path: str | os.PathLike) -> Path:
    """`path`; where it is a link to a folder, that folder: what is put in place beside the link would replace the link alone.

    Raises:
      UserError: it has no name, as "." has none.
    """
    path = Path(path)
    if path.name in ("", ".."):
        raise UserError(f"{path}: cannot be replaced by what is made; give a name in it")
    return path.resolve() if path.is_symlink() and path.is_dir() else path


def check_place(path: str | os.PathLike, marks: Sequence[str], kind: str) -> Path:
    """Refuses to replace a folder that is not of a kind of ours, before the work; an empty one may be replaced.

    Args:
      marks: what each of them has in it.
      kind: what is made, in words: "a token store".

    Returns:
      `real_folder` of the path.

    Raises:
      UserError: it is something else, or has no name.
    """
    path = real_folder(path)
    if path.exists() and not all((path / mark).exists() for mark in marks) and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: there already, and not {kind}; choose another place")
    return path


def read_json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a small JSONL file with their line numbers, from 1; empty lines are passed over. Large ones: data/readers.

    Raises:
      UserError: the file cannot be read, or a line is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # JSON may hold other ends of lines
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: cannot read: {getattr(e, 'strerror', None) or 'not a text file'}; correct the path or the file") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: not a JSON object; write one object a line")
        yield number, row


def write_tensors(path: str | os.PathLike, kind: str, tensors: Mapping[str, np.ndarray], header: Mapping[str, str]) -> None:
    """A safetensors file of a kind of ours, whole or not at all."""
    import safetensors.numpy

    with atomic_path(path) as temporary:
        try:
            # From 0.8 on the library writes the memory of a view as it lies, whatever its strides.
            whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
            safetensors.numpy.save_file(whole, temporary, metadata={"format": kind, **header})
        except safetensors.SafetensorError as e:  # it reports a full disk as its own error
            raise UserError(f"{path}: cannot write: {e}; free space or choose another place") from None


def read_tensors(path: str | os.PathLike, kind: str, what: str, command: str) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """What `write_tensors` wrote: tensors and header.

    Args:
      kind: the format that is asked for.
      what: its name in messages.
      command: that makes it.

    Raises:
      UserError: it is missing, damaged, or of another kind.
    """
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs)
    import safetensors

    if not os.path.isfile(path):  # Path.is_file raises where the name is too long
        raise UserError(f"{path}: no such file; make it with `{command}`")
    try:
        Path(path).open("rb").close()  # of a file that may not be read, safetensors says that there is none
        with safetensors.safe_open(path, "numpy") as f:
            header = f.metadata() or {}
            if header.get("format") != kind:
                raise UserError(f"{path}: no {what} of format {kind}; make it again with `{command}`")
            return {name: f.get_tensor(name) for name in f.keys()}, header  # noqa: SIM118  (safe_open is no mapping)
    except (safetensors.SafetensorError, OSError) as e:  # the library's own OSErrors have no errno
        raise UserError(f"{path}: not a readable {what} ({getattr(e, 'strerror', None) or e}); make it again with `{command}`") from None
