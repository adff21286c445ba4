"""Scores, in numpy, each with its protocol in its name (facts: data_eval.md 2.2).

The same pair of images differs by 5 dB between two papers' "PSNR", so no function here is called `psnr`. Images are
[h, w, 3], uint8 or float on the same 0-255 scale. All sums run in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from xprompt_jax.errors import UserError

EIGEN_CROP = (slice(45, 471), slice(41, 601))
"""Rows and columns of a 480 x 640 NYUv2 image that depth papers score."""

DEPTH_RANGE = (1e-3, 10.0)
"""Metres: predictions are clipped to it, ground truth counts strictly inside it."""

ANGLE_BINS = 1800
"""Of an angle histogram, 0.1 degrees each."""

# MATLAB's rgb2ycbcr, first row, for RGB on 0-255.
_TO_Y = np.array([65.481, 128.553, 24.966]) / 255


def _pair(image, target) -> tuple[np.ndarray, np.ndarray]:
    image, target = np.asarray(image, np.float64), np.asarray(target, np.float64)
    if image.shape != target.shape:
        raise ValueError(f"images of different shapes: {image.shape} and {target.shape}")
    return image, target


def _psnr(squared_error: float) -> float:
    return float("inf") if squared_error == 0 else float(10 * np.log10(255.0**2 / squared_error))


def luma_matlab_uint8(image) -> np.ndarray:
    """Y of MATLAB's rgb2ycbcr on a uint8 image: 16-235, rounded; float64 [h, w]."""
    return np.floor(16 + np.asarray(image, np.float64) @ _TO_Y + 0.5)  # MATLAB rounds halves up


def psnr_rgb(image, target) -> float:
    """PSNR over all pixels and channels, peak 255 (skimage, InstructIR, PromptIR); inf for equal images."""
    image, target = _pair(image, target)
    return _psnr(np.mean((image - target) ** 2))


def psnr_y(image, target) -> float:
    """PSNR of the Y channel of uint8 images, peak 255 (MPRNet, Restormer and Painter on rain)."""
    image, target = _pair(image, target)
    return _psnr(np.mean((luma_matlab_uint8(image) - luma_matlab_uint8(target)) ** 2))


def mean_abs_error(image, target) -> float:
    """Mean absolute difference, in levels of 0-255."""
    image, target = _pair(image, target)
    return float(np.mean(np.abs(image - target)))


def _gaussian_window() -> np.ndarray:
    """11 taps, sigma 1.5 (Wang et al. 2004)."""
    taps = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    return taps / taps.sum()


def _filter_valid(x: np.ndarray, taps: np.ndarray, axes: tuple[int, ...] = (0, 1)) -> np.ndarray:
    """Separable correlation of [h, w, c] along `axes`, without padding."""
    for axis in axes:
        windows = np.lib.stride_tricks.sliding_window_view(x, len(taps), axis=axis)
        x = windows @ taps
    return x


def _ssim(image: np.ndarray, target: np.ndarray, taps: np.ndarray, unbias: float) -> float:
    """Mean SSIM of [h, w, c] over the places where the window fits."""
    if min(image.shape[:2]) < len(taps):
        raise UserError(f"images of {image.shape[1]} x {image.shape[0]} pixels are below SSIM's window of {len(taps)}; leave them out")
    return _mean_similarity(image, target, lambda x: _filter_valid(x, taps), unbias)


def _mean_similarity(image: np.ndarray, target: np.ndarray, smooth: Callable[[np.ndarray], np.ndarray], unbias: float) -> float:
    """Mean SSIM from local means; peak 255, K1 0.01, K2 0.03."""
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    a, b = smooth(image), smooth(target)
    var_a, var_b = unbias * (smooth(image * image) - a * a), unbias * (smooth(target * target) - b * b)
    covariance = unbias * (smooth(image * target) - a * b)
    return float(np.mean((2 * a * b + c1) * (2 * covariance + c2) / ((a * a + b * b + c1) * (var_a + var_b + c2))))


def ssim_rgb_gaussian(image, target) -> float:
    """Wang's SSIM per channel, averaged: Gaussian window 11, sigma 1.5, no padding.

    Equals skimage with gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255.
    """
    return _ssim(*_pair(image, target), _gaussian_window(), 1.0)


def ssim_skimage_default(image, target) -> float:
    """skimage's default, per channel, averaged: uniform window 7, sample covariance (Painter on LOL)."""
    return _ssim(*_pair(image, target), np.full(7, 1 / 7), 49 / 48)


def ssim_y(image, target) -> float:
    """Wang's SSIM of the Y channel of uint8 images (MPRNet, Restormer and Painter on rain)."""
    image, target = _pair(image, target)
    return _ssim(luma_matlab_uint8(image)[..., None], luma_matlab_uint8(target)[..., None], _gaussian_window(), 1.0)


