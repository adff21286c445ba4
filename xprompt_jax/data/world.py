"""A procedural world with exact ground truth: scenes drawn from a key, described and edited in exact words.

`render.py` draws them (and states the frames and conventions). Sampling and rendering are pure and run under jit and vmap;
words and edits work on the host, on one unbatched scene, because they need its values.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from xprompt_jax.data.render import (
    COLORS,
    FLOOR_COLORS,
    FLOOR_KINDS,
    MATERIALS,
    MAX_OBJECTS,
    SHAPES,
    SKIES,
    Render,
    Scene,
    render,
    render_batch,
)
from xprompt_jax.errors import UserError

__all__ = [
    "Edit", "Render", "Scene", "add_object", "change_floor", "change_light", "change_material", "change_sky", "describe_object",
    "describe_scene", "move_object", "recolor", "remove_object", "render", "render_batch", "replace_shape", "resize",
    "sample_scene", "sample_scenes",
]  # fmt: skip

SIZES = {"small": (0.38, 0.44), "large": (0.58, 0.64)}  # metres, half the height of most solids
LARGE = 0.52  # from here on an object is called large
DIRECTIONS = {
    "left": -np.pi / 2,
    "front": np.pi,
    "right": np.pi / 2,
    "back": 0.0,
}  # azimuth the light comes from, 0 is +z
WARMTHS = {"cool": -0.9, "neutral": 0.0, "warm": 0.9}


# Where objects stand (x, z): three near and three far. No solid reaches beyond 1.07 sizes, so no two of them touch.
PLACES = np.array([(0.0, 2.55), (-1.45, 2.7), (1.45, 2.7), (-0.7, 4.2), (0.8, 4.2), (2.3, 4.3)], np.float32)
JITTER = np.array([0.04, 0.12], np.float32)


def sample_scene(key: jax.Array, min_objects: int = 2, max_objects: int = 4) -> Scene:
    """Draws a scene with that many objects (both ends included). Objects of a scene never share a colour."""
    m = MAX_OBJECTS
    rows = iter(jax.random.uniform(key, (24, len(COLORS))))  # one draw for all compiles quickest

    def uniform(low, high, count=None):
        row = next(rows)
        return low + (high - low) * (row[0] if count is None else row[:count])

    def choice(options, count=None):
        return jnp.minimum(jnp.floor(uniform(0.0, len(options), count)).astype(jnp.int32), len(options) - 1)

    def permutation(count):  # ranks of random numbers, without a sort
        row = next(rows)[:count]
        return (row[:, None] > row).sum(-1)

    number = min_objects + jnp.floor(uniform(0.0, 1.0) * (max_objects - min_objects + 1)).astype(jnp.int32)
    large = uniform(0, 1, m) < 0.6
    mirror = jnp.where(uniform(0, 1) < 0.5, 1.0, -1.0)
    places = jnp.array(PLACES)[permutation(m)] * jnp.stack([mirror, 1.0])
    return Scene(
        exists=jnp.arange(m) < number,
        shape=choice(SHAPES, m),
        color=permutation(len(COLORS))[:m].astype(jnp.int32),
        material=choice(MATERIALS, m),
        size=jnp.where(large, uniform(*SIZES["large"], m), uniform(*SIZES["small"], m)),
        position=places + jnp.stack([uniform(-1, 1, m), uniform(-1, 1, m)], -1) * JITTER,
        yaw=uniform(0, 2 * np.pi, m),
        floor_kind=choice(FLOOR_KINDS),
        floor_color=choice(FLOOR_COLORS),
        sky=choice(SKIES),
        light_azimuth=jnp.array(list(DIRECTIONS.values()))[choice(DIRECTIONS)] + uniform(-0.4, 0.4),
        light_elevation=uniform(0.7, 1.0),
        warmth=jnp.array(list(WARMTHS.values()))[choice(WARMTHS)] + uniform(-0.1, 0.1),
        ambient=uniform(0.9, 1.1),
        camera=jnp.stack([uniform(1.9, 2.2), uniform(0.30, 0.36), uniform(1.42, 1.56)]),
    )


@functools.partial(jax.jit, static_argnums=1)
def sample_scenes(key: jax.Array, count: int, min_objects: int = 2, max_objects: int = 4) -> Scene:
    """`count` scenes; scene i depends on (key, i) alone."""
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count))
    return jax.vmap(lambda k: sample_scene(k, min_objects, max_objects))(keys)


# Words and edits: on the host, one unbatched scene at a time.


def _index(kind: str, name: str, names) -> int:
    if name not in names:
        raise UserError(f"{kind} {name!r} is unknown: choose from {', '.join(names)}")
    return list(names).index(name)


def article(words: str) -> str:
    """`words` with "a" or "an" in front."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def describe_object(scene: Scene, i: int) -> str:
    """Such as "large red shiny sphere"."""
    size = "large" if float(scene.size[i]) >= LARGE else "small"
    return f"{size} {list(COLORS)[int(scene.color[i])]} {MATERIALS[int(scene.material[i])]} {SHAPES[int(scene.shape[i])]}"


