"""Surface normals and semantic classes: NYUv2 (two ground truths), ScanNet, ADE20K (paper, Tables 2 and 6).

Normals stay in the axes of their publishers, so that what a model draws can be scored against their files; the three differ in sign.
In all of them red is horizontal, so a mirror turns red around (`palettes.mirror_normals`). RGB is (n + 1) / 2 * 255; pixels whose vector is
far from unit length are unknown, and black. Pairs of one ground truth are never examples for another.
"""

from __future__ import annotations

import functools
import pickletools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from xprompt_jax.data.datasets.base import Card, Dataset, Layout, Options, Pairs, Part, Rows
from xprompt_jax.data.images import open_image
from xprompt_jax.data.palettes import max_separation, painter_ade
from xprompt_jax.data.phrases import say
from xprompt_jax.data.readers import Folders
from xprompt_jax.data.sources import Record
from xprompt_jax.errors import UserError

IMAGE = r"\.(?:png|jpg|jpeg)"


def _normals(row: Mapping[str, Any], group: str) -> Record:
    rgb = np.asarray(open_image(row["normals"]))
    length = np.linalg.norm(rgb / 127.5 - 1.0, axis=-1, keepdims=True)
    known = np.abs(length - 1.0) < 0.25  # (0, 0, 0) and (255, 255, 255), the marks in use, have length 1.73
    return Record(
        row["input"], np.where(known, rgb, 0).astype(np.uint8), task="normals", group=group, exact=True,
        **say("normals", f"{group}/{row['key']}"),
    )  # fmt: skip


def _normal_files(group: str, pattern: str, normals: str, *, below: tuple[str, ...], listed: str = "") -> Callable[[Path, Options], Pairs]:
    """`listed` names a text file whose first words are the keys to keep."""

    def open_part(root: Path, options: Options) -> Pairs:
        only = _names(root / listed) if listed else None
        rows = Folders(root, pattern, {"normals": normals}, below=[b for b in below if (root / b).is_dir()], only=only)
        return Rows(rows, functools.partial(_normals, group=group), options.eval_fraction)

    return open_part


class _Scenes:
    """Contains the keys <scene>/<frame> whose scene, or which themselves, are named."""

    def __init__(self, names: frozenset[str]):
        self._names = names

    def __contains__(self, key: object) -> bool:
        return key in self._names or str(key).partition("/")[0] in self._names


def _names(path: Path) -> frozenset[str]:
    try:
        return frozenset(line.split()[0] for line in path.read_text().splitlines() if line.strip())
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: not there or not a text; it lists a split: download it") from None


def _geonet(split: str) -> Callable[[Path, Options], Pairs]:
    return _normal_files("nyuv2_normals/geonet", rf"{split}/img/(?P<key>[^/]+){IMAGE}", rf"{split}/norm/\g<key>", below=(split,))


def _nyud_mt(split: str) -> Callable[[Path, Options], Pairs]:
    return _normal_files(
        "nyuv2_normals/nyud_mt",
        rf"images/(?P<key>[^/]+){IMAGE}",
        r"normals/\g<key>",
        below=("images", "normals"),
        listed=f"gt_sets/{split}.txt",
    )


NYUV2_NORMALS = Dataset("nyuv2_normals", Card(
    "NYUv2 surface normals: GeoNet's (scored by Bae et al.) or NYUD_MT's (scored by InvPT)",
    "https://github.com/baegwangbin/surface_normal_uncertainty or https://github.com/SimonVandenhende/Multi-Task-Learning-PyTorch",
    "research", ("normals",), "two different ground truths: 14.90 and 19.04 degrees in the paper's Table 2 do not compare",
), (
    Layout("GeoNet, as Bae et al. have it", (
        Part("train", "train/norm", _geonet("train"), 795), Part("test", "test/norm", _geonet("test"), 654),
    )),
    Layout("NYUD_MT", (Part("train", "gt_sets/train.txt", _nyud_mt("train"), 795), Part("val", "gt_sets/val.txt", _nyud_mt("val"), 654))),
), ("nyu", "NYUD_MT"))  # fmt: skip


_FRAME = re.compile(r"(scene\d{4}_\d{2})/frame-(\d+)-")


