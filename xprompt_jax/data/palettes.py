"""Pictures of numbers: invertible colours for depth, surface normals and classes.

A model that speaks only image tokens predicts depth, normals or classes as a colour picture; scores are computed after
decoding it. The palette decides how much a given colour error costs in metres (facts: data_eval.md 2.1).

Conventions
  depth     metres, planar (along the camera axis), 0 is near; 0..max_depth is spread over 256 samples.
  normals   camera frame, x right, y up, z towards the viewer, unit length. A left-right flip must negate x.
  labels    int [h, w]; negative = unlabelled = black.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from xprompt_jax.errors import UserError

NUM_SAMPLES = 256

# Colours that have a name in instructions; those of `color_name` too.
NAMED_COLORS: dict[str, tuple[int, int, int]] = {
    "black": (0, 0, 0), "white": (255, 255, 255), "grey": (128, 128, 128), "red": (230, 25, 25), "orange": (255, 140, 0),
    "yellow": (255, 230, 20), "lime": (150, 240, 30), "green": (20, 150, 40), "teal": (0, 128, 128), "cyan": (30, 220, 240),
    "sky blue": (110, 180, 255), "blue": (30, 70, 230), "navy": (10, 15, 100), "purple": (120, 30, 170),
    "magenta": (240, 30, 220), "pink": (255, 160, 190), "maroon": (110, 10, 25), "brown": (130, 80, 35),
    "olive": (120, 120, 20), "beige": (240, 220, 170),
}  # fmt: skip


def color_name(rgb) -> str:
    """The nearest named colour (RGB L2)."""
    names = list(NAMED_COLORS)
    distances = ((np.array(list(NAMED_COLORS.values())) - np.asarray(rgb)) ** 2).sum(-1)
    return names[int(distances.argmin())]


def _nearest(rgb: np.ndarray, colors: np.ndarray, norm: int = 2) -> np.ndarray:
    """Index of the nearest of `colors` [n, 3] for every pixel of `rgb` [..., 3] (first wins a tie)."""
    unique, inverse = np.unique(np.asarray(rgb, np.uint8).reshape(-1, 3), axis=0, return_inverse=True)
    difference = np.abs(unique[:, None].astype(np.int32) - colors[None].astype(np.int32))  # [unique, n, 3]
    index = (difference**norm).sum(-1).argmin(-1)
    return index[inverse.reshape(-1)].reshape(np.shape(rgb)[:-1])


@dataclass(frozen=True)
class Palette:
    """A colour ramp from near (first stop) to far (last stop); stops are RGB, evenly spaced, joined by straight lines."""

    name: str
    stops: tuple[tuple[int, int, int], ...]

    @functools.cached_property
    def table(self) -> np.ndarray:
        """The 256 samples, uint8 [256, 3]."""
        at = np.linspace(0, 1, NUM_SAMPLES)
        knots = np.linspace(0, 1, len(self.stops))
        columns = [np.interp(at, knots, channel) for channel in np.array(self.stops, np.float64).T]
        return np.rint(np.stack(columns, -1)).astype(np.uint8)

    def encode(self, depth, max_depth: float = 10.0) -> np.ndarray:
        """Depth [...] in metres to uint8 RGB [..., 3]; clipped to 0..max_depth."""
        unit = np.clip(np.asarray(depth, np.float64) / max_depth, 0, 1)
        return self.table[np.rint(unit * (NUM_SAMPLES - 1)).astype(np.int64)]

    def decode(self, rgb, max_depth: float = 10.0) -> np.ndarray:
        """Nearest of the 256 samples (RGB L2), float32 metres [...]."""
        return (_nearest(rgb, self.table) * (max_depth / (NUM_SAMPLES - 1))).astype(np.float32)


def _hex(stops: str) -> tuple[tuple[int, int, int], ...]:
    return tuple((n >> 16, n >> 8 & 255, n & 255) for n in (int(s, 16) for s in stops.split()))


# Control points of the well-known ramps; between them straight lines (within 7 levels of the originals for turbo,
# viridis and magma). hsv is left out on purpose: it is cyclic, so near and far would share a colour.
PALETTES: dict[str, Palette] = {name: Palette(name, _hex(stops)) for name, stops in {
    "grey": "000000 ffffff",
    "turbo": "30123b 4040a2 466be3 4294ff 28bceb 18ddc2 32f298 6dfe62 a4fc3c cdec34 eecf3a fdac34 fb7e21 eb500e d02f05 a91601 "
             "7a0403",
    "viridis": "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 "
               "fde725",
    "magma": "000004 0a0822 1d1147 36106b 51127c 6a1c81 832681 9c2e7f b73779 d0416f e75263 f56b5c fc8961 fea772 fec488 fde2a3 "
             "fcfdbf",
    "inferno": "000004 0b0724 210c4a 3d0965 57106e 71196e 8a226a a32c61 bc3754 d24644 e45a31 f1731d f98e09 fcac11 f9cb35 f2ea69 "
               "fcffa4",
    "plasma": "0d0887 4c02a1 7e03a8 aa2395 cc4778 e66c5c f89540 fdc527 f0f921",
    "jet": "000080 0000ff 0080ff 00ffff 80ff80 ffff00 ff8000 ff0000 800000",
    "hot": "0b0000 5f0000 b30000 ff0800 ff5c00 ffb000 ffff07 ffff85 ffffff",
    "coolwarm": "3b4cc0 6282ea 8db0fe b9d0f9 dddcdc f5c4ac f4987a dd5f4b b40426",
    "cubehelix": "000000 1b1e3b 16534c 447731 a1794a d484a9 c6b4ee cbe8f0 ffffff",
    "spectral": "9e0142 d53e4f f46d43 fdae61 fee08b ffffbf e6f598 abdda4 66c2a5 3288bd 5e4fa2",
    "rdylbu": "a50026 d73027 f46d43 fdae61 fee090 ffffbf e0f3f8 abd9e9 74add1 4575b4 313695",
}.items()}  # fmt: skip

HELD_OUT: tuple[str, ...] = ("spectral", "rdylbu")
"""Named ramps that training never draws, for the novel-spectrum test."""


def get_palette(name: str) -> Palette:
    """A registered ramp.

    Raises:
      UserError: if there is none of that name.
    """
    if name not in PALETTES:
        raise UserError(f"depth palette {name!r} is unknown: choose from {', '.join(PALETTES)}")
    return PALETTES[name]


def random_ramp(rng: np.random.Generator, stops: int | None = None) -> Palette:
    """A ramp through 2 or 3 random colours that all lie at least 150 (RGB L2) apart; named by its colours."""
    count = stops or int(rng.integers(2, 4))
    names: list[str] = []
    while len(set(names)) < count:
        colors = distinct_colors(rng, count, separation=150)
        names = [color_name(c) for c in colors]
    words = " through ".join(names[:-1]) + f" to {names[-1]}"
    return Palette(words, tuple((int(r), int(g), int(b)) for r, g, b in colors))


def distinct_colors(rng: np.random.Generator, count: int, separation: float = 70) -> np.ndarray:
    """Random colours at least `separation` apart in RGB L2 (the demand falls where the cube is too full), uint8 [count, 3]."""
    colors = [rng.integers(0, 256, 3)]
    while len(colors) < count:
        candidates = rng.integers(0, 256, (64, 3))
        nearest = np.sqrt(((candidates[:, None] - np.array(colors)[None]) ** 2).sum(-1)).min(-1)
        free = np.flatnonzero(nearest >= separation)
        if len(free):
            colors.append(candidates[free[0]])
        else:
            separation *= 0.9
    return np.array(colors, np.uint8)


def encode_normals(normals) -> np.ndarray:
    """Unit normals [..., 3] (camera frame, see above) to uint8 RGB: round((n + 1) / 2 * 255)."""
    return np.rint((np.clip(np.asarray(normals, np.float64), -1, 1) + 1) / 2 * 255).astype(np.uint8)


def decode_normals(rgb) -> np.ndarray:
    """Inverse of `encode_normals`, renormalised to unit length, float32 [..., 3]."""
    normals = np.asarray(rgb, np.float64) / 255 * 2 - 1
    return (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32)


def mirror_normals(rgb: np.ndarray) -> np.ndarray:
    """A picture of normals uint8 [h, w, 3] seen in a mirror: columns from right to left, and x, the red channel, negated.

    Exact on the encoding: 255 - r is where -x is written. Black, which is unknown, stays black.
    """
    turned = np.asarray(rgb)[:, ::-1]
    known = turned.any(axis=-1, keepdims=True)
    return np.where(known, np.concatenate([255 - turned[..., :1], turned[..., 1:]], axis=-1), turned)


@dataclass(frozen=True, eq=False)
class ClassPalette:
    """One colour per class; black is kept for unlabelled pixels."""

    colors: np.ndarray  # uint8 [classes, 3]

    def encode(self, labels) -> np.ndarray:
        """Labels int [...] to uint8 RGB [..., 3]; negative labels become black.

        Raises:
          UserError: if a label has no colour.
        """
        labels = np.asarray(labels)
        if labels.size and labels.max() >= len(self.colors):
            raise UserError(f"label {labels.max()} has no colour: the palette holds {len(self.colors)} classes")
        return np.where((labels < 0)[..., None], 0, self.colors[np.maximum(labels, 0)]).astype(np.uint8)

    def decode(self, rgb, norm: int = 2) -> np.ndarray:
        """Nearest class colour for every pixel, int64 [...]; `norm` 1 is Painter's default, 2 ours. Never unlabelled."""
        return _nearest(rgb, self.colors, norm)


def painter_ade() -> ClassPalette:
    """Painter's 150 ADE20K colours: a 6-level grid of step 42 counted down from white (facts: data_eval.md 2.1)."""
    i = np.arange(150)
    return ClassPalette((255 - 42 * np.stack([i // 36, i % 36 // 6, i % 6], -1)).astype(np.uint8))


@functools.cache
def max_separation(n: int) -> ClassPalette:
    """`n` colours, each as far as possible (RGB L2) from black and from all before it; picked from a 16^3 grid.

    Tolerates a lossy image tokenizer better than Painter's grid. The first k colours do not depend on n.
    """
    level = np.arange(0, 256, 17)
    grid = np.stack(np.meshgrid(level, level, level, indexing="ij"), -1).reshape(-1, 3)
    nearest = (grid**2).sum(-1)  # squared distance to the chosen ones; black is taken from the start
    chosen = []
    for _ in range(n):
        chosen.append(grid[nearest.argmax()])
        nearest = np.minimum(nearest, ((grid - chosen[-1]) ** 2).sum(-1))
    return ClassPalette(np.array(chosen, np.uint8))
