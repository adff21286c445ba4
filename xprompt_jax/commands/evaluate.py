"""`xprompt eval`: a subcommand for each suite of image pairs, for GenEval and the tokenizer alone, and two that read results."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from xprompt_jax.commands.evaluate_suites import (
    EDIT_SUITES,
    MAGICBRUSH_SUITES,
    PAIR_SUITES,
    DrawingFlags,
    Edits,
    MagicBrush,
    Pairs,
    Table4,
    World,
    tell_waiting,
)  # fmt: skip
from xprompt_jax.errors import UserError


@dataclass
class GenEval(DrawingFlags):
    """Table 1: text to image, judged by an object detector.

    With --model it draws what OUT lacks, in the official layout. Then give the detector's verdicts with --results (results.jsonl of the
    official evaluation/evaluate_images.py, run on OUT), or its boxes and colours with --detections, which are judged here by the official
    rules. With neither, and no --model, it only sees whether OUT is complete.

    Examples:
      xprompt eval geneval --model DIR --data evaluation_metadata.jsonl --out geneval
      xprompt eval geneval --data evaluation_metadata.jsonl --out geneval --results results.jsonl
    """

    data: Path
    """GenEval's evaluation_metadata.jsonl."""
    out: Path
    """Folder for the images, or that holds them; started again, a run goes on."""
    model: str = ""
    """Model folder, or org/name on the Hugging Face hub."""
    results: Path | None = None
    """The official evaluation's results.jsonl."""
    detections: Path | None = None
    """JSONL, a line for each image: {"filename", "objects": [{"class", "box", "confidence", "color"}]}; see docs/evaluation.md."""
    num_images: int = 4
    """Images of each prompt; the benchmark has 4."""
    seed: int = 0
    """Of the images."""

    def run(self) -> None:
        """Draws, checks, and scores."""
        if self.num_images < 1:
            raise UserError("--num-images must be at least 1")
        if self.results is not None and self.detections is not None:
            raise UserError("give --results or --detections, not both")
        bare = GenEval(data=self.data, out=self.out, results=self.results, detections=self.detections, num_images=self.num_images)
        if not self.model and self != bare:
            raise UserError("flags of drawing need --model; give it, or leave them out")
        from xprompt_jax.evaluate import geneval
        from xprompt_jax.sample.arguments import seed_of

        seed_of(self.seed, "--seed")
        metadata, shard = geneval.read_metadata(self.data), self.part()
        if self.model:
            with self.loaded(self.model) as model:
                geneval.draw_prompts(
                    model, metadata, self.out, num_images=self.num_images, seed=self.seed, shard=shard, overwrite=self.overwrite,
                    sampling=self.sampling(),
                )  # fmt: skip
        if shard.count > 1 and not geneval.is_complete(self.out, metadata, self.num_images):
            return tell_waiting(self.out, shard)
        geneval.check_folder(self.out, metadata, self.num_images)
        if self.results is None and self.detections is None:
            print(f"{self.out}: all {len(metadata)} prompts have their {self.num_images} images; run GenEval's evaluate_images.py on it, "
                  "then this command with --results")  # fmt: skip
            return
        if self.results is not None:
            correct, judge = geneval.take_results(self.results, self.out, metadata, self.num_images), "the official evaluation"
        else:
            assert self.detections is not None
            correct = geneval.judge_detections(self.detections, self.out, metadata, self.num_images)
            judge = "the official rules from given detections"
        print("\n".join(geneval.lines(geneval.write_scores(self.out, correct, metadata, judged_by=judge))))
        print(f"open {self.out / 'index.html'}")


@dataclass
class Reconstruction:
    """Table 5: images through the image tokenizer and back, which bounds every other score.

    One image of 1024 pixels takes some 1.5 GB of memory with Chameleon's tokenizer.

    Example: xprompt eval reconstruction --model models/anole-7b --data Rain100L/target --out scores/tokenizer
    """

    model: str
    """Model folder, or org/name on the Hugging Face hub; its decoder is not loaded."""
    data: Path
    """Any folder of images."""
    out: Path
    """Folder for the results; started again, a run goes on from the images in it."""
    sides: tuple[int, ...] = ()
    """Pixels that images are stretched to; by default the model's and twice that (512 and 1024)."""
    shard: str = ""
    """Part of the images to take here, such as 0/4, into the same OUT; the last part to end scores the whole."""
    overwrite: bool = False
    """Forget what OUT holds of other images or another model."""

    def run(self) -> None:
        """Reconstructs and scores."""
        from xprompt_jax.convert.formats import open_source
        from xprompt_jax.convert.weights import load_vqgan
        from xprompt_jax.data.images import list_images
        from xprompt_jax.evaluate.reconstruction import NOTE, PUBLISHED, lines, reconstruct

        shard = DrawingFlags(shard=self.shard, overwrite=self.overwrite).part()
        list_images(self.data)  # missing data is named before the model is loaded
        vqgan = load_vqgan(open_source(self.model))
        result = reconstruct(vqgan, self.data, self.out, sides=self.sides, shard=shard, overwrite=self.overwrite)
        if result is None:
            return tell_waiting(self.out, shard)
        print("\n".join(lines(result)))
        for row, columns in PUBLISHED.items():
            print(f"paper: {row}: {', '.join(f'{name} {value:g}' for name, value in columns.items())}")
        print(f"reconstruction: {NOTE}")
        print(f"open {self.out / 'index.html'}")


