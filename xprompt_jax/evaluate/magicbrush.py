"""MagicBrush's test set, the paper's Table 3: photographs edited by instruction, scored by CLIP and DINO.

    test/edit_turns.json              [{"input", "output", "instruction"}, ...], names <image>-input.png, <image>-output<turn>.png
    test/images/<image>/*.png
    test/global_descriptions.json     image -> file -> caption of the whole picture, inputs too
    test/local_descriptions.json      image -> file -> caption of what the turn edited

Turns are single ("all-turn"): each starts from the true picture of the turn before, as in the paper. Its CLIP-T reads local captions; a
direction needs captions of both pictures, which only the global ones are. A manifest of other edits has no captions: it gets the scores
of images alone. Examples are drawn at random from those that are given, or retrieved for each turn by its instruction (RAIE).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.data import sources
from xprompt_jax.data.retrieval import HASHED, RetrievalIndex
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate import features
from xprompt_jax.evaluate.features import Encoders, Looks
from xprompt_jax.evaluate.suites import Metric, Suite, Sums

NAME = "magicbrush"


@dataclasses.dataclass(frozen=True)
class Edit(sources.Record):
    """A turn, with the captions of both pictures: kind ("local", "global") -> words."""

    captions_before: Mapping[str, str] = dataclasses.field(default_factory=dict)
    captions_after: Mapping[str, str] = dataclasses.field(default_factory=dict)


def read_turns(folder: Path) -> list[Edit]:
    """All turns of an unpacked test set, each from the true picture of the turn before.

    Raises:
      UserError: a file of captions is missing or has no caption for a picture, or a file is damaged.
    """
    whole, local = (_captions(folder, kind) for kind in ("global", "local"))
    turns = []
    for row in _json(folder / "edit_turns.json"):
        try:
            before, after, instruction = (str(row[name]) for name in ("input", "output", "instruction"))
        except (TypeError, KeyError):
            raise UserError(
                f"{folder / 'edit_turns.json'}: a turn without input, output and instruction; unpack the archive again"
            ) from None
        image = before.split("-")[0]
        captions = {"global": _caption(folder, whole, image, after), "local": _caption(folder, local, image, after)}
        place = folder / "images" / image
        turns.append(
            Edit(
                place / before, place / after, instruction.strip(), task=NAME, group=NAME, split="eval",
                captions_before={"global": _caption(folder, whole, image, before)}, captions_after=captions,
            )
        )  # fmt: skip
    return turns


def _captions(folder: Path, kind: str) -> Any:
    for name in (f"{kind}_descriptions.json", f"{kind}_captions.json"):
        if (folder / name).is_file():
            return _json(folder / name)
    raise UserError(f"{folder}: no {kind}_descriptions.json; it lies in MagicBrush's test archive: unpack all of it")


def _caption(folder: Path, captions: Any, image: str, file: str) -> str:
    try:
        return str(captions[image][file])
    except (TypeError, KeyError):
        raise UserError(f"{folder}: no caption of {file} in its JSON files; unpack MagicBrush's test archive again") from None


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable ({e}); unpack MagicBrush's test archive again") from None


@dataclasses.dataclass(frozen=True)
class EditSuite(Suite):
    """A suite whose metrics compare `Looks` in place of pixels."""

    encoders: Encoders | None = None
    index: RetrievalIndex | None = None
    """Training pairs to retrieve each turn's examples from."""
    examples: int = 1
    """How many."""
    most: int = 0
    """Turns to take with retrieval, from the first; 0 takes all. Each is a group of its own then, so `per_group` bounds nothing."""

    def with_encoders(self, clip: Path | None, dino: Path | None) -> EditSuite:
        """The suite, ready to score; its metrics name the weights that they use.

        Raises:
          UserError: one is not given, or cannot be read.
        """
        encoders = Encoders(clip, dino)
        told = f"; weights {encoders.clip.name}, {encoders.dino.name}"
        return dataclasses.replace(
            self, encoders=encoders, metrics=tuple(dataclasses.replace(m, protocol=m.protocol + told) for m in self.metrics)
        )

    def with_retrieval(self, index: RetrievalIndex, examples: int, most: int = 0) -> EditSuite:
        """Shows every turn the training pairs whose instructions are nearest to its own; the wrong example is another turn's."""
        return dataclasses.replace(self, index=index, examples=examples, most=most)

    def find(self, folder: Path) -> list[sources.Record] | None:
        """MagicBrush's turns, of its test folder or of the folder that this lies in; with the pairs retrieved for them, in their groups.

        Raises:
          UserError: a file is damaged or missing, or the index was made with another encoder than --clip.
        """
        place = next((p for p in (folder, folder / "test") if (p / "edit_turns.json").is_file()), None)
        if place is None:
            return None
        turns: list[sources.Record] = list(read_turns(place))
        if self.index is None:
            return turns
        turns = turns[: self.most or None]
        encoder = None if self.encoders is None or self.index.encoder.startswith(HASHED) else self.encoders.clip
        shown = self.index.retrieve_all([turn.instruction for turn in turns], self.examples, encoder=encoder)
        records: list[sources.Record] = []
        for number, (turn, pairs) in enumerate(zip(turns, shown, strict=True)):
            group = f"{NAME} {number}"
            records.append(dataclasses.replace(turn, group=group))
            records += [dataclasses.replace(pair, task=NAME, group=group, split="train") for pair, _ in pairs]
        return records

    @property
    def wanted(self) -> str:
        """The layout in words."""
        return "MagicBrush's unpacked test folder, with edit_turns.json, images/ and the captions"

    def score(self, record: sources.Record, images: Mapping[str, np.ndarray], size: int) -> dict[str, dict[str, Sums]]:
        """Metric -> arm -> sums of one query.

        Drawn pictures are compared at the target's size. Features of a square target are taken from the square that was drawn.

        Raises:
          UserError: the suite has no encoders, or an image cannot be read.
        """
        if self.encoders is None:
            raise UserError(f"suite {self.name} needs --clip and --dino")
        before, after = (record.captions_before, record.captions_after) if isinstance(record, Edit) else ({}, {})
        source, target = self.encoders.look_at(record.input, before), self.encoders.look_at(record.output, after)
        height, width = target.pixels.shape[:2]
        pixels = {arm: self.truth.decode(image, (height, width)) for arm, image in images.items()}
        seen = self.encoders.look(list((images if height == width else pixels).values()))
        drawn = {arm: Looks(pixels[arm], *look) for arm, look in zip(images, seen, strict=True)}
        return {m.name: {arm: m.measure(looks, target, source) for arm, looks in drawn.items()} for m in self.metrics}


