"""Renders scenes of convex solids in JAX: picture, depth, normals and labels, exact to rounding.

Solids stand on a patterned floor under a sky and one sun. Every solid is {quadric <= 0} and up to six half-spaces, in a
local frame whose floor is y = -1, so one data-driven ray test serves all shapes, under jit and vmap.

  world frame    x right, y up, z away from the camera, metres; the floor is y = 0; the camera stands at (0, height, 0)
  depth          planar, along the camera axis, metres, clipped to MAX_DEPTH; the sky is MAX_DEPTH
  normals        camera frame, x right, y up, z towards the viewer, unit length; the sky is (0, 0, 1)
  segmentation   index into CLASSES; instances: 0 for sky and floor, object slot + 1 otherwise

Depth, normals and labels are those of the ray through the pixel centre; rgb is the mean of 2 x 2 rays per pixel.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

MAX_OBJECTS = 6
MAX_DEPTH = 10.0
SKY = 1e6  # the t of a ray that meets nothing

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.88, 0.10, 0.12), "orange": (1.00, 0.50, 0.05), "yellow": (0.98, 0.88, 0.10), "green": (0.12, 0.62, 0.18),
    "cyan": (0.10, 0.82, 0.86), "blue": (0.12, 0.28, 0.90), "purple": (0.52, 0.16, 0.72), "pink": (1.00, 0.52, 0.72),
    "brown": (0.50, 0.29, 0.13), "white": (0.97, 0.97, 0.97),
}  # fmt: skip
FLOOR_COLORS: dict[str, tuple[float, float, float]] = {
    "grey": (0.62, 0.62, 0.62), "tan": (0.80, 0.68, 0.50), "olive": (0.48, 0.54, 0.30), "slate": (0.38, 0.44, 0.54),
    "cream": (0.90, 0.87, 0.76), "rust": (0.66, 0.40, 0.30),
}  # fmt: skip
FLOOR_KINDS = ("plain", "checkered", "striped", "tiled")
MATERIALS = ("matte", "shiny", "checkered", "striped")

# Sky: zenith, horizon, colour of the sun, colour of the ambient light.
SKIES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "blue": ((0.22, 0.46, 0.86), (0.74, 0.87, 0.97), (0.72, 0.70, 0.64), (0.50, 0.52, 0.56)),
    "sunset": ((0.34, 0.22, 0.50), (1.00, 0.60, 0.30), (0.74, 0.50, 0.32), (0.54, 0.44, 0.46)),
    "overcast": ((0.58, 0.61, 0.65), (0.82, 0.84, 0.86), (0.36, 0.36, 0.36), (0.62, 0.63, 0.65)),
    "night": ((0.04, 0.05, 0.20), (0.16, 0.20, 0.44), (0.42, 0.47, 0.62), (0.36, 0.40, 0.54)),
    "pink": ((0.62, 0.52, 0.86), (1.00, 0.80, 0.84), (0.66, 0.55, 0.55), (0.54, 0.48, 0.54)),
}

# Solids: q . p^2 + l * p_y + c <= 0 with rows (q_x, q_y, q_z, l, c), and half-spaces n . p <= d with rows (n, d).
_ALL, _ANY = (0, 0, 0, 0, -1), (0, 0, 0, 1)


def _box(half: float, top: float) -> list[tuple]:
    return [(1, 0, 0, half), (-1, 0, 0, half), (0, 0, 1, half), (0, 0, -1, half), (0, 1, 0, top), (0, -1, 0, 1)]


_FLAT = [(0, 1, 0, 1), (0, -1, 0, 1)]
_SOLIDS: dict[str, tuple[tuple, list[tuple]]] = {
    "sphere": ((1, 1, 1, 0, -1), []),
    "cube": (_ALL, _box(0.75, 0.5)),
    "cylinder": ((1, 0, 1, 0, -0.64), _FLAT),
    "cone": ((1, -0.25, 1, 0.5, -0.25), _FLAT),
    "dome": ((1, 0.45, 1, 0.9, -0.55), [(0, -1, 0, 1)]),  # half an egg, centred on the floor
    "pyramid": (_ALL, [(8 / 3, 1, 0, 1), (-8 / 3, 1, 0, 1), (0, 1, 8 / 3, 1), (0, 1, -8 / 3, 1), (0, -1, 0, 1)]),
}
SHAPES = tuple(_SOLIDS)
CLASSES = ("sky", "floor", *SHAPES)

_QUADRICS = np.array([q for q, _ in _SOLIDS.values()], np.float32)
_PLANES = np.array([p + [_ANY] * (6 - len(p)) for _, p in _SOLIDS.values()], np.float32)  # [shapes, 6, 4]
_COLOR_TABLE = np.array(list(COLORS.values()), np.float32)
_FLOOR_TABLE = np.array(list(FLOOR_COLORS.values()), np.float32)
_SKY_TABLE = np.array(list(SKIES.values()), np.float32)


Array = Any  # a jax.Array on the device, numpy on the host


class Scene(NamedTuple):
    """One scene (batched: a leading axis on every leaf). Object leaves are [MAX_OBJECTS]; the rest are scalars or as told."""

    exists: Array  # bool
    shape: Array  # int32, index into SHAPES
    color: Array  # int32, index into COLORS
    material: Array  # int32, index into MATERIALS
    size: Array  # float32 metres
    position: Array  # float32 [MAX_OBJECTS, 2], x and z on the floor
    yaw: Array  # float32 radians about y
    floor_kind: Array  # int32, index into FLOOR_KINDS
    floor_color: Array  # int32, index into FLOOR_COLORS
    sky: Array  # int32, index into SKIES
    light_azimuth: Array  # float32 radians, where the light comes from: 0 is ahead (+z), pi/2 is right (+x)
    light_elevation: Array  # float32 radians above the floor
    warmth: Array  # float32 -1 (cool) to 1 (warm)
    ambient: Array  # float32, multiplies the sky's ambient light
    camera: Array  # float32 [3]: height in metres, downward pitch in radians, focal length in half image heights


class Render(NamedTuple):
    """Pictures of one scene (batched: a leading axis), see the module's conventions."""

    rgb: Array  # uint8 [h, w, 3]
    depth: Array  # float32 [h, w], metres
    normals: Array  # float32 [h, w, 3]
    segmentation: Array  # int32 [h, w]
    instances: Array  # int32 [h, w]


