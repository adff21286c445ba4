"""`xprompt eval`: a subcommand for each suite of image pairs, for GenEval and the tokenizer alone, and two that read results."""

from __future__ import annotations

import functools
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from xprompt_jax.commands.sampling import SamplingFlags
from xprompt_jax.errors import UserError

if TYPE_CHECKING:
    from xprompt_jax.evaluate.suites import Suite

PAIR_SUITES = {
    "pairs": "Any pairs of images: how near the drawn image is to the held-out one.",
    "derain": "Rain100L: light rain removed.",
    "derain_heavy": "Rain100H: heavy rain removed, the novel task of Table 4.",
    "low_light": "LOL-v1: dark photographs brightened.",
    "deblur": "GoPro: motion blur removed.",
    "denoise": "Noise removed from photographs.",
    "depth": "NYUv2: depth in metres.",
    "segmentation": "ADE20K: 150 classes.",
    "normals": "NYUv2: surface normals.",
}
"""Name -> what it measures; as in `evaluate.suites`, which is too heavy for --help."""


@dataclass
class Pairs(SamplingFlags):
    """Score a model on pairs of images, every one drawn from several example pairs."""

    suite: tyro.conf.Suppress[str]
    """One of PAIR_SUITES."""
    model: str
    """Model folder, or org/name on the Hugging Face hub."""
    data: Path
    """A manifest (its rows of split eval), or a folder with input/ and target/, whose files have equal names."""
    out: Path
    """Folder for the results; started again, a run goes on from the images in it."""
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
    overwrite: bool = False
    """Draw again what OUT holds; needed when settings have changed."""

    def run(self) -> None:
        """Draws and scores."""
        if self.examples < 1 or self.queries < 0:
            raise UserError("--examples must be at least 1, and --queries at least 0")
        if self.seed < 0:
            raise UserError("--seed must not be negative")
        from xprompt_jax import XPrompt
        from xprompt_jax.evaluate.scores import evaluate, lines
        from xprompt_jax.evaluate.suites import find_records

        suite = self._suite()
        find_records(suite, self.data)  # missing data is named before the model is loaded
        if self.examples_from is not None:
            find_records(suite, self.examples_from, flag="--examples-from")
        fraction = self.eval_fraction if self.eval_fraction is not None else 0.05 if self.suite == "pairs" else 1.0
        result = evaluate(
            XPrompt.from_pretrained(self.model), suite, self.data, self.out, examples_from=self.examples_from, examples=self.examples,
            per_group=self.queries, eval_fraction=fraction, seed=self.seed, overwrite=self.overwrite, sampling=self.sampling(),
        )  # fmt: skip
        print("\n".join(lines(suite, result)))
        if suite.note:
            print(f"{suite.name}: {suite.note}")
        print(f"open {self.out / 'index.html'}")

    def _suite(self) -> Suite:
        from xprompt_jax.evaluate.suites import get_suite

        return get_suite(self.suite, self.palette)


@dataclass
class MagicBrush(Pairs):
    """Table 3: photographs edited by instruction, scored by CLIP and DINO; --index retrieves the examples, as the paper does.

    Example: xprompt eval magicbrush --model DIR --data MagicBrush/test --clip clip-vit-base-patch32 --dino dino-vits16 --out scores/edits
    """

    clip: Path | None = None
    """Folder of CLIP ViT-B/32 (openai/clip-vit-base-patch32): weights, config.json and the tokenizer's files."""
    dino: Path | None = None
    """Folder of DINO ViT-S/16 (facebook/dino-vits16), or Meta's dino_deitsmall16_pretrain.pth."""
    index: Path | None = None
    """Index of training pairs (`xprompt index` of a manifest): every turn is drawn from those with the nearest instructions."""

    def _suite(self) -> Suite:
        from xprompt_jax.evaluate.magicbrush import EditSuite

        suite = super()._suite()
        assert isinstance(suite, EditSuite)
        suite = suite.with_encoders(self.clip, self.dino)
        if self.index is None:
            return suite
        if self.examples_from is not None or self.data.is_file():
            raise UserError("--index takes the place of --examples-from, and works on MagicBrush's test folder; leave one out")
        from xprompt_jax.data.retrieval import RetrievalIndex

        return suite.with_retrieval(RetrievalIndex.load(self.index), self.examples, self.queries)


@dataclass
class GenEval(SamplingFlags):
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
    overwrite: bool = False
    """Draw again what OUT holds; needed when settings have changed."""

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

        metadata = geneval.read_metadata(self.data)
        if self.model:
            from xprompt_jax import XPrompt

            geneval.draw_prompts(
                XPrompt.from_pretrained(self.model), metadata, self.out, num_images=self.num_images, seed=self.seed,
                overwrite=self.overwrite, sampling=self.sampling(),
            )  # fmt: skip
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
    overwrite: bool = False
    """Forget what OUT holds of other images or another model."""

    def run(self) -> None:
        """Reconstructs and scores."""
        from xprompt_jax.convert.formats import open_source
        from xprompt_jax.convert.weights import load_vqgan
        from xprompt_jax.data.images import list_images
        from xprompt_jax.evaluate.reconstruction import NOTE, PUBLISHED, lines, reconstruct

        list_images(self.data)  # missing data is named before the model is loaded
        result = reconstruct(load_vqgan(open_source(self.model)), self.data, self.out, sides=self.sides, overwrite=self.overwrite)
        print("\n".join(lines(result)))
        for row, columns in PUBLISHED.items():
            print(f"paper: {row}: {', '.join(f'{name} {value:g}' for name, value in columns.items())}")
        print(f"reconstruction: {NOTE}")
        print(f"open {self.out / 'index.html'}")


@dataclass
class Compare:
    """Two results of one suite beside each other: differences with paired bootstrap intervals.

    Example: xprompt eval compare scores/causal scores/xprompt --out scores/causal-and-xprompt
    """

    folders: tyro.conf.Positional[tuple[Path, ...]] = ()
    """A B, the --out folders of two finished runs."""
    out: Path | None = None
    """Folder for compare.csv and index.html."""

    def run(self) -> None:
        """Compares."""
        if len(self.folders) != 2 or self.out is None:
            raise UserError("give two folders with results and one for the comparison: xprompt eval compare A B --out C")
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
    """Of magicbrush: the --clip it was scored with."""
    dino: Path | None = None
    """Of magicbrush: the --dino it was scored with."""
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
    edits = MagicBrush(suite="magicbrush", model=tyro.MISSING, data=tyro.MISSING, out=tyro.MISSING)
    suites += (Annotated[MagicBrush, tyro.conf.subcommand("magicbrush", default=edits)],)
    others = {"geneval": GenEval, "reconstruction": Reconstruction, "compare": Compare, "recompute": Recompute}
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
      xprompt eval pairs --model demo/model --data pairs.jsonl --out scores/mine
      xprompt eval derain --model models/anole-7b --data Rain100L --examples-from Rain13K/train --out scores/derain
      xprompt eval geneval --model models/anole-7b --data evaluation_metadata.jsonl --out scores/geneval
    """

    suite: _subcommands()  # type: ignore[valid-type]
    """What to do."""

    def run(self) -> None:
        """Runs the subcommand."""
        self.suite.run()
