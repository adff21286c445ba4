"""The datasets of the paper's Tables 6 and 7, each a card and a short adapter; `DATASETS` is the table of them all."""

from __future__ import annotations

from xprompt_jax.data.datasets import control, dense, depth, editing, personal, restoration, tfds
from xprompt_jax.data.datasets.base import Card, Dataset, Options, Pairs
from xprompt_jax.errors import UserError

__all__ = ["DATASETS", "Card", "Dataset", "Options", "Pairs", "get_dataset", "table"]

DATASETS: dict[str, Dataset] = {
    dataset.name: dataset for family in (restoration, control, editing, depth, dense, personal, tfds) for dataset in family.DATASETS
}
"""By name."""


def get_dataset(name: str) -> Dataset:
    """A dataset of the table.

    Raises:
      UserError: there is none of that name.
    """
    if name not in DATASETS:
        raise UserError(f"--dataset {name}: unknown; `xprompt tokenize --list` shows them: {', '.join(DATASETS)}")
    return DATASETS[name]


def table() -> str:
    """What `xprompt tokenize --list` prints: every dataset with its splits and their counts, layouts, licence and source."""
    lines = []
    for dataset in DATASETS.values():
        card = dataset.card
        lines += [f"{dataset.name}  {card.title}", f"    tasks    {', '.join(card.tasks)}"]
        for layout in dataset.layouts:
            lines.append(f"    layout   {layout.name}: {', '.join(f'{part.split} {part.expected}' for part in layout.parts)}")
        lines += [f"    licence  {card.licence}", f"    source   {card.source}"] + ([f"    note     {card.note}"] if card.note else [])
        lines.append("")
    return "\n".join(lines).rstrip()
