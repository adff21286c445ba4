"""The dense sub-tasks: a scene to a colour picture of its geometry or its parts. They need a scene's exact ground truth."""

from __future__ import annotations

import numpy as np

from xprompt_jax.data import palettes
from xprompt_jax.data.pairs import Task, draw_one, draw_two_colors
from xprompt_jax.data.render import CLASSES

_TASKS: list[Task] = []


def _dense(name, instructions, reverse, draw, change):
    """`change(source, p, rng) -> (output, words)`; the words say what the output shows."""

    def both(source, p, rng):
        output, words = change(source, p, rng)
        return source.image, output, "is a picture of a scene", words

    _TASKS.append(Task(name, "dense", True, instructions, reverse, draw, both))


def _color(rng) -> dict:
    return {"color": (name := draw_one(rng, list(palettes.NAMED_COLORS)[3:])), "rgb": list(palettes.NAMED_COLORS[name])}


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
    lambda rng: draw_two_colors(rng, "objects", "ground"),
    _foreground,
)
_dense(
    "outlines",
    ("outline everything in {lines_name} on {ground_name}", "draw the contours in {lines_name} on {ground_name}"),
    ("turn the outlines into a picture",),
    lambda rng: draw_two_colors(rng, "lines", "ground"),
    _edges,
)

DENSE = tuple(_TASKS)
