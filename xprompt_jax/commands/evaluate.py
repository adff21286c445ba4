"""`xprompt eval`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from xprompt_jax.commands.sampling import SamplingFlags
from xprompt_jax.errors import UserError


@dataclass
class Evaluate(SamplingFlags):
    """Score a model: held-out images drawn from several example pairs, beside what a wrong example, the input and the tokenizer reach.

    Writes OUT/result.json, scores.csv and index.html, and prints one line for each score beside the paper's. The suites are those of
    the paper's tables of restoration and of depth, classes and normals, and `pairs` for any data of yours; see docs/evaluation.md.

    Examples:
      xprompt eval pairs --model demo/model --data pairs.jsonl --out scores/mine
      xprompt eval derain --model models/anole-7b --data Rain100L --examples-from Rain13K/train --out scores/derain
    """

    suite: tyro.conf.Positional[
        Literal["pairs", "derain", "derain_heavy", "low_light", "deblur", "denoise", "depth", "segmentation", "normals"]
    ]
    """What to measure."""
    model: str
    """Model folder, or org/name on the Hugging Face hub."""
    data: Path
    """A manifest (its rows of split eval), or a folder with input/ and target/, whose files have equal names."""
    out: Path
    """Folder for the results."""
    examples_from: Path | None = None
    """Manifest or folder to take example pairs from; without it, the manifest's training pairs, or pairs set aside from --data."""
    examples: int = 3
    """Example pairs to draw every query from; scores are given with their spread over them."""
    queries: int = 0
    """Most queries of each group; 0 takes all."""
    eval_fraction: float | None = None
    """Held out of a manifest that does not say; by default 0.05 for pairs, as in `xprompt tokenize`, and 1 for the other suites."""
    palette: str = ""
    """Colours of depth (grey, turbo, ...) or of classes (max_separation, painter), where the model was trained on others."""
    seed: int = 0
    """Of the choice of examples, of the images and of the bootstrap."""

    def run(self) -> None:
        """Draws and scores."""
        if self.examples < 1 or self.queries < 0:
            raise UserError("--examples must be at least 1, and --queries at least 0")
        from xprompt_jax import XPrompt
        from xprompt_jax.evaluate.scores import evaluate, lines
        from xprompt_jax.evaluate.suites import find_records, get_suite

        suite = get_suite(self.suite, self.palette)
        find_records(suite, self.data)  # missing data is named before the model is loaded
        if self.examples_from is not None:
            find_records(suite, self.examples_from, flag="--examples-from")
        fraction = self.eval_fraction if self.eval_fraction is not None else 0.05 if self.suite == "pairs" else 1.0
        result = evaluate(
            XPrompt.from_pretrained(self.model), suite, self.data, self.out, examples_from=self.examples_from, examples=self.examples,
            per_group=self.queries, eval_fraction=fraction, seed=self.seed, sampling=self.sampling(),
        )  # fmt: skip
        print("\n".join(lines(suite, result)))
        if suite.note:
            print(f"{suite.name}: {suite.note}")
        print(f"open {self.out / 'index.html'}")
