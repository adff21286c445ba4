"""Degraded photographs and their clean ones: noise, motion blur, rain, low light, retouching (paper, Table 6, first rows)."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from xprompt_jax.data import degrade
from xprompt_jax.data.datasets.base import Card, Dataset, Layout, Options, Pairs, Part, Rows, pair_of
from xprompt_jax.data.datasets.optional import need
from xprompt_jax.data.images import MAX_PIXELS, open_image
from xprompt_jax.data.phrases import pick, say
from xprompt_jax.data.readers import Folders
from xprompt_jax.data.readers.strings import position
from xprompt_jax.data.sources import Record
from xprompt_jax.errors import UserError

IMAGE = r"\.(?:png|jpg|jpeg|bmp|JPG|PNG)"


def _folders(
    task: str, group: str, inputs: str, outputs: str | tuple[str, ...], *, below: str, name: str = r"(?P<key>[^/]+)"
) -> Callable[[Path, Options], Pairs]:
    """Opens pairs of files: `inputs`/`name` is a pattern, `outputs` the templates of its partner."""

    def open_part(root: Path, options: Options) -> Pairs:
        rows = Folders(root, inputs + "/" + name + IMAGE, {"output": outputs}, below=[below])
        return Rows(rows, functools.partial(pair_of, task=task, group=group), options.eval_fraction)

    return open_part


# Denoising: clean photographs alone; the noise is made here.


class _Crops(Sequence[Mapping[str, Any]]):
    """Squares of 512 pixels at a stride of 416 from pictures that are wider and higher than 800 pixels, all others whole: the crops
    that Restormer's DFWB is made of."""

    def __init__(self, rows: Folders, size: int = 512, stride: int = 416, least: int = 800):
        self._rows, boxes = rows, []
        for number, row in enumerate(rows):
            width, height = _size(row["input"])
            whole = min(width, height) <= least
            for top in [0] if whole else _starts(height, size, stride):
                for left in [0] if whole else _starts(width, size, stride):
                    boxes.append((number, left, top, width if whole else left + size, height if whole else top + size))
        self._boxes = np.array(boxes, np.int32).reshape(-1, 5)

    def __len__(self) -> int:
        return len(self._boxes)

    def __getitem__(self, i):
        number, *box = self._boxes[position(i, len(self))].tolist()
        row = self._rows[number]
        return {"key": f"{row['key']}/{box[0]}/{box[1]}", "scene": row["key"], "input": row["input"], "box": box}


def _size(path: Path) -> tuple[int, int]:
    """Width and height, from the header alone."""
    try:
        with PIL.Image.open(path) as image:
            return image.size
    except Exception:  # decoders meet hostile bytes with nearly any exception
        raise UserError(f"{path}: not an image, or damaged; download it again") from None


def _starts(length: int, size: int, stride: int) -> list[int]:
    return [*range(0, length - size, stride), length - size]


def _noisy(row: Mapping[str, Any]) -> Record:
    """Adds Gaussian noise of 15, 25 or 50 levels, always the same to the same picture."""
    image = open_image(row["input"])
    clean = np.asarray(image.crop(row["box"]) if "box" in row else image)
    key = str(row["key"])
    sigma = int(pick(("15", "25", "50"), f"sigma/{key}"))
    rng = np.random.default_rng(list(key.encode("utf-8", "surrogateescape")))
    noisy = degrade.gaussian_noise(clean, rng, sigma=sigma)
    return Record(noisy, clean, task="denoise", group="denoise", **say("denoise", key))


def _dfwb_sources(root: Path, options: Options) -> Pairs:
    rows = Folders(root, rf"(?P<key>(?:DIV2K|Flickr2K|WaterlooED|BSD400)/.+){IMAGE}", {})
    return Rows(_Crops(rows), _noisy, options.eval_fraction, counted=len(rows))


def _dfwb_crops(root: Path, options: Options) -> Pairs:
    """Restormer's crops, <set>-<photograph>-<number>, or <set>-<photograph> where it is whole; the photographs are counted."""
    rows = Folders(root, rf"(?P<key>train/DFWB/(?P<scene>[^/-]+-[^/]+?)(?:-\d+)?){IMAGE}", {}, below=["train/DFWB"])
    return Rows(rows, _noisy, options.eval_fraction, counted=len({row["scene"] for row in rows}))


def _clean(folder: str) -> Callable[[Path, Options], Pairs]:
    return lambda root, options: Rows(Folders(root, rf"(?P<key>{folder}/[^/]+){IMAGE}", {}, below=[folder]), _noisy, options.eval_fraction)


_NOISE_TESTS = (("CBSD68", 68), ("Kodak", 24), ("McMaster", 18), ("Urban100", 100))

