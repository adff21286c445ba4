"""Drawing held-out pairs from example pairs, with the controls that say what a score is worth.

    records --make_episodes--> episodes --run_pairs--> outcomes --(metrics)--> scores

Each query is drawn from several example pairs of its group, because the score depends on the pair that is shown. Beside what is
drawn stand the controls: drawn from a wrong example under the right words, perhaps drawn from the words alone, the input left as it
is, and the target after the image tokenizer, which no model can beat.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from xprompt_jax.data.images import open_image, resize_center_crop
from xprompt_jax.data.sources import Record
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.modes import Mode, Shown, draw_shown, show

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

ARMS = ("drawn", "wrong", "copied", "ceiling")
"""What is compared with the target: drawn from the right example, drawn from a wrong one, the input, the target's reconstruction."""

NO_EXAMPLE = "none"
"""The arm of `run_pairs` that is drawn from the words alone: XP tokens that have seen nothing. It depends on the query, not the example."""

AT_ONCE = 16
"""Episodes that are drawn together: as much is lost at most when a run is killed."""
PROMPTS = 64
"""Compiled prompts that are kept; one of a 7B model takes some 30 MB."""

Read = Callable[[Record], tuple[np.ndarray, np.ndarray]]
"""A record -> its input and its output as the model meets them, uint8 [size, size, 3]."""


@dataclasses.dataclass(frozen=True, eq=False)
class Episode:
    """A query, an example to draw it from, and a wrong one."""

    query: Record
    example: Record
    wrong: Record
    backwards: bool
    """The wrong example is shown from output to input."""
    choice: int
    """Number of the example among those of its group: scores are spread over it."""


@dataclasses.dataclass(frozen=True, eq=False)
class Outcome:
    """What came of an episode."""

    episode: Episode
    example: tuple[np.ndarray, np.ndarray]
    """The example's input and output, uint8 [size, size, 3]."""
    images: Mapping[str, np.ndarray]
    """By arm, uint8 [size, size, 3]."""
    target: np.ndarray
    """The query's output, uint8 [size, size, 3]."""


def make_episodes(
    queries: Sequence[Record], shown: Sequence[Record] = (), *, examples: int = 3, per_group: int = 0, seed: int = 0
) -> list[Episode]:
    """Chooses examples, once for each group, and pairs them with its queries.

    Args:
      queries: held-out pairs.
      shown: pairs to take examples from. A group that has none here sets its examples aside from its queries.
      examples: example pairs of a group, each drawn from for every query; fewer where the group has fewer.
      per_group: most queries of a group; 0 takes all.
      seed: of the choices.

    Returns:
      Episodes, all examples of a query side by side. The wrong example is a pair of the next group with another task; with one task,
      of the next group; with one group, the example itself shown backwards.

    Raises:
      UserError: no group has both an example and a query.
    """
    if examples < 1:
        raise UserError("at least 1 example is needed")
    groups: dict[str, list[Record]] = {}
    sources: dict[str, list[Record]] = {}
    for table, records in ((groups, queries), (sources, shown)):
        for record in records:
            table.setdefault(record.group, []).append(record)
    chosen: dict[str, list[Record]] = {}
    for number, (group, asked) in enumerate(groups.items()):
        rng = np.random.default_rng([seed, number])
        pool = sources.get(group, asked)
        # Examples that are set aside leave at least one query.
        count = min(examples, len(pool) if group in sources else len(asked) - 1)
        picked = rng.permutation(len(pool))[:count]
        chosen[group] = [pool[i] for i in picked]
        if group not in sources:
            groups[group] = [record for i, record in enumerate(asked) if i not in picked]
    names = [group for group, picked in chosen.items() if picked]
    if not names:
        raise UserError("no group of the held-out pairs has both an example and a query; give more pairs, or examples of their own")
    episodes = []
    for place, group in enumerate(names):
        others = names[place + 1 :] + names[:place]
        other = next((o for o in others if chosen[o][0].task != chosen[group][0].task), others[0] if others else None)
        wrong = chosen[group] if other is None else chosen[other]
        for query in groups[group][: per_group or None]:
            for choice, example in enumerate(chosen[group]):
                episodes.append(Episode(query, example, wrong[choice % len(wrong)], other is None, choice))
    return episodes


def pairs_in(record: Record) -> tuple[Record, ...]:
    """The pairs that a record stands for: itself, or those of `turns.Turns`, turn by turn."""
    return getattr(record, "turns", (record,))


