"""Edits of rendered scenes, judged by exact ground truth in place of CLIP: needs no data set and no weights but the model's.

    DATA/world.json                   what was rendered
    DATA/manifest.jsonl               pairs, a group for each edit with its parameters (data/edits.py)
    DATA/input/*.png, target/*.png    renders
    DATA/input_labels/*.png, ...      8-bit: 0 sky, 1 floor, 2 + number of the object's colour in render.COLORS

A drawn picture is segmented again: every pixel takes the label one of whose shades, in the exact pictures, is nearest. Colours tell
objects apart because no two of a scene share one.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
import PIL.Image

from xprompt_jax.data import sources
from xprompt_jax.data.images import save_png
from xprompt_jax.data.pairs import scene_sources
from xprompt_jax.data.render import Render, Scene, render_batch
from xprompt_jax.data.tasks import TASKS
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate import metrics
from xprompt_jax.evaluate.measures import CHANGED, PSNR, UNCHANGED, Metric, Sums, counted
from xprompt_jax.evaluate.results import FORMAT, read_json, write_json
from xprompt_jax.evaluate.suites import Suite
from xprompt_jax.evaluate.truths import raw_numbers
from xprompt_jax.files import atomic_path

EDITS = ("add_object", "remove_object", "recolor", "replace_shape", "resize", "move_object")
"""Those that change which object is seen where."""
SHADES = 8
"""Colours of each label: solids have a lit side and one in shadow."""


def write_edits(folder: Path, *, size: int, groups: int = 4, pairs_per_group: int = 6, seed: int = 0) -> Path:
    """Renders pairs with their labels, if they do not lie there already.

    Args:
      size: pixels.
      groups: parameter draws of each edit.
      pairs_per_group: scenes that share them.
      seed: of everything.

    Returns:
      The manifest; its rows are all held out.

    Raises:
      UserError: other scenes lie there.
    """
    manifest, rows = folder / "manifest.jsonl", []
    settings = {"format": FORMAT, "size": size, "groups": groups, "pairs_per_group": pairs_per_group, "seed": seed}
    if manifest.exists():
        if read_json(folder / "world.json") != settings:
            raise UserError(f"{folder}: holds scenes of another seed, size or number; choose another --out")
        return manifest
    write_json(folder / "world.json", settings)
    for place, name in enumerate(EDITS):
        for group in range(groups):
            rng = np.random.default_rng([seed, place, group])
            parameters = TASKS[name].sample_parameters(rng)
            scenes = scene_sources(int(rng.integers(2**31)), pairs_per_group, size)
            changes = [TASKS[name].change(source, parameters, rng) for source in scenes]
            for number, (before, edit) in enumerate(changes):
                file = f"{name}-{group}-{number}.png"
                for side, (scene, render) in zip(("input", "target"), _render([before, edit.scene], size), strict=True):
                    save_png(np.asarray(render.rgb), folder / side / file)
                    save_png(_labels(scene, render), folder / f"{side}_labels" / file)
                rows.append({"input": f"input/{file}", "output": f"target/{file}", "instruction": edit.words,
                             "reverse_instruction": edit.reverse, "task": name, "group": f"{name} {group}", "split": "eval"})  # fmt: skip
    with atomic_path(manifest) as temporary:  # last: without it, a run that was killed renders all again
        temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return manifest


def _render(scenes: list[Scene], size: int) -> list[tuple[Scene, Render]]:
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *scenes)
    renders = jax.device_get(render_batch(stacked, size))
    return [(scene, jax.tree.map(lambda leaf, i=i: leaf[i], renders)) for i, scene in enumerate(scenes)]


def _labels(scene: Scene, render: Render) -> np.ndarray:
    """uint8 [h, w]."""
    instances = np.asarray(render.instances)
    colors = np.asarray(scene.color)[np.maximum(instances - 1, 0)]
    return np.where(instances > 0, 2 + colors, np.minimum(render.segmentation, 1)).astype(np.uint8)


def label_colours(pictures: list[np.ndarray], labels: list[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The colours of each label that occurs, from dark to bright, float64 [n, SHADES, 3], and the labels as indices into them."""
    known, indices = np.unique(np.concatenate([part.ravel() for part in labels]), return_inverse=True)
    pixels = np.concatenate([picture.reshape(-1, 3) for picture in pictures]).astype(np.float64)
    colours = np.stack([_shades(pixels[indices == number]) for number in range(len(known))])
    ends = np.cumsum([part.size for part in labels])[:-1]
    return colours, [part.reshape(label.shape) for part, label in zip(np.split(indices, ends), labels, strict=True)]


def _shades(pixels: np.ndarray) -> np.ndarray:
    """Pixels [m, 3] -> means of SHADES parts of them, by brightness [SHADES, 3]."""
    ordered = pixels[np.argsort(pixels.sum(-1), kind="stable")]
    places = np.linspace(0, len(ordered), SHADES + 1).astype(int)
    return np.stack([ordered[a : max(b, a + 1)].mean(0) for a, b in zip(np.minimum(places, len(ordered) - 1), places[1:], strict=False)])


EDIT_SUCCESS = Metric(
    "edit_success",
    "share of edits that were done: segmented again by the nearest of 8 shades of each object, more than half of the pixels whose exact "
    "label changes have the new one, and of the others more than half, labels weighing alike, kept theirs; of queries where one changes",
    "%", lambda picture, truth, source: (0.0, 0),  # `WorldSuite.score` measures it: it needs labels
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class WorldSuite(Suite):
    """Pairs with exact labels beside them."""

    @property
    def wanted(self) -> str:
        """The layout in words."""
        return "the manifest.jsonl that this command renders"

    def find(self, folder: Path) -> list[sources.Record] | None:
        """The pairs of a rendered folder."""
        manifest = folder / "manifest.jsonl"
        return list(sources.manifest(manifest)) if manifest.is_file() else None

    def score(self, record: sources.Record, images: Mapping[str, np.ndarray], size: int) -> dict[str, dict[str, Sums]]:
        """As `Suite.score`, and the success of the edit.

        Raises:
          UserError: a picture or its labels are missing.
        """
        scores = super().score(record, images, size)
        labels = [_read_labels(path, size) for path in (record.input, record.output)]
        colours, (before, after) = label_colours(list(self.read(record, size)), labels)
        done = lambda image: metrics.edit_success(image, before, after, colours)
        scores[EDIT_SUCCESS.name] = {arm: counted(100 * done(image)) for arm, image in images.items()}
        return scores


def _read_labels(picture: Path, size: int) -> np.ndarray:
    """The labels of a picture at the model's size."""
    labels = raw_numbers(picture.parent.with_name(f"{picture.parent.name}_labels") / picture.name)
    return np.asarray(PIL.Image.fromarray(labels).resize((size, size), PIL.Image.Resampling.NEAREST))


WORLD = WorldSuite(
    "world", "Edits of rendered scenes, against exact ground truth.", (EDIT_SUCCESS, PSNR, CHANGED, UNCHANGED), whole=False, grouped=True,
    layouts=(), note="ours: the paper has no such test",
)  # fmt: skip
