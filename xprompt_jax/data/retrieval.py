"""Retrieval of examples by instruction (RAIE, paper section 3.3): text features and exact nearest neighbours.

The paper uses CLIP B/32 text features (`vision.clip.CLIP` is such an encoder) and says the distance can be replaced. The encoder
here needs no weights: it hashes words and letter triples, so that instructions that share words come close. Neighbours are exact
(data/nearest.py).

    manifest or token store --build_index--> RetrievalIndex --save--> a folder --load--> .neighbours for training, .retrieve for editing

    edits.index/
      neighbours.parquet   {row, neighbour, cosine}: int32, int32, float32; by row, nearest first
      index.safetensors    features of the distinct instructions, and which of them each pair has; what it was made of

An index knows its encoder by name, and texts are compared with it through the same one only.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from xprompt_jax.data import sources
from xprompt_jax.data.nearest import neighbours
from xprompt_jax.data.store import Store
from xprompt_jax.errors import UserError
from xprompt_jax.files import atomic_path, check_place, read_tensors, write_tensors

FORMAT = "xprompt-index-3"
PLACE = ("index.safetensors",), "an index of `xprompt index`"
"""What `files.check_place` knows an index by."""
HASHED = "hashed-ngram-"
Exclude = Literal["row", "image", "session"]


class Encoder(Protocol):
    """Texts -> unit vectors; their products are how near texts are."""

    @property
    def name(self) -> str:
        """Equal for encoders that give equal vectors, and for no others."""

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, d], rows of length 1."""