# Vectors are [3, R] or [3, 1]: one row per axis, R rays.


def _dot(a, b):
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def _unit(a):
    return a / jnp.sqrt(_dot(a, a))


def _turn(v, yaw):
    c, s = jnp.cos(yaw), jnp.sin(yaw)
    return jnp.stack([c * v[0] + s * v[2], v[1], c * v[2] - s * v[0]])


def _enter_and_leave(obj, origin, direction):
    """Ray against one solid: (t in, t out, face at t in: 0 curved, else 1 + index of the plane); missed where t in > t out."""
    shape, size, position, yaw = obj
    center = jnp.stack([position[0], size, position[1]])[:, None]
    o, d = _turn(origin - center, -yaw) / size, _turn(direction, -yaw) / size
    *q, linear, constant = jnp.asarray(_QUADRICS)[shape]
    a, b = _dot(q, d * d), _dot(q, o * d) + linear * d[1] / 2
    c = _dot(q, o * o) + linear * o[1] + constant
    a = jnp.where(jnp.abs(a) < 1e-9, 1e-9, a)
    discriminant = b * b - a * c
    w = -(b + jnp.where(b < 0, -1.0, 1.0) * jnp.sqrt(jnp.maximum(discriminant, 0.0)))  # no cancellation
    w = jnp.where(jnp.abs(w) < 1e-12, 1e-12, w)
    first, last = jnp.minimum(w / a, c / w), jnp.maximum(w / a, c / w)
    # a < 0 happens in the cone only: the ray is inside beyond the roots; its lower half lies below the ray's descent.
    down = d[1] < 0
    t_in = jnp.where(a > 0, first, jnp.where(down, last, -1e6))
    t_out = jnp.where(a > 0, last, jnp.where(down, 1e6, first))
    t_out = jnp.where((a > 0) & (discriminant < 0), -1e6, t_out)
    face = jnp.zeros(t_in.shape, jnp.int32)
    for i in range(_PLANES.shape[1]):
        *n, offset = jnp.asarray(_PLANES)[shape, i]
        along = _dot(n, d)
        t = (offset - _dot(n, o)) / jnp.where(jnp.abs(along) < 1e-9, 1e-9, along)
        face = jnp.where((along < 0) & (t > t_in), i + 1, face)
        t_in = jnp.where(along < 0, jnp.maximum(t_in, t), t_in)
        t_out = jnp.where(along < 0, t_out, jnp.minimum(t_out, t))
    return t_in, t_out, face


