"""How often each dataset is drawn; and the paper's own mixture, as far as its tables tell.

Without weights a pair is drawn as often as any other, so that a dataset's share is its size. A weight says how many pairs a dataset, or a
task, counts for, whatever number of them the store has: `{"gopro": 16824}` draws half of GoPro twice as often, `{"gopro": 0}` leaves it
out. What has no weight counts for what it has. A task's name goes before a dataset's.

The paper's Tables 6 and 7 stand here as data. Our protocol, where they leave something open: see docs/data.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xprompt_jax.config import Config
from xprompt_jax.data.store import Store
from xprompt_jax.data.table import Categories, Pairs
from xprompt_jax.errors import UserError


@dataclass(frozen=True)
class PaperRow:
    """A row of the paper's Table 6 or 7."""

    name: str
    """As printed."""
    pairs: int
    """As printed, in ones."""
    times: int
    """Training samples that a pair gives: 4 for forwards and reversed, as an image and as a description; 2 for LAION, which is drawn and
    described; 1 for the tasks of several inputs."""
    ours: Mapping[str, int]
    """Our datasets or tasks that are this row, with the training pairs of a whole copy; they share the row by these numbers."""


TABLE_6 = (
    PaperRow("DFWB", 72_000, 4, {"dfwb": 1}),
    PaperRow("GoPro", 17_000, 4, {"gopro": 1}),
    PaperRow("Rain13K", 13_000, 4, {"rain13k": 1}),
    PaperRow("MIT5K", 5_000, 4, {"fivek": 1}),
    PaperRow("LoL", 6_000, 4, {"lol_v1": 485, "lol_v2_real": 689, "lol_v2_synthetic": 900}),
    PaperRow("Laion_Aesthetic", 500_000, 2, {"laion_aesthetics": 1}),
    PaperRow("Ultra-Edit", 500_000, 4, {"ultraedit": 1}),
    PaperRow("MagicBrush", 1_700, 4, {"magicbrush": 1}),
    PaperRow("NYU-v2-depth", 48_000, 4, {"nyuv2_depth": 1}),
    PaperRow("ADE20K", 20_000, 4, {"ade20k": 1}),
    PaperRow("ScannNet-Norm", 260_000, 4, {"scannet_normals": 1}),
    PaperRow("dep2img", 100_000, 4, {"control_depth": 1}),
    PaperRow("seg2img", 100_000, 4, {"control_seg": 1}),
    PaperRow("norm2img", 100_000, 4, {"control_normal": 1}),
    PaperRow("hed2img", 100_000, 4, {"control_hed": 1}),
    PaperRow("mlsd2img", 100_000, 4, {"control_mlsd": 1}),
)
TABLE_7 = (
    PaperRow("RB-Modulation", 10_000, 1, {"style_pairs": 1}),
    PaperRow("IP-Adapter", 50_000, 1, {"ip_adapter": 1}),
    PaperRow("VITON", 120_000, 1, {"viton_hd": 1}),
    PaperRow("Pose & action", 10_000, 1, {"pose_action": 1}),
    PaperRow("MimicBrush", 50_000, 1, {"mimicbrush": 1}),
)
PAPER = TABLE_6 + TABLE_7

PAPER_WEIGHTS: dict[str, float] = {
    name: row.pairs * part / sum(row.ours.values()) for row in PAPER for name, part in row.ours.items()
}  # fmt: skip
"""`data.weights` of the paper's mixture: every dataset counts for the pairs that the paper had of it."""

REST = "the rest"
"""What has no weight of its own."""


