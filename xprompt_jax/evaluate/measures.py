"""Metrics of `metrics.py` with what one must know to compare them, summed over queries by one rule.

A score is (numerator, denominator), summed over queries and divided once; arrays of both are classes, averaged after the division. So
means over images, over pixels and over classes are one rule.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import numpy as np

from xprompt_jax.data.palettes import Palette
from xprompt_jax.evaluate import metrics

Sums = tuple[Any, Any]
"""Numerator and denominator, both floats or both [classes]."""


def reduce_sums(sums: Iterable[Sums]) -> float:
    """Mean over classes of summed numerators / summed denominators; nan where no denominator is positive."""
    pairs = list(sums)
    if not pairs:
        return float("nan")
    over, under = (np.atleast_1d(np.sum([pair[i] for pair in pairs], axis=0, dtype=np.float64)) for i in (0, 1))
    seen = under > 0
    return float(np.mean(over[seen] / under[seen])) if seen.any() else float("nan")


@dataclasses.dataclass(frozen=True)
class Metric:
    """A number, and everything one must know to compare it."""

    name: str
    """The function in metrics.py or features.py, and the key of its dictionary if it gives one."""
    protocol: str
    unit: str
    measure: Callable[[Any, Any, Any], Sums]
    """(prediction, truth, input) of one query, as arrays or as `Looks` (features.py); a score of nothing is (0, 0)."""
    better: Literal["higher", "lower"] = "higher"
    column: str = ""
    """Of the paper's table, to print beside; empty: the paper has none."""
    reduce: Callable[[Iterable[Sums]], float] = reduce_sums
    """Sums of all queries -> the score."""
    of_picture: bool = False
    """The prediction is the drawn picture itself, at the model's size, not what it says."""

    @property
    def digits(self) -> int:
        """Decimal places to print."""
        return 2 if self.unit in ("dB", "%", "degrees", "levels") else 3


def each(score: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Sums]:
    """The mean over queries of a score of one image."""
    return lambda prediction, truth, source: counted(score(prediction, truth))


def counted(value: float) -> Sums:
    """A score of one query; nan is a score of nothing."""
    return (0.0, 0) if np.isnan(value) else (value, 1)


def _angles(key: str, scale: float = 1.0) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Sums]:
    """A mean over the valid pixels of all images together."""

    def measure(prediction: np.ndarray, truth: np.ndarray, source: np.ndarray) -> Sums:
        pixels = int(np.any(truth != 0, axis=-1).sum())
        return (scale * metrics.normal_angles([prediction], [truth])[key] * pixels, pixels) if pixels else (0.0, 0)

    return measure


def _median_of_sums(sums: Iterable[Sums]) -> float:
    histograms = [histogram for histogram, _ in sums]
    return metrics.median_angle(np.asarray(np.sum(histograms or [np.zeros(1)], axis=0, dtype=np.int64)))


def _overlaps(classes: int) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Sums]:
    """Intersections, in percent, and unions of each class: summed over images they give `metrics.mean_iou`."""

    def measure(prediction: np.ndarray, truth: np.ndarray, source: np.ndarray) -> Sums:
        scored = (truth >= 0) & (truth < classes)
        prediction, truth = prediction[scored], truth[scored]
        count = lambda labels: np.bincount(labels, minlength=classes)
        hits = count(truth[prediction == truth])
        return 100.0 * hits, count(truth) + count(prediction) - hits

    return measure


def _pooled_depth(prediction: np.ndarray, truth: np.ndarray, source: np.ndarray) -> Sums:
    errors = metrics.depth_squared_errors(prediction, truth)
    return float(errors.sum()), errors.size


def _regional(score: Callable[..., float]) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Sums]:
    return lambda prediction, truth, source: counted(score(source, prediction, truth))


PSNR = Metric("psnr_rgb", "PSNR over all pixels and channels of uint8 RGB, peak 255", "dB", each(metrics.psnr_rgb), column="PSNR")
PSNR_Y = Metric(
    "psnr_y", "PSNR of the Y channel of uint8 images (MATLAB rgb2ycbcr, 16-235), peak 255", "dB", each(metrics.psnr_y), column="PSNR"
)
SSIM = Metric(
    "ssim_rgb_gaussian", "SSIM of each RGB channel, averaged: Gaussian window 11, sigma 1.5, no padding", "",
    each(metrics.ssim_rgb_gaussian), column="SSIM",
)  # fmt: skip
SSIM_Y = Metric("ssim_y", "SSIM of the Y channel: Gaussian window 11, sigma 1.5, no padding", "", each(metrics.ssim_y), column="SSIM")
SSIM_UNIFORM = Metric(
    "ssim_skimage_default", "SSIM of each RGB channel, averaged: uniform window 7, sample covariance", "",
    each(metrics.ssim_skimage_default), column="SSIM",
)  # fmt: skip
SSIM_3D = Metric(
    "ssim_matlab_3d", "MATLAB's ssim of height x width x 3 as a volume: Gaussian window 11 x 11 x 11, sigma 1.5, borders repeated", "",
    each(metrics.ssim_matlab_3d), column="SSIM",
)  # fmt: skip
MAE = Metric("mean_abs_error", "mean absolute difference of uint8 RGB", "levels", each(metrics.mean_abs_error), "lower")
CHANGED = Metric(
    "changed_region_psnr", "PSNR-RGB where the target differs from the input by more than 8 levels, of queries that have such", "dB",
    _regional(metrics.changed_region_psnr),
)  # fmt: skip
UNCHANGED = Metric(
    "unchanged_region_psnr", "PSNR-RGB where the target differs from the input by at most 8 levels, of queries that have such", "dB",
    _regional(metrics.unchanged_region_psnr),
)  # fmt: skip
PHOTOGRAPH_METRICS = (PSNR, SSIM, PSNR_Y, SSIM_Y, MAE)
"""Of any two pictures of one thing."""
IOU = Metric(
    "mean_iou", "mean over classes of intersection / union, from counts summed over all images", "%", _overlaps(150), column="mIoU"
)
NORMALS = (
    Metric("normal_angles_mean", "mean angle over the valid pixels of all images together (Bae et al., InvPT)", "degrees",
           _angles("mean"), "lower", "angle"),
    Metric("normal_angles_median", "median angle of the same pixels, from a histogram of 0.1 degrees", "degrees",
           lambda prediction, truth, source: (metrics.angle_histogram(prediction, truth).astype(np.int32), 1), "lower",
           reduce=_median_of_sums),
    *(Metric(f"normal_angles_{limit}", f"share of the same pixels below {limit} degrees", "%", _angles(limit, 100.0))
      for limit in ("11.25", "22.5", "30")),
)  # fmt: skip


def depth_metrics(palette: Palette) -> tuple[Metric, ...]:
    """Of depth that is drawn in these colours."""
    return (
        Metric(
            "depth_rmse_painter", "RMSE in metres of each image, truth in (0.001, 10) m, 480 x 640 images in the Eigen crop (Painter, BTS)",
            "m", each(lambda prediction, truth: metrics.depth_rmse_painter([prediction], [truth])), "lower", "RMSE",
        ),
        Metric(
            "depth_rmse_pooled", "RMSE in metres over the pixels of all images together (InvPT), of the same pixels", "m", _pooled_depth,
            "lower", reduce=lambda sums: math.sqrt(reduce_sums(sums)),
        ),
        Metric(
            "palette_distance", f"mean distance in RGB of the drawn pixels to the nearest colour of {palette.name}", "levels",
            lambda picture, truth, source: counted(metrics.palette_distance(picture, palette.table)), "lower", of_picture=True,
        ),
    )  # fmt: skip