def ssim_matlab_3d(image, target) -> float:
    """MATLAB's `ssim` of an [h, w, 3] array, which it takes for a volume: Gaussian window of 11 x 11 x 11, sigma 1.5, borders repeated.

    Tables of GoPro use it (MPRNet, Restormer, NAFNet). It mixes the colours: another number than any SSIM of an image.
    """
    taps = _gaussian_window()

    def smooth(x: np.ndarray) -> np.ndarray:
        for axis in (2, 0, 1):  # colours first, or each image would be 13 deep on the way
            border = [(len(taps) // 2,) * 2 if a == axis else (0, 0) for a in range(3)]
            x = _filter_valid(np.pad(x, border, mode="edge"), taps, (axis,))
        return x

    return _mean_similarity(*_pair(image, target), smooth, 1.0)


def _changed(source, target, threshold: float) -> np.ndarray:
    source, target = _pair(source, target)
    return np.max(np.abs(source - target), axis=-1) > threshold


def changed_region_psnr(source, image, target, threshold: float = 8) -> float:
    """PSNR-RGB of `image` against `target` where `target` differs from `source` by more than `threshold` levels.

    A difference is the largest over the channels. nan if nothing differs.
    """
    return _region_psnr(image, target, _changed(source, target, threshold))


def unchanged_region_psnr(source, image, target, threshold: float = 8) -> float:
    """PSNR-RGB of `image` against `target` everywhere else; nan if everything differs."""
    return _region_psnr(image, target, ~_changed(source, target, threshold))


def _region_psnr(image, target, region: np.ndarray) -> float:
    image, target = _pair(image, target)
    return _psnr(np.mean((image - target)[region] ** 2)) if region.any() else float("nan")


def depth_squared_errors(prediction, truth) -> np.ndarray:
    """Squared errors in m^2 of the scored pixels of one image, float64 [pixels]; arguments as of `depth_rmse_painter`, one image."""
    prediction, truth = _pair(prediction, truth)
    if truth.ndim != 2:
        raise ValueError(f"a depth map must be [h, w], not {list(truth.shape)}")
    if truth.shape == (480, 640):
        prediction, truth = prediction[EIGEN_CROP], truth[EIGEN_CROP]
    low, high = DEPTH_RANGE
    scored = (truth > low) & (truth < high)
    return (np.clip(prediction, low, high) - truth)[scored] ** 2


def depth_rmse_painter(predictions: Iterable, truths: Iterable) -> float:
    """RMSE in metres of each image, averaged over images (Painter, BTS): the protocol of X-Prompt's table.

    Args:
      predictions: of [h, w] metres, already at the size of the truth (Painter resizes bilinearly).
      truths: of [h, w] metres, 0 where unknown.

    480 x 640 images are cut to the Eigen crop. Images without a scored pixel are left out; nan if none has any.
    """
    errors = [depth_squared_errors(p, t) for p, t in zip(predictions, truths, strict=True)]
    return float(np.mean([np.sqrt(e.mean()) for e in errors if e.size] or [np.nan]))


def depth_rmse_pooled(predictions: Iterable, truths: Iterable) -> float:
    """RMSE in metres over the pixels of all images together (InvPT); otherwise like `depth_rmse_painter`."""
    errors = np.concatenate([depth_squared_errors(p, t) for p, t in zip(predictions, truths, strict=True)] or [np.empty(0)])
    return float(np.sqrt(errors.mean())) if errors.size else float("nan")


def palette_distance(picture, colors) -> float:
    """Palette adherence: mean distance (RGB L2, levels of 0-255) of a picture's pixels to the nearest of `colors`.

    Args:
      picture: uint8 [h, w, 3].
      colors: uint8 [n, 3], the samples of a palette.
    """
    unique, counts = np.unique(np.asarray(picture, np.uint8).reshape(-1, 3), axis=0, return_counts=True)
    known = np.asarray(colors, np.float64)
    parts = np.array_split(unique.astype(np.float64), -(-len(unique) // 4096))  # a photograph has a hundred thousand colours
    nearest = np.concatenate([((part[:, None] - known) ** 2).sum(-1).min(-1) for part in parts])
    return float(np.average(np.sqrt(nearest), weights=counts))


def _angles(prediction, truth, valid=None) -> np.ndarray:
    """Degrees between the normals of one image's scored pixels."""
    p, t = _pair(prediction, truth)
    scored = np.any(t != 0, axis=-1)
    if valid is not None:
        scored &= np.asarray(valid, bool)
    p, t = p[scored], t[scored]
    # Better conditioned at 0 and 180 degrees than the arc cosine.
    return np.degrees(np.arctan2(np.linalg.norm(np.cross(p, t), axis=-1), np.sum(p * t, axis=-1)))


def normal_angles(predictions: Sequence, truths: Sequence, valid: Sequence | None = None) -> dict[str, float]:
    """Angles between normals, over the pixels of all images together (Bae et al.).

    Args:
      predictions: of [h, w, 3], any length but zero.
      truths: of [h, w, 3], any length; a zero vector is not scored.
      valid: of bool [h, w], pixels to score; None takes all.

    Returns:
      {"mean", "median"} in degrees; {"11.25", "22.5", "30"}: fractions of pixels below that many degrees.
    """
    masks = [None] * len(truths) if valid is None else valid
    angles = [_angles(p, t, mask) for p, t, mask in zip(predictions, truths, masks, strict=True)]
    pooled = np.concatenate(angles or [np.empty(0)])
    if not pooled.size:
        return dict.fromkeys(("mean", "median", "11.25", "22.5", "30"), float("nan"))
    below = {str(limit): float(np.mean(pooled < limit)) for limit in (11.25, 22.5, 30)}
    return {"mean": float(np.mean(pooled)), "median": float(np.median(pooled)), **below}


def angle_histogram(prediction, truth) -> np.ndarray:
    """How many pixels of one image have each angle between normals, int64 [ANGLE_BINS]; arguments as of `normal_angles`."""
    return np.histogram(_angles(prediction, truth), ANGLE_BINS, (0, 180))[0]


def median_angle(histogram: np.ndarray) -> float:
    """Degrees below which half the pixels of a summed `angle_histogram` are, to a tenth of a degree; nan if there are none."""
    if not (total := histogram.sum()):
        return float("nan")
    below = np.cumsum(histogram)
    place = int(np.searchsorted(below, total / 2))
    inside = (total / 2 - (below[place] - histogram[place])) / histogram[place]
    return float((place + inside) * 180 / ANGLE_BINS)


def mean_iou(predictions: Iterable, truths: Iterable, num_classes: int) -> float:
    """Mean over classes of intersection / union, from counts summed over all images (ADE20K, Painter).

    Args:
      predictions: of int [h, w], 0 to num_classes - 1; anything else is wrong everywhere.
      truths: of int [h, w]; outside 0 to num_classes - 1 is not scored.
      num_classes: classes that neither predictions nor truths hold are left out of the mean.
    """
    confusion = np.zeros((num_classes, num_classes + 1), np.int64)  # the last column: no class
    for prediction, truth in zip(predictions, truths, strict=True):
        prediction, truth = np.asarray(prediction), np.asarray(truth)
        if prediction.shape != truth.shape:
            raise ValueError(f"labels of different shapes: {prediction.shape} and {truth.shape}")
        scored = (truth >= 0) & (truth < num_classes)
        known = np.where((prediction >= 0) & (prediction < num_classes), prediction, num_classes)
        confusion += np.bincount(truth[scored] * (num_classes + 1) + known[scored], minlength=confusion.size).reshape(confusion.shape)
    hits = np.diagonal(confusion)
    union = confusion.sum(1) + confusion[:, :-1].sum(0) - hits
    return float(np.mean(hits[union > 0] / union[union > 0])) if union.any() else float("nan")


def nearest_labels(picture, colors) -> np.ndarray:
    """Re-segmentation: the label with the nearest colour (RGB L2) at every pixel, int64 [h, w].

    Args:
      picture: uint8 [h, w, 3].
      colors: float [n, shades, 3], some of each label.
    """
    colors = np.asarray(colors, np.float64)
    difference = np.asarray(picture, np.float64)[:, :, None] - colors.reshape(-1, 3)
    return (difference**2).sum(-1).argmin(-1) // colors.shape[1]


def edit_success(picture, before, after, colors) -> float:
    """Whether an edit was done, 1 or 0: a drawn picture is segmented again by nearest colour and held against exact labels.

    It was done if more than half of the pixels whose label the edit changes have the new label, and of the others more than half, every
    label weighing alike, kept theirs. What was painted over as a whole is no success, nor is the input as it was.

    Args:
      picture: uint8 [h, w, 3].
      before, after: int [h, w], exact labels of the input and of the target; indices into `colors`.
      colors: float [n, shades, 3].

    Returns:
      nan if the edit changes no label.
    """
    before, after = np.asarray(before), np.asarray(after)
    changed = before != after
    if not changed.any():
        return float("nan")
    right = nearest_labels(picture, colors) == after
    kept = [right[~changed & (after == label)].mean() for label in np.unique(after[~changed])]
    return float(right[changed].mean() > 0.5 and (not kept or np.mean(kept) > 0.5))
