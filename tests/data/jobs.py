"""Pairs to tokenize, and what is compared of a store."""

import numpy as np

from tests.data.made import MADE
from tests.helpers import tiny_tokenizer
from xprompt_jax.data.datasets import get_dataset
from xprompt_jax.data.sources import Record
from xprompt_jax.data.tokenise import tokenize


def opened(name, layout, root, split="", **options):
    root.mkdir(exist_ok=True)
    MADE[name, layout](root)
    return get_dataset(name).open(root, split, allow_partial=True, **options)


def store_of(records, vqgan, path, **options):
    return tokenize(records, vqgan, tiny_tokenizer(), path, progress=False, **options)


def files_of(folder):
    """What a store consists of, but for the tokenizers, whose writer puts the time in."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def pixels(seed, size=(16, 24)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


class Shared(list):
    """24 pairs that share pictures near and far; counts what is read."""

    def __init__(self):
        pair = lambda i: Record(pixels(i % 7), pixels(100 + i // 3), f"do {i}", task="edit" if i % 4 else "t", group=f"g{i % 5}")
        super().__init__(pair(i) for i in range(24))
        self.reads = 0

    def __getitem__(self, i):
        self.reads += 1
        return super().__getitem__(i)