def _short(scene: Scene, i: int) -> str:
    return f"{list(COLORS)[int(scene.color[i])]} {SHAPES[int(scene.shape[i])]}"


def describe_floor(scene: Scene) -> str:
    """Such as "grey checkered floor"."""
    return f"{list(FLOOR_COLORS)[int(scene.floor_color)]} {FLOOR_KINDS[int(scene.floor_kind)]} floor"


def describe_light(scene: Scene) -> str:
    """Such as "warm light from the left" (from the viewer's side is "front"); the nearest of the named directions."""
    turn = {name: abs((float(scene.light_azimuth) - at + np.pi) % (2 * np.pi) - np.pi) for name, at in DIRECTIONS.items()}
    warmth = min(WARMTHS, key=lambda name: abs(WARMTHS[name] - float(scene.warmth)))
    return f"{warmth} light from the {min(turn, key=lambda name: turn[name])}"


def describe_scene(scene: Scene) -> str:
    """Exact words: objects from left to right as seen, each related to the next, then floor, sky and light."""
    pitch, height = float(scene.camera[1]), float(scene.camera[0])
    size, position = np.asarray(scene.size), np.asarray(scene.position)
    depth = position[:, 1] * np.cos(pitch) + (height - size) * np.sin(pitch)
    across = position[:, 0] / depth
    order = sorted(np.flatnonzero(np.asarray(scene.exists)).tolist(), key=lambda i: across[i])
    words = ""
    for i, following in zip(order, [*order[1:], None][: len(order)], strict=True):
        words += article(describe_object(scene, i))
        if following is not None:
            beside = across[following] - across[i] > 0.08
            words += " left of " if beside else " in front of " if depth[i] < depth[following] else " behind "
    sky = article(f"{list(SKIES)[int(scene.sky)]} sky")
    return f"{words + ' on' if words else 'nothing on'} {article(describe_floor(scene))} under {sky}, {describe_light(scene)}"


class Edit(NamedTuple):
    """An edited scene in words: what to do, how to undo it, and what each of the two images shows."""

    scene: Scene
    words: str
    reverse: str
    before: str
    after: str


def replace_values(scene: Scene, i: int | None, **values) -> Scene:
    """A copy with leaves replaced (i None), or object i's entry of them; as numpy arrays."""
    changed = {}
    for name, value in values.items():
        leaf = np.array(getattr(scene, name))
        leaf[() if i is None else i] = value
        changed[name] = leaf
    return scene._replace(**changed)


def add_object(scene: Scene, shape: str, color: str, material: str, size: str, position, yaw: float = 0.4) -> Edit:
    """Adds an object at `position` (x, z) in metres.

    Raises:
      UserError: if a name is unknown or the scene is full.
    """
    free = np.flatnonzero(~np.asarray(scene.exists))
    if not len(free):
        raise UserError(f"the scene already holds {MAX_OBJECTS} objects: remove one first")
    low, high = SIZES[list(SIZES)[_index("size", size, SIZES)]]
    new = replace_values(scene, i := int(free[0]), exists=True, shape=_index("shape", shape, SHAPES), size=(low + high) / 2, yaw=yaw,
               color=_index("color", color, COLORS), material=_index("material", material, MATERIALS), position=position)  # fmt: skip
    name, full = _short(new, i), article(describe_object(new, i))
    return Edit(new, f"add {full}", f"remove the {name}", f"has no {name}", f"has {full} in addition")


def remove_object(scene: Scene, i: int) -> Edit:
    """Removes object i."""
    name, full = _short(scene, i), article(describe_object(scene, i))
    return Edit(replace_values(scene, i, exists=False), f"remove the {name}", f"add {full}", f"has {full}", f"has no {name}")


