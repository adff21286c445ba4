"""Tasks with several input images, and generated pairs: style, composition, try-on, pose and action, imitation (paper, Table 7).

Most were never released, so their form here is ours: JSONL with paths relative to the file (docs/data.md). Pairs with several inputs are
plain tasks without an example, and are not reversed: two images cannot be drawn at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from xprompt_jax.data.datasets.base import Card, Chosen, Dataset, Joined, Layout, Options, Pairs, Part, Rows, files
from xprompt_jax.data.images import open_image
from xprompt_jax.data.phrases import say
from xprompt_jax.data.readers import Folders, Manifest
from xprompt_jax.data.sources import Record, manifest_record
from xprompt_jax.errors import UserError


def _lines(make: Callable[..., Record], keep: Callable[[Mapping[str, Any]], bool] | None = None) -> Callable[[Path, Options], Pairs]:
    """Opens every JSONL of a folder."""

    def open_part(root: Path, options: Options) -> Pairs:
        parts: list[Pairs] = []
        for path in files(root, "*.jsonl"):
            rows = Manifest(path)
            pairs: Pairs = Rows(rows, functools.partial(make, root=root), options.eval_fraction)
            if keep is not None:
                pairs = Chosen(pairs, np.array([i for i, row in enumerate(rows) if keep(row)], np.int64))
            parts.append(pairs)
        return Joined(parts)

    return open_part


def _paths(row: Mapping[str, Any], root: Path, *names: str) -> list[Path]:
    missing = [name for name in names if not isinstance(row.get(name), str)]
    if missing:
        raise UserError(f"{root}, {row['key']}: no text field {missing[0]!r}; it takes {', '.join(names)}")
    return [root / row[name] for name in names]


def _style(row: Mapping[str, Any], root: Path) -> Record:
    """{"style_image", "source", "output", "prompt"}."""
    style, source, output = _paths(row, root, "style_image", "source", "output")
    words = _without_end(say("style", f"style/{row['key']}", prompt=str(row.get("prompt", ""))))
    return Record(style, output, task="style", group="style_pairs", more_inputs=(source,), **words)


def _passed(row: Mapping[str, Any]) -> bool:
    """Whether both filters (paper, C.2) said yes, or were not asked."""
    return all(str(row.get(name, "yes")).lower() in ("yes", "true") for name in ("style_same", "layout_same"))


def _composition(row: Mapping[str, Any], root: Path) -> Record:
    """{"image1", "image2", "output", "description"}: the description says what of either image lives on (paper, Fig. 9).

    Without one, `xprompt annotate --kind relation` asks for it.
    """
    first, second, output = _paths(row, root, "image1", "image2", "output")
    described = str(row.get("description", ""))
    words = _without_end(say("compose", f"compose/{row['key']}", prompt=described))
    return Record(first, output, task="compose", group="ip_adapter", more_inputs=(second,), **words | {"description": described})


def _without_end(words: dict[str, Any]) -> dict[str, Any]:
    """An instruction whose template waits for words that there are none of."""
    return words | {"instruction": words["instruction"].rstrip(": ")}


def _action(row: Mapping[str, Any], root: Path) -> Record:
    """A manifest's line: {"input", "output", "instruction"}, ..."""
    key = str(row["key"])  # the file's name and the line, unless the line has a key of its own
    name, _, number = key.rpartition(":")
    file, line = (name, int(number)) if number.isdigit() else (key, 0)
    return manifest_record({"task": "pose_action", **row}, root / Path(file).name, line)


def _imitation(row: Mapping[str, Any], root: Path) -> Record:
    """{"source", "reference", "output"}, perhaps "mask" (white where the source is to be redrawn) and "instruction"."""
    source, reference, output = _paths(row, root, "source", "reference", "output")
    before: Any = source
    if isinstance(row.get("mask"), str):
        image = open_image(source)
        hole = open_image(root / row["mask"]).convert("L").resize(image.size, PIL.Image.Resampling.NEAREST)
        before = np.where(np.asarray(hole)[..., None] > 127, np.uint8(127), np.asarray(image))
    words = say("imitate", f"imitate/{row['key']}")
    if row.get("instruction"):
        words["instruction"] = str(row["instruction"])
    return Record(before, output, task="imitate", group="mimicbrush", more_inputs=(reference,), **words)


_JSONL = lambda open_part: (Layout("JSONL", (Part("train", "*.jsonl", open_part),)),)
_OURS = "not released; the form is ours"

