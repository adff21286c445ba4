"""What is measured, how, and what the paper reports: one table of suites.

Every metric carries its protocol in its name and in words, because the same images differ by 5 dB between two papers' "PSNR"
(facts: data_eval.md 2.2). A score is (numerator, denominator), summed over queries and divided once; arrays of both are classes,
averaged after the division. So means over images, over pixels and over classes are one rule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import PIL.Image

from xprompt_jax.data import palettes, sources
from xprompt_jax.data.images import open_image, resize_center_crop
from xprompt_jax.errors import UserError
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
    """The function in metrics.py, and the key of its dictionary if it gives one."""
    protocol: str
    unit: str
    measure: Callable[[Any, Any, Any], Sums]
    """(prediction, truth, input) of one query, as arrays or as `Looks` (features.py); a score of nothing is (0, 0)."""
    better: Literal["higher", "lower"] = "higher"
    column: str = ""
    """Of the paper's table, to print beside; empty: the paper has none."""
    reduce: Callable[[Iterable[Sums]], float] = reduce_sums
    """Sums of all queries -> the score."""


def _each(score: Callable[[np.ndarray, np.ndarray], float]) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Sums]:
    """The mean over queries of a score of one image."""
    return lambda prediction, truth, source: _counted(score(prediction, truth))


def _counted(value: float) -> Sums:
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


_PSNR = Metric("psnr_rgb", "PSNR over all pixels and channels of uint8 RGB, peak 255", "dB", _each(metrics.psnr_rgb), column="PSNR")
_PSNR_Y = Metric(
    "psnr_y", "PSNR of the Y channel of uint8 images (MATLAB rgb2ycbcr, 16-235), peak 255", "dB", _each(metrics.psnr_y), column="PSNR"
)
_SSIM = Metric(
    "ssim_rgb_gaussian", "SSIM of each RGB channel, averaged: Gaussian window 11, sigma 1.5, no padding", "",
    _each(metrics.ssim_rgb_gaussian), column="SSIM",
)  # fmt: skip
_SSIM_Y = Metric(
    "ssim_y", "SSIM of the Y channel: Gaussian window 11, sigma 1.5, no padding", "", _each(metrics.ssim_y), column="SSIM"
)  # fmt: skip
_SSIM_UNIFORM = Metric(
    "ssim_skimage_default", "SSIM of each RGB channel, averaged: uniform window 7, sample covariance", "",
    _each(metrics.ssim_skimage_default), column="SSIM",
)  # fmt: skip
_SSIM_3D = Metric(
    "ssim_matlab_3d", "MATLAB's ssim of height x width x 3 as a volume: Gaussian window 11 x 11 x 11, sigma 1.5, borders repeated", "",
    _each(metrics.ssim_matlab_3d), column="SSIM",
)  # fmt: skip
_MAE = Metric("mean_abs_error", "mean absolute difference of uint8 RGB", "levels", _each(metrics.mean_abs_error), "lower")
PHOTOGRAPH_METRICS = (_PSNR, _SSIM, _PSNR_Y, _SSIM_Y, _MAE)
"""Of any two pictures of one thing."""
_CHANGED = Metric(
    "changed_region_psnr", "PSNR-RGB where the target differs from the input by more than 8 levels, of queries that have such", "dB",
    lambda prediction, truth, source: _counted(metrics.changed_region_psnr(source, prediction, truth)),
)  # fmt: skip
_DEPTH = Metric(
    "depth_rmse_painter", "RMSE in metres of each image, truth in (0.001, 10) m, 480 x 640 images in the Eigen crop (Painter, BTS)", "m",
    _each(lambda prediction, truth: metrics.depth_rmse_painter([prediction], [truth])), "lower", "RMSE",
)  # fmt: skip
_IOU = Metric(
    "mean_iou", "mean over classes of intersection / union, from counts summed over all images", "%", _overlaps(150), column="mIoU"
)
_NORMALS = (
    Metric("normal_angles_mean", "mean angle over the valid pixels of all images together (Bae et al.)", "degrees", _angles("mean"),
           "lower", "angle"),
    Metric("normal_angles_median", "median angle of the same pixels, from a histogram of 0.1 degrees", "degrees",
           lambda prediction, truth, source: (metrics.angle_histogram(prediction, truth).astype(np.int32), 1), "lower",
           reduce=_median_of_sums),
    *(Metric(f"normal_angles_{limit}", f"share of the same pixels below {limit} degrees", "%", _angles(limit, 100.0))
      for limit in ("11.25", "22.5", "30")),
)  # fmt: skip