@dataclass
class Compare:
    """Two results of one suite beside each other: differences with paired bootstrap intervals.

    `xprompt eval --compare A B` says the same.

    Example: xprompt eval compare scores/causal scores/xprompt --out scores/causal-and-xprompt
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    """A B, the --out folders of two finished runs."""
    out: Path = Path("comparison")
    """Folder for compare.csv and index.html."""

    def run(self) -> None:
        """Compares."""
        if len(self.folders) != 2:
            raise UserError("give two folders with results: xprompt eval compare A B")
        from xprompt_jax.evaluate.compare import compare, lines

        print("\n".join(lines(compare(*self.folders, self.out))))
        print(f"open {self.out / 'index.html'}")


@dataclass
class Recompute:
    """Every number of a result once more, from the images that lie beside it; fails if one differs. Needs no model.

    Example: xprompt eval recompute scores/derain
    """

    folder: tyro.conf.Positional[tuple[Path, ...]] = ()
    """The --out folder of a finished run."""
    data: Path | None = None
    """Where its --data lies now, if elsewhere."""
    examples_from: Path | None = None
    """Where its --examples-from lies now, if elsewhere."""
    clip: Path | None = None
    """Of edited photographs: the --clip they were scored with."""
    dino: Path | None = None
    """Of edited photographs: the --dino they were scored with."""
    index: Path | None = None
    """Of magicbrush: the --index its examples were retrieved from."""

    def run(self) -> None:
        """Computes and compares."""
        if len(self.folder) != 1:
            raise UserError("give one folder with results: xprompt eval recompute FOLDER")
        from xprompt_jax.evaluate.recompute import recompute

        count = recompute(self.folder[0], data=self.data, examples_from=self.examples_from, clip=self.clip, dino=self.dino,
                          index=self.index)  # fmt: skip
        print(f"{self.folder[0]}: all {count} numbers of result.json follow from its files")


def _subcommands() -> Any:
    """The union of all subcommands."""
    suites = tuple(
        Annotated[Pairs, tyro.conf.subcommand(
            name, default=Pairs(suite=name, model=tyro.MISSING, data=tyro.MISSING, out=tyro.MISSING), description=says
        )]
        for name, says in PAIR_SUITES.items()
    )  # fmt: skip
    missing: dict[str, Any] = {"model": tyro.MISSING, "data": tyro.MISSING, "out": tyro.MISSING}
    suites += tuple(
        Annotated[MagicBrush, tyro.conf.subcommand(name, default=MagicBrush(suite=name, **missing), description=says)]
        for name, says in MAGICBRUSH_SUITES.items()
    )  # fmt: skip
    suites += tuple(
        Annotated[Edits, tyro.conf.subcommand(name, default=Edits(suite=name, **missing), description=says)]
        for name, says in EDIT_SUITES.items()
    )  # fmt: skip
    world = World(suite="world", model=tyro.MISSING, out=tyro.MISSING)
    suites += (Annotated[World, tyro.conf.subcommand("world", default=world)],)
    others = {"table4": Table4, "geneval": GenEval, "reconstruction": Reconstruction, "compare": Compare, "recompute": Recompute}
    rest = tuple(Annotated[kind, tyro.conf.subcommand(name)] for name, kind in others.items())
    kinds: Any = functools.reduce(operator.or_, suites + rest)
    unprefixed: Any = tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes
    return unprefixed[0][unprefixed[1][kinds]]


@dataclass
class Evaluate:
    """Score a model: the paper's tables, and `pairs` for any data of yours.

    Held-out images are drawn from several example pairs, beside what a wrong example, no example, the input and the tokenizer reach. Writes
    OUT/result.json, scores.csv, index.html and the images, and prints one line for each score beside the paper's. See docs/evaluation.md,
    and `xprompt eval SUITE --help`.

    Examples:
      xprompt eval pairs --model mini --data pairs.jsonl --out scores/mine
      xprompt eval derain --model models/anole-7b --data Rain100L --examples-from Rain13K/train --out scores/derain
      xprompt eval geneval --model models/anole-7b --data evaluation_metadata.jsonl --out scores/geneval
    """

    suite: _subcommands()  # type: ignore[valid-type]
    """What to do."""

    def run(self) -> None:
        """Runs the subcommand."""
        self.suite.run()
