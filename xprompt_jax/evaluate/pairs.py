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


def run_pairs(
    model: XPrompt, episodes: Sequence[Episode], *, read: Read | None = None, no_example: bool = False, seed: int = 0,
    progress: bool = True, **sampling: Any,
) -> Iterator[Outcome]:  # fmt: skip
    """Draws every episode from its example and from its wrong example, in batches.

    Examples are compiled once each. The words of the task are the query's own in both arms, so what the wrong example loses came
    through the XP tokens. An image depends on the seed and its own prompt alone, not on the order or the number of episodes.

    Args:
      read: opens a record; the default is the centre crop that models are trained on.
      no_example: draws every query without an example too, as the arm NO_EXAMPLE.
      sampling: temperature, top_k, top_p, guidance, decoding, window of `XPrompt.generate`.

    Yields:
      An outcome for each episode, in order.

    Raises:
      UserError: an image cannot be read.
    """
    from xprompt_jax.sample.sampler import Example

    size = model.config.vq.image_size
    read = read or (lambda record: (_crop(record.input, size), _crop(record.output, size)))
    shown = {id(record): record for e in episodes for record in (e.example, e.wrong)}

    @functools.lru_cache(maxsize=PROMPTS)
    def compiled(key: int, backwards: bool = False):
        record, (before, after) = shown[key], read(shown[key])
        if backwards:
            return model.compile([Example(after, before, record.reverse_instruction or record.instruction)]), (after, before)
        return model.compile([Example(before, after, record.instruction)]), (before, after)

    with tqdm(total=len(episodes), unit="image", desc="drawing", disable=not progress) as bar:
        for first in range(0, len(episodes), AT_ONCE):
            part = episodes[first : first + AT_ONCE]
            opened = {id(e.query): e.query for e in part}
            pictures = {key: read(record) for key, record in opened.items()}
            targets = [after for _, after in pictures.values()]
            ceilings = dict(zip(pictures, _arrays(model.decode_images(model.encode_images(targets))), strict=True))
            inputs = [pictures[id(e.query)][0] for e in part] * 2
            prompts = [compiled(id(e.example))[0] for e in part] + [compiled(id(e.wrong), e.backwards)[0] for e in part]
            queries = [e.query for e in part] * 2
            if no_example:
                prompts, inputs = prompts + [model._no_example] * len(opened), inputs + [before for before, _ in pictures.values()]
                queries += opened.values()
            prompts = [dataclasses.replace(p, instruction=q.instruction) for p, q in zip(prompts, queries, strict=True)]
            images = _arrays(model.generate(prompts, inputs, seed=seed, **sampling))
            alone = dict(zip(opened, images[2 * len(part) :], strict=no_example))
            for i, e in enumerate(part):
                before, after = pictures[id(e.query)]
                arms = {"drawn": images[i], "wrong": images[len(part) + i], "copied": before, "ceiling": ceilings[id(e.query)]}
                if no_example:
                    arms[NO_EXAMPLE] = alone[id(e.query)]
                yield Outcome(e, compiled(id(e.example))[1], arms, after)
            bar.update(len(part))


def _crop(image: Any, size: int) -> np.ndarray:
    return resize_center_crop(open_image(image), size)


def _arrays(images: Sequence[Any]) -> list[np.ndarray]:
    return [np.asarray(image) for image in images]


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
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(resamples)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(values.mean()), float(low), float(high)
