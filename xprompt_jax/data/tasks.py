"""The sub-tasks: what can be done to an image, as pairs with exact words, in four prototypes.

  dense    a scene to a colour picture of its geometry or its parts       (needs exact ground truth: a Scene)
  restore  a degraded image to the clean one                              (scenes and photographs)
  style    an image to a recoloured or redrawn one                        (scenes and photographs)
  edit     a scene to the same scene with one thing changed, re-rendered  (needs a Scene)

An in-context episode shows one change on two sources, so what defines the change (`parameters`) is drawn apart from the
sources it is applied to:

    parameters = TASKS["recolor"].sample_parameters(rng)
    example, query = make_pairs("recolor", parameters, scene_sources(seed=0, count=2, size=64), seed=1)

Dense tasks are in `dense.py`, edits in `edits.py`; an edit's input is a picture of the scene as arranged for the edit, not the source's
own picture. Everything is a pure function of parameters, sources and seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xprompt_jax.data import degrade
from xprompt_jax.data.dense import DENSE
from xprompt_jax.data.edits import EDITS
from xprompt_jax.data.pairs import (
    GENERIC,
    Pair,
    Source,
    Task,
    apply_all,
    draw_real,
    draw_two_colors,
    photo_source,
    scene_sources,
)
from xprompt_jax.errors import UserError

__all__ = ["GENERIC", "TASKS", "Pair", "Source", "Task", "make_pairs", "photo_source", "scene_sources"]

TASKS: dict[str, Task] = {task.name: task for task in DENSE}


def make_pairs(task_name: str, parameters: dict, sources: Sequence[Source], seed: int) -> list[Pair]:
    """Pairs that share task and parameters, one per source; pair i depends on (seed, i) and its source.

    Raises:
      UserError: on an unknown task, or a photograph given to a task that needs a scene.
    """
    if task_name not in TASKS:
        raise UserError(f"task {task_name!r} is unknown: choose from {', '.join(TASKS)}")
    return apply_all(TASKS[task_name], parameters, sources, [np.random.default_rng([seed, i]) for i in range(len(sources))])


def _restore(name, instructions, reverse, words, draw, change):
    """`change(source, p, rng) -> degraded image`; `words`, over the parameters, say what is wrong with it."""

    def both(source, p, rng):
        return change(source, p, rng), source.image, f"suffers from {words.format(**p)}", "is the same view, clean and undisturbed"

    TASKS[name] = Task(name, "restore", False, instructions, reverse, draw, both)


def _style(name, instructions, reverse, words, draw, change):
    """`change(image, p) -> restyled image`; `words`, over the parameters, say how it looks."""

    def both(source, p, rng):
        return source.image, change(source.image, p), "has its natural colours", f"is the same view {words.format(**p)}"

    TASKS[name] = Task(name, "style", False, instructions, reverse, draw, both)


# Restore.

_restore(
    "derain",
    ("remove the rain", "derain the image", "clear away the rain"),
    ("add rain", "make it rain"),
    "rain leaning {angle} degrees, {density} drops per pixel",
    lambda rng: {"angle": int(rng.integers(-40, 41)), "density": draw_real(rng, 0.005, 0.025, 3), "length": draw_real(rng, 0.12, 0.3)},
    lambda s, p, rng: degrade.rain(s.image, rng, depth=s.depth, **p),
)
_restore(
    "denoise",
    ("remove the noise", "denoise the image"),
    ("add noise", "make the image noisy"),
    "noise of {sigma} levels",
    lambda rng: {"sigma": int(rng.integers(12, 51))},
    lambda s, p, rng: degrade.gaussian_noise(s.image, rng, **p),
)
_restore(
    "motion_deblur",
    ("remove the motion blur", "undo the camera shake"),
    ("add motion blur", "shake the camera"),
    "motion blur along {angle} degrees",
    lambda rng: {"angle": int(rng.integers(0, 180)), "length": draw_real(rng, 0.08, 0.22)},
    lambda s, p, rng: degrade.motion_blur(s.image, **p),
)
_restore(
    "defocus_deblur",
    ("sharpen the image", "bring the image into focus"),
    ("defocus the image", "blur the image"),
    "defocus with a radius of {radius} image widths",
    lambda rng: {"radius": draw_real(rng, 0.025, 0.08, 3)},
    lambda s, p, rng: degrade.defocus(s.image, **p),
)
_restore(
    "low_light",
    ("brighten the dark image", "enhance the low light image"),
    ("darken the image", "make the image underexposed"),
    "low light, gamma {gamma} and gain {gain}",
    lambda rng: {"gamma": draw_real(rng, 1.2, 2.5), "gain": draw_real(rng, 0.25, 0.6)},
    lambda s, p, rng: degrade.low_light(s.image, rng, **p),
)
_restore(
    "dehaze",
    ("remove the haze", "dehaze the image", "clear the fog"),
    ("add haze", "make it foggy"),
    "haze of strength {beta} per metre",
    lambda rng: {"beta": draw_real(rng, 0.1, 0.35), "airlight": [int(v) for v in rng.integers(185, 240) + rng.integers(-12, 13, 3)]},
    lambda s, p, rng: degrade.haze(s.image, depth=s.depth, **p),
)
_restore(
    "depixelate",
    ("restore the details", "undo the pixelation", "increase the resolution"),
    ("pixelate the image", "lower the resolution"),
    "pixelation in blocks of {block} image widths",
    lambda rng: {"block": draw_real(rng, 0.035, 0.13, 3)},
    lambda s, p, rng: degrade.pixelate(s.image, **p),
)
_restore(
    "salt_pepper",
    ("remove the black and white dots", "remove the salt and pepper noise"),
    ("add salt and pepper noise",),
    "salt and pepper on {fraction} of the pixels",
    lambda rng: {"fraction": draw_real(rng, 0.04, 0.25)},
    lambda s, p, rng: degrade.salt_pepper(s.image, rng, **p),
)
_restore(
    "color_cast",
    ("remove the colour cast", "correct the white balance"),
    ("add a colour cast", "spoil the white balance"),
    "a colour cast of {gains}",
    lambda rng: {
        "gains": [draw_real(rng, 0.4, 0.65) if i == cut else draw_real(rng, 0.7, 1.15) for cut in [rng.integers(3)] for i in range(3)]
    },
    lambda s, p, rng: degrade.color_cast(s.image, **p),
)
_restore(
    "colorize",
    ("colourise the image", "bring back the colours"),
    ("make the image black and white", "remove the colours"),
    "a loss of colour, {levels} grey levels",
    lambda rng: {"levels": int(rng.integers(8, 257))},
    lambda s, p, rng: degrade.posterise(degrade.greyscale(s.image), **p),
)
_restore(
    "devignette",
    ("remove the vignette", "brighten the dark corners"),
    ("add a vignette", "darken the corners"),
    "a vignette of strength {strength}",
    lambda rng: {"strength": draw_real(rng, 0.5, 0.95), "radius": draw_real(rng, 0.1, 0.45)},
    lambda s, p, rng: degrade.vignette(s.image, **p),
)

# Style.


def _draw_order(rng):
    orders = [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    order = list(orders[rng.integers(len(orders))])
    return {"order": order, "channels": ", ".join(("red", "green", "blue")[i] for i in order)}


def _draw_inverted(rng):
    mask = [[0, 0, 1], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 0, 1], [1, 1, 0], [1, 1, 1]][rng.integers(7)]
    return {"mask": mask, "channels": " and ".join(c for c, m in zip(("red", "green", "blue"), mask, strict=True) if m)}


_style(
    "hue_rotation",
    ("rotate the hues by {angle} degrees", "turn the colour wheel by {angle} degrees"),
    ("undo the hue rotation by {angle} degrees",),
    "with hues rotated by {angle} degrees",
    lambda rng: {"angle": int(rng.integers(40, 321))},
    lambda im, p: degrade.hue_rotation(im, **p),
)
_style(
    "channel_permutation",
    ("reorder the channels to {channels}", "swap colour channels: {channels}"),
    ("undo the channel order {channels}",),
    "with its channels reordered to {channels}",
    _draw_order,
    lambda im, p: degrade.channel_permutation(im, order=p["order"]),
)
_style(
    "tone_curve",
    ("apply the tone curve {levels}", "map the tones to {levels}"),
    ("undo the tone curve {levels}",),
    "with its tones mapped to {levels}",
    lambda rng: {"levels": sorted(int(v) for v in rng.choice(256, 5, replace=False))},
    lambda im, p: degrade.tone_curve(im, **p),
)
_style(
    "posterise",
    ("posterise to {levels} levels", "keep only {levels} levels per channel"),
    ("undo the posterisation to {levels} levels",),
    "posterised to {levels} levels",
    lambda rng: {"levels": int(rng.integers(2, 6))},
    lambda im, p: degrade.posterise(im, **p),
)
_style(
    "sepia",
    ("give the image a sepia tone of {strength}", "make it an old photograph, strength {strength}"),
    ("remove the sepia tone",),
    "in sepia of strength {strength}",
    lambda rng: {"strength": draw_real(rng, 0.6, 1)},
    lambda im, p: degrade.sepia(im, **p),
)
_style(
    "invert",
    ("invert the {channels} channels", "make a negative of the {channels} channels"),
    ("undo the negative of the {channels} channels",),
    "with its {channels} channels inverted",
    _draw_inverted,
    lambda im, p: np.where(p["mask"], degrade.invert(im), im),
)
_style(
    "duotone",
    ("print the image in {shadow_name} and {highlight_name}", "duotone: shadows {shadow_name}, lights {highlight_name}"),
    ("bring back the colours of the {shadow_name} and {highlight_name} print",),
    "printed in {shadow_name} and {highlight_name}",
    lambda rng: draw_two_colors(rng, "shadow", "highlight"),
    lambda im, p: degrade.duotone(im, shadow=p["shadow"], highlight=p["highlight"]),
)
_style(
    "edge_ink",
    ("draw the image in {ink_name} ink on {paper_name} paper", "make a pen drawing, {ink_name} on {paper_name}"),
    ("paint a picture for this drawing",),
    "drawn in {ink_name} ink on {paper_name} paper",
    lambda rng: draw_two_colors(rng, "ink", "paper"),
    lambda im, p: degrade.edge_ink(im, ink=p["ink"], paper=p["paper"]),
)

TASKS.update({task.name: task for task in EDITS})