def _objects(scene):
    return scene.shape, scene.size, scene.position, scene.yaw


def _shadow(scene, point, light):
    """True where the way to the light is blocked."""

    def body(dark, entry):
        exists, obj = entry
        t_in, t_out, _ = _enter_and_leave(obj, point, light)
        return dark | (exists & (t_out > t_in) & (t_out > 5e-3)), None

    return jax.lax.scan(body, jnp.zeros(point.shape[1:], bool), (scene.exists, _objects(scene)))[0]


def _parity(a, b=0.0):
    """True on every second cell of a line or a board."""
    return (jnp.floor(a) + jnp.floor(b)) % 2 == 0


def _sky_color(scene, direction):
    zenith, horizon = jnp.asarray(_SKY_TABLE)[scene.sky, :2, :, None]
    rise = jnp.clip(direction[1] * 2.2, 0, 1)
    return horizon + (zenith - horizon) * rise


def _trace(scene: Scene, u, v):
    """Rays through image coordinates u, v [R] -> direction [3, R], depth t, object slot or -1, face (see above), each [R]."""
    height, pitch, focal = scene.camera
    right, up, ahead = u / focal, v / focal, jnp.ones_like(u)
    c, s = jnp.cos(pitch), jnp.sin(pitch)
    direction = jnp.stack([right, c * up - s * ahead, c * ahead + s * up])  # one unit along the axis: t is planar depth
    origin = jnp.stack([0.0, height, 0.0])[:, None]

    def body(carry, entry):
        t, code = carry
        i, exists, obj = entry
        t_in, t_out, face = _enter_and_leave(obj, origin, direction)
        hit = exists & (t_in < t_out) & (t_in > 0) & (t_in < t)
        return (jnp.where(hit, t_in, t), jnp.where(hit, 8 * i + face, code)), None

    floor = jnp.where(direction[1] < -1e-6, -height / jnp.minimum(direction[1], -1e-6), SKY)
    start = (floor, jnp.full(u.shape, -8))
    (t, code), _ = jax.lax.scan(body, start, (jnp.arange(MAX_OBJECTS), scene.exists, _objects(scene)))
    return direction, t, code // 8, code % 8


def _surface(scene: Scene, direction, t, slot, face):
    """What a ray met: world normal [3, R] and the point in the object's own frame [3, R]; the floor where slot is -1."""
    own = jnp.maximum(slot, 0)
    shape, size, yaw, (x, z) = scene.shape[own], scene.size[own], scene.yaw[own], scene.position[own].T
    point = jnp.stack([t * direction[0] - x, scene.camera[0] + t * direction[1] - size, t * direction[2] - z])
    local = _turn(point, -yaw) / size
    q = jnp.asarray(_QUADRICS)[shape].T
    curved = jnp.stack([q[0] * local[0], q[1] * local[1] + q[3] / 2, q[2] * local[2]])
    flat = jnp.asarray(_PLANES)[shape, jnp.maximum(face - 1, 0), :3].T
    normal = _turn(_unit(jnp.where(face == 0, curved, flat)), yaw)
    return jnp.where(slot < 0, jnp.array([0.0, 1.0, 0.0])[:, None], normal), local


def _albedo(scene: Scene, direction, t, slot, local):
    """Colour of the material [3, R] and whether it is shiny [R]."""
    own = jnp.maximum(slot, 0)
    material = scene.material[own]
    squares = _parity(local[0] * 1.9, local[2] * 1.9 + jnp.floor(local[1] * 1.9))
    dark = ((material == 2) & squares) | ((material == 3) & _parity(local[1] * 2.5 + 0.5))
    solid = jnp.asarray(_COLOR_TABLE)[scene.color].T[:, own] * jnp.where(dark, 0.48, 1.0)
    # The floor's pattern fades with distance, where it would be finer than a pixel.
    x, z = t * direction[0] / 0.8, t * direction[2] / 0.8
    seam = jnp.minimum(jnp.abs(x - jnp.round(x)), jnp.abs(z - jnp.round(z))) < 0.06
    kind = scene.floor_kind
    dark = ((kind == 1) & _parity(x, z)) | ((kind == 2) & _parity(x)) | ((kind == 3) & seam)
    floor = jnp.asarray(_FLOOR_TABLE)[scene.floor_color][:, None] * jnp.where(dark, 1 - 0.35 * jnp.exp(-((t / 14) ** 2)), 1.0)
    return jnp.where(slot < 0, floor, solid), (slot >= 0) & (material == 1)


