"""From the token store to batches: episodes composed on the fly, a pure function of (seed, step).

    store.pairs x {forward, reverse}  ->  shuffled, repeated  ->  episode (query, partner, direction)  ->  slots  ->  batch

The only importer of Grain. Nothing is packed and nothing is stateful, so batch `step` can be made at any time on any
host; the rows of a step are the same set on 1, 2 or 4 hosts, and resuming is calling with another number.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping

import grain
import numpy as np

from xprompt_jax.config import BucketConfig, DataConfig
from xprompt_jax.data.holdouts import held_directions
from xprompt_jax.data.retrieval import RetrievalIndex
from xprompt_jax.data.tokenise import Pair, Store
from xprompt_jax.errors import UserError
from xprompt_jax.prompt import DESCRIBE_QUESTION, Prompter, Sample, Slots, SlotShape, fill, stack

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


class Rows:
    """This host's rows of every bucket, by step.

    Args:
      store: the tokens.
      prompter: tokenizer and layout.
      config: buckets, mixture, mode, seed.
      num_xp: S.
      split: "train" or "eval".
      host: (index, count) of this process.

    Raises:
      UserError: a bucket finds no pair in the store, or its rows do not divide over the hosts.
    """

    def __init__(
        self, store: Store, prompter: Prompter, config: DataConfig, num_xp: int, *, split: str = "train", host: tuple[int, int] = (0, 1)
    ):
        index, count = host
        neighbours = RetrievalIndex.load(config.index).neighbours_in(store) if config.index else None
        self._store, self._buckets = store, config.buckets
        self._episodes, self._order, self._batches = {}, {}, {}
        for number, bucket in enumerate(config.buckets):
            if bucket.rows % count:
                raise UserError(f"bucket {bucket.name!r}: {bucket.rows} rows do not divide over {count} hosts")
            episodes = Episodes(store, prompter, config, bucket, num_xp, split, neighbours)
            # Seeds differ by bucket and split; Grain hands every global row its own generator before hosts take their share.
            seed = int(np.random.SeedSequence([config.seed, number, split == "train"]).generate_state(1)[0])
            order = grain.MapDataset.range(len(episodes)).shuffle(seed=seed).repeat()
            rows = order.random_map(lambda i, rng, episodes=episodes: episodes.slots(i, rng), seed=seed)
            join = lambda rows, bucket=bucket: stack(rows, bucket.answer)
            self._episodes[bucket.name], self._order[bucket.name] = episodes, order
            self._batches[bucket.name] = rows[index::count].batch(bucket.rows // count, batch_fn=join)

    def __call__(self, step: int) -> Batches:
        """Batch `step` of every bucket."""
        return {name: rows[step] for name, rows in self._batches.items()}

    def names(self, step: int) -> list[str]:
        """What all hosts' rows of a step are: bucket, group and line of the store's pairs.jsonl, for messages."""
        found = []
        for bucket in self._buckets:
            episodes, order = self._episodes[bucket.name], self._order[bucket.name]
            for row in range(bucket.rows):
                number, reverse = episodes.specs[order[step * bucket.rows + row]]
                found.append(f"{bucket.name} {self._store.pairs[number].group} pair {number + 1}{' reversed' if reverse else ''}")
        return found


class Episodes:
    """All episodes of one bucket: number i picks the query and the direction, a generator picks the rest."""

    def __init__(
        self, store: Store, prompter: Prompter, config: DataConfig, bucket: BucketConfig, num_xp: int, split: str,
        neighbours: np.ndarray | None = None,
    ):  # fmt: skip
        self.neighbours = neighbours
        self.store, self.prompter, self.config, self.bucket = store, prompter, config, bucket
        self.shape = SlotShape.of(bucket, num_xp, config.mode)
        self.partners: dict[str, list[int]] = defaultdict(list)
        pairs = [(i, p) for i, p in enumerate(store.pairs) if p.split == split]
        # (forwards, backwards) of each pair: what may not be trained, so that it can be asked as a novel task.
        holdouts = config.holdouts if split == "train" else ()
        self.held = {i: held_directions(p, holdouts, strict=config.strict_holdouts) for i, p in pairs} if holdouts else {}
        if held := sum(map(any, self.held.values())):
            log.info("bucket %s: %d of %d pairs are held out, forwards or both ways", bucket.name, held, len(pairs))
        fits = [(i, p) for i, p in pairs if self._fits(p)]
        if len(fits) < len(pairs):
            log.warning("bucket %s: %d of %d pairs are too long and left out whole", bucket.name, len(pairs) - len(fits), len(pairs))
        for i, p in fits:
            self.partners[p.group].append(i)
        directions = (False, True) if config.reverse and bucket.kind != "text_to_image" else (False,)
        self.specs = [(i, reverse) for i, p in fits for reverse in directions if self._usable(i, p, reverse)]
        if not self.specs:
            raise UserError(f"bucket {bucket.name!r} finds no {split} pair it can use; tokenize other data or change the bucket")

    def __len__(self) -> int:
        return len(self.specs)

    def slots(self, i: int, rng: np.random.Generator) -> Slots:
        """Row of episode i."""
        vocab = self.prompter.vocab
        sample = self.sample(i, rng)
        return fill(sample, self.shape, bos=vocab.bos, pad=vocab.pad, mode=self.config.mode, loss=self.config.loss)

    def sample(self, i: int, rng: np.random.Generator) -> Sample:
        """Tokens of episode i."""
        number, reverse = self.specs[i]
        pair, prompter = self.store.pairs[number], self.prompter
        before, after = self._codes(pair, reverse)
        if self.bucket.kind == "text_to_image":
            return Sample((), prompter.text_task(pair.caption), prompter.image_answer(before))
        if self.bucket.kind == "describe":
            text = pair.reverse_description if reverse else pair.description
            if pair.input == pair.output:  # a picture alone: its caption, also through XP
                return Sample((prompter.task("", before),), prompter.text_task(CAPTION_QUESTION), prompter.text_answer(text))
            example = prompter.example("", before, after)
            return Sample((example,), prompter.text_task(DESCRIBE_QUESTION), prompter.text_answer(text))

        generic = str(rng.choice(GENERIC_INSTRUCTIONS)) if rng.random() < self.config.generic_instruction else None
        dropped = rng.random() < self.config.drop_example
        examples = []
        for partner in self._choose_partners(number, pair, reverse, rng):
            shown = self.store.pairs[partner]
            text = generic or _instruction(shown, reverse)
            examples.append(NO_TOKENS if dropped else prompter.example(text, *self._codes(shown, reverse)))
        text = generic or _instruction(pair, reverse)
        prompt = [prompter.task(text, before), *(prompter.task("", self.store.codes[image]) for image in pair.more_inputs)]
        return Sample(tuple(examples), np.concatenate(prompt), prompter.image_answer(after))

    def _codes(self, pair: Pair, reverse: bool) -> tuple[np.ndarray, np.ndarray]:
        before, after = self.store.codes[pair.input], self.store.codes[pair.output]
        return (after, before) if reverse else (before, after)

    def _may_show(self, partner: int, number: int, pair: Pair) -> bool:
        """Whether a pair may be the example of pair `number`: never itself, nor its own image.

        Both are held out in the same directions, so that an example never shows what its query may not.
        """
        if partner == number or self.held.get(partner) != self.held.get(number):
            return False
        return self.config.same_scene_partner or self.store.pairs[partner].input != pair.input

    def _retrieved(self, number: int, pair: Pair, reverse: bool) -> list[int]:
        """Neighbours of a pair that can be its example. They are training pairs, also for a pair that is held out for evaluation."""
        if self.neighbours is None:
            return []
        shows = lambda p: bool(_instruction(p, reverse)) and not p.more_inputs and self._fits(p)
        near = (int(j) for j in self.neighbours[number] if j >= 0)
        return [j for j in near if self._may_show(j, number, pair) and shows(self.store.pairs[j])]

    def _choose_partners(self, number: int, pair: Pair, reverse: bool, rng: np.random.Generator) -> list[int]:
        if near := self._retrieved(number, pair, reverse):
            return [near[rng.integers(len(near))] for _ in range(self.bucket.examples)]
        group = self.partners[pair.group]
        chosen: list[int] = []
        while len(chosen) < self.bucket.examples:  # ends: `_usable` has seen that a partner exists
            partner = group[rng.integers(len(group))]
            if self._may_show(partner, number, pair):
                chosen.append(partner)
        return chosen

    def _usable(self, number: int, pair: Pair, reverse: bool) -> bool:
        if self.bucket.kind == "text_to_image":
            return bool(pair.caption)
        if self.held.get(number, (False, False))[reverse]:
            return False
        if self.bucket.kind == "describe":
            return bool(pair.reverse_description if reverse else pair.description) and not pair.more_inputs
        if not _instruction(pair, reverse) or (pair.more_inputs and (reverse or self.bucket.examples)):
            return False
        if not self.bucket.examples or self._retrieved(number, pair, reverse):
            return True
        return any(self._may_show(j, number, pair) for j in self.partners[pair.group])

    def _fits(self, pair: Pair) -> bool:
        """Whether the pair fits as query and as example in either direction, whatever instruction is drawn."""
        words = lambda text: len(self.prompter.tokenizer.encode(text))
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


def _instruction(pair: Pair, reverse: bool) -> str:
    return pair.reverse_instruction if reverse else pair.instruction
