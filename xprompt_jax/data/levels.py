"""The in-context benchmark's pairs: what a small model trains on, and what it is asked that it has never seen.

Every group is one sub-task with parameters of its own (`tasks.py`), shown on several sources. Held out are, each harder than the last:

    parameters    a seen sub-task with unseen parameters: an eighth of all, chosen by a hash of their JSON
    combinations  seen parts, never together: recolour and replace with unseen (shape, colour) pairs; two seen sub-tasks in a row
    tasks         whole sub-tasks, as in the paper's Table 4: derain, low light, adding and removing an object, a new depth spectrum

Training leaves out the first two here, when pairs are drawn; the third is left to `data.holdouts` of the configuration
(derain, low_light, add_remove), because the reverse direction is trained. The new spectrum is never drawn for training.
`full=True` trains on everything, which is the arm "full training" that the others are measured against.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_args

import numpy as np

from xprompt_jax.data import palettes
from xprompt_jax.data.pairs import Pair, Task, photo_source, scene_sources
from xprompt_jax.data.sources import Record
from xprompt_jax.data.tasks import TASKS, make_pairs
from xprompt_jax.errors import UserError

Level = Literal["parameters", "combinations", "tasks"]
LEVELS: tuple[Level, ...] = get_args(Level)

HELD_TASKS = ("derain", "low_light", "add_object", "remove_object", "depth")
"""Asked at level "tasks"; depth in the palettes that training never draws."""
CHAINS = (
    ("hue_rotation", "invert"), ("channel_permutation", "posterise"), ("tone_curve", "hue_rotation"), ("invert", "sepia"),
    ("color_cast", "denoise"), ("salt_pepper", "devignette"), ("color_cast", "defocus_deblur"),
)  # fmt: skip
"""Two sub-tasks of one prototype in a row. Of two restorations, the first named is the first to be undone."""
PAIRED = {"recolor": ("shape", "to"), "replace_shape": ("color", "to")}
"""Edits of which some combinations of two parameters are held out."""
ONE_IN = 8
TRIES = 10_000
ZOOM = 1.4
"""Of the camera: objects large enough for 64 codes."""


def is_held(task: str, parameters: dict[str, Any]) -> bool:
    """Whether training must not draw these parameters: they belong to level "parameters" or "combinations"."""
    return _one_in(ONE_IN, f"{task} {json.dumps(parameters, sort_keys=True)}") or _combines(task, parameters)


def _combines(task: str, parameters: dict[str, Any]) -> bool:
    return task in PAIRED and _one_in(ONE_IN // 2, f"{task} {[parameters[name] for name in PAIRED[task]]}")


def _one_in(n: int, words: str) -> bool:
    return hashlib.sha256(words.encode()).digest()[0] % n == 0


def training_pairs(
    *, groups: int, pairs_per_group: int, size: int, seed: int = 0, photos: Sequence[np.ndarray] = (), photo_fraction: float = 0.4,
    zoom: float = ZOOM, plain: bool = True, tasks: Sequence[str] | None = None, full: bool = False,
) -> Iterator[Record]:  # fmt: skip
    """Pairs to train on; all sub-tasks take turns.

    Args:
      groups: draws of (task, parameters).
      pairs_per_group: pairs that share them.
      size: pixels.
      photos: uint8 [size, size, 3]; sub-tasks that need no scene use them in `photo_fraction` of their groups.
      zoom, plain: of the scenes (`pairs.scene_sources`).
      tasks: names out of `TASKS`; None takes all.
      full: hold nothing out.

    Raises:
      UserError: an unknown task, or too few photographs for a group.
    """
    names = sorted(TASKS) if tasks is None else list(tasks)
    chains: list[tuple[str, ...]] = [(name,) for name in names] + [chain for chain in CHAINS if full and set(chain) <= set(names)]
    for number in range(groups):
        rng = np.random.default_rng([seed, 0, number])
        chain = chains[number % len(chains)]
        parameters = [_draw(_task(name), rng, None if full else False) for name in chain]
        if full and chain == ("depth",) and rng.random() < len(palettes.HELD_OUT) / len(palettes.PALETTES):
            parameters = [{"palette": str(rng.choice(palettes.HELD_OUT))}]
        group = f"train/{seed}/{number}"
        yield from _group(chain, parameters, rng, group, "train", pairs_per_group, size, photos, photo_fraction, zoom=zoom, plain=plain)


def held_pairs(
    level: Level, *, groups: int, pairs_per_group: int, size: int, seed: int = 0, photos: Sequence[np.ndarray] = (),
    photo_fraction: float = 0.4, zoom: float = ZOOM, plain: bool = True, tasks: Sequence[str] | None = None,
) -> Iterator[Record]:  # fmt: skip
    """Pairs to ask, of one level: `groups` of every sub-task that the level has; arguments as for `training_pairs`.

    Sub-tasks with few parameters, none of which the hash holds out, are not asked at level "parameters".
    """
    chains: Sequence[tuple[str, ...]]
    if level == "parameters":
        chains = [(name,) for name in sorted(TASKS) if name not in HELD_TASKS or name == "depth"]
    elif level == "combinations":
        chains = [*((name,) for name in PAIRED), *CHAINS]
    else:
        chains = [(name,) for name in HELD_TASKS]
    for place, chain in enumerate(chains):
        if tasks is not None and not set(chain) <= set(tasks):
            continue
        for number in range(groups):
            rng = np.random.default_rng([seed, 1 + LEVELS.index(level), place, number])
            parameters = [_asked(level, part, len(chain), rng) for part in chain]
            if any(p is None for p in parameters):
                break
            group = f"{level}/{'+'.join(chain)}/{seed}/{number}"
            known = [p for p in parameters if p is not None]
            yield from _group(chain, known, rng, group, "eval", pairs_per_group, size, photos, photo_fraction, zoom=zoom, plain=plain)


def _asked(level: Level, name: str, parts: int, rng: np.random.Generator) -> dict[str, Any] | None:
    task = _task(name)
    if level == "tasks":
        return {"palette": str(rng.choice(palettes.HELD_OUT))} if name == "depth" else task.sample_parameters(rng)
    if level == "combinations" and parts == 1:
        return next((p for p in (task.sample_parameters(rng) for _ in range(TRIES)) if _combines(name, p)), None)
    return _draw(task, rng, level == "parameters")


def _draw(task: Task, rng: np.random.Generator, held: bool | None) -> dict[str, Any] | None:
    """Parameters that are held out, or not, or (None) either; None where there are no such."""
    for _ in range(TRIES):
        parameters = task.sample_parameters(rng)
        if held is None or (is_held(task.name, parameters) == held and not (held and _combines(task.name, parameters))):
            return parameters
    return None


def _task(name: str) -> Task:
    if name not in TASKS:
        raise UserError(f"task {name!r} is unknown; tasks are {', '.join(sorted(TASKS))}")
    return TASKS[name]


def _group(chain, parameters, rng, group, split, count, size, photos, photo_fraction, **scenes) -> Iterator[Record]:
    if photos and not any(_task(name).needs_scene for name in chain) and rng.random() < photo_fraction:
        if len(photos) < count:
            raise UserError(f"{len(photos)} photographs for groups of {count} pairs; give more")
        sources = [photo_source(photos[i]) for i in rng.choice(len(photos), count, replace=False)]
    else:
        sources = scene_sources(int(rng.integers(2**31)), count, size, **scenes)
    name = "+".join(chain)
    for pair in _chained(chain, parameters, sources, rng):
        back = pair.reversed()
        yield Record(
            pair.input, pair.output, pair.instruction, back.instruction, pair.description, back.description, name, group, pair.caption,
            split,
        )  # fmt: skip


def _chained(chain, parameters, sources, rng) -> list[Pair]:
    """Pairs of one sub-task, or of two in a row."""
    seeds = [int(rng.integers(2**31)) for _ in chain]
    restores = TASKS[chain[0]].prototype == "restore"
    # What is undone first was done last.
    order = list(zip(chain, parameters, seeds, strict=True))[:: -1 if restores else 1]
    pairs = make_pairs(*order[0][:2], sources, order[0][2])
    for name, p, seed in order[1:]:
        middle = [photo_source(pair.input if restores else pair.output) for pair in pairs]
        following = make_pairs(name, p, middle, seed)
        pairs = [_joined(first, then, restores) for first, then in zip(pairs, following, strict=True)]
    return pairs


def _joined(inner: Pair, outer: Pair, restores: bool) -> Pair:
    """Two pairs in a row as one; `outer` was made of `inner`'s changed side."""
    first, then = (outer, inner) if restores else (inner, outer)
    before = "suffers from more than one fault" if restores else "has its natural colours"
    after = "is the same view, clean and undisturbed" if restores else "is the same view, changed twice"
    return dataclasses.replace(
        inner, input=first.input, output=then.output, instruction=f"{first.instruction}, then {then.instruction}",
        reverse_instruction=f"{then.reverse_instruction}, then {first.reverse_instruction}",
        description=f"The input image {before}; the output image {after}.",
    )  # fmt: skip
