"""The oracle of `data.pipeline.Episodes`: the same rules, pair by pair, in Python; and small stores of made pairs."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from pathlib import Path

import numpy as np

from xprompt_jax.data.holdouts import held_directions
from xprompt_jax.data.pipeline import CAPTION_QUESTION, GENERIC_INSTRUCTIONS
from xprompt_jax.data.store import Encoding, Store, StoreWriter
from xprompt_jax.data.table import CATEGORIES, TEXTS, Pair, TokenCounter
from xprompt_jax.prompt import DESCRIBE_QUESTION


def made_store(folder: Path, pairs: list[Pair], tokenizer, *, images: int, grid: int = 4, crops: int = 1, num_codes: int = 32) -> Store:
    """A store of random codes and given pairs, without pictures."""
    folder.mkdir(parents=True)
    names = {name: list(dict.fromkeys(getattr(p, name) for p in pairs)) for name in CATEGORIES}
    encoding = Encoding("0" * 16, tokenizer.fingerprint, "meta", crops, 4 * grid, grid)
    writer = StoreWriter(folder, encoding, images=images, names=names)
    rng, count = np.random.default_rng(0), TokenCounter(tokenizer)
    for i in range(images):
        writer.add_image(rng.integers(0, num_codes, (crops, grid, grid)).astype("<u2").tobytes(), i.to_bytes(32, "little"))
    columns = {f.name: [getattr(p, f.name) for p in pairs] for f in dataclasses.fields(Pair)}
    columns |= {name: [names[name].index(value) for value in columns[name]] for name in CATEGORIES}
    writer.add_pairs(columns | {f"{name}_tokens": count(columns[name]) for name in TEXTS})
    writer.finish()
    return Store.open(folder)


class SlowEpisodes:
    """Which episodes there are, and which partners and neighbours each may have."""

    def __init__(self, store, prompter, config, bucket, split, neighbours=None):
        self.store, self.prompter, self.config, self.bucket, self.neighbours = store, prompter, config, bucket, neighbours
        self.table = list(store.pairs)
        pairs = [(i, p) for i, p in enumerate(self.table) if p.split == split]
        holdouts = config.holdouts if split == "train" else ()
        self.held = {i: held_directions(p, holdouts, strict=config.strict_holdouts) for i, p in pairs} if holdouts else {}
        fits = [(i, p) for i, p in pairs if self.fits(p)]
        self.groups = defaultdict(list)
        for i, p in fits:
            self.groups[p.group].append(i)
        directions = (False, True) if config.reverse and bucket.kind != "text_to_image" else (False,)
        self.specs = [(i, reverse) for i, p in fits for reverse in directions if self.usable(i, p, reverse)]

    def words(self, text):
        return _count(self.prompter.tokenizer, text)

    def may_show(self, partner, number, reverse):
        shown, pair = self.table[partner], self.table[number]
        if partner == number or self.held.get(partner) != self.held.get(number):
            return False
        if not instruction(shown, reverse) or shown.more_inputs or not self.fits(shown):
            return False
        return self.config.same_scene_partner or shown.input != pair.input

    def near(self, number, reverse):
        if self.neighbours is None:
            return []
        return [int(j) for j in self.neighbours[number] if j >= 0 and self.may_show(int(j), number, reverse)]

    def partners(self, number, reverse):
        return [j for j in self.groups[self.table[number].group] if self.may_show(j, number, reverse)]

    def usable(self, number, pair, reverse):
        if self.bucket.kind == "text_to_image":
            return bool(pair.caption)
        if self.held.get(number, (False, False))[reverse]:
            return False
        if self.bucket.kind == "describe":
            return bool(pair.reverse_description if reverse else pair.description) and not pair.more_inputs
        if not instruction(pair, reverse) or (pair.more_inputs and (reverse or self.bucket.examples)):
            return False
        if self.bucket.several_inputs and not pair.more_inputs:
            return False
        return not self.bucket.examples or bool(self.near(number, reverse) or self.partners(number, reverse))

    def fits(self, pair):
        words = self.words
        image = self.prompter.layout.num_tokens(*self.store.codes.shape[1:])
        if self.bucket.kind == "text_to_image":
            return words(pair.caption) + 1 + image + 1 <= self.bucket.todo
        if self.bucket.kind == "describe":
            answer = 1 + max(words(pair.description), words(pair.reverse_description))
            task = max(map(words, (DESCRIBE_QUESTION, CAPTION_QUESTION))) + 1 + answer
            return 2 * image + 1 <= self.bucket.context and task <= self.bucket.todo and answer <= self.bucket.answer
        text = max(map(words, (pair.instruction, pair.reverse_instruction, *GENERIC_INSTRUCTIONS)))
        fits_example = not self.bucket.examples or text + 2 * image + 1 <= self.bucket.context
        return fits_example and text + 2 * image + 2 + len(pair.more_inputs) * (image + 1) <= self.bucket.todo


@functools.cache
def _count(tokenizer, text):
    return len(tokenizer.encode(text))


def instruction(pair, reverse):
    return pair.reverse_instruction if reverse else pair.instruction
