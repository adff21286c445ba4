"""Edits beyond MagicBrush: Table 4's object addition and removal, and the style and action forms of section 4.5.

InstructPix2Pix (clip-filtered-dataset): seeds.json is [[folder, [seed, ...]], ...], a folder has prompt.json with "input", "edit" and
"output" and pairs <seed>_0.jpg, <seed>_1.jpg. Its last 5 % of prompts are the test split, the 5 % before it validate: the paper chose
100 additions and 100 removals of the test by hand and did not publish which. Ours are the first 100 of each by a hash of the
instruction (`data.datasets.editing.table_4`), told apart by the keyword rule that holds them out of training; examples come from the
validation split by the same rule. The queries of result.json name every one.

Style and action are pairs of a manifest whose groups are one style, one action. The paper shows pictures and no numbers, so what is scored
is ours: the change seen by CLIP against the target's change, which needs no words.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from xprompt_jax.data import sources
from xprompt_jax.data.holdouts import addition_or_removal
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.edits import DINO, DIRECTION, IMAGE, IMAGE_DIRECTION, KEPT, L1, TEXT_GLOBAL, Edit, EditSuite

COUNT = 100
"""Queries of each kind, as in the paper."""
_TEST, _VALIDATION = (0.95, 1.0), (0.9, 0.95)


@dataclasses.dataclass(frozen=True)
class ObjectSuite(EditSuite):
    """Additions or removals of InstructPix2Pix."""

    kind: Literal["add", "remove"] = "add"

    @property
    def wanted(self) -> str:
        """The layout in words."""
        return "InstructPix2Pix's clip-filtered-dataset, with seeds.json and a folder for each prompt"

    def find(self, folder: Path) -> list[sources.Record] | None:
        """Queries of the test split, and examples of the validation split.

        Raises:
          UserError: a file is damaged or missing.
        """
        place = next((p for p in (folder, folder / "clip-filtered-dataset") if (p / "seeds.json").is_file()), None)
        if place is None:
            return None
        return [*self._choose(place, _TEST, "eval"), *self._choose(place, _VALIDATION, "train")]

    def _choose(self, place: Path, share: tuple[float, float], split: str) -> list[Edit]:
        """The first pair of each of the first instructions, in the order of their hash: a prompt's other seeds are the same edit again."""
        found: dict[str, tuple[str, Path, str, dict[str, str]]] = {}
        for path, seed, prompt in _prompts(place, share):
            words = prompt["edit"].strip()
            if words not in found and addition_or_removal(words) == self.kind:
                found[words] = hashlib.sha256(words.encode("utf-8", "replace")).hexdigest(), path, seed, prompt
        return [
            Edit(
                path / f"{seed}_0.jpg", path / f"{seed}_1.jpg", words, task=self.name, group=self.name, split=split,
                captions_before={"global": prompt["input"]}, captions_after={"global": prompt["output"]},
            )
            for words, (_, path, seed, prompt) in sorted(found.items(), key=lambda row: row[1][0])[:COUNT]
        ]  # fmt: skip


def _prompts(place: Path, share: tuple[float, float]) -> Iterator[tuple[Path, str, dict[str, str]]]:
    """(folder, seed, prompt.json) of every pair of a share of the prompts."""
    listed: Any = _json(place / "seeds.json")
    first, last = (int(len(listed) * part) for part in share)
    for name, seeds in listed[first:last]:
        prompt = _json(place / name / "prompt.json")
        if not isinstance(prompt, dict) or not all(isinstance(prompt.get(key), str) for key in ("input", "edit", "output")):
            raise UserError(f"{place / name / 'prompt.json'}: no prompt with input, edit and output; complete the copy")
        for seed in seeds:
            yield place / name, seed, prompt


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(f"{path}: not readable ({e}); complete the copy of InstructPix2Pix") from None


# CLIP_out is by the caption of the whole picture here: there are no local ones.
_OBJECT_METRICS = (DIRECTION, dataclasses.replace(TEXT_GLOBAL, column="CLIP_out"), IMAGE, DINO, L1)
_OBJECT_NOTE = "the paper's 100 hand-picked pairs are not published, so ours are others; nor does it name its CLIP"
OBJECT_ADDITION = ObjectSuite(
    "object_addition", "InstructPix2Pix: objects added by instruction, a novel task of Table 4.", _OBJECT_METRICS, layouts=(),
    note=_OBJECT_NOTE, kind="add", count=COUNT,
)  # fmt: skip
OBJECT_REMOVAL = ObjectSuite(
    "object_removal", "InstructPix2Pix: objects removed by instruction, a novel task of Table 4.", _OBJECT_METRICS, layouts=(),
    note=_OBJECT_NOTE, kind="remove", count=COUNT,
)  # fmt: skip
_FORM_METRICS = (IMAGE_DIRECTION, IMAGE, DINO, KEPT)
_FORM_NOTE = "the paper shows pictures (section 4.5) and no numbers"
STYLE = EditSuite(
    "style", "A style taken from the example, section 4.5; a group is a style.", _FORM_METRICS,
    instruction="draw it in the style that the example shows", grouped=True, note=_FORM_NOTE,
)  # fmt: skip
ACTION = EditSuite(
    "action", "A pose or an action taken from the example, section 4.5; a group is an action.", _FORM_METRICS,
    instruction="change the action as the example shows", grouped=True, note=_FORM_NOTE,
)  # fmt: skip
