"""The scene edits as sub-tasks: what is drawn for them, and how a scene is arranged so that the edit has one meaning.

An edit names its object by colour and shape. The source's scene is first given exactly one such object (and no other of
its colour), so parameters drawn without knowing the scene fit every scene, forwards and backwards.
"""

from __future__ import annotations

import numpy as np

from xprompt_jax.data import world
from xprompt_jax.data.pairs import Source, Task, draw_one, draw_real, draw_two
from xprompt_jax.data.render import COLORS, FLOOR_COLORS, FLOOR_KINDS, MATERIALS, SHAPES, SKIES, Scene

TEMPLATES = ("{words}", "please {words}", "{words} in this picture", "edit the scene: {words}")


def _arrange(source: Source, rng, *also: str, **attributes) -> tuple[Scene, int]:
    """A copy of the scene with one well visible object of the given attributes; no other has its colour or one of `also`."""
    assert source.scene is not None
    assert source.render is not None
    counts = np.bincount(source.render.instances.ravel(), minlength=world.MAX_OBJECTS + 1)[1:]
    visible = np.flatnonzero(counts >= min(counts.max(), source.image[..., 0].size // 64))
    i = int(rng.choice(visible))
    tables = {"color": list(COLORS), "shape": list(SHAPES), "material": list(MATERIALS)}
    values: dict[str, float] = {k: tables[k].index(v) for k, v in attributes.items() if k in tables}
    if "size" in attributes:
        values["size"] = sum(world.SIZES[attributes["size"]]) / 2
    scene = world.replace_values(source.scene, i, exists=True, **values)
    taken = {values["color"], *(tables["color"].index(c) for c in also)}
    spare = [c for c in range(len(COLORS)) if c not in taken and c not in scene.color]
    others = [j for j in np.flatnonzero(scene.exists).tolist() if j != i and scene.color[j] in taken]
    for j, color in zip(others, spare, strict=False):
        scene = world.replace_values(scene, j, color=color)
    return scene, i


def _clear(scene: Scene, i: int, *spots) -> Scene:
    """Removes all objects but i that stand within reach of the spots (x, z)."""
    distance = np.stack([np.hypot(*(scene.position - np.array(s)).T) for s in spots]).min(0)
    return scene._replace(exists=scene.exists & ((distance > 1.35) | (np.arange(len(distance)) == i)))


def _object(rng, *, full=False) -> dict:
    p = {"shape": draw_one(rng, SHAPES), "color": draw_one(rng, COLORS)}
    return {**p, "material": draw_one(rng, MATERIALS), "size": draw_one(rng, world.SIZES)} if full else p


def _add(source, p, rng):
    scene = source.scene
    same = np.flatnonzero(scene.exists & (scene.color == list(COLORS).index(p["color"]))).tolist()
    spare = [c for c in range(len(COLORS)) if c not in scene.color]
    for j, color in zip(same, spare, strict=False):
        scene = world.replace_values(scene, j, color=color)
    if scene.exists.all():
        scene = world.replace_values(scene, world.MAX_OBJECTS - 1, exists=False)
    spots = np.concatenate([world.PLACES, world.PLACES * (-1, 1)])
    rng.shuffle(spots)
    there = scene.position[scene.exists]

    def room(spot):  # metres to the nearest neighbour, and angle to what would hide it, both as far as they matter
        nearer = there[there[:, 1] < spot[1] - 0.5]
        hidden = np.abs(nearer[:, 0] / nearer[:, 1] - spot[0] / spot[1]).min(initial=0.25)
        return min(np.hypot(*(there - spot).T).min(initial=1.35), 1.35) + min(hidden, 0.25)

    spot = max(spots, key=room)
    scene = _clear(scene, -1, spot)
    return scene, world.add_object(scene, p["shape"], p["color"], p["material"], p["size"], spot, yaw=float(rng.uniform(0, 6.28)))


def _remove(source, p, rng):
    scene, i = _arrange(source, rng, **p)
    return scene, world.remove_object(scene, i)


def _draw_change(attribute, options):
    """Draws an object and two values, "from" and "to", of one of its attributes."""

    def draw(rng):
        old, new = draw_two(rng, options)
        return {**{k: v for k, v in _object(rng).items() if k != attribute}, "from": old, "to": new}

    return draw


def _attribute(attribute, edit):
    def plan(source, p, rng):
        fixed = {k: p[k] for k in ("shape", "color") if k in p}
        also = (p["to"],) if attribute == "color" else ()
        scene, i = _arrange(source, rng, *also, **fixed, **{attribute: p["from"]})
        return scene, edit(scene, i, p["to"])

    return plan


def _move(source, p, rng):
    scene, i = _arrange(source, rng, shape=p["shape"], color=p["color"])
    d, aside = p["distance"], float(rng.uniform(-0.25, 0.25))
    left, right = (-d / 2 + aside, 2.7), (d / 2 + aside, 2.7)
    near, far = (3 * aside, 2.6), (3 * aside, 2.6 + d)
    start, end = {"left": (right, left), "right": (left, right), "closer": (far, near), "away": (near, far)}[p["direction"]]
    scene = _clear(world.replace_values(scene, i, position=start), i, start, end)
    return scene, world.move_object(scene, i, p["direction"], d)


def _draw_move(rng):
    return {**_object(rng), "direction": draw_one(rng, ("left", "right", "closer", "away")), "distance": draw_real(rng, 0.8, 1.3)}


def _environment(draw_one, set_one):
    """A change of something that every scene has: the old value is set first, so that the way back is known too."""

    def draw(rng):
        old = draw_one(rng)
        while (new := draw_one(rng)) == old:
            pass
        return {"from": old, "to": new}

    def plan(source, p, rng):
        scene = set_one(source.scene, p["from"]).scene
        return scene, set_one(scene, p["to"])

    return draw, plan


_EDITS = {
    "add_object": (lambda rng: _object(rng, full=True), _add),
    "remove_object": (lambda rng: _object(rng, full=True), _remove),
    "recolor": (_draw_change("color", COLORS), _attribute("color", world.recolor)),
    "replace_shape": (_draw_change("shape", SHAPES), _attribute("shape", world.replace_shape)),
    "change_material": (_draw_change("material", MATERIALS), _attribute("material", world.change_material)),
    "resize": (_draw_change("size", world.SIZES), _attribute("size", world.resize)),
    "move_object": (_draw_move, _move),
    "change_floor": _environment(
        lambda rng: [draw_one(rng, FLOOR_COLORS), draw_one(rng, FLOOR_KINDS)], lambda s, v: world.change_floor(s, *v)
    ),
    "change_light": _environment(
        lambda rng: [draw_one(rng, world.DIRECTIONS), draw_one(rng, world.WARMTHS)], lambda s, v: world.change_light(s, *v)
    ),
    "change_sky": _environment(lambda rng: draw_one(rng, SKIES), world.change_sky),
}
EDITS = tuple(Task(name, "edit", True, TEMPLATES, TEMPLATES, draw, plan) for name, (draw, plan) in _EDITS.items())
