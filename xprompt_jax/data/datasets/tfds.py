"""TensorFlow Datasets without TensorFlow: reading prepared copies, and preparing our own.

`as_data_source` reads at random from array_record files and decodes with PIL. Preparing needs no TensorFlow either as long as a builder
yields the bytes of its images instead of arrays; ours does, for any of our datasets.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.data.datasets.base import Card, Dataset, Joined, Layout, Options, Pairs, Part, files
from xprompt_jax.data.images import open_image
from xprompt_jax.data.readers.strings import position
from xprompt_jax.data.sources import Record
from xprompt_jax.errors import UserError

_TEXTS = ("instruction", "reverse_instruction", "description", "reverse_description", "task", "group", "caption", "split", "holdout")


class Prepared(Sequence[Mapping[str, Any]]):
    """One split of a prepared copy: rows of its features, images uint8 [h, w, 3], texts as str; "key" is the number.

    Args:
      folder: the one with features.json and dataset_info.json.
      split: "train", "validation", ...

    Raises:
      UserError: not a prepared copy, no such split, or not in array_record files.
    """

    def __init__(self, folder: str | Path, split: str):
        self._folder, self._split, self._source = Path(folder), split, None
        self._length = len(self._open())

    def _open(self):
        if self._source is None:
            import tensorflow_datasets as tfds

            try:
                builder = tfds.builder_from_directory(self._folder)
            except Exception as e:  # it meets foreign files with nearly any exception
                raise UserError(f"{self._folder}: not a copy prepared by TensorFlow Datasets ({_first(e)})") from None
            if self._split not in builder.info.splits:
                raise UserError(f"{self._folder}: no split {self._split!r}, but {', '.join(builder.info.splits)}")
            try:
                self._source = builder.as_data_source(split=self._split)
            except NotImplementedError as e:
                raise UserError(
                    f"{self._folder}: not array_record files; prepare it with file_format='array_record' ({_first(e)})"
                ) from None
        return self._source

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i):
        i = position(i, len(self))
        row = self._open()[i]
        return {"key": str(i)} | {name: value.decode() if isinstance(value, bytes) else value for name, value in row.items()}

    def __getstate__(self):
        return {**self.__dict__, "_source": None}


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def prepare(splits: Mapping[str, Pairs], data_dir: str | Path, *, name: str = "xprompt_pairs", version: str = "1.0.0") -> Path:
    """Writes pairs as a TensorFlow dataset in array_record files, images as PNG bytes where they are not files already.

    Args:
      splits: split -> pairs.
      data_dir: where TensorFlow Datasets keeps its copies.
      name: of the dataset, in snake case.

    Returns:
      The folder of the copy, which `Prepared` and `tfds.builder_from_directory` open.

    Raises:
      UserError: the folder has a copy of that name and version already, or an image cannot be read.
    """
    import tensorflow_datasets as tfds

    if (Path(data_dir) / name / version).exists():
        raise UserError(f"{Path(data_dir) / name / version}: there is a copy already; remove it or choose another name")
    texts = {field: tfds.features.Text() for field in _TEXTS}
    image = lambda: tfds.features.Image(shape=(None, None, 3), encoding_format="png")
    features = tfds.features.FeaturesDict({
        "input": image(), "output": image(), "more_inputs": tfds.features.Sequence(image()), "exact": np.bool_, **texts,
    })  # fmt: skip

    class PairsBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
        """Example pairs, their images as bytes."""

        VERSION = tfds.core.Version(version)
        # Where its checksums would lie; looking for them needs a package that TensorFlow Datasets does not ask for.
        code_path = None

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, description="Example pairs.", features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(pairs) for split, pairs in splits.items()}

        def _generate_examples(self, pairs):
            for number, record in enumerate(pairs):
                images = {"input": _png(record.input), "output": _png(record.output), "more_inputs": [_png(i) for i in record.more_inputs]}
                yield number, {**images, "exact": record.exact, **{field: getattr(record, field) for field in _TEXTS}}

    PairsBuilder.name = name
    builder = PairsBuilder(data_dir=str(data_dir), file_format="array_record")
    builder.download_and_prepare()
    return Path(data_dir) / name / version


def _png(image: Any) -> io.BytesIO:
    """An image's PNG bytes: TensorFlow Datasets takes them as they are."""
    stream = io.BytesIO()
    open_image(image).save(stream, "PNG")
    stream.seek(0)
    return stream


def _record(row: Mapping[str, Any]) -> Record:
    return Record(row["input"], row["output"], more_inputs=tuple(row["more_inputs"]), exact=bool(row["exact"]),
                  **{field: row[field] for field in _TEXTS})  # fmt: skip


def _pairs(mark: str):
    """All splits of a copy; a pair keeps the split that it was written with."""

    def open_part(root: Path, options: Options) -> Pairs:
        import tensorflow_datasets as tfds

        folder = files(root, mark)[-1].parent
        return Joined([_Kept(Prepared(folder, split), _record) for split in tfds.builder_from_directory(folder).info.splits])

    return open_part


class _Kept(Pairs):
    """Rows made pairs, with the split that they bring."""

    def __init__(self, rows: Prepared, make):
        self._rows, self._make = rows, make

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, i: int) -> Record:
        """Row `i` as a pair."""
        return self._make(self._rows[i])


TFDS_PAIRS = Dataset("tfds_pairs", Card(
    "Any pairs prepared as a TensorFlow dataset by data.datasets.tfds.prepare", "made here", "of what it was made from", ("any",),
), (
    Layout("version folder", (Part("train", "features.json", _pairs("features.json")),)),
    Layout("dataset folder", (Part("train", "*/features.json", _pairs("*/features.json")),)),
))  # fmt: skip

DATASETS = (TFDS_PAIRS,)