DFWB = Dataset("dfwb", Card(
    "DIV2K, Flickr2K, WaterlooED, BSD400: clean photographs, made noisy (sigma 15, 25, 50)",
    "https://github.com/swz30/Restormer (Denoising/download_data.py)", "each set's own; research", ("denoise",),
    "8,594 photographs make about 74,000 crops; the paper counts 72K",
), (
    Layout("photographs", (Part("train", "Downloads/*", lambda root, o: _dfwb_sources(root / "Downloads", o), 8594),)),
    Layout("photographs without Downloads/", (Part("train", "WaterlooED", _dfwb_sources, 8594),)),
    Layout("crops", (
        Part("train", "train/DFWB", _dfwb_crops, 8594),
        *(Part(name, f"test/{name}", _clean(f"test/{name}"), count) for name, count in _NOISE_TESTS),
    )),
), ("Datasets",))  # fmt: skip

# Deblurring.


def _official(split: str) -> Callable[[Path, Options], Pairs]:
    """GOPRO_Large: <scene>/blur/000001.png and <scene>/sharp/000001.png; blur_gamma is left alone, as everyone does."""

    def open_part(root: Path, options: Options) -> Pairs:
        pattern = rf"{split}/(?P<scene>[^/]+)/blur/(?P<frame>[^/]+){IMAGE}"
        output = {"output": rf"{split}/\g<scene>/sharp/\g<frame>"}
        rows = Folders(root, pattern, output, below=[split], key=r"\g<scene>-\g<frame>")
        return Rows(rows, functools.partial(pair_of, task="deblur", group="gopro"), options.eval_fraction)

    return open_part


def _gopro(folder: str) -> Callable[[Path, Options], Pairs]:
    split, inputs = folder.split("/")
    return _folders("deblur", "gopro", folder, rf"{split}/{inputs.replace('input', 'target')}/\g<key>", below=split)


GOPRO = Dataset("gopro", Card(
    "GoPro: frames of moving cameras and sharp ones", "https://seungjunnah.github.io/Datasets/gopro", "CC BY 4.0", ("deblur",),
    "the linear blur (blur/), not blur_gamma/; the paper's 17K are the 16,824 crops",
), (
    Layout("crops of 512 pixels", (
        Part("train", "train/input_crops", _gopro("train/input_crops"), 16824), Part("test", "test/input", _gopro("test/input"), 1111),
    )),
    Layout("MPRNet's", (Part("train", "train/input", _gopro("train/input"), 2103), Part("test", "test/input", _gopro("test/input"), 1111))),
    Layout("official", (Part("train", "train/*/blur", _official("train"), 2103), Part("test", "test/*/blur", _official("test"), 1111))),
), ("GoPro", "GOPRO_Large"))  # fmt: skip

# Rain.

_RAIN_TESTS = (("Rain100L", 100), ("Rain100H", 100), ("Test100", 100), ("Test1200", 1200), ("Test2800", 2800))


def _rain(folder: str) -> Callable[[Path, Options], Pairs]:
    """input/target with equal names; other copies have rainy/norain, or rain-001 and norain-001."""
    outputs = tuple(
        rf"{folder}/{part}" for part in (r"target/\g<key>", r"norain/\g<key>", r"target/no\g<key>", r"norain/no\g<key>", r"no\g<key>")
    )
    return _folders("derain", "rain", rf"{folder}(?:/input|/rainy|/rain)?", outputs, below=folder, name=r"(?P<key>(?!norain)[^/]+)")


RAIN13K = Dataset("rain13k", Card(
    "Rain13K with Rain100L, Rain100H, Test100, Test1200, Test2800: rain streaks",
    "https://github.com/swz30/MPRNet (Deraining/download_data.py)",
    "each set's own; research", ("derain",), "copies of Rain100L with rainy/norain or rain-001/norain-001 names are read too",
), (
    Layout("MPRNet's", (
        Part("train", "train/Rain13K", _rain("train/Rain13K"), 13712),
        *(Part(name, f"test/{name}", _rain(f"test/{name}"), count) for name, count in _RAIN_TESTS),
    )),
    Layout("Painter's", (
        Part("train", "train/input", _rain("train"), 13712),
        *(Part(name, f"test/{name}", _rain(f"test/{name}"), count) for name, count in _RAIN_TESTS),
    )),
    Layout("a test set alone", tuple(Part(name, name, _rain(name), count) for name, count in _RAIN_TESTS)),
), ("Datasets", "derain"))  # fmt: skip

# Low light and retouching.


def _lol(name: str, split: str, inputs: str, count: int) -> Part:
    """`inputs` as .../low; the official LOL-v2 calls its files low00001 and normal00001."""
    folder, _, low = inputs.rpartition("/")
    high = {"low": "high", "Low": "Normal", "input": "target"}[low]
    outputs = (rf"{folder}/{high}/\g<key>", rf"{folder}/{high}/normal\g<key>")
    return Part(split, inputs, _folders("low_light", name, inputs, outputs, below=folder, name=r"(?:low(?=\d))?(?P<key>[^/]+)"), count)