def _framenet_split(path: Path, split: str) -> frozenset[str]:
    """scene/frame of every frame of a split, from FrameNet's train_test_split.pkl: its strings are looked through, and it is never
    unpickled, which could run code."""
    frames: dict[str, set[str]] = {}
    listed = None
    try:
        for _, value, _ in pickletools.genops(path.read_bytes()):
            text = value.decode("latin-1") if isinstance(value, bytes) else value if isinstance(value, str) else ""
            if text in ("train", "test"):  # the keys of a dictionary, each before what it holds
                listed = frames.setdefault(text, set())
            elif listed is not None:  # a path, or all of an array, as wide characters even
                listed.update(f"{scene}/{frame}" for scene, frame in _FRAME.findall(text.replace("\0", "")))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable ({e}); download it again") from None
    if not frames.get(split):
        raise UserError(f"{path}: no {split} frames in it; download it again, or list scenes in train.txt and test.txt in its place")
    return frozenset(frames[split])


def _scannet(split: str = "", listed: str = "{}.txt") -> Callable[[Path, Options], Pairs]:
    def open_part(root: Path, options: Options) -> Pairs:
        only = None
        if split:
            path = root / listed.format(split)
            only = _Scenes(_framenet_split(path, split) if path.suffix == ".pkl" else _names(path))
        pattern = r"(?:scannet-frames/)?(?P<scene>scene\d+_\d+)/frame-(?P<n>\d+)-color\.(?:png|jpg)"
        normals = {"normals": r"scannet-frames/\g<scene>/frame-\g<n>-normal"}
        rows = Folders(root, pattern, normals, below=["scannet-frames"], key=r"\g<scene>/\g<n>", only=only)
        return Rows(rows, functools.partial(_normals, group="scannet_normals"), options.eval_fraction)

    return open_part


_PICKLED = "train_test_split.pkl"
SCANNET_NORMALS = Dataset("scannet_normals", Card(
    "ScanNet normals by FrameNet: rooms, every tenth frame", "https://github.com/hjwdzh/FrameNet (src/data/download.sh)",
    "ScanNet terms of use", ("normals",),
    "the split is FrameNet's train_test_split.pkl beside scannet-frames/ (its strings are read, it is never unpickled), or train.txt and "
    "test.txt of scenes or scene/frame; without either all 264,039 frames are for training, which is what the paper's 260K seem to be",
), (
    Layout("FrameNet's", (
        Part("train", _PICKLED, _scannet("train", _PICKLED), 199_720), Part("test", _PICKLED, _scannet("test", _PICKLED), 64_319),
    )),
    Layout("with lists", (Part("train", "train.txt", _scannet("train"), 199_720), Part("test", "test.txt", _scannet("test"), 64_319))),
    Layout("frames alone", (Part("train", "scannet-frames", _scannet(), 264_039),)),
))  # fmt: skip


def _classes(row: Mapping[str, Any], classes: str) -> Record:
    """ADE20K's annotation, 0 for what belongs to no class and 1 to 150, in the palette's colours."""
    try:
        with PIL.Image.open(row["labels"]) as image:
            labels = np.asarray(image)
    except Exception:  # decoders meet hostile bytes with nearly any exception
        raise UserError(f"{row['labels']}: not a readable image; replace or remove it") from None
    if labels.ndim != 2 or labels.max() > 150:
        raise UserError(f"{row['labels']}: not a map of 150 classes; take ADEChallengeData2016, not the instance or the full annotations")
    palette = painter_ade() if classes == "painter" else max_separation(150)
    return Record(
        row["input"], palette.encode(labels.astype(np.int64) - 1), task="segmentation", group=f"ade20k/{classes}", exact=True,
        **say("segmentation", f"ade20k/{row['key']}"),
    )  # fmt: skip


def _ade(split: str) -> Callable[[Path, Options], Pairs]:
    pattern, labels = rf"images/{split}/(?P<key>[^/]+)\.jpg", rf"annotations/{split}/\g<key>"
    below = (f"images/{split}", f"annotations/{split}")
    return lambda root, options: Rows(Folders(root, pattern, {"labels": labels}, below=below),
                                      functools.partial(_classes, classes=options.classes), options.eval_fraction)  # fmt: skip


ADE20K = Dataset("ade20k", Card(
    "ADE20K: 150 classes (--classes max_separation or painter)", "http://sceneparsing.csail.mit.edu/",
    "images for research, annotations BSD",
    ("segmentation",), "ADEChallengeData2016; the scene_parse150 of TensorFlow Datasets holds instances and does not serve",
), (Layout("ADEChallengeData2016", (
    Part("train", "images/training", _ade("training"), 20_210), Part("val", "images/validation", _ade("validation"), 2_000),
)),), ("ADEChallengeData2016",), ("classes",))  # fmt: skip

DATASETS = (NYUV2_NORMALS, SCANNET_NORMALS, ADE20K)
