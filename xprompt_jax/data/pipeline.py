"""From the token store to batches: episodes composed on the fly, a pure function of (seed, step).

    store.pairs x {forwards, reversed}  ->  mixed, shuffled, repeated  ->  choice (query, direction, partners, crops)  ->  slots  ->  batch

The only importer of Grain. Nothing is packed and nothing is stateful, so batch `step` can be made at any time on any
host; the rows of a step are the same set on 1, 2 or 4 hosts, and resuming is calling with another number.

What episodes there are follows from the columns of the table of pairs, by whole arrays; only the pairs of a row are ever read.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from xprompt_jax.config import BucketConfig, DataConfig
from xprompt_jax.data.holdouts import held
from xprompt_jax.data.mixture import Mixture
from xprompt_jax.data.retrieval import RetrievalIndex
from xprompt_jax.data.store import Store
from xprompt_jax.data.table import Pair
from xprompt_jax.errors import UserError
from xprompt_jax.prompt import DESCRIBE_QUESTION, Prompter, Sample, Slots, SlotShape, fill, most_targets, stack

log = logging.getLogger(__name__)

GENERIC_INSTRUCTIONS = (
    "Do what the example shows.",
    "Apply the change of the example to this image.",
    "Do the same to this image.",
    "Repeat the example's edit.",
)
"""Instructions that leave the task to the example."""

CAPTION_QUESTION = "Describe the image in detail."
"""Task text of a dense description; the image stands in IE, so the answer comes through XP alone."""

NO_TOKENS = np.zeros(0, np.int32)

Batches = Mapping[str, dict[str, np.ndarray]]


@dataclass(frozen=True)
class Choice:
    """What a row shows: everything that is drawn, before there are tokens."""

    pair: int
    """Number of the query's pair."""
    reverse: bool
    crop: int
    """Of all images of the query."""
    partners: tuple[int, ...] = ()
    """Numbers of the examples' pairs, one for each example."""
    partner_crops: tuple[int, ...] = ()
    """One for each partner."""
    generic: str = ""
    """A text that leaves the task to the example, in place of every instruction; "" keeps the instructions."""
    dropped: bool = False
    """The examples say nothing."""