_LOL_SOURCE = "https://daooshee.github.io/BMVC2018website/"
LOL_V1 = Dataset("lol_v1", Card("LOL: dark rooms, short and long exposures", _LOL_SOURCE, "research", ("low_light",)), (
    Layout("official", (_lol("lol_v1", "train", "our485/low", 485), _lol("lol_v1", "test", "eval15/low", 15))),
    Layout("Retinexformer's", (_lol("lol_v1", "train", "Train/input", 485), _lol("lol_v1", "test", "Test/input", 15))),
), ("LOLv1", "LOL", "LOLdataset"))  # fmt: skip


def _lol_v2(name: str, folder: str, train: int) -> Dataset:
    parts = (_lol(name, "train", f"{folder}/Train/Low", train), _lol(name, "test", f"{folder}/Test/Low", 100))
    card = Card(f"LOL-v2 {folder.replace('_', ' ').lower()}", "https://github.com/flyywh/SGM-Low-Light", "research", ("low_light",))
    return Dataset(name, card, (Layout("official, or Retinexformer's names", parts),), ("LOLv2", "LOL-v2"))


LOL_V2_REAL = _lol_v2("lol_v2_real", "Real_captured", 689)
LOL_V2_SYNTHETIC = _lol_v2("lol_v2_synthetic", "Synthetic", 900)


def _developed(row: Mapping[str, Any]) -> Record:
    """The camera's raw file and the expert's 16-bit TIFF, as 8-bit pictures."""
    rawpy, tifffile = need("rawpy", "FiveK's raw files"), need("tifffile", "FiveK's 16-bit TIFFs")
    try:
        with rawpy.imread(str(row["input"])) as raw:
            before = raw.postprocess(use_camera_wb=True)
    except (rawpy.LibRawError, OSError) as e:
        raise UserError(f"{row['input']}: not a readable raw file ({e}); download it again") from None
    try:
        levels = tifffile.imread(row["output"])
    except (tifffile.TiffFileError, OSError, ValueError) as e:
        raise UserError(f"{row['output']}: not a readable TIFF ({e}); download it again") from None
    if levels.size > 3 * MAX_PIXELS:
        raise UserError(f"{row['output']}: more than {MAX_PIXELS:,} pixels; make it smaller")
    after = levels if levels.dtype == np.uint8 else np.rint(levels / 257.0).astype(np.uint8)
    return pair_of({**row, "input": before, "output": np.ascontiguousarray(after[..., :3])}, task="retouch", group="fivek")


def _fivek_raw(root: Path, options: Options) -> Pairs:
    expert = rf"img/tiff16_{options.expert}/\g<key>"
    output = (expert, rf"raw_photos/{expert}")
    rows = Folders(root, r"raw_photos/.*/photos/(?P<key>[^/]+)\.dng", {"output": output})
    return Rows(rows, _developed, options.eval_fraction)


def _fivek_480p(*lists: str) -> Callable[[Path, Options], Pairs]:
    """Zeng's 480p JPEGs; `lists` name a split's pictures (its training list is in two halves)."""

    def open_part(root: Path, options: Options) -> Pairs:
        names = {re.sub(r"\.\w+$", "", line.strip()) for name in lists for line in _lines(root / name) if line.strip()}
        output = rf"expert{options.expert.upper()}/JPG/480p/\g<key>"
        below = ["input/JPG/480p", f"expert{options.expert.upper()}/JPG/480p"]
        rows = Folders(root, rf"input/JPG/480p/(?P<key>[^/]+){IMAGE}", {"output": output}, below=below, only=names)
        return Rows(rows, functools.partial(pair_of, task="retouch", group="fivek"), options.eval_fraction)

    return open_part


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: not there or not a text; it lists a split of FiveK: download it") from None


def _retinexformer(split: str) -> Callable[[Path, Options], Pairs]:
    """Retinexformer's JPEGs, of expert C alone."""
    opened = _folders("retouch", "fivek", f"{split}/input", rf"{split}/target/\g<key>", below=split)

    def open_part(root: Path, options: Options) -> Pairs:
        if options.expert != "c":
            raise UserError(f"--expert {options.expert}: {root} is Retinexformer's copy, which has expert C alone; leave it out")
        return opened(root, options)

    return open_part


FIVEK = Dataset("fivek", Card(
    "MIT-Adobe FiveK: 5,000 photographs and their retouching by an expert (--expert, C)", "https://data.csail.mit.edu/graphics/fivek/",
    "research only (two licences, by photograph)", ("retouch",), "raw files need pip install 'xprompt-jax[data]'",
), (
    Layout("official, raw", (Part("train", "raw_photos", _fivek_raw, 5000),)),
    Layout("Zeng's 480p", (
        Part("train", "train_input.txt", _fivek_480p("train_input.txt", "train_label.txt"), 4500),
        Part("test", "test.txt", _fivek_480p("test.txt"), 500),
    )),
    Layout("Retinexformer's", (
        Part("train", "train/input", _retinexformer("train"), 4500), Part("test", "test/input", _retinexformer("test"), 500),
    )),
), ("fivek_dataset", "FiveK"), ("expert",))  # fmt: skip

DATASETS = (DFWB, GOPRO, RAIN13K, LOL_V1, LOL_V2_REAL, LOL_V2_SYNTHETIC, FIVEK)
