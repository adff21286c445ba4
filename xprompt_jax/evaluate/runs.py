"""A run of a suite as files: planned, drawn image by image, opened again.

    OUT/run.json                      what the images depend on, and where the data lies
    OUT/images/00000/drawn-0.png      query 0 drawn from its example number 0
    OUT/images/00000/wrong-0.png      from a wrong example
    OUT/images/00000/none.png         from the words alone
    OUT/images/00000/ceiling.png      its target through the image tokenizer

Images are at the model's size, before they are brought to the target's. A score is computed from these files and the data's, never from
what is in memory, so that it can be computed again; a run that was killed goes on from the files that are there. The plan itself is a
pure function of run.json and the data. Queries may be drawn by several processes, each its own (`Shard`), into one folder.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xprompt_jax.data.images import open_image, save_png
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.modes import Mode
from xprompt_jax.evaluate.pairs import NO_EXAMPLE, Episode, make_episodes, pairs_in
from xprompt_jax.evaluate.results import WHOLE, Shard, file_fingerprint, fingerprint, start
from xprompt_jax.evaluate.suites import Suite, find_records

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

OF_AN_EXAMPLE = ("drawn", "wrong")
"""Arms that there is an image of for each example of a query."""
OF_A_QUERY = (NO_EXAMPLE, "copied", "ceiling")
"""Arms that there is one image of; "copied" is the input, which is not stored."""
ARMS = OF_AN_EXAMPLE + OF_A_QUERY


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What is to be drawn and scored."""

    suite: Suite
    episodes: Sequence[Episode]
    numbers: Mapping[int, int]
    """id of a query's record -> its number, which names its folder."""
    marks: Mapping[int, str]
    """id of a query's record -> fingerprint of its two files."""
    settings: Mapping[str, Any]
    """JSON values that the episodes and their data depend on."""
    where: Mapping[str, str | None]

    def files(self, out: Path, episode: Episode) -> dict[str, Path]:
        """Arm -> where its image lies; not of "copied"."""
        folder = out / "images" / f"{self.numbers[id(episode.query)]:05d}"
        own = {arm: folder / f"{arm}-{episode.choice}.png" for arm in OF_AN_EXAMPLE}
        return own | {arm: folder / f"{arm}.png" for arm in OF_A_QUERY if arm != "copied"}


def make_plan(
    suite: Suite, data: Path, *, examples_from: Path | None = None, examples: int = 3, per_group: int = 0, eval_fraction: float = 1.0,
    seed: int = 0,
) -> Plan:  # fmt: skip
    """Finds queries and chooses their examples; every file that takes part is read once for its fingerprint.

    Args:
      data: a manifest, or a folder in the suite's layout.
      examples_from: another one, to take the example pairs from; without it, training pairs of `data`, or held-out ones set aside.
      examples, per_group, seed: see `make_episodes`.
      eval_fraction: held out where a manifest does not say.

    Raises:
      UserError: data is missing or cannot be read; says where it is expected.
    """
    records = find_records(suite, data, eval_fraction=eval_fraction)
    queries, shown = [r for r in records if r.split == "eval"], [r for r in records if r.split != "eval"]
    if not queries:
        raise UserError(f'--data {data}: no pair is held out; mark some "split": "eval", or give --eval-fraction')
    if examples_from is not None:
        found = find_records(suite, examples_from, flag="--examples-from")
        shown = [r for r in found if r.split != "eval"] or found  # a whole folder says that it is held out
        if missing := {r.group for r in queries} - {r.group for r in shown}:
            raise UserError(f"--examples-from {examples_from}: no pair of group {min(missing)!r}, which --data asks for")
    episodes = make_episodes(queries, shown, examples=examples, per_group=per_group, seed=seed)

    mark_file = functools.cache(file_fingerprint)
    mark = lambda record: fingerprint(*(mark_file(image) for pair in pairs_in(record) for image in (pair.input, pair.output)))
    words = lambda record: "|".join(pair.instruction for pair in pairs_in(record))
    if e := next((e for e in episodes if mark(e.example) == mark(e.query)), None):
        flag = f"--data {data}" if examples_from is None else f"--examples-from {examples_from}"
        raise UserError(f"{flag}: {e.query.input} would be an example for itself (equal files); give other pairs")
    numbers = {key: number for number, key in enumerate(dict.fromkeys(id(e.query) for e in episodes))}
    told = ["|".join((mark(e.query), words(e.query), mark(e.example), words(e.example), mark(e.wrong), f"{e.backwards}")) for e in episodes]
    settings = {
        "suite": suite.name, "palette": suite.palette, "examples": examples, "per_group": per_group, "eval_fraction": eval_fraction,
        "seed": seed, "pairs": fingerprint(*told),
    }  # fmt: skip
    where = {"data": str(data), "examples_from": str(examples_from) if examples_from else None}  # spelt so: a split may hang on it
    return Plan(suite, episodes, numbers, {id(e.query): mark(e.query) for e in episodes}, settings, where)