def _shade(scene: Scene, direction, t, slot, face):
    """Colour [3, R], 0..1 but for overexposed highlights, of what `_trace` found."""
    normal, local = _surface(scene, direction, t, slot, face)
    albedo, gloss = _albedo(scene, direction, t, slot, local)
    origin = jnp.stack([0.0, scene.camera[0], 0.0])[:, None]
    lift, flat = jnp.sin(scene.light_elevation), jnp.cos(scene.light_elevation)
    light = jnp.stack([flat * jnp.sin(scene.light_azimuth), lift, flat * jnp.cos(scene.light_azimuth)])[:, None]
    tint = jnp.stack([1 + 0.16 * scene.warmth, 1 + 0.02 * scene.warmth, 1 - 0.24 * scene.warmth])[:, None]
    sun, ambient = jnp.asarray(_SKY_TABLE)[scene.sky, 2:, :, None]
    ground = t < SKY
    lit = ground & ~_shadow(scene, origin + jnp.where(ground, t, 0.0) * direction + 1e-3 * normal, light)
    view = _unit(direction)
    bounce = view - 2 * _dot(view, normal) * normal
    diffuse = ambient * scene.ambient * (0.8 + 0.2 * normal[1]) + sun * lit * jnp.maximum(_dot(normal, light), 0)
    spark = jnp.maximum(_dot(bounce, light), 0) ** 24 * lit
    mirror = 0.12 + 0.5 * (1 - jnp.abs(_dot(view, normal))) ** 3
    surface = albedo * diffuse * tint + gloss * (0.9 * sun * spark + mirror * (_sky_color(scene, bounce) - 0.3))
    sky = _sky_color(scene, direction)
    far = jnp.where(ground, 1 - jnp.exp(-(jnp.maximum(t - MAX_DEPTH, 0) / 18)), 1.0)  # the floor melts into the horizon
    return surface * (1 - far) + sky * far


def _grid(size: int):
    at = (jnp.arange(size) + 0.5) / size * 2 - 1
    return jnp.tile(at, size), jnp.repeat(-at, size)


@functools.partial(jax.jit, static_argnums=1)
def render(scene: Scene, size: int) -> Render:
    """Renders one scene at `size` x `size` pixels."""
    fine, exact = _grid(2 * size), _grid(size)
    direction, t, slot, face = _trace(scene, *(jnp.concatenate(pair) for pair in zip(fine, exact, strict=True)))
    n = fine[0].size
    rgb = _shade(scene, direction[:, :n], t[:n], slot[:n], face[:n]).reshape(3, size, 2, size, 2).mean((2, 4))
    direction, t, slot, face = direction[:, n:], t[n:], slot[n:], face[n:]
    normal, _ = _surface(scene, direction, t, slot, face)
    c, s = jnp.cos(scene.camera[1]), jnp.sin(scene.camera[1])
    in_camera = jnp.stack([normal[0], c * normal[1] + s * normal[2], s * normal[1] - c * normal[2]])
    sky = (slot < 0) & (t == SKY)
    in_camera = jnp.where(sky, jnp.array([0.0, 0.0, 1.0])[:, None], in_camera)
    shape = jnp.where(slot < 0, jnp.where(sky, 0, 1), 2 + scene.shape[jnp.maximum(slot, 0)])
    image = (size, size)
    return Render(
        rgb=jnp.round(jnp.clip(rgb, 0, 1) * 255).astype(jnp.uint8).transpose(1, 2, 0),
        depth=jnp.minimum(t, MAX_DEPTH).reshape(image),
        normals=in_camera.T.reshape(*image, 3),
        segmentation=shape.astype(jnp.int32).reshape(image),
        instances=(slot + 1).astype(jnp.int32).reshape(image),
    )


@functools.partial(jax.jit, static_argnums=1)
def render_batch(scenes: Scene, size: int) -> Render:
    """`render` over the leading axis of every leaf."""
    return jax.vmap(lambda scene: render(scene, size))(scenes)