class Rows:
    """This host's rows of every bucket, by step.

    Args:
      store: the tokens.
      prompter: tokenizer and layout.
      config: buckets, mixture, mode, seed.
      num_xp: S.
      split: "train" or "eval".
      host: (index, count), which share of a step's rows this process feeds (`mesh.row_share`).

    Raises:
      UserError: a bucket finds no pair in the store, or its rows do not divide over the hosts.
    """

    def __init__(
        self, store: Store, prompter: Prompter, config: DataConfig, num_xp: int, *, split: str = "train", host: tuple[int, int] = (0, 1)
    ):
        index, count = host
        neighbours = RetrievalIndex.load(config.index).neighbours_in(store) if config.index else None
        table = PairTable(store, prompter, config, split)
        mixture = Mixture.of(store.pairs, config.weights, table.in_split)
        self._store, self._buckets = store, config.buckets
        self._choices, self._batches = {}, {}
        self.num_episodes = 0
        """Of all buckets: queries, directions and kinds of answer."""
        for number, bucket in enumerate(config.buckets):
            if bucket.rows % count:
                raise UserError(f"bucket {bucket.name!r}: {bucket.rows} rows do not divide over {count} hosts or groups of them")
            episodes = Episodes(store, prompter, config, bucket, num_xp, split, neighbours, table)
            self.num_episodes += len(episodes)
            # Seeds differ by bucket and split; Grain hands every global row its own generator before hosts take their share.
            seed = int(np.random.SeedSequence([config.seed, number, split == "train"]).generate_state(1)[0])
            choices = _order(episodes, mixture, seed).random_map(episodes.choose, seed=seed)
            rows = choices.map(episodes.slots)
            join = functools.partial(stack, max_targets=most_targets(bucket, episodes.shape, config.loss))
            self._choices[bucket.name] = choices
            self._batches[bucket.name] = rows[index::count].batch(bucket.rows // count, batch_fn=join)

    def __call__(self, step: int) -> Batches:
        """Batch `step` of every bucket."""
        return {name: rows[step] for name, rows in self._batches.items()}

    def choices(self, step: int) -> dict[str, list[Choice]]:
        """What all hosts' rows of a step show, by bucket; row r is row r of a single host's batch."""
        return {b.name: [self._choices[b.name][step * b.rows + row] for row in range(b.rows)] for b in self._buckets}

    def names(self, step: int) -> list[str]:
        """What all hosts' rows of a step are: bucket, group and number of the store's pair, for messages."""
        group = self._store.pairs.group
        return [
            f"{bucket} {group.names[group.codes[choice.pair]]} pair {choice.pair + 1}{' reversed' if choice.reverse else ''}"
            for bucket, choices in self.choices(step).items() for choice in choices
        ]  # fmt: skip


def _order(episodes: Episodes, mixture: Mixture, seed: int) -> grain.MapDataset:
    """Numbers of episodes, for ever: each part of the mixture shuffled by itself, and dealt out evenly at its rate."""
    rates, parts = mixture.rates(episodes.specs.pairs)
    shuffled = [
        grain.MapDataset.range(len(part)).shuffle(seed=(seed + i) % 2**32).repeat().map(lambda j, part=part: int(part[j]))
        for i, part in enumerate(parts)
    ]
    return shuffled[0] if len(shuffled) == 1 else grain.MapDataset.mix(shuffled, weights=rates)


class PairTable:
    """What the buckets of a split ask of the columns of pairs, found once.

    Pairs of one group that are held out in the same directions are a class: they may be examples for each other, so that an example
    never shows what its query may not. Pairs of a class that share what an example may not share with its query (the input image; the pair
    itself, with `same_scene_partner`) are a run. Runs are numbered class by class.
    """

    def __init__(self, store: Store, prompter: Prompter, config: DataConfig, split: str):
        pairs = store.pairs
        self.in_split = np.array([name == split for name in pairs.split.names], bool)[pairs.split.codes]
        # bool [P, 2]: what may not be trained, forwards and backwards, so that it can be asked as a novel task.
        self.held = np.zeros((len(pairs), 2), bool)
        if split == "train":
            self.held = held(pairs, config.holdouts, strict=config.strict_holdouts) & self.in_split[:, None]
            if self.held.any():
                log.info("%d of %d pairs are held out, forwards or both ways", self.held.any(1).sum(), self.in_split.sum())
        own = store.tokenizer == prompter.tokenizer.fingerprint
        self.num_tokens = pairs.num_tokens if own else pairs.count_tokens(prompter.tokenizer)
        # bool [P, 2]: what has an instruction, and so can be an example or a query, forwards and backwards.
        self.told = np.stack([self.num_tokens["instruction"] > 0, self.num_tokens["reverse_instruction"] > 0], 1)

        together = pairs.group.codes.astype(np.int64) * 4 + self.held @ np.array([1, 2])
        apart = np.arange(len(pairs)) if config.same_scene_partner else pairs.input
        order = np.lexsort((apart, together))
        new_class = np.diff(together[order], prepend=-1) != 0
        new_run = new_class | (np.diff(apart[order], prepend=-1) != 0)
        self.by_run = order.astype(np.int32)
        """int32 [P], all pairs, class by class and run by run."""
        self.class_of, self.run_of = np.empty(len(pairs), np.int32), np.empty(len(pairs), np.int32)
        self.class_of[order], self.run_of[order] = np.cumsum(new_class) - 1, np.cumsum(new_run) - 1


class Partners:
    """The pairs that can be examples in one direction, and who may show what to whom.

    Args:
      can: bool [P], the pairs that can be examples.
    """

    def __init__(self, table: PairTable, can: np.ndarray):
        self._table = table
        self._pairs = table.by_run[can[table.by_run]]
        self._class_starts, self._run_starts = _starts(table.class_of, can), _starts(table.run_of, can)

    def count(self, pairs: np.ndarray) -> np.ndarray:
        """How many partners each of these pairs has, int64 [n]."""
        first, own, own_end, end = self._places(pairs)
        return end - first - (own_end - own)

    def draw(self, pair: int, rng: np.random.Generator) -> int:
        """One of a pair's partners, all equally likely. There must be one."""
        first, own, own_end, end = map(int, self._places(pair))
        at = first + int(rng.integers(end - first - (own_end - own)))
        return int(self._pairs[at if at < own else at + own_end - own])

    def of(self, pair: int) -> list[int]:
        """All of a pair's partners."""
        first, own, own_end, end = self._places(pair)
        return [*self._pairs[first:own].tolist(), *self._pairs[own_end:end].tolist()]

    def _places(self, pairs):
        """Where the class of a pair (or of many) begins in `_pairs`, where its run begins and ends, and where the class ends."""
        of_class, of_run = self._table.class_of[pairs], self._table.run_of[pairs]
        return self._class_starts[of_class], self._run_starts[of_run], self._run_starts[of_run + 1], self._class_starts[of_class + 1]


def _starts(part_of: np.ndarray, can: np.ndarray) -> np.ndarray:
    """Where each part begins among the pairs that `can`, and where the last ends: int64 [parts + 1]."""
    return np.concatenate([[0], np.cumsum(np.bincount(part_of[can], minlength=int(part_of.max(initial=-1)) + 1))])


class Specs(Sequence[tuple[int, bool]]):
    """Which pairs are queries of a bucket, and in which direction: int32 pair numbers and bools, [n] each."""

    def __init__(self, usable: np.ndarray):
        """From bool [P, 2]."""
        self.pairs, reverse = (part.astype(np.int32) for part in np.nonzero(usable))
        self.reverse = reverse.astype(bool)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i):
        return int(self.pairs[i]), bool(self.reverse[i])


