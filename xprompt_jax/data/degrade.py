"""Degradations and photometric styles of uint8 images: numpy in, numpy out, any size, 1 x 1 included.

Every function takes `image` uint8 [h, w, 3] and returns a new array of that kind. What is random comes from an explicit
generator; what is drawn once for a whole task (an angle, a strength) is a keyword. Lengths are fractions of the image's
short side, at least a pixel or two, so that a setting looks the same at every resolution. Angles are in degrees.
`depth` is float [h, w] in metres or None (a photograph).
"""

from __future__ import annotations

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])


def _to_uint8(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 255)).astype(np.uint8)


def _pixels(fraction: float, image: np.ndarray, least: float) -> float:
    return max(least, fraction * min(image.shape[:2]))


def _convolve(values: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Same-size convolution of [h, w, c] with an odd square kernel that sums to 1; edges are repeated."""
    reach = kernel.shape[0] // 2
    padded = np.pad(values.astype(np.float64), ((reach, reach), (reach, reach), (0, 0)), mode="edge")
    shape = padded.shape[:2]
    spectrum = np.fft.rfft2(padded, axes=(0, 1)) * np.fft.rfft2(kernel, shape)[..., None]
    full = np.fft.irfft2(spectrum, shape, axes=(0, 1))
    return full[2 * reach :, 2 * reach :]


def _line_kernel(length: float, angle: float) -> np.ndarray:
    """A line of `length` pixels through the centre; 0 degrees is horizontal, counter-clockwise."""
    reach = int(np.ceil(length / 2))
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    along = np.linspace(-length / 2, length / 2, 8 * reach + 1)
    y, x = reach - along * np.sin(np.deg2rad(angle)), reach + along * np.cos(np.deg2rad(angle))
    y0, x0 = np.floor(y).astype(int), np.floor(x).astype(int)
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - (y - y0)) * np.abs(1 - dx - (x - x0))
            np.add.at(kernel, (np.minimum(y0 + dy, 2 * reach), np.minimum(x0 + dx, 2 * reach)), weight)
    return kernel / kernel.sum()


def _disc_kernel(radius: float) -> np.ndarray:
    reach = int(np.ceil(radius))
    at = np.arange(-reach, reach + 1)
    kernel = np.clip(radius + 0.5 - np.hypot(at[:, None], at[None]), 0, 1)  # soft rim
    return kernel / kernel.sum()


def rain(image, rng, *, angle: float, density: float, length: float, depth=None) -> np.ndarray:
    """Bright streaks in three layers; with depth, a layer falls only in front of what lies behind it.

    Args:
      angle: lean from the vertical, positive to the right at the top.
      density: streaks per pixel of one layer, about 0.005 to 0.025.
      length: streak length of the nearest layer.
    """
    out, (h, w) = image.astype(np.float64), image.shape[:2]
    for distance, share in ((7.0, 0.4), (4.0, 0.65), (1.5, 1.0)):  # far to near
        kernel = _line_kernel(_pixels(length * share, image, 2.0), 90 - angle)
        drops = (rng.random((h, w, 1)) < density) * rng.uniform(0.6, 1.0, (h, w, 1))
        alpha = np.clip(_convolve(drops, kernel / kernel.max()) * share * 0.75, 0, 0.8)
        if depth is not None:
            alpha = alpha * (np.asarray(depth)[..., None] > distance)
        out = out * (1 - alpha) + np.array([225, 232, 240]) * alpha
    return _to_uint8(out)


def gaussian_noise(image, rng, *, sigma: float) -> np.ndarray:
    """Independent noise of standard deviation `sigma` levels."""
    return _to_uint8(image + rng.normal(0, sigma, image.shape))


def motion_blur(image, *, angle: float, length: float) -> np.ndarray:
    """Mean along a line; 0 degrees is horizontal."""
    return _to_uint8(_convolve(image, _line_kernel(_pixels(length, image, 2.5), angle)))


def defocus(image, *, radius: float) -> np.ndarray:
    """Mean over a disc."""
    return _to_uint8(_convolve(image, _disc_kernel(_pixels(radius, image, 1.2))))


def low_light(image, rng, *, gamma: float, gain: float, photons: float = 200.0) -> np.ndarray:
    """Dark exposure with shot noise: (v / 255)^gamma * gain, counted as `photons` at full scale, and 1-level read noise."""
    exposed = (image / 255.0) ** gamma * gain
    return _to_uint8(rng.poisson(exposed * photons) / photons * 255 + rng.normal(0, 1, image.shape))


def haze(image, *, beta: float, airlight: tuple[int, int, int], depth=None) -> np.ndarray:
    """Koschmieder's law, t = exp(-beta * depth); a photograph counts as 5 m deep everywhere."""
    transmission = np.exp(-beta * (np.full(image.shape[:2], 5.0) if depth is None else np.asarray(depth)))[..., None]
    return _to_uint8(image * transmission + np.array(airlight) * (1 - transmission))


def pixelate(image, *, block: float) -> np.ndarray:
    """Mean over square blocks (at least 2 pixels wide; the last row and column of blocks may be narrower)."""
    size, (h, w) = round(_pixels(block, image, 2)), image.shape[:2]
    rows, columns = np.arange(0, h, size), np.arange(0, w, size)
    sums = np.add.reduceat(np.add.reduceat(image.astype(np.float64), rows, 0), columns, 1)
    heights, widths = np.diff(np.append(rows, h)), np.diff(np.append(columns, w))
    means = sums / (heights[:, None] * widths[None])[..., None]
    return _to_uint8(means.repeat(heights, 0).repeat(widths, 1))


def salt_pepper(image, rng, *, fraction: float) -> np.ndarray:
    """That fraction of the pixels becomes black or white."""
    chance = rng.random(image.shape[:2])[..., None]
    return np.where(chance < fraction / 2, 0, np.where(chance < fraction, 255, image)).astype(np.uint8)


def color_cast(image, *, gains: tuple[float, float, float]) -> np.ndarray:
    """Channels multiplied by `gains`."""
    return _to_uint8(image * np.array(gains))


def greyscale(image) -> np.ndarray:
    """Luma (BT.601) in all three channels."""
    return np.repeat(_to_uint8(image @ LUMA)[..., None], 3, -1)


def vignette(image, *, strength: float, radius: float) -> np.ndarray:
    """Darkens to 1 - `strength` in the corners, from `radius` (0 centre, 1 corner) outwards."""
    h, w = image.shape[:2]
    y, x = (np.arange(h) + 0.5) / h * 2 - 1, (np.arange(w) + 0.5) / w * 2 - 1
    corner = np.hypot(y[:, None], x[None]) / np.sqrt(2)
    fade = np.clip((corner - radius) / (1 - radius), 0, 1)
    return _to_uint8(image * (1 - strength * fade * (2 - fade))[..., None])


def hue_rotation(image, *, angle: float) -> np.ndarray:
    """Turns RGB about the grey axis."""
    c, s = np.cos(np.deg2rad(angle)), np.sin(np.deg2rad(angle))
    a, b = (1 - c) / 3, s / np.sqrt(3)
    matrix = np.array([[c + a, a - b, a + b], [a + b, c + a, a - b], [a - b, a + b, c + a]])
    return _to_uint8(image @ matrix.T)


def channel_permutation(image, *, order: tuple[int, int, int]) -> np.ndarray:
    """Output channel i is input channel order[i]."""
    return np.ascontiguousarray(image[..., list(order)])


def tone_curve(image, *, levels: tuple[int, ...]) -> np.ndarray:
    """Piecewise linear curve through `levels` (uint8, evenly spaced inputs from 0 to 255), all channels alike."""
    table = np.interp(np.arange(256), np.linspace(0, 255, len(levels)), levels)
    return _to_uint8(table)[image]


def posterise(image, *, levels: int) -> np.ndarray:
    """Rounds every channel to `levels` evenly spaced values, 0 and 255 among them."""
    return _to_uint8(np.rint(image / 255.0 * (levels - 1)) * (255 / (levels - 1)))


def sepia(image, *, strength: float) -> np.ndarray:
    """Blends with a warm brown monochrome."""
    toned = (image @ LUMA)[..., None] * np.array([1.10, 0.90, 0.66])
    return _to_uint8(image * (1 - strength) + toned * strength)


def invert(image) -> np.ndarray:
    """The photographic negative."""
    return 255 - image


def duotone(image, *, shadow: tuple[int, int, int], highlight: tuple[int, int, int]) -> np.ndarray:
    """Luma mapped to the line between two colours."""
    luma = (image @ LUMA)[..., None] / 255
    return _to_uint8(np.array(shadow) * (1 - luma) + np.array(highlight) * luma)


def edge_ink(image, *, ink: tuple[int, int, int], paper: tuple[int, int, int], threshold: float = 24.0) -> np.ndarray:
    """A pen drawing: contours of any channel (central differences over `threshold` levels) in ink on plain paper."""
    padded = np.pad(image.astype(np.float64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    gradient = np.hypot(padded[2:, 1:-1] - padded[:-2, 1:-1], padded[1:-1, 2:] - padded[1:-1, :-2]).max(-1)
    alpha = np.clip(gradient / threshold - 0.5, 0, 1)[..., None]
    return _to_uint8(np.array(paper) * (1 - alpha) + np.array(ink) * alpha)
