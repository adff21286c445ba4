"""Images in folders, brought together by a rule on their names."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from xprompt_jax.data.images import EXTENSIONS, walk
from xprompt_jax.data.readers.strings import Strings, position
from xprompt_jax.errors import UserError

Row = Mapping[str, Any]

_KNOWN = EXTENSIONS | {".npy", ".h5", ".dng"}
"""What may belong to a row; lists and notes that lie beside it do not."""


class Folders(Sequence[Row]):
    """One row for each file whose path fits a pattern, with the files that belong to it.

    Args:
      root: folder; paths below are relative to it, with "/" between names.
      pattern: regular expression on the whole path of an input, extension included.
      columns: column -> where its file is, without extension: a replacement template over the pattern's groups, or several that are
        tried in turn.
      below: only these folders are searched.
      key: template of the row's key.
      only: keys to keep; None keeps all.

    Rows are sorted by path: {"key": str, "input": Path, column: Path, ...}, and "scene" if the pattern has a group of that name.

    Raises:
      UserError: no such folder, nothing in it fits, or an input lacks a file that belongs to it.
    """

    def __init__(
        self, root: str | Path, pattern: str, columns: Mapping[str, str | tuple[str, ...]], *, below: Iterable[str] = (".",),
        key: str = r"\g<key>", only: Container[str] | None = None,
    ):  # fmt: skip
        self.root = Path(root)
        self._rule = rule = re.compile(pattern)
        extensions: dict[str, list[str]] = {}
        for path in sorted(_walk(self.root, below)):
            stem, extension = os.path.splitext(path)
            extensions.setdefault(stem, []).append(extension)
        keys, inputs = list[str](), list[str]()
        others: dict[str, list[str]] = {name: [] for name in columns}
        for stem, found in extensions.items():
            for extension in found:
                if not (match := rule.fullmatch(stem + extension)) or (only is not None and match.expand(key) not in only):
                    continue
                keys.append(match.expand(key))
                inputs.append(stem + extension)
                for name, templates in columns.items():
                    wanted = [match.expand(t) for t in ((templates,) if isinstance(templates, str) else templates)]
                    there = next((w for w in wanted if w in extensions), None)
                    if there is None:
                        raise UserError(f"{self.root / (stem + extension)}: no {' or '.join(wanted)}.* in {self.root}; complete the copy")
                    others[name].append(there + partner(extension, extensions[there], self.root / there))
        if not keys:
            raise UserError(f"{self.root}: no file whose path fits {pattern}; give the folder that holds them")
        self._columns = {"key": Strings(keys)} | {name: Strings(paths) for name, paths in {"input": inputs, **others}.items()}

    def __len__(self) -> int:
        return len(self._columns["key"])

    def __getitem__(self, i):
        i = position(i, len(self))
        row: dict[str, Any] = {name: column[i] if name == "key" else self.root / column[i] for name, column in self._columns.items()}
        if "scene" in self._rule.groupindex and (match := self._rule.fullmatch(self._columns["input"][i])):
            row["scene"] = match["scene"]
        return row


def partner(extension: str, those: Sequence[str], stem: Path) -> str:
    """Of the extensions that a wanted file is there with, the one that is meant: an input's own, or the only one.

    Raises:
      UserError: there are several others.
    """
    if extension in those:
        return extension
    if len(those) > 1:
        raise UserError(f"{stem}: is there with {' and '.join(sorted(those))}; remove all but one, or give it its input's extension")
    return those[0]


def _walk(root: Path, below: Iterable[str]):
    """Relative paths of all files, hidden ones left out; links are followed."""

    def fail(error: OSError):
        raise UserError(f"{error.filename}: cannot read the folder: {error.strerror}; correct the path or its permissions") from None

    for start in below:
        for folder, names in walk(root / start, fail):
            inside = os.path.relpath(folder, root).replace(os.sep, "/")
            for name in names:
                if not name.startswith(".") and os.path.splitext(name)[1].lower() in _KNOWN:
                    yield name if inside == "." else f"{inside}/{name}"
