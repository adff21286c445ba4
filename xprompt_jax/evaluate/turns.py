"""Pictures that are edited several times over: each turn starts from what the model drew in the turn before.

    input --turn 1, its words, its example--> drawn --turn 2, ...--> drawn --> held against the last target

Every arm goes its own way: what the wrong example drew in turn 1 is what it edits in turn 2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from xprompt_jax.data.sources import Record
from xprompt_jax.evaluate.modes import Mode, Shown, draw_shown
from xprompt_jax.evaluate.pairs import AT_ONCE, NO_EXAMPLE, Episode, Examples, Outcome, Read, pairs_in, read_queries

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt


@dataclasses.dataclass(frozen=True)
class Turns(Record):
    """Example pairs for a session, one for each of its turns; its own fields are the first's."""

    turns: tuple[Record, ...] = ()

    @classmethod
    def of(cls, pairs: Sequence[Record]) -> Turns:
        """One pair for each turn, in order."""
        first = {field.name: getattr(pairs[0], field.name) for field in dataclasses.fields(Record)}
        return cls(**first, turns=tuple(pairs))


def at_turn(record: Record, turn: int) -> Record:
    """The pair that an example shows in a turn, from 0; one that has fewer begins again."""
    pairs = pairs_in(record)
    return pairs[turn % len(pairs)]


def run_turns(
    model: XPrompt, episodes: Sequence[Episode], *, read: Read, mode: Mode = "xprompt", seed: int = 0, progress: bool = True,
    **sampling: Any,
) -> Iterator[Outcome]:  # fmt: skip
    """As `run_pairs` with no_example, for queries of several turns.

    Args:
      episodes: a query's `turns` are drawn one after the other; examples may have a pair for each turn (`Turns`).
      read, mode, seed, sampling: see `run_pairs`.

    Yields:
      An outcome for each episode, in order: its images are those of the last turn.

    Raises:
      UserError: an image cannot be read.
    """
    shown = Examples(model, mode, read)
    total = sum(len(pairs_in(e.query)) for e in episodes)
    with tqdm(total=total, unit="turn", desc="drawing", disable=not progress) as bar:
        for first in range(0, len(episodes), AT_ONCE):
            part = episodes[first : first + AT_ONCE]
            pictures, ceilings = read_queries(model, {id(e.query): e.query for e in part}, read)
            # (episode, arm) -> what it has drawn so far; without an example, (query, arm).
            now: dict[tuple[int, str], np.ndarray] = {}
            for i, e in enumerate(part):
                for way in ((i, "drawn"), (i, "wrong"), (id(e.query), NO_EXAMPLE)):
                    now[way] = pictures[id(e.query)][0]
            for turn in range(max(len(pairs_in(e.query)) for e in part)):
                active = [(i, e) for i, e in enumerate(part) if turn < len(pairs_in(e.query))]
                rows: dict[tuple[int, str], tuple[Shown, str]] = {}
                for i, e in active:
                    words = pairs_in(e.query)[turn].instruction
                    rows[i, "drawn"] = shown(at_turn(e.example, turn))[0], words
                    rows[i, "wrong"] = shown(at_turn(e.wrong, turn), e.backwards)[0], words
                    rows[id(e.query), NO_EXAMPLE] = shown.nothing, words
                inputs = [now[way] for way in rows]
                images = draw_shown(model, [s for s, _ in rows.values()], [w for _, w in rows.values()], inputs, seed=seed, **sampling)
                now |= zip(rows, images, strict=True)
                bar.update(len(active))
            for i, e in enumerate(part):
                key, (before, after) = id(e.query), pictures[id(e.query)]
                own = {"drawn": now[i, "drawn"], "wrong": now[i, "wrong"], NO_EXAMPLE: now[key, NO_EXAMPLE]}
                yield Outcome(e, shown(at_turn(e.example, 0))[1], {**own, "copied": before, "ceiling": ceilings[key]}, after)