class Truth(Protocol):
    """What the target files of a suite mean."""

    def read(self, path: Any) -> np.ndarray:
        """The truth in its own units, [h, w] or [h, w, 3]."""

    def picture(self, truth: np.ndarray) -> np.ndarray:
        """How a model draws it, uint8 [h, w, 3]."""

    def decode(self, picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """What a drawn picture says, at (height, width) and in the units of `read`."""


def _resize(picture: np.ndarray, shape: tuple[int, int], how: PIL.Image.Resampling) -> np.ndarray:
    return picture if picture.shape[:2] == shape else np.asarray(PIL.Image.fromarray(picture).resize(shape[::-1], how))


class Colours:
    """Pictures that mean themselves; brought to the target's size by BICUBIC, as Painter does."""

    def read(self, path: Any) -> np.ndarray:
        """uint8 [h, w, 3]."""
        return np.asarray(open_image(path))

    def picture(self, truth: np.ndarray) -> np.ndarray:
        """Itself."""
        return truth

    def decode(self, picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """uint8 [h, w, 3]."""
        return _resize(picture, shape, PIL.Image.Resampling.BICUBIC)


@dataclasses.dataclass(frozen=True)
class Depth:
    """Depth in metres: 16-bit PNG in millimetres (NYUv2 as BTS has it) or .npy in metres; 0 is unknown. Resized in metres, bilinearly."""

    palette: palettes.Palette

    def read(self, path: Any) -> np.ndarray:
        """float32 [h, w] metres."""
        if Path(path).suffix == ".npy":
            try:
                depth = np.load(path, allow_pickle=False)
            except (OSError, ValueError) as e:
                raise UserError(f"{path}: not a readable .npy of depth ({e})") from None
        else:
            depth = _raw(path) / np.float32(1000)
        if depth.ndim != 2:
            raise UserError(f"{path}: a depth map must be [h, w], not {list(depth.shape)}; give 16-bit PNG in mm, or .npy in metres")
        return depth.astype(np.float32)

    def picture(self, truth: np.ndarray) -> np.ndarray:
        """In the palette's colours, 0 to 10 m."""
        return self.palette.encode(truth)

    def decode(self, picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """float32 [h, w] metres."""
        return _resize(self.palette.decode(picture), shape, PIL.Image.Resampling.BILINEAR)


@dataclasses.dataclass(frozen=True)
class Labels:
    """Classes: 8-bit PNG, 0 is unlabelled, class i is i + 1 (ADE20K). Resized as colours, by the nearest pixel."""

    palette: palettes.ClassPalette

    def read(self, path: Any) -> np.ndarray:
        """int64 [h, w], -1 where unlabelled."""
        labels = _raw(path)
        if labels.ndim != 2 or labels.max() > len(self.palette.colors):
            raise UserError(f"{path}: not a map of {len(self.palette.colors)} classes (8-bit PNG, 0 unlabelled)")
        return labels.astype(np.int64) - 1

    def picture(self, truth: np.ndarray) -> np.ndarray:
        """In the palette's colours."""
        return self.palette.encode(truth)

    def decode(self, picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """int64 [h, w]."""
        return self.palette.decode(_resize(picture, shape, PIL.Image.Resampling.NEAREST))


class Normals:
    """Normals: 8-bit RGB PNG, round((n + 1) / 2 * 255), black is unknown (GeoNet's NYUv2). Resized as colours, bilinearly."""

    def read(self, path: Any) -> np.ndarray:
        """float32 [h, w, 3]; zero where unknown."""
        rgb = np.asarray(open_image(path))
        return np.where(rgb.any(axis=-1, keepdims=True), palettes.decode_normals(rgb), np.float32(0))

    def picture(self, truth: np.ndarray) -> np.ndarray:
        """As in the files."""
        return np.where(truth.any(axis=-1, keepdims=True), palettes.encode_normals(truth), np.uint8(0))

    def decode(self, picture: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
        """float32 [h, w, 3]."""
        return palettes.decode_normals(_resize(picture, shape, PIL.Image.Resampling.BILINEAR))


def _raw(path: Any) -> np.ndarray:
    """A grey or palette PNG's own numbers."""
    try:
        with PIL.Image.open(path) as image:
            return np.asarray(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path") from None
    except Exception:  # decoders meet hostile bytes with nearly any exception
        raise UserError(f"{path}: not a readable image; replace or remove it") from None


@dataclasses.dataclass(frozen=True)
class Suite:
    """One thing to measure."""

    name: str
    measures: str
    """In one sentence."""
    metrics: tuple[Metric, ...]
    layouts: tuple[tuple[str, str], ...] = (("input", "target"),)
    """Folders of inputs and of targets below --data, any of these; files have the same name."""
    instruction: str = "do what the example shows"
    """Of the pairs of a folder."""
    truth: Truth = dataclasses.field(default_factory=Colours)
    whole: bool = True
    """Images are stretched to the model's square and back, and scored whole, as benchmarks are; else their centre crop is all there is."""
    published: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    """Row of a table of arXiv 2412.01824 -> column -> number."""
    note: str = ""
    """What to know before comparing with them."""
    palette: str = ""
    """What `get_suite` was given."""

    @property
    def wanted(self) -> str:
        """Of a folder, in words."""
        return f"a folder with {' or '.join(f'{inputs}/ and {targets}/' for inputs, targets in self.layouts)}, whose files have equal names"

    def find(self, folder: Path) -> list[sources.Record] | None:
        """The pairs of a folder in one of the layouts, all held out; None where it has none of them."""
        for inputs, targets in self.layouts:
            if (folder / inputs).is_dir() and (folder / targets).is_dir():
                return list(sources.paired_folders(
                    folder / inputs, folder / targets, task=self.name, instruction=self.instruction, eval_fraction=1.0
                ))  # fmt: skip
        return None

    def read(self, record: sources.Record, size: int) -> tuple[np.ndarray, np.ndarray]:
        """A record as the model meets it, two uint8 [size, size, 3]."""
        before, after = open_image(record.input), PIL.Image.fromarray(self.truth.picture(self.truth.read(record.output)))
        if not self.whole:
            return resize_center_crop(before, size), resize_center_crop(after, size)
        # Colours that stand for numbers must not be mixed.
        how = PIL.Image.Resampling.LANCZOS if isinstance(self.truth, Colours) else PIL.Image.Resampling.NEAREST
        return np.asarray(before.resize((size, size), PIL.Image.Resampling.LANCZOS)), np.asarray(after.resize((size, size), how))

    def score(self, record: sources.Record, images: Mapping[str, np.ndarray], size: int) -> dict[str, dict[str, Sums]]:
        """Metric -> arm -> sums of one query, from the pictures of `run_pairs`."""
        truth, source = self.truth.read(record.output), np.asarray(open_image(record.input))
        if not self.whole:
            source, target = self.read(record, size)
            truth = self.truth.decode(target, target.shape[:2])
        predictions = {arm: self.truth.decode(image, truth.shape[:2]) for arm, image in images.items()}
        return {m.name: {arm: m.measure(p, truth, source) for arm, p in predictions.items()} for m in self.metrics}


_NEITHER = "the paper does not say whether RGB or Y was scored, nor at which size"
SUITES: dict[str, Suite] = {suite.name: suite for suite in (
    Suite("pairs", "Any pairs of images: how near the drawn image is to the held-out one.",
          (_PSNR, _SSIM, _MAE, _CHANGED), whole=False),
    Suite("derain", "Rain100L: light rain removed.", (_PSNR_Y, _SSIM_Y, _PSNR, _SSIM), instruction="remove the rain",
          published={"X-Prompt, Table 2": {"PSNR": 25.53, "SSIM": 0.843}, "Painter, Table 2": {"PSNR": 29.87, "SSIM": 0.882},
                     "OmniGen, Table 2": {"PSNR": 12.02, "SSIM": 0.233},
                     "Chameleon's tokenizer alone, Table 5": {"PSNR": 26.34, "SSIM": 0.805}}, note=_NEITHER),
    Suite("derain_heavy", "Rain100H: heavy rain removed, the novel task of Table 4.", (_PSNR_Y, _SSIM_Y, _PSNR, _SSIM),
          instruction="remove the rain",
          published={"X-Prompt, novel task, Table 4": {"PSNR": 18.91, "SSIM": 0.512},
                     "the same without XP tokens, Table 4": {"PSNR": 18.10, "SSIM": 0.509},
                     "no example, Table 4": {"PSNR": 7.924, "SSIM": 0.212}, "trained on it, Table 4": {"PSNR": 21.55, "SSIM": 0.633}},
          note=_NEITHER),
    Suite("low_light", "LOL-v1: dark photographs brightened.", (_PSNR, _SSIM_UNIFORM, _SSIM), (("input", "target"), ("low", "high")),
          "brighten the dark photograph",
          published={"X-Prompt, Table 2": {"PSNR": 19.71, "SSIM": 0.810}, "Painter, Table 2": {"PSNR": 22.40, "SSIM": 0.872},
                     "X-Prompt, novel task, Table 4": {"PSNR": 17.22, "SSIM": 0.653},
                     "the same without XP tokens, Table 4": {"PSNR": 17.00, "SSIM": 0.633},
                     "no example, Table 4": {"PSNR": 9.140, "SSIM": 0.253}},
          note="the paper does not say which SSIM; for the same model Table 2 prints 0.810 and Table 4 0.770"),
    Suite("deblur", "GoPro: motion blur removed.", (_PSNR, _SSIM, _SSIM_3D), instruction="remove the motion blur",
          published={"X-Prompt, Table 2": {"PSNR": 21.04, "SSIM": 0.761}, "InstructIR, Table 2": {"PSNR": 29.40, "SSIM": 0.886},
                     "OmniGen, Table 2": {"PSNR": 13.39, "SSIM": 0.321}}, note="the paper does not say which SSIM, nor at which size"),
    Suite("denoise", "Noise removed from photographs.", (_PSNR, _SSIM), (("input", "target"), ("noisy", "clean")), "remove the noise",
          note="the paper shows pictures and no numbers"),
    Suite("depth", "NYUv2: depth in metres.", (_DEPTH,), (("input", "target"), ("rgb", "depth")), "paint the depth",
          Depth(palettes.get_palette("grey")),
          published={"X-Prompt, Table 2": {"RMSE": 0.277}, "Painter, Table 2": {"RMSE": 0.288}, "OmniGen, Table 2": {"RMSE": 0.480},
                     "X-Prompt, novel colours, Table 4": {"RMSE": 0.352}, "the same without XP tokens, Table 4": {"RMSE": 0.390},
                     "no example, Table 4": {"RMSE": 0.745}},
          note="the paper names neither its crop nor its colours; Table 4 prints 0.279 for the model of Table 2"),
    Suite("segmentation", "ADE20K: 150 classes.", (_IOU,), (("input", "target"), ("images/validation", "annotations/validation")),
          "paint every class in its colour", Labels(palettes.max_separation(150)),
          published={"X-Prompt, Table 2": {"mIoU": 31.21}, "Painter, Table 2": {"mIoU": 49.90}, "Lumina-mGPT, Table 2": {"mIoU": 20.87}},
          note="the paper does not name its colours"),
    Suite("normals", "NYUv2: surface normals.", _NORMALS, (("input", "target"), ("img", "norm")), "paint the surface normals", Normals(),
          published={"X-Prompt, Table 2": {"angle": 19.17}, "Bae et al., Table 2": {"angle": 14.90}, "InvPT, Table 2": {"angle": 19.04}},
          note="Bae and InvPT score against different ground truths; the paper does not say which is its own"),
)}  # fmt: skip
"""By name. Numbers of the paper: arXiv 2412.01824, Tables 2, 4 and 5."""


def get_suite(name: str, palette: str = "") -> Suite:
    """A suite, perhaps with other colours.

    Args:
      palette: for depth one of `palettes.PALETTES`; for segmentation "painter" or "max_separation"; "" leaves it as it is.

    Raises:
      UserError: no such suite or palette, or the suite has none.
    """
    from xprompt_jax.evaluate.magicbrush import MAGICBRUSH  # it builds on this module

    suites = {**SUITES, MAGICBRUSH.name: MAGICBRUSH}
    if name not in suites:
        raise UserError(f"suite {name!r} is unknown; suites are {', '.join(suites)}")
    suite = suites[name]
    if not palette:
        return suite
    if isinstance(suite.truth, Depth):
        return dataclasses.replace(suite, truth=Depth(palettes.get_palette(palette)), palette=palette)
    if not isinstance(suite.truth, Labels):
        raise UserError(f"--palette {palette}: suite {name} has no colours to choose; leave it out")
    choices = {"painter": palettes.painter_ade, "max_separation": lambda: palettes.max_separation(150)}
    if palette not in choices:
        raise UserError(f"--palette {palette}: unknown; use {' or '.join(choices)}")
    return dataclasses.replace(suite, truth=Labels(choices[palette]()), palette=palette)


def find_records(suite: Suite, data: Path, *, flag: str = "--data", eval_fraction: float = 1.0) -> list[sources.Record]:
    """The pairs of a manifest, or of a folder in one of the suite's layouts, which is all held out.

    Args:
      eval_fraction: held out where the manifest does not say.

    Raises:
      UserError: nothing is there; says where it is expected and in which layout.
    """
    if data.is_file():
        records = list(sources.manifest(data, eval_fraction=eval_fraction))
        # The other suites are one task each, whatever a manifest calls it.
        return records if suite.name == "pairs" else [dataclasses.replace(r, task=suite.name, group=suite.name) for r in records]
    found = suite.find(data)
    if found is not None:
        return found
    missing = "no such file or folder" if not data.exists() else "not the layout expected"
    raise UserError(f"{flag} {data}: {missing}; suite {suite.name} takes a manifest (docs/data.md), or {suite.wanted}")