class Examples:
    """Example pairs as a model is shown them, each encoded once and kept for a while.

    Args:
      read: opens a record.
    """

    def __init__(self, model: XPrompt, mode: Mode, read: Read):
        self._model, self._mode, self._read = model, mode, read
        self._records: dict[int, Record] = {}
        self._known = functools.lru_cache(maxsize=PROMPTS)(self._encode)
        self.nothing = show(model, mode, None)

    def __call__(self, record: Record, backwards: bool = False) -> tuple[Shown, tuple[np.ndarray, np.ndarray]]:
        """What is shown, and its two pictures in the order of showing."""
        self._records[id(record)] = record
        return self._known(id(record), backwards)

    def _encode(self, key: int, backwards: bool) -> tuple[Shown, tuple[np.ndarray, np.ndarray]]:
        from xprompt_jax.sample.sampler import Example

        record = self._records[key]
        before, after = self._read(record)
        words = record.instruction
        if backwards:
            before, after, words = after, before, record.reverse_instruction or words
        if self._mode == "none":
            return self.nothing, (before, after)
        return show(self._model, self._mode, Example(before, after, words)), (before, after)


def run_pairs(
    model: XPrompt, episodes: Sequence[Episode], *, read: Read | None = None, no_example: bool = False, wrong: bool = True,
    mode: Mode = "xprompt", seed: int = 0, progress: bool = True, **sampling: Any,
) -> Iterator[Outcome]:  # fmt: skip
    """Draws every episode from its example and from its wrong example, in batches.

    Examples are compiled once each. The words of the task are the query's own in all arms, so what the wrong example loses came
    through the XP tokens. An image depends on the seed and its own prompt alone, not on the order or the number of episodes.

    Args:
      read: opens a record; the default is the centre crop that models are trained on.
      no_example: draws every query without an example too, as the arm NO_EXAMPLE.
      wrong: draws from the wrong example; False leaves that arm out.
      mode: how examples are shown.
      sampling: defaults, temperature, top_k, top_p, guidance, decoding, window of `XPrompt.generate`.

    Yields:
      An outcome for each episode, in order.

    Raises:
      UserError: an image cannot be read.
    """
    size = model.config.vq.image_size
    read = read or (lambda record: (_crop(record.input, size), _crop(record.output, size)))
    shown = Examples(model, mode, read)
    with tqdm(total=len(episodes), unit="image", desc="drawing", disable=not progress) as bar:
        for first in range(0, len(episodes), AT_ONCE):
            part = episodes[first : first + AT_ONCE]
            opened = {id(e.query): e.query for e in part}
            pictures, ceilings = read_queries(model, opened, read)
            codes = dict(zip(opened, model.encode_images([pictures[key][0] for key in opened]), strict=True))  # once for all arms
            by_arm = {"drawn": [shown(e.example)[0] for e in part]}
            if wrong:
                by_arm["wrong"] = [shown(e.wrong, e.backwards)[0] for e in part]
            if no_example:
                by_arm[NO_EXAMPLE] = [shown.nothing] * len(part)
            # What is shown the same is drawn once.
            rows = {(id(p), id(e.query)): (p, e.query) for prompts in by_arm.values() for p, e in zip(prompts, part, strict=True)}
            drawn = dict(zip(rows, draw_shown(
                model, [p for p, _ in rows.values()], [q.instruction for _, q in rows.values()],
                [codes[id(q)] for _, q in rows.values()], seed=seed, **sampling,
            ), strict=True))  # fmt: skip
            for i, e in enumerate(part):
                key, (before, after) = id(e.query), pictures[id(e.query)]
                arms = {arm: drawn[id(prompts[i]), key] for arm, prompts in by_arm.items()}
                yield Outcome(e, shown(e.example)[1], {**arms, "copied": before, "ceiling": ceilings[key]}, after)
            bar.update(len(part))


def read_queries(
    model: XPrompt, queries: Mapping[int, Record], read: Read
) -> tuple[dict[int, tuple[np.ndarray, np.ndarray]], dict[int, np.ndarray]]:  # fmt: skip
    """Under the same keys: input and output of every query, and its output after the image tokenizer, uint8 [size, size, 3]."""
    pictures = {key: read(record) for key, record in queries.items()}
    targets = [after for _, after in pictures.values()]
    return pictures, dict(zip(pictures, map(np.asarray, model.decode_images(model.encode_images(targets))), strict=True))


def _crop(image: Any, size: int) -> np.ndarray:
    return resize_center_crop(open_image(image), size)


def paired_bootstrap(
    differences: Sequence[float], *, resamples: int = 5000, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of paired differences and its percentile bootstrap interval.

    Args:
      differences: one for each independent unit (a query); those that are not finite are left out.
      level: probability that the interval is meant to hold.

    Returns:
      (mean, low, high); nan where there is nothing.
    """
    values = np.asarray(differences, np.float64)
    values = values[np.isfinite(values)]
    if not values.size:
        return float("nan"), float("nan"), float("nan")
    rng, at_once = np.random.default_rng(seed), max(1, 1_000_000 // len(values))
    parts = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
    means = np.concatenate([values[rng.integers(len(values), size=(part, len(values)))].mean(1) for part in parts])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)