class Episodes:
    """All episodes of one bucket: number i picks the query and the direction, a generator picks the rest.

    Args:
      neighbours: int [P, k], pairs near each pair, -1 where there are no more (`RetrievalIndex.neighbours_in`).
      table: of the same store, configuration and split.

    Raises:
      UserError: the split has no pair for this bucket.
    """

    def __init__(
        self, store: Store, prompter: Prompter, config: DataConfig, bucket: BucketConfig, num_xp: int, split: str,
        neighbours: np.ndarray | None = None, table: PairTable | None = None,
    ):  # fmt: skip
        self.store, self.prompter, self.config, self.bucket, self.neighbours = store, prompter, config, bucket, neighbours
        self.shape = SlotShape.of(bucket, num_xp, config.mode)
        self._repeats = config.repeat_example if split == "train" else 0.0
        self.table = table or PairTable(store, prompter, config, split)
        fits = self.fits()
        if long := int((self.table.in_split & ~fits).sum()):
            log.warning("bucket %s: %d of %d pairs are too long and left out whole", bucket.name, long, self.table.in_split.sum())
        self.can_show = self.table.told & (fits & ~store.pairs.has_more)[:, None]
        self.partners = [Partners(self.table, self.can_show[:, way] & self.table.in_split) for way in (0, 1)]
        self.specs = Specs(self._usable() & (fits & self.table.in_split)[:, None])
        if not self.specs:
            raise UserError(f"bucket {bucket.name!r} finds no {split} pair it can use; tokenize other data or change the bucket")

    def __len__(self) -> int:
        return len(self.specs)

    def fits(self) -> np.ndarray:
        """Whether each pair fits as query and as example in either direction, whatever instruction is drawn: bool [P]."""
        n, bucket = self.table.num_tokens, self.bucket
        words = lambda text: len(self.prompter.tokenizer.encode(text))
        image = self.prompter.layout.num_tokens(*self.store.codes.shape[1:3])
        if bucket.kind == "text_to_image":
            return n["caption"] + 1 + image + 1 <= bucket.todo
        if bucket.kind == "describe":
            answer = 1 + np.maximum(n["description"], n["reverse_description"])
            task = max(map(words, (DESCRIBE_QUESTION, CAPTION_QUESTION))) + 1 + answer
            return (2 * image + 1 <= bucket.context) & (task <= bucket.todo) & (answer <= bucket.answer)
        text = np.maximum(np.maximum(n["instruction"], n["reverse_instruction"]), max(map(words, GENERIC_INSTRUCTIONS)))
        fits_example = not bucket.examples or text + 2 * image + 1 <= bucket.context
        return fits_example & (text + 2 * image + 2 + self.store.pairs.num_more * (image + 1) <= bucket.todo)

    def _usable(self) -> np.ndarray:
        """Whether each pair can be asked forwards and backwards, too long or not: bool [P, 2]."""
        n, pairs, bucket = self.table.num_tokens, self.store.pairs, self.bucket
        alone = ~pairs.has_more
        if bucket.kind == "text_to_image":
            return np.stack([n["caption"] > 0, np.zeros(len(pairs), bool)], 1)
        if bucket.kind == "describe":
            usable = np.stack([n["description"] > 0, n["reverse_description"] > 0], 1) & alone[:, None]
        else:
            forwards = ~alone if bucket.several_inputs else alone | (not bucket.examples)
            usable = self.table.told & np.stack([forwards, alone & (not bucket.several_inputs)], 1)
        usable &= ~self.table.held
        usable[:, 1] &= self.config.reverse
        if bucket.kind == "image" and bucket.examples:
            every = np.arange(len(pairs))
            shown = np.stack([self.partners[way].count(every) > 0 for way in (0, 1)], 1)
            if self.neighbours is not None:
                shown |= np.stack([self._near_enough(every, way).any(1) for way in (0, 1)], 1)
            usable &= shown
        return usable

    def _near_enough(self, pairs: np.ndarray, way: int) -> np.ndarray:
        """Which neighbours of these pairs can be their example in a direction: bool [n, k].

        Neighbours are training pairs, also of a pair that is held out for evaluation.
        """
        assert self.neighbours is not None
        near, table, inputs = self.neighbours[pairs], self.table, self.store.pairs.input
        own = pairs[:, None]
        allowed = (near >= 0) & (near != own) & self.can_show[near, way] & (table.held[near] == table.held[own]).all(-1)
        return allowed if self.config.same_scene_partner else allowed & (inputs[near] != inputs[own])

    def near(self, number: int, reverse: bool) -> np.ndarray:
        """The neighbours that can be an example of a pair, nearest first: int [n]."""
        if self.neighbours is None:
            return np.zeros(0, np.int32)
        return self.neighbours[number][self._near_enough(np.array([number]), int(reverse))[0]]

    def choose(self, i: int, rng: np.random.Generator) -> Choice:
        """What episode i shows."""
        number, reverse = self.specs[i]
        generic, dropped, partners = "", False, tuple[int, ...]()
        if self.bucket.kind == "image":
            generic = str(rng.choice(GENERIC_INSTRUCTIONS)) if rng.random() < self.config.generic_instruction else ""
            generic = generic if self.bucket.examples else ""  # drawn all the same: no other row of a seed changes
            dropped = bool(rng.random() < self.config.drop_example)
            partners = self._choose_partners(number, reverse, rng)
        crop, *partner_crops = (int(rng.integers(self.store.encoding.crops)) for _ in (number, *partners))
        if partners and self._repeats and self.can_show[number, int(reverse)] and rng.random() < self._repeats:
            at = int(rng.integers(len(partners)))
            partners, partner_crops[at] = (*partners[:at], number, *partners[at + 1 :]), crop
        return Choice(number, reverse, crop, partners, tuple(partner_crops), generic, dropped)

    def _choose_partners(self, number: int, reverse: bool, rng: np.random.Generator) -> tuple[int, ...]:
        examples = range(self.bucket.examples)
        near = self.near(number, reverse)
        if len(near):
            return tuple(int(near[rng.integers(len(near))]) for _ in examples)
        return tuple(self.partners[reverse].draw(number, rng) for _ in examples)

    def slots(self, choice: Choice) -> Slots:
        """The row of a choice."""
        vocab = self.prompter.vocab
        return fill(self.sample(choice), self.shape, bos=vocab.bos, pad=vocab.pad, mode=self.config.mode, loss=self.config.loss)

    def sample(self, choice: Choice) -> Sample:
        """The tokens of a choice."""
        pair, prompter, reverse = self.store.pairs[choice.pair], self.prompter, choice.reverse
        before, after = self._codes(pair, reverse, choice.crop)
        if self.bucket.kind == "text_to_image":
            return Sample((), prompter.text_task(pair.caption), prompter.image_answer(before))
        if self.bucket.kind == "describe":
            text = pair.reverse_description if reverse else pair.description
            if pair.input == pair.output:  # a picture alone: its caption, also through XP
                return Sample((prompter.task("", before),), prompter.text_task(CAPTION_QUESTION), prompter.text_answer(text))
            example = prompter.example("", before, after)
            return Sample((example,), prompter.text_task(DESCRIBE_QUESTION), prompter.text_answer(text))

        examples = []
        for number, crop in zip(choice.partners, choice.partner_crops, strict=True):
            shown = self.store.pairs[number]
            text = choice.generic or _instruction(shown, reverse)
            examples.append(NO_TOKENS if choice.dropped else prompter.example(text, *self._codes(shown, reverse, crop)))
        more = [prompter.task("", self.store.codes.crops(image)[choice.crop]) for image in pair.more_inputs]
        prompt = [prompter.task(choice.generic or _instruction(pair, reverse), before), *more]
        return Sample(tuple(examples), np.concatenate(prompt), prompter.image_answer(after))

    def _codes(self, pair: Pair, reverse: bool, crop: int) -> tuple[np.ndarray, np.ndarray]:
        before, after = (self.store.codes.crops(image)[crop] for image in (pair.input, pair.output))
        return (after, before) if reverse else (before, after)


def _instruction(pair: Pair, reverse: bool) -> str:
    return pair.reverse_instruction if reverse else pair.instruction
