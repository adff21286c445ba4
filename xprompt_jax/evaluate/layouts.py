"""How copies of benchmarks lie on disk where it is not two folders of equal names (facts: data_eval.md 1.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from xprompt_jax.data.readers import Folders
from xprompt_jax.errors import UserError

_IMAGE = r"\.(?:png|jpg|jpeg|bmp|PNG|JPG)"


@dataclasses.dataclass(frozen=True)
class Copy:
    """A rule on names."""

    words: str
    """The layout, for those who look for it."""
    marks: tuple[str, ...]
    """Globs; a match of any says that it is there."""
    inputs: str
    """Regular expression on an input's path, with a group "key"."""
    targets: tuple[str, ...]
    """Templates of its target's path without extension, tried in turn."""
    lists: tuple[tuple[str, str], ...] = ()
    """(split, text file with the keys of its pairs in the first word of each line); without any, all is held out."""

    def read(self, place: Path) -> Iterator[tuple[Path, Path, str]]:
        """(input, target, split) of every pair; nothing where no mark is.

        Raises:
          UserError: an input lacks its target, or a list cannot be read.
        """
        if not any(True for mark in self.marks for _ in place.glob(mark)):
            return
        for split, name in self.lists or (("eval", ""),):
            only = _names(place / name) if name else None
            for row in Folders(place, self.inputs, {"output": self.targets}, only=only):
                yield row["input"], row["output"], split


def _names(path: Path) -> frozenset[str]:
    try:
        return frozenset(line.split()[0] for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: not there or not a text; it lists a split: complete the copy") from None


RAIN = Copy(
    "rainy/ and norain/, or files rain-001 and norain-001", ("norain", "norain-*", "target/norain-*"),
    rf"(?:input/|rainy/|rain/)?(?P<key>(?!norain)[^/]+){_IMAGE}",
    (r"target/\g<key>", r"norain/\g<key>", r"target/no\g<key>", r"norain/no\g<key>", r"no\g<key>"),
)  # fmt: skip
"""Rain100L and Rain100H as they circulate beside MPRNet's input/ and target/."""
GOPRO_LARGE = Copy(
    "<scene>/blur/ and <scene>/sharp/", ("*/blur",), rf"(?P<key>(?P<scene>[^/]+)/blur/(?P<frame>[^/]+)){_IMAGE}",
    (r"\g<scene>/sharp/\g<frame>",),
)  # fmt: skip
"""GoPro of its authors; blur_gamma/ is left alone, as MPRNet and its followers do."""
NYU_BTS = Copy(
    "<scene>/rgb_00045.jpg and <scene>/sync_depth_00045.png", ("*/sync_depth_*.png",),
    r"(?P<key>(?P<scene>.+)/rgb_(?P<n>\d+))\.(?:jpg|png)", (r"\g<scene>/sync_depth_\g<n>",),
)  # fmt: skip
"""NYUv2 depth of BTS and Painter."""
NYUD_MT = Copy(
    "images/, normals/ and gt_sets/", ("gt_sets/val.txt",), rf"images/(?P<key>[^/]+){_IMAGE}", (r"normals/\g<key>",),
    (("eval", "gt_sets/val.txt"), ("train", "gt_sets/train.txt")),
)  # fmt: skip
"""NYUv2 normals of MTI-Net and InvPT: all 1,449 pictures lie together, lists say which 654 are scored."""