def plan_again(run: Mapping[str, Any], suite: Suite, data: Path | None = None, examples_from: Path | None = None) -> Plan:
    """The plan of a run.json.

    Args:
      suite: that of the run, ready to score.
      data, examples_from: where they lie now; None takes where they lay.

    Raises:
      UserError: data is missing.
    """
    where = run["where"]
    examples_from = examples_from or (Path(where["examples_from"]) if where["examples_from"] else None)
    options = {name: run[name] for name in ("examples", "per_group", "eval_fraction", "seed")}
    return make_plan(suite, data or Path(where["data"]), examples_from=examples_from, **options)


def draw_missing(
    model: XPrompt, plan: Plan, out: Path, *, sampling: Mapping[str, Any], mode: Mode = "xprompt", shard: Shard = WHOLE,
    overwrite: bool = False, progress: bool = True,
) -> int:  # fmt: skip
    """Draws what `out` does not hold yet.

    Args:
      sampling: see `run_pairs`.
      mode: how examples are shown.
      shard: the queries to draw, by their numbers.

    Returns:
      The number of episodes drawn now.

    Raises:
      UserError: `out` holds images of other settings, or cannot be written.
    """
    size = model.config.vq.image_size
    settings = {"model": model.fingerprint, "image_size": size, "mode": mode, "precision": model.precision,
                "sampling": dict(sampling), **plan.settings}  # fmt: skip
    start(out, settings, images=lambda: out.glob("images/*/*.png"), overwrite=overwrite, where=plan.where, shard=shard)
    todo = [e for e in missing(plan, out) if shard.has(plan.numbers[id(e.query)])]
    for outcome in plan.suite.draw(model, todo, size, mode=mode, seed=plan.settings["seed"], progress=progress, **sampling):
        for arm, path in plan.files(out, outcome.episode).items():
            if arm in OF_AN_EXAMPLE or not path.is_file():  # that of a query comes with each of its examples
                save_png(outcome.images[arm], path)
    return len(todo)


def missing(plan: Plan, out: Path) -> list[Episode]:
    """The episodes whose images are not all in `out`."""
    return [e for e in plan.episodes if not all(path.is_file() for path in plan.files(out, e).values())]


def open_images(plan: Plan, out: Path, episode: Episode, size: int, arms: Sequence[str] = ARMS) -> dict[str, np.ndarray]:
    """Arm -> uint8 [size, size, 3], from the files.

    Raises:
      UserError: a file is missing, damaged or of another size.
    """
    images = {}
    for arm in arms:
        if arm == "copied":
            images[arm] = plan.suite.read(episode.query, size)[0]
            continue
        path = plan.files(out, episode)[arm]
        images[arm] = np.asarray(open_image(path))
        if images[arm].shape != (size, size, 3):
            raise UserError(f"{path}: not {size} x {size} pixels, as it was drawn; remove it and run `xprompt eval` again")
    return images
