"""What a tokenizing job has done so far, on disk, so that it goes on after any end.

    OUT.partial/
      job.json        what is being made; another job finds it and stops
      progress.json   records that are done, and how many bytes of each log count; replaced whole every few seconds
      codes.bin       uint16 [images, crops, rows, columns]
      addresses.bin   uint8 [images, 32]
      pairs.jsonl     one pair a line, as the store will have it
      skipped.jsonl   one record a line that could not be read
      store/          the store, while it is put together

Logs only grow. What lies beyond the counts of progress.json was under way when the job ended: the next start cuts it off and does it again.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.data.store import ADDRESS_BYTES
from xprompt_jax.errors import UserError

COMMIT_SECONDS = 5.0
"""At most so much work is lost."""
_LOGS = ("codes.bin", "addresses.bin", "pairs.jsonl", "skipped.jsonl")
_FILES = {*_LOGS, "job.json", "progress.json", "progress.json.new", "lock", "store"}


def refuse_foreign(folder: Path) -> None:
    """Refuses a folder that happens to have a journal's name: what is in it would be removed with the journal.

    Raises:
      UserError: something else is in it, or it is a file.
    """
    if not folder.exists():
        return
    found = {p.name for p in folder.iterdir() if not p.name.startswith((".nfs", ".DS_Store"))} if folder.is_dir() else {""}
    if found - _FILES or (found and not found & {"job.json", "lock", "progress.json"}):
        raise UserError(f"{folder}: there already, and not what a stopped job left; move it, or choose another place")


def forget(folder: Path) -> None:
    """Throws away what a stopped job left.

    Raises:
      UserError: the folder is something else.
    """
    refuse_foreign(folder)
    shutil.rmtree(folder, ignore_errors=True)


class Journal:
    """The journal of one job; a context manager, which removes it if nothing was done.

    Args:
      folder: OUT.partial.
      job: what is being made, in JSON's types.

    Raises:
      UserError: the folder is of another job, in use, damaged, or cannot be written.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any]):
        self.folder = folder
        self._job = json.loads(json.dumps(dict(job)))
        self._record_bytes = 2 * job["crops"] * job["grid"] ** 2
        self.done = 0
        """Records that are read, encoded and journalled."""
        self.images = 0
        self.skipped = 0
        self._committed = 0

    def __enter__(self) -> Journal:
        with self._told():
            refuse_foreign(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._lock.close()
                raise UserError(f"{self.folder}: another process is writing it; give every job a place of its own") from None
            except OSError:  # a file system without locks
                pass
            lengths = self._resume()
            self._logs = {}
            for name in _LOGS:
                file = (self.folder / name).open("ab")
                file.truncate(lengths[name])
                self._logs[name] = file
            self._last = time.monotonic()
        return self

    def _resume(self) -> dict[str, int]:
        """Reads progress.json, if it is of this job; the lengths of the logs."""
        try:
            progress = json.loads((self.folder / "progress.json").read_text())
            job = json.loads((self.folder / "job.json").read_text())
        except FileNotFoundError:
            progress, job = {"done": 0}, {}
        except ValueError:
            raise UserError(f"{self.folder}: damaged; remove it to begin again") from None
        if not progress["done"]:
            (self.folder / "job.json").write_text(json.dumps(self._job, indent=2))
            return dict.fromkeys(_LOGS, 0)
        for name in {**job, **self._job}:
            then, now = job.get(name), self._job.get(name)
            if then != now:
                raise UserError(
                    f"{self.folder}: begun with {name} {then}, not {now}; give the same again to go on, or remove it to begin anew"
                )
        for name, length in progress["bytes"].items():
            if not (self.folder / name).is_file() or (self.folder / name).stat().st_size < length:
                raise UserError(f"{self.folder / name}: shorter than it was; remove {self.folder} to begin again")
        self.done, self.images, self.skipped = progress["done"], progress["images"], progress["skipped"]
        self._committed = self.done
        return progress["bytes"]

    def __exit__(self, *exception: object) -> None:
        for file in (*self._logs.values(), self._lock):
            with contextlib.suppress(OSError):  # a full disk was told already
                file.close()
        if not self._committed:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add_images(self, codes: np.ndarray, addresses: Sequence[bytes]) -> None:
        """Adds the next images, uint16 [n, crops, rows, columns]."""
        with self._told():
            self._logs["codes.bin"].write(np.ascontiguousarray(codes, "<u2").tobytes())
            self._logs["addresses.bin"].write(b"".join(addresses))
        self.images += len(addresses)

    def add_row(self, kind: str, row: Mapping[str, Any], done: int) -> None:
        """Adds a line to pairs.jsonl or skipped.jsonl (`kind` "pairs" or "skipped"); with it, `done` records are done."""
        with self._told():
            self._logs[f"{kind}.jsonl"].write(json.dumps(row, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")
        self.skipped += kind == "skipped"
        self.done = done

    def commit_now_and_then(self) -> None:
        """Makes what was added count, every few seconds."""
        if time.monotonic() - self._last >= COMMIT_SECONDS:
            self.commit()

    def commit(self) -> None:
        """Makes what was added count."""
        with self._told():
            for file in self._logs.values():
                file.flush()
                os.fsync(file.fileno())
            lengths = {name: file.tell() for name, file in self._logs.items()}
            progress = {"done": self.done, "images": self.images, "skipped": self.skipped, "bytes": lengths}
            temporary = self.folder / "progress.json.new"
            temporary.write_text(json.dumps(progress))
            os.replace(temporary, self.folder / "progress.json")
        self._last, self._committed = time.monotonic(), self.done

    def codes(self) -> Iterator[bytes]:
        """Every image's codes, uint16 [crops, rows, columns] as bytes."""
        return self._records("codes.bin", self._record_bytes)

    def addresses(self) -> Iterator[bytes]:
        """Every image's address."""
        return self._records("addresses.bin", ADDRESS_BYTES)

    def _records(self, name: str, length: int) -> Iterator[bytes]:
        with (self.folder / name).open("rb") as file:
            for _ in range(self.images):
                yield file.read(length)

    def rows(self, kind: str) -> Iterator[dict[str, Any]]:
        """Lines of pairs.jsonl or skipped.jsonl."""
        with (self.folder / f"{kind}.jsonl").open("rb") as file:
            yield from map(json.loads, file)

    @contextlib.contextmanager
    def finished(self, out: Path) -> Iterator[Path]:
        """A folder for the finished store; when the block ends well, it takes its place at `out`, and the journal is gone."""
        store = self.folder / "store"
        with self._told():
            shutil.rmtree(store, ignore_errors=True)  # of a job that was killed here
            store.mkdir()
            yield store
            if out.is_dir():
                shutil.rmtree(out)
            os.replace(store, out)
        self._committed = 0

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise UserError(f"{self.folder}: cannot write: {e.strerror or e}; free space or choose another place") from None
