"""Control pictures to images, and captions to images: MultiGen-20M and LAION-Aesthetics (paper, Table 6)."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.data.datasets.base import Card, Chosen, Dataset, Joined, Layout, Options, Pairs, Part, Rows, files
from xprompt_jax.data.phrases import PHRASES, say
from xprompt_jax.data.questions import KEPT_CAPTIONS
from xprompt_jax.data.readers import Manifest, Tar
from xprompt_jax.data.sources import Record, held_out
from xprompt_jax.errors import UserError


def _control(row: Mapping[str, Any], root: Path, control: str) -> Record:
    """A line {"source", "prompt", "control_<kind>"}, or our own spelling {"image", "prompt", "control", "task"}."""
    kind = str(row.get("task", control)).removeprefix("control_").removesuffix("base")
    names = [name for name in ("control", f"control_{control}", f"control_{kind}") if name in row]
    source = row.get("source", row.get("image"))
    if f"control_{kind}" not in PHRASES or not names or not isinstance(source, str) or not isinstance(row.get("prompt"), str):
        kinds = ", ".join(sorted(name.removeprefix("control_") for name in PHRASES if name.startswith("control_")))
        raise UserError(f"{root}, {row['key']}: not a line of source, prompt and control_<kind>; kinds are {kinds}")
    words = say(f"control_{kind}", f"multigen/{row['key']}", prompt=row["prompt"].strip().rstrip("."))
    before, after = _find(root, row[names[0]], "conditions"), _find(root, source, "images")
    return Record(before, after, task=f"control_{kind}", group=f"multigen/{kind}", **words)


def _find(root: Path, name: str, folder: str) -> Path:
    """A path as its list has it: from the root, or from the folder that its archives unpack to."""
    return root / name if (root / name).exists() else root / folder / name


def _multigen(root: Path, options: Options) -> Pairs:
    lists = files(root, "json_files/*.json*") or files(root, "*.jsonl")
    parts = []
    for path in lists:
        match = re.search(r"group_(\w+?)_all", path.stem)
        rows = Manifest(path)
        parts.append(Rows(rows, functools.partial(_control, root=root, control=match[1] if match else ""), options.eval_fraction))
    return Joined(parts)


MULTIGEN = Dataset("multigen", Card(
    "MultiGen-20M: depth, segmentation, normals, HED and other controls to images",
    "gs://sfr-unicontrol-data-research/dataset or https://huggingface.co/datasets/limingcv/MultiGen-20M_depth",
    "research; images of LAION", tuple(sorted(n for n in PHRASES if n.startswith("control_"))),
    'MLSD, which the paper has, is not in it: bring your own lines {"image", "control", "prompt", "task": "mlsd"}',
), (
    Layout("json_files/", (Part("train", "json_files/*.json*", _multigen),)), Layout("JSONL", (Part("train", "*.jsonl", _multigen),)),
), ("MultiGen-20M",))  # fmt: skip

# LAION.


class _Captioned(Sequence[Mapping[str, Any]]):
    """Samples with the caption they are trained on: rewritten where captions.jsonl has one, but original for a tenth."""

    def __init__(self, rows: Tar, rewritten: Path):
        self._rows, self._written = rows, Manifest(rewritten) if rewritten.exists() else None
        hashes = [_hash(str(row["key"])) for row in self._written or ()]
        self._order = np.argsort(np.array(hashes, np.uint64), kind="stable")
        self._hashes = np.array(hashes, np.uint64)[self._order]

    def _rewritten(self, key: str) -> str:
        """The new caption of a sample; "" if it has none."""
        wanted = np.uint64(_hash(key))
        for place in range(int(np.searchsorted(self._hashes, wanted)), len(self._hashes)):
            if self._hashes[place] != wanted or self._written is None:
                break
            row = self._written[int(self._order[place])]
            if row["key"] == key:
                return str(row.get("caption", ""))
        return ""

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i):
        row = self._rows[i]
        original = (row["text"] or b"").decode("utf-8", "replace").strip()
        kept = held_out(f"caption/{row['key']}", KEPT_CAPTIONS) == "eval"
        return {**row, "caption": original if kept else self._rewritten(row["key"]) or original}


def _hash(key: str) -> int:
    return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8], "big")


def _picture(row: Mapping[str, Any]) -> Record:
    """A picture alone: drawn from its caption, and described by it."""
    caption = row["caption"]
    return Record(row["image"], row["image"], "", task="text_to_image", group="laion_aesthetics", caption=caption, description=caption)


def _laion(pattern: str):
    def open_part(root: Path, options: Options) -> Pairs:
        columns = {"image": ("jpg", "jpeg", "png", "webp"), "text": ("txt",), "meta": ("json",)}
        tar = Tar(files(root, pattern), columns, required=["image"])
        good = np.array([i for i in range(len(tar)) if _score(tar, i) >= options.min_score], np.int64)
        if not len(good):
            raise UserError(f"{root}: no picture has an aesthetic score of {options.min_score}; lower --min-score")
        return Chosen(Rows(_Captioned(tar, root / "captions.jsonl"), _picture, options.eval_fraction), good)

    return open_part


def _score(tar: Tar, i: int) -> float:
    """Of sample i; one without a score is taken for chosen already."""
    meta = tar.read(i, "meta")
    try:
        row = json.loads(meta) if meta else {}
        score = next((row[name] for name in ("AESTHETIC_SCORE", "aesthetic", "aesthetic_score") if row.get(name) is not None), np.inf)
        return float(score)
    except (ValueError, TypeError, AttributeError):
        raise UserError(f"{tar.files[0].parent}: sample {i} has no usable .json; make the tars again with img2dataset") from None


LAION = Dataset("laion_aesthetics", Card(
    "LAION-Aesthetics: pictures with captions, as tars of img2dataset", "https://huggingface.co/datasets/laion/relaion2B-en-research-safe",
    "metadata CC BY 4.0; pictures of their owners", ("text_to_image", "dense description"),
    'links rot: nothing is counted; rewritten captions lie beside as captions.jsonl, {"key", "caption"} a line; a tenth stays original',
), (
    Layout("tars", (Part("train", "*.tar", _laion("*.tar")),)), Layout("folders of tars", (Part("train", "*/*.tar", _laion("*/*.tar")),)),
), options=("min_score",))  # fmt: skip

DATASETS = (LAION, MULTIGEN)
