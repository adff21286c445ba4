"""The sub-tasks: what can be done to an image, as pairs with exact words, in four prototypes.

  dense    a scene to a colour picture of its geometry or its parts       (needs exact ground truth: a Scene)
  restore  a degraded image to the clean one                              (scenes and photographs)
  style    an image to a recoloured or redrawn one                        (scenes and photographs)
  edit     a scene to the same scene with one thing changed, re-rendered  (needs a Scene)

An in-context episode shows one change on two sources, so what defines the change (`parameters`) is drawn apart from the
sources it is applied to:

    parameters = TASKS["recolor"].sample_parameters(rng)
    example, query = make_pairs("recolor", parameters, scene_sources(seed=0, count=2, size=64), seed=1)

The edits are in `edits.py`; their input is a picture of the scene as arranged for the edit, not the source's own picture.
Everything is a pure function of parameters, sources and seed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from xprompt_jax.data import degrade, palettes
from xprompt_jax.data.edits import EDITS
from xprompt_jax.data.pairs import (
    GENERIC,
    Pair,
    Source,
    Task,
    apply_all,
    draw_one,
    draw_real,
    photo_source,
    scene_sources,
)
from xprompt_jax.data.render import CLASSES
from xprompt_jax.errors import UserError

__all__ = ["GENERIC", "TASKS", "Pair", "Source", "Task", "make_pairs", "photo_source", "scene_sources"]

TASKS: dict[str, Task] = {}


def make_pairs(task_name: str, parameters: dict, sources: Sequence[Source], seed: int) -> list[Pair]:
    """Pairs that share task and parameters, one per source; pair i depends on (seed, i) and its source.

    Raises:
      UserError: on an unknown task, or a photograph given to a task that needs a scene.
    """
    if task_name not in TASKS:
        raise UserError(f"task {task_name!r} is unknown: choose from {', '.join(TASKS)}")
    return apply_all(TASKS[task_name], parameters, sources, [np.random.default_rng([seed, i]) for i in range(len(sources))])


def _dense(name, instructions, reverse, draw, change):
    """`change(source, p, rng) -> (output, words)`; the words say what the output shows."""

    def both(source, p, rng):
        output, words = change(source, p, rng)
        return source.image, output, "is a picture of a scene", words

    TASKS[name] = Task(name, "dense", True, instructions, reverse, draw, both)


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


def _color(rng) -> dict:
    return {"color": (name := draw_one(rng, list(palettes.NAMED_COLORS)[3:])), "rgb": list(palettes.NAMED_COLORS[name])}


def _two_colors(rng, first: str, second: str) -> dict:
    """Two colours that lie far apart, and their names."""
    a, b = palettes.distinct_colors(rng, 2, separation=200).tolist()
    while palettes.color_name(a) == palettes.color_name(b):
        a, b = palettes.distinct_colors(rng, 2, separation=200).tolist()
    return {first: a, second: b, f"{first}_name": palettes.color_name(a), f"{second}_name": palettes.color_name(b)}


# Dense.


def _draw_palette(rng):
    return {"palette": draw_one(rng, [n for n in palettes.PALETTES if n not in palettes.HELD_OUT])}


def _draw_ramp(rng):
    ramp = palettes.random_ramp(rng)
    return {"ramp": ramp.name, "stops": [list(s) for s in ramp.stops]}


def _depth_ramp(source, p, rng):
    ramp = palettes.Palette(p["ramp"], tuple(map(tuple, p["stops"])))
    return ramp.encode(source.depth), f"shows the depth from near to far in colours from {p['ramp']}"


def _draw_axes(rng):
    order, signs = rng.permutation(3).tolist(), rng.choice([-1, 1], 3).tolist()
    axes = " ".join(("-" if sign < 0 else "") + "xyz"[axis] for axis, sign in zip(order, signs, strict=True))
    return {"order": order, "signs": signs, "axes": axes}


def _normals(source, p, rng):
    turned = source.render.normals[..., p["order"]] * np.array(p["signs"])
    return palettes.encode_normals(turned), f"shows the surface normals with red, green and blue for {p['axes']}"


def _draw_classes(rng):
    return {"colors": dict(zip(CLASSES, palettes.distinct_colors(rng, len(CLASSES), 90).tolist(), strict=True))}


def _classes(source, p, rng):
    colors = np.array([p["colors"][c] for c in CLASSES], np.uint8)
    labels = source.render.segmentation
    named = ", ".join(f"{CLASSES[i]} in {palettes.color_name(colors[i])}" for i in np.unique(labels))
    return palettes.ClassPalette(colors).encode(labels), f"paints {named}"


def _find(source, which: str) -> np.ndarray:
    """Mask [h, w] of the leftmost, rightmost, nearest or biggest object, slivers left out; empty if there is none."""
    instances = source.render.instances
    masks = [instances == i for i in np.unique(instances[instances > 0])]
    if not masks:
        return np.zeros(instances.shape, bool)
    least = min(max(m.sum() for m in masks), instances.size // 256)
    masks = [m for m in masks if m.sum() >= least]
    score = {
        "leftmost": lambda m: np.nonzero(m)[1].mean(), "rightmost": lambda m: -np.nonzero(m)[1].mean(),
        "nearest": lambda m: source.depth[m].min(), "biggest": lambda m: -m.sum(),
    }[which]  # fmt: skip
    return min(masks, key=score)


def _draw_which(rng):
    return {"which": draw_one(rng, ("leftmost", "rightmost", "nearest", "biggest")), **_color(rng)}


def _mask(source, p, rng):
    out = np.where(_find(source, p["which"])[..., None], p["rgb"], 0).astype(np.uint8)
    return out, f"shows only the {p['which']} object, in {p['color']}"


def _box(source, p, rng):
    out, (y, x) = source.image.copy(), np.nonzero(_find(source, p["which"]))
    if len(y):
        top, bottom, left, right = y.min(), y.max(), x.min(), x.max()
        out[[top, bottom], left : right + 1] = p["rgb"]
        out[top : bottom + 1, [left, right]] = p["rgb"]
    return out, f"has a {p['color']} box around the {p['which']} object"


def _foreground(source, p, rng):
    out = np.where(source.render.instances[..., None] > 0, p["objects"], p["ground"]).astype(np.uint8)
    return out, f"shows all objects in {p['objects_name']} on {p['ground_name']}"


def _edges(source, p, rng):
    labels = source.render.instances * len(CLASSES) + source.render.segmentation
    edge = np.zeros(labels.shape, bool)
    edge[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edge[1:] |= labels[1:] != labels[:-1]
    out = np.where(edge[..., None], p["lines"], p["ground"]).astype(np.uint8)
    return out, f"draws the outlines in {p['lines_name']} on {p['ground_name']}"


_dense(
    "depth",
    ("show the depth in the {palette} palette", "estimate depth, coloured {palette}", "turn the image into a {palette} depth map"),
    ("turn the {palette} depth map into a picture", "paint a scene for this {palette} depth map"),
    _draw_palette,
    lambda s, p, rng: (palettes.get_palette(p["palette"]).encode(s.depth), f"shows the depth in the {p['palette']} palette"),
)
_dense(
    "depth_ramp",
    ("show the depth in colours from {ramp}", "estimate depth, near to far: {ramp}"),
    ("turn the depth map, {ramp}, into a picture",),
    _draw_ramp,
    _depth_ramp,
)
_dense(
    "normals",
    ("show the surface normals as {axes}", "estimate surface normals, axes {axes}"),
    ("turn the normal map {axes} into a picture",),
    _draw_axes,
    _normals,
)
_dense(
    "segmentation",
    ("segment the image in the colours of the example", "paint every class in its colour"),
    ("turn the segmentation into a picture",),
    _draw_classes,
    _classes,
)
_dense(
    "segmentation_standard",
    ("segment the image", "show the semantic segmentation"),
    ("paint a scene for this segmentation",),
    lambda rng: {
        "palette": "max_separation",
        "colors": dict(zip(CLASSES, palettes.max_separation(len(CLASSES)).colors.tolist(), strict=True)),
    },
    _classes,
)
_dense(
    "object_mask",
    ("mark the {which} object in {color}", "cut out the {which} object in {color}"),
    ("turn the {color} mask of the {which} object into a picture",),
    _draw_which,
    _mask,
)
_dense(
    "object_box",
    ("draw a {color} box around the {which} object", "frame the {which} object in {color}"),
    ("remove the {color} box", "erase the {color} frame"),
    _draw_which,
    _box,
)
_dense(
    "foreground",
    ("show all objects in {objects_name} on {ground_name}", "separate objects, {objects_name}, from {ground_name}"),
    ("turn the silhouettes into a picture",),
    lambda rng: _two_colors(rng, "objects", "ground"),
    _foreground,
)
_dense(
    "outlines",
    ("outline everything in {lines_name} on {ground_name}", "draw the contours in {lines_name} on {ground_name}"),
    ("turn the outlines into a picture",),
    lambda rng: _two_colors(rng, "lines", "ground"),
    _edges,
)

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
    lambda rng: _two_colors(rng, "shadow", "highlight"),
    lambda im, p: degrade.duotone(im, shadow=p["shadow"], highlight=p["highlight"]),
)
_style(
    "edge_ink",
    ("draw the image in {ink_name} ink on {paper_name} paper", "make a pen drawing, {ink_name} on {paper_name}"),
    ("paint a picture for this drawing",),
    "drawn in {ink_name} ink on {paper_name} paper",
    lambda rng: _two_colors(rng, "ink", "paper"),
    lambda im, p: degrade.edge_ink(im, ink=p["ink"], paper=p["paper"]),
)

TASKS.update({task.name: task for task in EDITS})