class HashedNgramEncoder:
    """Text -> unit vectors by feature hashing of words, word pairs and letter triples; no weights, stable everywhere."""

    def __init__(self, dim: int = 512):
        self.dim, self.name = dim, f"{HASHED}{dim}"

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim], rows of length 1 (0 for a text without letters or digits)."""
        out = np.zeros((len(texts), self.dim), np.float32)
        known: dict[str, tuple[int, int]] = {}  # the same few features come again and again
        for row, text in zip(out, texts, strict=True):
            for feature, weight in self._features(text):
                if feature not in known:
                    number = int.from_bytes(hashlib.blake2b(feature.encode("utf-8", "replace"), digest_size=8).digest(), "big")
                    known[feature] = number % self.dim, 1 if number >> 63 else -1  # signs keep collisions unbiased
                column, sign = known[feature]
                row[column] += sign * weight
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)

    @staticmethod
    def _features(text: str):
        words = re.findall(r"\w+", text.lower())
        for word in words:
            yield f"w {word}", 1.0
            padded = f"^{word}$"
            for i in range(len(padded) - 2):
                yield f"t {padded[i : i + 3]}", 0.3
        for pair in itertools.pairwise(words):
            yield "p " + " ".join(pair), 0.7


@dataclasses.dataclass(frozen=True)
class RetrievalIndex:
    """Which training pairs have the nearest instructions: of every pair of a data set, and of any text.

    Row i is line i of the manifest, and pair i of a token store that was made from it.
    """

    features: np.ndarray
    """float32 [u, d], unit rows: the distinct instructions of training pairs."""
    instructions: np.ndarray
    """int32 [n], the row of `features` that belongs to a pair; -1 for pairs that are held out or cannot be an example."""
    neighbours: np.ndarray
    """int32 [n, k], training pairs, nearest first; -1 where there are no more."""
    cosines: np.ndarray
    """float32 [n, k]; -inf where there are no more."""
    source: Path
    """The manifest or store."""
    fingerprint: str
    """Of the source's table of pairs."""
    rows: str
    """Of the instructions and splits of all rows, so that a store of the same pairs is known by its own."""
    encoder: str
    """Name of the encoder that made `features`."""

    def save(self, path: str | Path) -> None:
        """Writes the folder, whole or not at all; it names its source relative to where it lies."""
        path = check_place(path, *PLACE)
        header = {
            "encoder": self.encoder, "fingerprint": self.fingerprint, "rows": self.rows, "neighbours": str(self.neighbours.shape[1]),
            "source": os.path.relpath(self.source.resolve(), path.resolve().parent),
        }  # fmt: skip
        row, place = np.nonzero(self.neighbours >= 0)
        columns = {"row": row.astype(np.int32), "neighbour": self.neighbours[row, place], "cosine": self.cosines[row, place]}
        with atomic_path(path) as temporary:
            temporary.mkdir()
            pa.parquet.write_table(pa.table(columns), temporary / "neighbours.parquet")
            write_tensors(temporary / "index.safetensors", FORMAT, {n: getattr(self, n) for n in ("features", "instructions")}, header)

    @classmethod
    def load(cls, path: str | Path) -> RetrievalIndex:
        """Reads the folder.

        Raises:
          UserError: it is missing, damaged or no index, or its source is gone or has changed since.
        """
        path = Path(path)
        if not path.exists():
            raise UserError(f"{path}: no such file; make it with `xprompt index`")
        if path.is_file():
            raise UserError(f"{path}: no index of format {FORMAT}, which is a folder; make it again with `xprompt index`")
        tensors, header = read_tensors(path / "index.safetensors", FORMAT, "index", "xprompt index")
        near, cosines = _read_table(path / "neighbours.parquet", len(tensors["instructions"]), int(header["neighbours"]))
        source = path.resolve().parent / header["source"]
        if _fingerprint(source) != header["fingerprint"]:
            raise UserError(f"{source}: has changed since {path} was made; run `xprompt index` again")
        return cls(
            **tensors, neighbours=near, cosines=cosines, source=source, fingerprint=header["fingerprint"], rows=header["rows"],
            encoder=header["encoder"],
        )  # fmt: skip

    def neighbours_in(self, store: Store) -> np.ndarray:
        """`neighbours` as pairs of a token store.

        Raises:
          UserError: the store has other pairs than the index.
        """
        own = self.source.is_dir() and self.source.resolve() == store.folder.resolve()  # `load` has seen that it is as it was
        if not own and _rows_fingerprint(_Told.of_store(store)) != self.rows:
            raise UserError(
                f"the index of {self.source} and the token store have other pairs; index the store: `xprompt index --data STORE`"
            )
        return self.neighbours

    def retrieve(self, text: str, k: int = 1, *, encoder: Encoder | None = None) -> list[tuple[sources.Record, float]]:
        """The training pairs whose instructions are nearest to a text, with their cosines; equal ones in the manifest's order.

        Args:
          encoder: the one that the index was made with; an index of hashed features needs none.

        Raises:
          UserError: the index is of a token store, which has no image files, k is out of range, or the encoder is another one.
        """
        return self.retrieve_all([text], k, encoder=encoder)[0]

    def retrieve_all(self, texts: Sequence[str], k: int = 1, *, encoder: Encoder | None = None) -> list[list[tuple[sources.Record, float]]]:
        """As `retrieve`, of many texts at once."""
        if self.source.is_dir():
            raise UserError(f"{self.source}: a token store has no image files; index its manifest")
        available = int((self.instructions >= 0).sum())
        if not 1 <= k <= available:
            raise UserError(f"{k} examples: the index has {available} training pairs")
        if encoder is None and self.encoder.startswith(HASHED):
            encoder = HashedNgramEncoder(self.features.shape[1])
        if encoder is None or encoder.name != self.encoder:
            given = f", not with {encoder.name}" if encoder else ""
            cure = "leave --clip out" if self.encoder.startswith(HASHED) else "give that encoder's folder with --clip"
            raise UserError(f"the index of {self.source} was made with {self.encoder}{given}; {cure}")
        records, found = self._records, []
        for feature in encoder(texts):
            cosines = (self.features @ feature)[self.instructions]
            cosines[self.instructions < 0] = -np.inf
            found.append([(records[i], float(cosines[i])) for i in np.argsort(-cosines, kind="stable")[:k]])
        return found

    @functools.cached_property
    def _records(self) -> sources.ManifestRecords:
        """The manifest's rows, read when they are asked for."""
        return sources.ManifestRecords(self.source)


