"""Writing files whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from xprompt_jax.errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike, writer: int | None = None) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well and vanishes when it does not.

    The block may make a file or a folder there. An existing folder at `path` is replaced. `writer` is in the name; the default is this
    process's number.

    Raises:
      UserError: the place cannot be written (no such folder, no permission, disk full).
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid() if writer is None else writer}.partial")
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
