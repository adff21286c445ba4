"""Retrieval of examples by instruction (RAIE, paper section 3.3): text features and exact nearest neighbours.

The paper uses CLIP B/32 text features (`vision.clip.CLIP` is such an encoder) and says the distance can be replaced. The encoder
here needs no weights: it hashes words and letter triples, so that instructions that share words come close. Neighbours are exact,
in slices of the keys.

    manifest or token store --build_index--> RetrievalIndex --save--> a file --load--> .neighbours for training, .retrieve for editing

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
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from xprompt_jax.data import sources
from xprompt_jax.data.tokenise import Store
from xprompt_jax.errors import UserError
from xprompt_jax.files import read_tensors, write_tensors

FORMAT = "xprompt-index-2"
HASHED = "hashed-ngram-"
QUERIES_AT_ONCE = 1024


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
        for row, text in enumerate(texts):
            for feature, weight in self._features(text):
                digest = hashlib.blake2b(feature.encode(), digest_size=8).digest()
                number = int.from_bytes(digest, "big")
                out[row, number % self.dim] += weight if number >> 63 else -weight  # signs keep collisions unbiased
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


def neighbours(
    queries: np.ndarray, keys: np.ndarray, k: int, *, query_groups: np.ndarray | None = None, key_groups: np.ndarray | None = None,
    chunk: int = 65536,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """The k nearest keys of each query by cosine, exactly.

    Args:
      queries: float32 [q, d], unit rows.
      keys: float32 [n, d], unit rows.
      query_groups, key_groups: int [q], [n]; a key of the query's own group is never returned (its own row, its session).
      chunk: keys looked at at once; bounds memory at q x chunk floats.

    Returns:
      indices int [q, k] and cosines float32 [q, k], best first; ties go to the lowest index. Where fewer than k keys may
      be returned, the index is -1 and the cosine -inf.
    """
    if query_groups is None or key_groups is None:
        query_groups, key_groups = np.full(len(queries), -1), np.zeros(len(keys), int)
    best = jnp.full((len(queries), k), -jnp.inf)
    index = jnp.full((len(queries), k), -1)
    for start in range(0, len(keys), chunk):
        part = keys[start : start + chunk]
        pad = min(chunk, len(keys)) - len(part)  # one shape, one compilation
        scored = np.pad(part, ((0, pad), (0, 0)))
        valid = np.arange(len(scored)) < len(part)
        groups = np.pad(key_groups[start : start + chunk], (0, pad))
        best, index = _merge(best, index, queries, query_groups, scored, groups, valid, start, k)
    return np.asarray(index), np.asarray(best)


@functools.partial(jax.jit, static_argnames="k")
def _merge(best, index, queries, query_groups, keys, key_groups, valid, start, k):
    scores = jnp.einsum("qd,nd->qn", queries, keys, precision="highest")
    scores = jnp.where(valid & (query_groups[:, None] != key_groups), scores, -jnp.inf)
    top, at = jax.lax.top_k(scores, min(k, keys.shape[0]))
    # The running best stands first, so an equal score from a later slice does not displace it.
    scores = jnp.concatenate([best, top], axis=1)
    indices = jnp.concatenate([index, jnp.where(jnp.isneginf(top), -1, at + start)], axis=1)
    best, chosen = jax.lax.top_k(scores, k)
    return best, jnp.take_along_axis(indices, chosen, axis=1)


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
        """Writes the file (safetensors), whole or not at all; it names its source relative to itself."""
        path = Path(path)
        header = {
            "encoder": self.encoder, "fingerprint": self.fingerprint, "rows": self.rows,
            "source": os.path.relpath(self.source.resolve(), path.resolve().parent),
        }  # fmt: skip
        tensors = {name: getattr(self, name) for name in ("features", "instructions", "neighbours", "cosines")}
        write_tensors(path, FORMAT, tensors, header)

    @classmethod
    def load(cls, path: str | Path) -> RetrievalIndex:
        """Reads the file.

        Raises:
          UserError: it is missing, damaged or no index, or its source is gone or has changed since.
        """
        path = Path(path)
        tensors, header = read_tensors(path, FORMAT, "index", "xprompt index")
        source = path.parent / header["source"]
        if _fingerprint(source) != header["fingerprint"]:
            raise UserError(f"{source}: has changed since {path} was made; run `xprompt index` again")
        return cls(**tensors, source=source, fingerprint=header["fingerprint"], rows=header["rows"], encoder=header["encoder"])

    def neighbours_in(self, store: Store) -> np.ndarray:
        """`neighbours` as pairs of a token store.

        Raises:
          UserError: the store has other pairs than the index.
        """
        if _rows_fingerprint(store.pairs) != self.rows:
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
        records, found = list(sources.manifest(self.source)), []
        for feature in encoder(texts):
            cosines = (self.features @ feature)[self.instructions]
            cosines[self.instructions < 0] = -np.inf
            found.append([(records[i], float(cosines[i])) for i in np.argsort(-cosines, kind="stable")[:k]])
        return found


def build_index(data: str | Path, *, k: int, eval_fraction: float = 0.0, seed: int = 0, encoder: Encoder | None = None) -> RetrievalIndex:
    """Finds the k nearest training pairs of every pair by their instructions, exactly.

    Pairs that share an image, directly or through other pairs, are a session (the turns of one edited picture), and never neighbours:
    one would show the other's answer. Pairs that are held out have neighbours and are none.

    Args:
      data: a manifest (JSONL), or the folder of a token store.
      eval_fraction: held out of a manifest whose rows do not say.
      seed: chooses among pairs of the same instruction.
      encoder: of the instructions; the default hashes words and letters.

    Raises:
      UserError: the data cannot be read, or has no training pair.
    """
    data = Path(data)
    rows: list = list(Store.open(data).pairs) if data.is_dir() else list(sources.manifest(data, eval_fraction=eval_fraction))
    training = [i for i, row in enumerate(rows) if _can_be_shown(row)]
    if not training:
        raise UserError(f"{data}: no training pair to retrieve")
    sessions = _sessions([(row.input, row.output, *row.more_inputs) for row in rows])
    texts = list(dict.fromkeys(rows[i].instruction for i in training))
    number = {text: i for i, text in enumerate(texts)}
    having: dict[int, list[int]] = defaultdict(list)
    for i in training:
        having[number[rows[i].instruction]].append(i)

    encoder = encoder or HashedNgramEncoder()
    features = encoder(texts)
    asked = list(dict.fromkeys(row.instruction for row in rows))
    # A text counts for nothing only if all its pairs are of the row's own session; so many texts more make k pairs certain.
    own: dict[int, set[str]] = defaultdict(set)
    for i in training:
        own[sessions[i]].add(rows[i].instruction)
    wide = min(len(texts), k + max(map(len, own.values())))
    near: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for start in range(0, len(asked), QUERIES_AT_ONCE):
        part = asked[start : start + QUERIES_AT_ONCE]
        near.update(zip(part, zip(*neighbours(encoder(part), features, wide), strict=True), strict=True))

    found, cosines = np.full((len(rows), k), -1, np.int32), np.full((len(rows), k), -np.inf, np.float32)
    for i, row in enumerate(rows):
        rng = np.random.default_rng([seed, i])
        chosen: list[tuple[int, float]] = []
        for text, cosine in zip(*near[row.instruction], strict=True):
            chosen += [(j, cosine) for j in _draw(having[int(text)], k - len(chosen), sessions, sessions[i], rng)]
            if len(chosen) == k:
                break
        for place, (j, cosine) in enumerate(chosen):
            found[i, place], cosines[i, place] = j, cosine
    held = np.array([number[row.instruction] if _can_be_shown(row) else -1 for row in rows], np.int32)
    return RetrievalIndex(features, held, found, cosines, data, _fingerprint(data), _rows_fingerprint(rows), encoder.name)


def _draw(rows: list[int], count: int, sessions: Sequence[int], own: int, rng: np.random.Generator) -> list[int]:
    """At most `count` of `rows` in random order, none of the session `own`."""
    found: list[int] = []
    for tried in (min(len(rows), 4 * count), len(rows)):  # a few are nearly always enough
        order = rng.choice(len(rows), tried, replace=False)
        found = list(itertools.islice((rows[j] for j in order if sessions[rows[j]] != own), count))
        if len(found) == count:
            break
    return found


def _can_be_shown(row: Any) -> bool:
    """Whether a pair can be an example: a training pair of one image to one image that says what it does."""
    return row.split == "train" and bool(row.instruction) and not row.more_inputs


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
    table = source / "pairs.jsonl" if source.is_dir() else source
    try:
        return hashlib.sha256(table.read_bytes()).hexdigest()[:16]
    except OSError as e:
        raise UserError(f"{table}: cannot read: {e.strerror}; the index belongs to it") from None


def _rows_fingerprint(rows: Sequence) -> str:
    """16 hex digits over the instruction and the split of every row."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.split}\t{row.instruction}\n".encode())
    return digest.hexdigest()[:16]