def build_index(
    data: str | Path, *, k: int, eval_fraction: float = 0.0, seed: int = 0, encoder: Encoder | None = None, exclude: Exclude = "session"
) -> RetrievalIndex:
    """Finds the k nearest training pairs of every pair by their instructions, exactly.

    Pairs that share an image, directly or through other pairs, are a session (the turns of one edited picture): one would show the
    other's answer. Pairs that are held out have neighbours and are none.

    Args:
      data: a manifest (JSONL), or the folder of a token store.
      eval_fraction: held out of a manifest whose rows do not say.
      seed: chooses among pairs of the same instruction.
      encoder: of the instructions; the default hashes words and letters.
      exclude: what is never a neighbour of a pair: itself alone, as in the paper; what shares an image with it; or its session.

    Raises:
      UserError: the data cannot be read, or has no training pair.
    """
    data = Path(data)
    rows = _Told.of_store(Store.open(data)) if data.is_dir() else _Told.of_records(sources.manifest(data, eval_fraction=eval_fraction))
    training = rows.can_be_shown()
    if not len(training):
        raise UserError(f"{data}: no training pair to retrieve")
    kept = _Apart(rows.images, exclude)
    texts = list(dict.fromkeys(rows.instructions[i] for i in training))
    number = {text: i for i, text in enumerate(texts)}
    having: dict[int, list[int]] = defaultdict(list)
    for i in training:
        having[number[rows.instructions[i]]].append(i)

    encoder = encoder or HashedNgramEncoder()
    features = encoder(texts)
    others = [text for text in dict.fromkeys(rows.instructions) if text not in number]
    # A text counts for nothing only if all its pairs are kept from the row; so many texts more make k pairs certain.
    wide = min(len(texts), k + kept.most_texts(rows.instructions, training))
    queries = features if not others else np.concatenate([features, encoder(others)])
    near, scores = neighbours(queries, features, wide)
    place = {text: i for i, text in enumerate([*texts, *others])}

    found, cosines = np.full((len(rows.splits), k), -1, np.int32), np.full((len(rows.splits), k), -np.inf, np.float32)
    for i, instruction in enumerate(rows.instructions):
        chosen: list[tuple[int, float]] = []
        asked = place[instruction]
        for text, cosine in zip(near[asked].tolist(), scores[asked].tolist(), strict=True):
            chosen += [(j, cosine) for j in _draw(having[text], k - len(chosen), kept, i, (seed, i, text))]
            if len(chosen) == k:
                break
        for rank, (j, cosine) in enumerate(chosen):
            found[i, rank], cosines[i, rank] = j, cosine
    held = np.full(len(rows.splits), -1, np.int32)
    held[training] = [number[rows.instructions[i]] for i in training]
    return RetrievalIndex(features, held, found, cosines, data, _fingerprint(data), _rows_fingerprint(rows), encoder.name)


@dataclasses.dataclass(frozen=True)
class _Told:
    """What an index asks of the pairs: a list for each question, with an entry for each pair."""

    instructions: list[str]
    splits: list[str]
    images: list[tuple[Hashable, ...]]

    @classmethod
    def of_store(cls, store: Store) -> _Told:
        pairs = store.pairs
        pictures = store.pictures()
        images: list[tuple[Hashable, ...]] = list(zip(pictures[pairs.input].tolist(), pictures[pairs.output].tolist(), strict=True))
        for i in np.flatnonzero(pairs.has_more):
            images[i] += tuple(pictures[list(pairs[int(i)].more_inputs)].tolist())
        splits = [pairs.split.names[code] for code in pairs.split.codes]
        return cls([pairs.text("instruction", i) for i in range(len(pairs))], splits, images)

    @classmethod
    def of_records(cls, records: Iterable[sources.Record]) -> _Told:
        found = [(r.instruction, r.split, (r.input, r.output, *r.more_inputs)) for r in records]
        return cls(*map(list, zip(*found, strict=True))) if found else cls([], [], [])

    def can_be_shown(self) -> np.ndarray:
        """Numbers of the pairs that can be examples: training pairs of one image to one image that say what they do."""
        every = enumerate(zip(self.instructions, self.splits, self.images, strict=True))
        return np.array([i for i, (text, split, images) in every if split == "train" and text and len(images) == 2], int)


