"""MagicBrush's test set, the paper's Table 3: photographs edited by instruction, scored by CLIP and DINO.

    test/edit_turns.json              [{"input", "output", "instruction"}, ...], names <image>-input.png, <image>-output<turn>.png
    test/images/<image>/*.png
    test/global_descriptions.json     image -> file -> caption of the whole picture, inputs too
    test/local_descriptions.json      image -> file -> caption of what the turn edited

Two protocols, as of the official script. Single turns ("all-turn"), the paper's: each turn starts from the true picture of the turn before.
Multi-turn ("iter"): a session's turns are drawn one after the other, each from what the model itself made of the turn before, and the
last picture is held against the session's last target. CLIP-T reads local captions; a direction needs captions of both pictures, which
only the global ones are. A manifest of other edits has no captions: it gets the scores of images alone. Examples are drawn at random
from those that are given, or retrieved for each turn by its instruction (RAIE).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xprompt_jax.data import sources
from xprompt_jax.data.retrieval import HASHED, RetrievalIndex
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate import published
from xprompt_jax.evaluate.edits import DINO, DIRECTION, IMAGE, L1, L2, TEXT_GLOBAL, TEXT_LOCAL, Edit, EditSuite, oracle
from xprompt_jax.evaluate.pairs import Episode, Outcome
from xprompt_jax.evaluate.turns import Turns, run_turns

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

NAME = "magicbrush"


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
class Session(Edit):
    """A picture that is edited turn after turn; input and captions before are the first turn's, the rest the last's."""

    turns: tuple[Edit, ...] = ()

    @classmethod
    def of(cls, turns: Sequence[Edit]) -> Session:
        """The turns of one picture, in order."""
        first, last = turns[0], turns[-1]
        words = {field.name: getattr(last, field.name) for field in dataclasses.fields(Edit)}
        return cls(**words | {"input": first.input, "captions_before": first.captions_before}, turns=tuple(turns))


def sessions(turns: Sequence[Edit]) -> list[Session]:
    """Turns by picture, in their order."""
    by_image: dict[Path, list[Edit]] = {}
    for turn in turns:
        by_image.setdefault(Path(turn.input).parent, []).append(turn)
    return [Session.of(rows) for rows in by_image.values()]


@dataclasses.dataclass(frozen=True)
class MagicBrushSuite(EditSuite):
    """Single turns, or sessions of turns."""

    multi: bool = False
    index: RetrievalIndex | None = None
    """Training pairs to retrieve each turn's examples from."""
    examples: int = 1
    """How many."""
    most: int = 0
    """Queries to take with retrieval, from the first; 0 takes all. Each is a group of its own then, so `per_group` bounds nothing."""

    def with_retrieval(self, index: RetrievalIndex, examples: int, most: int = 0) -> MagicBrushSuite:
        """Shows every turn the training pairs whose instructions are nearest to its own; the wrong example is another query's."""
        return dataclasses.replace(self, index=index, examples=examples, most=most)

    def find(self, folder: Path) -> list[sources.Record] | None:
        """The queries of the test folder or of the folder that this lies in; with the pairs retrieved for them, in their groups.

        Raises:
          UserError: a file is damaged or missing, or the index was made with another encoder than --clip.
        """
        place = next((p for p in (folder, folder / "test") if (p / "edit_turns.json").is_file()), None)
        if place is None:
            return None
        turns = [dataclasses.replace(turn, task=self.name, group=self.name) for turn in read_turns(place)]
        queries: Sequence[Edit] = sessions(turns) if self.multi else turns
        if self.index is None:
            return list(queries)
        records: list[sources.Record] = []
        for number, query in enumerate(queries[: self.most or None]):
            group = f"{self.name} {number}"
            records.append(dataclasses.replace(query, group=group))
            records += [dataclasses.replace(shown, task=self.name, group=group, split="train") for shown in self._retrieve(query)]
        return records

    def _retrieve(self, query: Edit) -> list[sources.Record]:
        """The examples of a query: of a session, each holds a pair for every turn."""
        assert self.index is not None
        encoder = None if self.encoders is None or self.index.encoder.startswith(HASHED) else self.encoders.clip
        turns = query.turns if isinstance(query, Session) else (query,)
        found = self.index.retrieve_all([turn.instruction for turn in turns], self.examples, encoder=encoder)
        ranked = [[pair for pair, _ in pairs] for pairs in found]
        return [Turns.of(pairs) if self.multi else pairs[0] for pairs in zip(*ranked, strict=True)]

    @property
    def published(self) -> published.Rows:
        """What the paper prints, the row with or without retrieval first."""
        return published.rows_of(self.name, retrieved=self.index is not None)

    @property
    def wanted(self) -> str:
        """The layout in words."""
        return "MagicBrush's unpacked test folder, with edit_turns.json, images/ and the captions"

    def draw(self, model: XPrompt, episodes: Sequence[Episode], size: int, **options: Any) -> Iterator[Outcome]:
        """Draws single turns at once, sessions turn by turn."""
        if not self.multi:
            return super().draw(model, episodes, size, **options)
        return run_turns(model, episodes, read=lambda record: self.read(record, size), **options)


_NOTE = (
    "the paper says that its metrics, CLIP and DINO are consistent with MagicBrush's and UltraEdit's: B/32, S/16, against the target, with "
    "local captions; its row without RAIE does not say whether an example was shown (here drawn, none)"
)
MAGICBRUSH = MagicBrushSuite(
    NAME, "MagicBrush: photographs edited by instruction, single turns.",
    (DIRECTION, TEXT_LOCAL, IMAGE, DINO, TEXT_GLOBAL, oracle("0.2826"), L1, L2), layouts=(), note=_NOTE, count=1053,
)  # fmt: skip
"""By the official script, image_eval.py: all turns, local captions."""
MAGICBRUSH_MULTI = dataclasses.replace(
    MAGICBRUSH, name="magicbrush_multi", measures="MagicBrush: photographs edited by instruction, the last picture of each session.",
    metrics=(DIRECTION, TEXT_LOCAL, IMAGE, DINO, TEXT_GLOBAL, oracle("0.2855"), L1, L2), multi=True, count=535,
    note="the paper's Table 3 is of single turns; compare with multi-turn columns of MagicBrush's table alone",
)  # fmt: skip
"""By the same script, multi-turn: each turn edits what the model drew before."""