@dataclass(frozen=True)
class Mixture:
    """The parts of a store that are drawn at rates of their own."""

    names: tuple[str, ...]
    """Of each part: a key of the weights, or `REST`."""
    parts: np.ndarray
    """int32 [pairs], the part of each pair."""
    factors: np.ndarray
    """float64 [parts], how often a pair of the part is drawn for every time that an unweighted one is."""

    @classmethod
    def of(cls, pairs: Pairs, weights: Mapping[str, float], among: np.ndarray) -> Mixture:
        """The mixture of a store's pairs.

        Args:
          weights: `data.weights`.
          among: bool [pairs], the split; pairs are counted in it.

        Raises:
          UserError: a weight is of a name that neither the store nor the paper has.
        """
        known = {*pairs.dataset.names, *pairs.task.names, *PAPER_WEIGHTS}
        if unknown := sorted(set(weights) - known):
            raise UserError(f"data.weights: {unknown[0]!r} is no dataset and no task of the store; it has "
                            f"{', '.join(sorted({*pairs.dataset.names, *pairs.task.names} - {''}))}")  # fmt: skip
        names = (*weights, REST)

        def numbers(column: Categories) -> np.ndarray:
            """Of each pair, the weight that its name has, or -1."""
            found = [names.index(name) if name in weights else -1 for name in column.names]
            return np.array(found, np.int32)[column.codes]

        parts = numbers(pairs.task)
        parts = np.where(parts < 0, numbers(pairs.dataset), parts)
        parts = np.where(parts < 0, len(weights), parts).astype(np.int32)
        counts = np.bincount(parts[among], minlength=len(names))
        factors = np.array([*weights.values(), counts[-1]], np.float64) / np.maximum(counts, 1)
        factors[-1] = 1.0
        return cls(names, parts, factors)

    def rates(self, pairs: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Splits a bucket's episodes.

        Args:
          pairs: int [episodes], the query of each.

        Returns:
          Of the parts that are drawn at all: their shares, float64, sum 1; and their episodes, int32 numbers in order.

        Raises:
          UserError: the weights leave nothing.
        """
        parts = self.parts[pairs]
        counts = np.bincount(parts, minlength=len(self.names)) * self.factors
        drawn = np.flatnonzero(counts > 0)
        if not len(drawn):
            raise UserError("data.weights leave no pair of a bucket; give one that is above 0, or remove the bucket")
        return counts[drawn] / counts[drawn].sum(), [np.flatnonzero(parts == i).astype(np.int32) for i in drawn]


def totals() -> dict[str, int]:
    """Sums of the paper's tables: pairs and training samples (augmented)."""
    of = lambda table, times: sum(row.pairs * (row.times if times else 1) for row in table)
    return {
        "table_6": of(TABLE_6, False), "table_6_augmented": of(TABLE_6, True), "table_7": of(TABLE_7, False),
        "table_7_augmented": of(TABLE_7, True),
    }  # fmt: skip


def report(config: Config, *, split: str = "train") -> str:
    """What a store has of the paper's mixture, and what a configuration draws of it, as text.

    Raises:
      UserError: the store cannot be read.
    """
    from xprompt_jax.convert.native import load_tokenizers
    from xprompt_jax.data.pipeline import Episodes, PairTable
    from xprompt_jax.data.retrieval import RetrievalIndex
    from xprompt_jax.prompt import Prompter
    from xprompt_jax.tokens import Layout

    store = Store.open(config.data.store)
    vqgan, tokenizer = load_tokenizers(Path(config.data.store) / "tokenizers")
    prompter = Prompter(tokenizer, Layout(config.model.layout, tokenizer.vocab, vqgan.config.downsample))
    table = PairTable(store, prompter, config.data, split)
    neighbours = RetrievalIndex.load(config.data.index).neighbours_in(store) if config.data.index else None
    lines = [*_paper_lines(store.pairs, table.in_split), ""]
    mixture = Mixture.of(store.pairs, config.data.weights, table.in_split)
    for bucket in config.data.buckets:
        lines.append(f"bucket {bucket.name}: {bucket.rows} rows a step")
        try:
            episodes = Episodes(store, prompter, config.data, bucket, config.model.num_xp_tokens, split, neighbours, table)
            rates, parts = mixture.rates(episodes.specs.pairs)
        except UserError as e:
            lines.append(f"  {e}")
            continue
        for rate, part in zip(rates, parts, strict=True):
            name = mixture.names[mixture.parts[episodes.specs.pairs[part[0]]]]
            lines.append(f"  {name:20}{len(part):>12,} episodes {100 * rate:8.3f} % {bucket.rows * rate:9.1f} rows a step")
    return "\n".join(lines)


def _paper_lines(pairs: Pairs, among: np.ndarray) -> list[str]:
    """The tables beside what the store has."""
    here: dict[str, int] = {}
    for column in (pairs.dataset, pairs.task):
        counts = np.bincount(column.codes[among], minlength=len(column.names))
        here |= {name: int(count) for name, count in zip(column.names, counts, strict=True)}
    line = lambda *cells: "{:18}{:>12}{:>6}{:>12}{:>12}  {}".format(*cells)
    lines = [line("paper", "pairs", "times", "samples", "here", "as")]
    for title, table in (("Table 6", TABLE_6), ("Table 7", TABLE_7)):
        for row in table:
            found = sum(here.get(name, 0) for name in row.ours)
            lines.append(line(row.name, f"{row.pairs:,}", row.times, f"{row.pairs * row.times:,}", f"{found:,}", ", ".join(row.ours)))
        whole, samples = sum(row.pairs for row in table), sum(row.pairs * row.times for row in table)
        found = sum(here.get(name, 0) for row in table for name in row.ours)
        lines.append(line(title, f"{whole:,}", "", f"{samples:,}", f"{found:,}", ""))
    ours = {name for row in PAPER for name in row.ours}
    others = int(among.sum()) - sum(count for name, count in here.items() if name in ours)
    return [*lines, line("not in the paper", "", "", "", f"{others:,}", "")]
