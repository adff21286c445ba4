"""What is measured, how, and what the paper reports: one table of suites.

Every metric carries its protocol in its name and in words, because the same images differ by 5 dB between two papers' "PSNR"
(facts: data_eval.md 2.2). Metrics are in measures.py, what target files mean in truths.py, the paper's numbers in published.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from xprompt_jax.data import palettes, sources
from xprompt_jax.data.images import open_image, resize_center_crop
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate import published
from xprompt_jax.evaluate.layouts import GOPRO_LARGE, NYU_BTS, NYUD_MT, RAIN, Copy
from xprompt_jax.evaluate.measures import (
    CHANGED,
    IOU,
    MAE,
    NORMALS,
    PSNR,
    PSNR_Y,
    SSIM,
    SSIM_3D,
    SSIM_UNIFORM,
    SSIM_Y,
    UNCHANGED,
    Metric,
    Sums,
    depth_metrics,
)  # fmt: skip
from xprompt_jax.evaluate.pairs import Episode, Outcome, run_pairs
from xprompt_jax.evaluate.truths import Colours, Depth, Labels, Normals, Truth

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt


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
    grouped: bool = False
    """A manifest's groups say which pairs are examples for each other; else the whole suite is one group."""
    note: str = ""
    """What to know before comparing with them."""
    palette: str = ""
    """What `get_suite` was given."""
    copies: tuple[Copy, ...] = ()
    """Other layouts, looked for first."""
    within: tuple[str, ...] = ()
    """Folders of a whole copy, in which the test set lies: the folder above may be given."""
    count: int = 0
    """Queries of the benchmark; 0: there is no such number."""

    @property
    def published(self) -> published.Rows:
        """What the paper prints."""
        return published.rows_of(self.name)

    def caveat(self, queries: int) -> str:
        """What to know before comparing so many queries with published numbers."""
        if not self.count or queries == self.count:
            return self.note
        few = f"{queries:,} queries are not the benchmark, which has {self.count:,}"
        return "; ".join(part for part in (few, self.note) if part)

    @property
    def wanted(self) -> str:
        """Of a folder, in words."""
        equal = f"{' or '.join(f'{inputs}/ and {targets}/' for inputs, targets in self.layouts)}, whose files have equal names"
        return ", or ".join([f"a folder with {equal}", *(copy.words for copy in self.copies)])

    def find(self, folder: Path) -> list[sources.Record] | None:
        """The pairs of a folder in one of the layouts, held out unless a list of its says that they train; None where it has none of them.

        Raises:
          UserError: an input lacks its target.
        """
        for place in (folder, *(folder / part for part in self.within)):
            for copy in self.copies:
                if pairs := list(copy.read(place)):
                    make = functools.partial(sources.Record, instruction=self.instruction, task=self.name, group=self.name)
                    return [make(before, after, split=split) for before, after, split in pairs]
            for inputs, targets in self.layouts:
                if (place / inputs).is_dir() and (place / targets).is_dir():
                    return list(sources.paired_folders(
                        place / inputs, place / targets, task=self.name, instruction=self.instruction, eval_fraction=1.0
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
        return {
            m.name: {arm: m.measure(images[arm] if m.of_picture else p, truth, source) for arm, p in predictions.items()}
            for m in self.metrics
        }

    def draw(self, model: XPrompt, episodes: Sequence[Episode], size: int, **options: Any) -> Iterator[Outcome]:
        """Draws episodes; options of `run_pairs`."""
        return run_pairs(model, episodes, read=lambda record: self.read(record, size), no_example=True, **options)


_NEITHER = "the paper does not say whether RGB or Y was scored, nor at which size"
SUITES: dict[str, Suite] = {suite.name: suite for suite in (
    Suite("pairs", "Any pairs of images: how near the drawn image is to the held-out one.",
          (PSNR, SSIM, MAE, CHANGED, UNCHANGED), whole=False, grouped=True),
    Suite("derain", "Rain100L: light rain removed.", (PSNR_Y, SSIM_Y, PSNR, SSIM), instruction="remove the rain", note=_NEITHER,
          copies=(RAIN,), within=("Rain100L", "test/Rain100L"), count=100),
    Suite("derain_heavy", "Rain100H: heavy rain removed, the novel task of Table 4.", (PSNR_Y, SSIM_Y, PSNR, SSIM),
          instruction="remove the rain", note=_NEITHER, copies=(RAIN,), within=("Rain100H", "test/Rain100H"), count=100),
    Suite("low_light", "LOL-v1: dark photographs brightened.", (PSNR, SSIM_UNIFORM, SSIM), (("input", "target"), ("low", "high")),
          "brighten the dark photograph",
          note="the paper does not say which SSIM; for the same model Table 2 prints 0.810 and Table 4 0.770", within=("eval15", "Test"),
          count=15),
    Suite("deblur", "GoPro: motion blur removed.", (PSNR, SSIM, SSIM_3D), instruction="remove the motion blur",
          note="the paper does not say which SSIM, nor at which size", copies=(GOPRO_LARGE,), within=("test",), count=1111),
    Suite("denoise", "Noise removed from photographs.", (PSNR, SSIM), (("input", "target"), ("noisy", "clean")), "remove the noise",
          note="the paper shows pictures and no numbers"),
    Suite("depth", "NYUv2: depth in metres.", depth_metrics(palettes.get_palette("grey")), (("input", "target"), ("rgb", "depth")),
          "paint the depth", Depth(palettes.get_palette("grey")),
          note="the paper names neither its crop nor its colours, nor whether holes of the truth are filled (here: what its files "
               "hold); Table 4 prints 0.279 for the model of Table 2",
          copies=(NYU_BTS,), within=("official_splits/test", "test"), count=654),
    Suite("segmentation", "ADE20K: 150 classes.", (IOU,), (("input", "target"), ("images/validation", "annotations/validation")),
          "paint every class in its colour", Labels(palettes.max_separation(150)), note="the paper does not name its colours",
          within=("ADEChallengeData2016",), count=2000),
    Suite("normals", "NYUv2: surface normals, GeoNet's ground truth.", NORMALS, (("input", "target"), ("img", "norm")),
          "paint the surface normals", Normals(), note="the paper does not say whether its ground truth is this or NYUD-MT's",
          within=("test",), count=654),
    Suite("normals_nyud", "NYUv2: surface normals, NYUD-MT's ground truth.", NORMALS, (("input", "target"), ("images", "normals")),
          "paint the surface normals", Normals(), note="the paper does not say whether its ground truth is this or GeoNet's",
          copies=(NYUD_MT,), within=("NYUD_MT",), count=654),
)}  # fmt: skip
"""By name; those that look through CLIP and DINO are in magicbrush.py and novel.py, that of the rendered world in world.py."""


def get_suite(name: str, palette: str = "") -> Suite:
    """A suite, perhaps with other colours.

    Args:
      palette: for depth one of `palettes.PALETTES`; for segmentation "painter" or "max_separation"; "" leaves it as it is.

    Raises:
      UserError: no such suite or palette, or the suite has none.
    """
    from xprompt_jax.evaluate.magicbrush import MAGICBRUSH, MAGICBRUSH_MULTI  # these build on this module
    from xprompt_jax.evaluate.novel import ACTION, OBJECT_ADDITION, OBJECT_REMOVAL, STYLE
    from xprompt_jax.evaluate.world import WORLD

    special = (MAGICBRUSH, MAGICBRUSH_MULTI, OBJECT_ADDITION, OBJECT_REMOVAL, STYLE, ACTION, WORLD)
    suites = {**SUITES, **{suite.name: suite for suite in special}}
    if name not in suites:
        raise UserError(f"suite {name!r} is unknown; suites are {', '.join(suites)}")
    suite = suites[name]
    if not palette:
        return suite
    if isinstance(suite.truth, Depth):
        colours = palettes.get_palette(palette)
        return dataclasses.replace(suite, truth=Depth(colours), metrics=depth_metrics(colours), palette=palette)
    if not isinstance(suite.truth, Labels):
        raise UserError(f"--palette {palette}: suite {name} has no colours to choose; leave it out")
    choices = {"painter": lambda: Labels(palettes.painter_ade(), norm=1), "max_separation": lambda: Labels(palettes.max_separation(150))}
    if palette not in choices:
        raise UserError(f"--palette {palette}: unknown; use {' or '.join(choices)}")
    return dataclasses.replace(suite, truth=choices[palette](), palette=palette)


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
        return records if suite.grouped else [dataclasses.replace(r, task=suite.name, group=suite.name) for r in records]
    found = suite.find(data)
    if found is not None:
        return found
    missing = "no such file or folder" if not data.exists() else "not the layout expected"
    raise UserError(f"{flag} {data}: {missing}; suite {suite.name} takes a manifest (docs/data.md), or {suite.wanted}")
