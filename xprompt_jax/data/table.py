"""The table of pairs of a token store: pairs.arrow, an Arrow file, not compressed.

Opening it reads nothing but a footer, its columns are arrays, and processes of one machine share its pages. A store of millions of pairs
opens in the time of a small one.

    input output      more_inputs   task group split holdout dataset   instruction ... caption   instruction_tokens ... caption_tokens
    int32 numbers     list<int32>   dictionary<int32, string>          string                    int32: tokens of each text
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc

from xprompt_jax.data.readers.strings import position
from xprompt_jax.errors import UserError
from xprompt_jax.tokens import Tokenizer

TEXTS = ("instruction", "reverse_instruction", "description", "reverse_description", "caption")
"""Columns of text; each has its number of tokens beside it."""
CATEGORIES = ("task", "group", "split", "holdout", "dataset")
"""Columns of few different values."""
ROWS = 65_536
"""Pairs of every record batch of pairs.arrow but the last."""

PLAIN = pa.schema([
    ("input", pa.int32()), ("output", pa.int32()), ("more_inputs", pa.list_(pa.int32())), *((name, pa.int32()) for name in CATEGORIES),
    *((name, pa.string()) for name in TEXTS), *((f"{name}_tokens", pa.int32()) for name in TEXTS),
])  # fmt: skip
"""Of the table of pairs, with numbers in place of categories."""
NAMED = pa.schema([(f.name, pa.dictionary(pa.int32(), pa.string()) if f.name in CATEGORIES else f.type) for f in PLAIN])


@dataclasses.dataclass(frozen=True)
class Pair:
    """One row of the table of pairs; `input` and `output` are numbers of images."""

    input: int
    output: int
    instruction: str
    reverse_instruction: str
    description: str
    reverse_description: str
    task: str
    group: str
    caption: str
    split: str
    more_inputs: tuple[int, ...] = ()
    holdout: str = ""
    dataset: str = ""


@dataclasses.dataclass(frozen=True)
class Categories:
    """A column of few different values: pair i has names[codes[i]]."""

    codes: np.ndarray
    """int32 [pairs]."""
    names: tuple[str, ...]


class Pairs(Sequence[Pair]):
    """The table of pairs, memory-mapped: pairs by number, and columns as arrays, which are made when they are first asked for.

    The object travels to other processes, which map the file again.

    Raises:
      UserError: the file is missing or damaged.
    """

    def __init__(self, path: str | Path):
        self._path = Path(path)
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except (pa.ArrowInvalid, OSError) as e:
            raise UserError(f"{path}: damaged ({str(e).splitlines()[0]}); make the store again with `xprompt tokenize`") from None
        if not reader.schema.equals(NAMED):
            raise UserError(f"{path}: not the columns of a token store; make it again with `xprompt tokenize`")
        self._columns = {name: [batch.column(name) for batch in batches] for name in NAMED.names}
        self._length = sum(batch.num_rows for batch in batches)
        self._rows = batches[0].num_rows if batches else 1

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i):
        i = position(i, len(self))
        named = {name: (column := getattr(self, name)).names[column.codes[i]] for name in CATEGORIES}
        more = self._columns["more_inputs"][i // self._rows][i % self._rows].as_py()
        texts = {name: self.text(name, i) for name in TEXTS}
        return Pair(int(self.input[i]), int(self.output[i]), more_inputs=tuple(more), **texts, **named)

    def __iter__(self) -> Iterator[Pair]:
        return map(self.__getitem__, range(len(self)))

    def text(self, name: str, i: int) -> str:
        """One text of pair `i`, of the columns `TEXTS`, without reading the rest of the pair."""
        return self._columns[name][i // self._rows][i % self._rows].as_py()

    @cached_property
    def input(self) -> np.ndarray:
        """int32 [pairs], numbers of images."""
        return self._numbers("input")

    @cached_property
    def output(self) -> np.ndarray:
        """int32 [pairs], numbers of images."""
        return self._numbers("output")

    @cached_property
    def num_more(self) -> np.ndarray:
        """int32 [pairs]: further input images."""
        return _joined([np.diff(column.offsets.to_numpy()) for column in self._columns["more_inputs"]])

    @cached_property
    def has_more(self) -> np.ndarray:
        """Bool [pairs]: whether there are further input images."""
        return self.num_more > 0

    @cached_property
    def task(self) -> Categories:
        """The sub-task."""
        return self._categories("task")

    @cached_property
    def group(self) -> Categories:
        """Pairs of one group can be examples for each other."""
        return self._categories("group")

    @cached_property
    def split(self) -> Categories:
        """ "train" or "eval"."""
        return self._categories("split")

    @cached_property
    def holdout(self) -> Categories:
        """A judge's answer: "yes", "no" or ""."""
        return self._categories("holdout")

    @cached_property
    def dataset(self) -> Categories:
        """The dataset it came from, or ""."""
        return self._categories("dataset")

    @cached_property
    def num_tokens(self) -> Mapping[str, np.ndarray]:
        """Each of `TEXTS` -> int32 [pairs], its number of tokens under the store's own text tokenizer; 0: there is none."""
        return {name: self._numbers(f"{name}_tokens") for name in TEXTS}

    def count_tokens(self, tokenizer: Tokenizer) -> Mapping[str, np.ndarray]:
        """As `num_tokens`, under another text tokenizer. It reads and encodes every text."""
        count = TokenCounter(tokenizer)
        found = {}
        for name in TEXTS:
            parts = []
            for column in self._columns[name]:
                unique = column.dictionary_encode()
                parts.append(count(unique.dictionary.to_pylist())[unique.indices.to_numpy()])
            found[name] = _joined(parts)
        return found

    def plain_batches(self) -> Iterator[dict[str, Any]]:
        """The table in parts, columns of `PairsWriter.write`."""
        for number, first in enumerate(range(0, len(self), self._rows)):
            part = {name: columns[number] for name, columns in self._columns.items()}
            codes = {name: getattr(self, name).codes[first : first + self._rows] for name in CATEGORIES}
            yield part | codes

    def _numbers(self, name: str) -> np.ndarray:
        return _joined([column.to_numpy() for column in self._columns[name]])

    def _categories(self, name: str) -> Categories:
        columns = self._columns[name]
        names = tuple(columns[0].dictionary.to_pylist()) if columns else ()
        return Categories(_joined([column.indices.to_numpy() for column in columns]), names)

    def __reduce__(self):
        return Pairs, (self._path,)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """One array of int32; a single part stays where it is in the file."""
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.int32), *parts])


class TokenCounter:
    """Numbers of tokens of texts; a text that comes again is not encoded again."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._known = tokenizer, {"": 0}

    def __call__(self, texts: Iterable[str]) -> np.ndarray:
        """int32 [texts]."""
        known = self._known if len(self._known) < 1_000_000 else {"": 0}
        counts = []
        for text in texts:
            if (count := known.get(text)) is None:
                count = known[text] = len(self._tokenizer.encode(text))
            counts.append(count)
        self._known = known
        return np.array(counts, np.int32)