def recolor(scene: Scene, i: int, color: str) -> Edit:
    """Paints object i."""
    new = replace_values(scene, i, color=_index("color", color, COLORS))
    old = list(COLORS)[int(scene.color[i])]
    return Edit(new, f"make the {_short(scene, i)} {color}", f"make the {_short(new, i)} {old}", *_has(scene, new, i))


def _has(scene: Scene, new: Scene, i: int) -> tuple[str, str]:
    full = article(describe_object(new, i))
    return f"has {article(describe_object(scene, i))}", f"has {full} in its place"


def replace_shape(scene: Scene, i: int, shape: str) -> Edit:
    """Makes object i another solid of the same colour, material and size."""
    new = replace_values(scene, i, shape=_index("shape", shape, SHAPES))
    old = SHAPES[int(scene.shape[i])]
    return Edit(new, f"replace the {_short(scene, i)} with {article(shape)}",
                f"replace the {_short(new, i)} with {article(old)}", *_has(scene, new, i))  # fmt: skip


def resize(scene: Scene, i: int, size: str) -> Edit:
    """Makes object i small or large, standing where it stood."""
    _index("size", size, SIZES)
    new = replace_values(scene, i, size=sum(SIZES[size]) / 2)
    words = {"large": "larger", "small": "smaller"}
    back = words["small" if size == "large" else "large"]
    return Edit(new, f"make the {_short(scene, i)} {words[size]}", f"make the {_short(scene, i)} {back}", *_has(scene, new, i))


def change_material(scene: Scene, i: int, material: str) -> Edit:
    """Gives object i another surface."""
    new = replace_values(scene, i, material=_index("material", material, MATERIALS))
    old = MATERIALS[int(scene.material[i])]
    return Edit(new, f"make the {_short(scene, i)} {material}", f"make the {_short(scene, i)} {old}", *_has(scene, new, i))


def move_object(scene: Scene, i: int, direction: str, distance: float) -> Edit:
    """Moves object i by `distance` metres "left", "right", "closer" or "away" (as the viewer sees it)."""
    steps = {"left": (-1, 0), "right": (1, 0), "closer": (0, -1), "away": (0, 1)}
    step = np.array(list(steps.values())[_index("direction", direction, steps)], np.float32)
    new = replace_values(scene, i, position=np.asarray(scene.position)[i] + step * distance)
    back = {"left": "right", "right": "left", "closer": "away", "away": "closer"}[direction]
    name, full = _short(scene, i), describe_object(scene, i)
    where = {"left": "further left", "right": "further right", "closer": "closer to the viewer", "away": "further away"}
    return Edit(new, f"move the {name} {direction}", f"move the {name} {back}",
                f"has the {full} {where[back]}", f"has the {full} {where[direction]}")  # fmt: skip


def change_floor(scene: Scene, color: str, kind: str) -> Edit:
    """Lays another floor."""
    new = replace_values(
        scene,
        None,
        floor_color=_index("floor color", color, FLOOR_COLORS),
        floor_kind=_index("floor", kind, FLOOR_KINDS),
    )
    return _whole("floor", describe_floor, scene, new)


def _whole(what: str, describe, scene: Scene, new: Scene) -> Edit:
    old, now = article(describe(scene)), article(describe(new))
    return Edit(new, f"change the {what} to {now}", f"change the {what} to {old}", f"has {old}", f"has {now}")


def change_sky(scene: Scene, sky: str) -> Edit:
    """Another sky, with its own sun and ambient colour."""
    return _whole("sky", lambda s: f"{list(SKIES)[int(s.sky)]} sky", scene, replace_values(scene, None, sky=_index("sky", sky, SKIES)))


def change_light(scene: Scene, direction: str | None = None, warmth: str | None = None) -> Edit:
    """Light from another of DIRECTIONS, of another of WARMTHS, or both; None keeps what there is."""
    values = {}
    if direction is not None:
        values["light_azimuth"] = list(DIRECTIONS.values())[_index("light direction", direction, DIRECTIONS)]
    if warmth is not None:
        values["warmth"] = list(WARMTHS.values())[_index("light warmth", warmth, WARMTHS)]
    return _whole("light", describe_light, scene, replace_values(scene, None, **values))
