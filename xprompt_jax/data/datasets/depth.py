"""NYUv2 depth: the labelled .mat, BTS's PNGs, FastDepth's HDF5 as files or tars, and prepared TensorFlow Datasets copies.

Depth is in metres; 0 is unknown and painted as the near end of the palette, as Painter does. The pictures keep their size: the black
frame of BTS's test photographs (outside rows 7 to 474 and columns 7 to 632) stays, the scored crop leaves it out.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from xprompt_jax.data.datasets.base import Card, Dataset, Layout, Options, Pairs, Part, Rows, files
from xprompt_jax.data.datasets.optional import need
from xprompt_jax.data.datasets.tfds import Prepared
from xprompt_jax.data.palettes import get_palette
from xprompt_jax.data.phrases import pick, say
from xprompt_jax.data.readers import Folders, Tar
from xprompt_jax.data.readers.strings import position
from xprompt_jax.data.sources import Record
from xprompt_jax.errors import UserError


def _depth(row: Mapping[str, Any], palettes: tuple[str, ...]) -> Record:
    """A row with "image" and "depth" (metres [h, w]); the palette is the sub-task, so one never shows another as example."""
    key = str(row["key"])
    palette = pick(palettes, f"palette/{key}")
    return Record(
        row["image"], get_palette(palette).encode(row["depth"]), task=f"depth/{palette}", group=f"nyuv2_depth/{palette}", exact=True,
        **say("depth", f"nyuv2_depth/{key}", palette=palette),
    )  # fmt: skip


def _millimetres(row: Mapping[str, Any], palettes: tuple[str, ...]) -> Record:
    """BTS's rows: paths; depth as 16-bit PNG in millimetres."""
    try:
        with PIL.Image.open(row["depth"]) as image:
            depth = np.asarray(image)
    except Exception:  # decoders meet hostile bytes with nearly any exception
        raise UserError(f"{row['depth']}: not a readable image; replace or remove it") from None
    if depth.ndim != 2 or depth.dtype == np.uint8:
        raise UserError(f"{row['depth']}: a depth map must be a 16-bit PNG in millimetres, not {depth.dtype} {list(depth.shape)}")
    return _depth({**row, "image": row["input"], "depth": depth / 1000.0}, palettes)


def _hdf5(row: Mapping[str, Any], palettes: tuple[str, ...]) -> Record:
    """FastDepth's rows: a small HDF5 file each, by path or as bytes: rgb uint8 [3, h, w], depth [h, w] in metres."""
    h5py = need("h5py", "NYUv2's HDF5 files")
    source = row["input"] if "input" in row else io.BytesIO(row["h5"])
    try:
        with h5py.File(source, "r") as file:
            image, depth = np.ascontiguousarray(file["rgb"][:].transpose(1, 2, 0)), file["depth"][:].astype(np.float32)
    except (OSError, KeyError) as e:
        raise UserError(f"{row['key']}: no HDF5 file with rgb and depth ({e}); download it again") from None
    return _depth({**row, "image": image, "depth": depth}, palettes)


class _Labelled(Sequence[Mapping[str, Any]]):
    """nyu_depth_v2_labeled.mat: 1,449 pictures with filled depth, and the raw depth with its holes. Rows 0..n-1 of one split."""

    def __init__(self, root: Path, split: str):
        self._path = root / "nyu_depth_v2_labeled.mat"
        self._file: Any = None
        # The filled depth is for training; benchmarks score against what the camera measured.
        self._name = "depths" if split == "train" else "rawDepths"
        from scipy.io import loadmat

        try:
            self._numbers = loadmat(root / "splits.mat")[f"{split}Ndxs"].reshape(-1).astype(np.int32) - 1
        except (OSError, KeyError, ValueError, TypeError, NotImplementedError) as e:
            raise UserError(f"{root / 'splits.mat'}: not readable ({e}); download it, it lies beside the .mat on NYUv2's page") from None

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i):
        number = int(self._numbers[position(i, len(self))])
        if self._file is None:
            h5py = need("h5py", "NYUv2's HDF5 files")
            try:
                self._file = h5py.File(self._path, "r")
            except OSError as e:
                raise UserError(f"{self._path}: not a whole .mat of version 7.3 ({e}); download it again") from None
        # MATLAB counts columns first, so its [h, w, 3, n] is read as [n, 3, w, h].
        image = np.ascontiguousarray(self._file["images"][number].transpose(2, 1, 0))
        return {"key": f"{number + 1:04d}", "image": image, "depth": self._file[self._name][number].T}

    def __getstate__(self):
        return {**self.__dict__, "_file": None}


Open = Callable[[Path, Options], Pairs]


def _rows(make: Callable[..., Record], rows: Callable[[Path], Sequence[Mapping[str, Any]]]) -> Open:
    return lambda root, options: Rows(rows(root), functools.partial(make, palettes=options.palettes), options.eval_fraction)


def _bts(folder: str) -> Open:
    pattern = rf"{folder}/(?P<scene>.+)/rgb_(?P<n>\d+)\.(?:jpg|png)"
    columns = {"depth": rf"{folder}/\g<scene>/sync_depth_\g<n>"}
    return _rows(_millimetres, lambda root: Folders(root, pattern, columns, below=[folder], key=r"\g<scene>/\g<n>"))


def _fastdepth(folder: str) -> Open:
    return _rows(_hdf5, lambda root: Folders(root, rf"{folder}/(?P<key>.+)\.h5", {}, below=[folder]))


def _tars(pattern: str) -> Open:
    return _rows(_hdf5, lambda root: Tar(files(root, pattern), {"h5": ("h5",)}, required=["h5"]))


def _prepared(mark: str, split: str) -> Open:
    return _rows(_depth, lambda root: Prepared(files(root, mark)[-1].parent, split))


NYUV2_DEPTH = Dataset("nyuv2_depth", Card(
    "NYUv2 depth: rooms with metric depth (--palette turbo)", "https://cs.nyu.edu/~fergus/datasets/nyu_depth_v2.html", "research",
    ("depth",),
    "the paper's 48K are FastDepth's 47,584; .mat and .h5 need pip install 'xprompt-jax[data]'; BTS lists 24,231 frames of sync/",
), (
    Layout("labelled .mat and splits.mat", (
        Part("train", "nyu_depth_v2_labeled.mat", _rows(_depth, lambda root: _Labelled(root, "train")), 795),
        Part("test", "nyu_depth_v2_labeled.mat", _rows(_depth, lambda root: _Labelled(root, "test")), 654),
    )),
    Layout("BTS, Painter", (
        Part("train", "sync", _bts("sync")), Part("train795", "official_splits/train", _bts("official_splits/train"), 795),
        Part("test", "official_splits/test", _bts("official_splits/test"), 654),
    )),
    Layout("FastDepth's .h5", (
        Part("train", "train/*/*.h5", _fastdepth("train"), 47584), Part("val", "val/*/*.h5", _fastdepth("val"), 654),
    )),
    Layout("tars of FastDepth's .h5", (
        Part("train", "train-*.tar", _tars("train-*.tar"), 47584), Part("val", "val-*.tar", _tars("val-*.tar"), 654),
    )),
    *(Layout(f"TensorFlow Datasets{where}", (
        Part("train", mark, _prepared(mark, "train"), 47584), Part("validation", mark, _prepared(mark, "validation"), 654),
    )) for where, mark in (("", "*/features.json"), (", version folder", "features.json"))),
), ("nyu_depth_v2", "nyudepthv2", "nyu_v2", "data"), ("palettes",))  # fmt: skip

DATASETS = (NYUV2_DEPTH,)