def _read_table(path: Path, rows: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """neighbours.parquet as int32 and float32 [rows, k], with -1 and -inf where there are fewer."""
    try:
        table = pa.parquet.read_table(path, columns=["row", "neighbour", "cosine"])
    except (OSError, pa.ArrowException) as e:
        told = str(e).splitlines()[0]
        raise UserError(f"{path}: not a readable table of neighbours ({told}); make it again with `xprompt index`") from None
    row, neighbour, cosine = (table.column(name).to_numpy() for name in ("row", "neighbour", "cosine"))
    place = np.arange(len(row)) - np.searchsorted(row, row)  # rows stand together, in order
    inside = [(values >= 0) & (values < most) for values, most in ((row, rows), (neighbour, rows), (place, k))]
    if (np.diff(row) < 0).any() or not np.all(inside):
        raise UserError(f"{path}: damaged; make it again with `xprompt index`")
    found, cosines = np.full((rows, k), -1, np.int32), np.full((rows, k), -np.inf, np.float32)
    found[row, place], cosines[row, place] = neighbour, cosine
    return found, cosines


def _draw(rows: list[int], count: int, kept: _Apart, own: int, seed: tuple[int, int, int]) -> list[int]:
    """At most `count` of `rows` in random order, none that is kept from row `own`."""
    if len(rows) == 1:  # most instructions come once; a generator costs more than all the rest
        return [j for j in rows if not kept.apart(own, j)]
    rng = np.random.default_rng(seed)
    found: list[int] = []
    for tried in (min(len(rows), 4 * count), len(rows)):  # a few are nearly always enough
        order = rng.choice(len(rows), tried, replace=False)
        found = list(itertools.islice((rows[j] for j in order if not kept.apart(own, rows[j])), count))
        if len(found) == count or tried == len(rows):
            break
    return found


class _Apart:
    """Which pairs must never be neighbours: those that have a mark in common.

    Args:
      images: of every pair, what tells its images.
      exclude: "row": a pair is its own mark. "image": its images are. "session": the images that hang together through pairs are one.
    """

    def __init__(self, images: Sequence[tuple[Hashable, ...]], exclude: Exclude):
        self._marks: Sequence[frozenset[Hashable]] = [
            frozenset(marks) for marks in
            {"row": ((i,) for i in range(len(images))), "image": images, "session": ((s,) for s in _sessions(images))}[exclude]
        ]  # fmt: skip

    def apart(self, i: int, j: int) -> bool:
        """Whether pair `j` is no neighbour of pair `i`; a pair is none of its own."""
        return not self._marks[i].isdisjoint(self._marks[j])

    def most_texts(self, texts: Sequence[str], training: Iterable[int]) -> int:
        """Bounds how many texts of training pairs are kept from any one pair."""
        having: dict[Hashable, set[str]] = defaultdict(set)
        for i in training:
            for mark in self._marks[i]:
                having[mark].add(texts[i])
        return max(sum(len(having.get(mark, ())) for mark in marks) for marks in self._marks)


def _sessions(rows: Sequence[tuple[Hashable, ...]]) -> list[int]:
    """Equal numbers for rows that share an image, directly or through others (union-find)."""
    parent: dict[Hashable, Hashable] = {}

    def root(image: Hashable) -> Hashable:
        parent.setdefault(image, image)
        while parent[image] != image:
            parent[image] = parent[parent[image]]
            image = parent[image]
        return image

    for first, *others in rows:
        for other in others:
            parent[root(other)] = root(first)
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(root(first), len(numbers)) for first, *_ in rows]


def _fingerprint(source: Path) -> str:
    """16 hex digits over the table of pairs.

    Raises:
      UserError: it cannot be read.
    """
    table = source / "store.json" if source.is_dir() else source
    try:
        return hashlib.sha256(table.read_bytes()).hexdigest()[:16]
    except OSError as e:
        raise UserError(f"{table}: cannot read: {e.strerror}; the index belongs to it") from None


def _rows_fingerprint(rows: _Told) -> str:
    """16 hex digits over the instruction and the split of every row."""
    digest = hashlib.sha256()
    for split, instruction in zip(rows.splits, rows.instructions, strict=True):
        digest.update(f"{split}\t{instruction}\n".encode("utf-8", "replace"))
    return digest.hexdigest()[:16]