def _metric(score: Callable[[Looks, Looks, Looks], float], protocol: str, column: str = "", better: Any = "higher") -> Metric:
    def measure(drawn: Any, target: Any, source: Any) -> Sums:
        value = score(drawn, target, source)
        return (0.0, 0) if np.isnan(value) else (value, 1)

    return Metric(score.__name__, protocol, "", measure, better, column)


_B32 = "CLIP ViT-B/32, its own preprocessing"
MAGICBRUSH = EditSuite(
    NAME, "MagicBrush: photographs edited by instruction, single turns.",
    (
        _metric(features.clip_direction, f"cosine of image - input and of global caption - the input's: {_B32}", "CLIP_dir"),
        _metric(features.clip_text_local, f"cosine of image and local caption, MagicBrush's CLIP-T: {_B32}", "CLIP_out"),
        _metric(features.clip_image_target, f"cosine of image and target, not input, MagicBrush's CLIP-I: {_B32}", "CLIP_img"),
        _metric(features.dino_target, "cosine of image and target: DINO ViT-S/16, short side 256 bicubic, centre 224", "DINO"),
        _metric(features.clip_text_global, f"cosine of image and global caption: {_B32}"),
        _metric(features.clip_text_oracle, "cosine of the target itself and its local caption; 0.2826 over the whole test set, or weights, "
                                           f"captions or preprocessing differ: {_B32}"),
        _metric(features.l1_unit, "mean absolute difference of RGB in [0, 1], at the target's size", better="lower"),
        _metric(features.l2_unit, "mean squared difference of RGB in [0, 1], at the target's size", better="lower"),
    ),
    layouts=(),
    published={"MagicBrush's own model, Table 3": {"CLIP_out": 0.278, "CLIP_img": 0.933, "DINO": 0.899}},
    note="the paper retrieves its example from MagicBrush's training turns, and does not name its CLIP, DINO or captions; the row of "
         "MagicBrush's model is what MagicBrush's own script gives with B/32, S/16 and local captions",
)  # fmt: skip
"""By the official script, image_eval.py: all turns, local captions."""