STYLE_PAIRS = Dataset("style_pairs", Card(
    "A style image, a source, the source in that style (RB-Modulation)", _OURS, "of its makers", ("style",),
    'lines {"style_image", "source", "output", "prompt", "style_same", "layout_same"}; a filter\'s no drops the line; the paper has 10K',
), _JSONL(_lines(_style, _passed)))  # fmt: skip
IP_ADAPTER = Dataset("ip_adapter", Card(
    "Two images and their composition (IP-Adapter)", _OURS, "of its makers", ("compose",),
    'lines {"image1", "image2", "output", "description"}, the last optional; the paper has 50K',
), _JSONL(_lines(_composition)))  # fmt: skip
POSE_ACTION = Dataset("pose_action", Card(
    "A person, the same person in another pose or action", _OURS, "of its makers", ("pose_action",),
    'lines of a manifest, {"input", "output", "instruction", ...}; the paper has 10K',
), _JSONL(_lines(_action)))  # fmt: skip
MIMICBRUSH = Dataset("mimicbrush", Card(
    "An image with a hole, a reference, the filled image (MimicBrush)", _OURS, "of its makers", ("imitate",),
    'lines {"source", "reference", "output", "mask", "instruction"}, the last two optional; the paper has 50K',
), _JSONL(_lines(_imitation)))  # fmt: skip

# VITON-HD.

_GARMENTS = (5, 6, 7)
"""Upper clothes, dress, coat: what is taken off, by the classes of the human parsing (LIP)."""


class _TryOn(Sequence[Mapping[str, Any]]):
    """People named in <split>_pairs.txt with the garment they wear, which has the same file name. What they are to try on in the unpaired
    test, the second column, has no true picture."""

    def __init__(self, root: Path, split: str):
        agnostic = next((n for n in ("agnostic-v3.2", "agnostic-v3", "agnostic") if (root / split / n).is_dir()), None)
        parsed = next((n for n in ("image-parse-v3", "image-parse") if (root / split / n).is_dir()), None)
        if agnostic is None and parsed is None:
            raise UserError(
                f"{root / split}: neither agnostic*/ nor image-parse*/; without them the input would be the answer: complete the copy"
            )
        helper = agnostic or parsed
        names = {line.split()[0].rpartition(".")[0] for line in _text(root / f"{split}_pairs.txt") if line.strip()}
        columns = {"cloth": rf"{split}/cloth/\g<key>", "agnostic" if agnostic else "parsed": rf"{split}/{helper}/\g<key>"}
        below = [f"{split}/{folder}" for folder in ("image", "cloth", helper)]
        self._rows = Folders(root, rf"{split}/image/(?P<key>[^/]+)\.(?:jpg|png)", columns, below=below, only=names)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i):
        return self._rows[i]


def _text(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: not there or not a text; it lists a split: download it") from None


def _worn(row: Mapping[str, Any]) -> Record:
    """The person without the garment and the garment to the person."""
    before: Any = row.get("agnostic")
    if before is None:
        person = open_image(row["input"])
        try:
            with PIL.Image.open(row["parsed"]) as image:
                classes = np.asarray(image.resize(person.size, PIL.Image.Resampling.NEAREST))
        except Exception:  # decoders meet hostile bytes with nearly any exception
            raise UserError(f"{row['parsed']}: not a readable image; replace or remove it") from None
        before = np.where(np.isin(classes, _GARMENTS)[..., None], np.uint8(127), np.asarray(person))
    words = say("try_on", f"viton/{row['key']}")
    return Record(before, row["input"], task="try_on", group="viton_hd", more_inputs=(row["cloth"],), **words)


def _viton(split: str, count: int) -> Part:
    return Part(split, f"{split}_pairs.txt", lambda root, options: Rows(_TryOn(root, split), _worn), count)


VITON = Dataset("viton_hd", Card(
    "VITON-HD: people and the garments they wear", "https://github.com/shadow2496/VITON-HD", "research only, CC BY-NC 4.0", ("try_on",),
    "the person comes without the garment: from agnostic*/, else from image-parse*/; the paper's 120K are not this set alone",
), (Layout("zip", (_viton("train", 11_647), _viton("test", 2_032))),), ("zalando-hd-resized", "VITON-HD"))  # fmt: skip

DATASETS = (STYLE_PAIRS, IP_ADAPTER, VITON, POSE_ACTION, MIMICBRUSH)
