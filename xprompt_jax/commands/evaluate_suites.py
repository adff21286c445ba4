"""The commands of `xprompt eval` that draw suites of image pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from xprompt_jax.commands.sampling import PrecisionFlags, SamplingFlags
from xprompt_jax.errors import UserError

if TYPE_CHECKING:
    from xprompt_jax.evaluate.results import Shard
    from xprompt_jax.evaluate.suites import Suite
    from xprompt_jax.sample.sampler import XPrompt

PAIR_SUITES = {
    "pairs": "Any pairs of images: how near the drawn image is to the held-out one.",
    "derain": "Rain100L: light rain removed.",
    "derain_heavy": "Rain100H: heavy rain removed, the novel task of Table 4.",
    "low_light": "LOL-v1: dark photographs brightened.",
    "deblur": "GoPro: motion blur removed.",
    "denoise": "Noise removed from photographs.",
    "depth": "NYUv2: depth in metres.",
    "segmentation": "ADE20K: 150 classes.",
    "normals": "NYUv2: surface normals, GeoNet's ground truth.",
    "normals_nyud": "NYUv2: surface normals, NYUD-MT's ground truth.",
}
"""Name -> what it measures; as in `evaluate.suites`, which is too heavy for --help."""
MAGICBRUSH_SUITES = {
    "magicbrush": "Table 3, MagicBrush: photographs edited by instruction, single turns; --index retrieves the examples (RAIE).",
    "magicbrush_multi": "MagicBrush, the last picture of each session: every turn edits what the model drew before.",
}
EDIT_SUITES = {
    "object_addition": "InstructPix2Pix: objects added by instruction, a novel task of Table 4.",
    "object_removal": "InstructPix2Pix: objects removed by instruction, a novel task of Table 4.",
    "style": "A style taken from the example, section 4.5; a group of the manifest is a style.",
    "action": "A pose or an action taken from the example, section 4.5; a group of the manifest is an action.",
}
"""Those that --clip and --dino score."""


@dataclass(kw_only=True)
class DrawingFlags(PrecisionFlags, SamplingFlags):
    """Of every command that draws many images to score them."""

    shard: str = ""
    """Part of the queries to draw here, such as 0/4 (1/4, 2/4, 3/4 elsewhere, into the same OUT); the last part to end scores the whole."""
    devices: int = 0
    """Devices of this process to split batches over; 0 takes all GPUs or TPUs, and of a CPU one."""
    overwrite: bool = False
    """Draw again what OUT holds; needed when settings have changed."""

    def part(self) -> Shard:
        """The shard.

        Raises:
          UserError: it is no part/parts, or is to overwrite what the other parts draw.
        """
        from xprompt_jax.evaluate.results import Shard

        shard = Shard.parse(self.shard)
        if shard.count > 1 and self.overwrite:
            raise UserError("--overwrite with --shard would remove what the other parts have drawn; choose another --out")
        return shard

    @contextlib.contextmanager
    def loaded(self, folder: str) -> Iterator[XPrompt]:
        """The model, on the devices that are asked for.

        Raises:
          UserError: there are not so many devices, or the model cannot be read.
        """
        import jax

        from xprompt_jax import XPrompt
        from xprompt_jax.config import MeshConfig
        from xprompt_jax.mesh import make_mesh

        have = jax.local_devices()
        count = self.devices or (1 if have[0].platform == "cpu" else len(have))
        if not 1 <= count <= len(have):
            raise UserError(f"--devices {self.devices}: this process has {len(have)}")
        if count == 1:
            yield XPrompt.from_pretrained(folder, **self.precision())
            return
        mesh = make_mesh(MeshConfig(data=count, fsdp=1, tensor=1), have[:count])
        with jax.set_mesh(mesh):
            yield XPrompt.from_pretrained(folder, mesh=mesh, **self.precision())


def tell_waiting(out: Path, shard: Shard) -> None:
    """Says what is still to be done."""
    print(f"{out}: part {shard.index} of {shard.count} is drawn; the scores come with the last part, or from this command without --shard")


@dataclass
class Pairs(DrawingFlags):
    """Score a model on pairs of images, every one drawn from several example pairs."""

    suite: tyro.conf.Suppress[str]
    """One of PAIR_SUITES."""
    model: str
    """Model folder, or org/name on the Hugging Face hub."""
    out: Path
    """Folder for the results; started again, a run goes on from the images in it."""
    data: Path
    """A manifest (its rows of split eval), or a folder with input/ and target/, whose files have equal names."""
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
    mode: Literal["xprompt", "causal", "none"] = "xprompt"
    """How examples are shown: through XP tokens; in sight, before the task (for models trained so); or not at all."""

    def run(self) -> None:
        """Draws and scores."""
        self.check()
        suite, fraction = self.find_suite(), self.eval_fraction
        self.find_data(suite)
        with self.loaded(self.model) as model:
            self.score(model, suite, (0.05 if suite.name == "pairs" else 1.0) if fraction is None else fraction)

    def check(self) -> None:
        """Refuses numbers out of their range."""
        from xprompt_jax.sample.arguments import seed_of

        if self.examples < 1 or self.queries < 0:
            raise UserError("--examples must be at least 1, and --queries at least 0")
        if self.eval_fraction is not None and not 0 <= self.eval_fraction <= 1:
            raise UserError(f"--eval-fraction {self.eval_fraction:g} must be from 0 to 1")
        seed_of(self.seed, "--seed")
        self.part()

    def find_data(self, suite: Suite) -> None:
        """Names missing data before the model is loaded."""
        from xprompt_jax.evaluate.suites import find_records

        find_records(suite, self.data)
        if self.examples_from is not None:
            find_records(suite, self.examples_from, flag="--examples-from")

    def score(self, model: XPrompt, suite: Suite, eval_fraction: float = 1.0) -> None:
        """Draws, scores and prints."""
        from xprompt_jax.evaluate.scores import evaluate, lines

        result = evaluate(
            model, suite, self.data, self.out, examples_from=self.examples_from, examples=self.examples, per_group=self.queries,
            eval_fraction=eval_fraction, seed=self.seed, mode=self.mode, shard=self.part(), overwrite=self.overwrite,
            sampling=self.sampling(),
        )  # fmt: skip
        if result is None:
            return tell_waiting(self.out, self.part())
        print("\n".join(lines(suite, result)))
        if note := result["published"]["note"]:
            print(f"{suite.name}: {note}")
        print(f"open {self.out / 'index.html'}")

    def find_suite(self) -> Suite:
        """The suite, ready to score."""
        from xprompt_jax.evaluate.suites import get_suite

        return get_suite(self.suite, self.palette)


@dataclass
class World(Pairs):
    """Edits of rendered scenes, against exact ground truth; renders its own data.

    Example: xprompt eval world --model mini --out scores/world
    """

    data: Path | None = None  # type: ignore[assignment]
    """A folder that this command rendered; without it, OUT/data, which is rendered if it is not there."""
    groups: int = 4
    """Parameter draws of each of six edits, of 6 scenes each."""

    def run(self) -> None:
        """Renders, draws and scores."""
        self.check()
        if self.groups < 1:
            raise UserError("--groups must be at least 1")
        from xprompt_jax.evaluate.world import write_edits

        suite, rendered = self.find_suite(), self.data is None
        self.data = self.out / "data" if self.data is None else self.data
        if not rendered:
            self.find_data(suite)
        with self.loaded(self.model) as model:
            if rendered:
                write_edits(self.data, size=model.config.vq.image_size, groups=self.groups, seed=self.seed)
            self.score(model, suite)


@dataclass
class Edits(Pairs):
    """Edited photographs, scored by CLIP and DINO; see docs/evaluation.md for the layout of --data."""

    clip: Path | None = None
    """Folder of CLIP ViT-B/32 (openai/clip-vit-base-patch32): weights, config.json and the tokenizer's files."""
    dino: Path | None = None
    """Folder of DINO ViT-S/16 (facebook/dino-vits16), or Meta's dino_deitsmall16_pretrain.pth."""

    def find_suite(self) -> Suite:
        """The suite, ready to score."""
        from xprompt_jax.evaluate.edits import EditSuite

        suite = super().find_suite()
        assert isinstance(suite, EditSuite)
        return suite.with_encoders(self.clip, self.dino)


@dataclass
class MagicBrush(Edits):
    """Table 3: photographs edited by instruction, scored by CLIP and DINO; --index retrieves the examples, as the paper does.

    Example: xprompt eval magicbrush --model DIR --data MagicBrush/test --clip clip-vit-base-patch32 --dino dino-vits16 --out scores/edits
    """

    index: Path | None = None
    """Index of training pairs (`xprompt index` of a manifest): every turn is drawn from those with the nearest instructions."""

    def find_suite(self) -> Suite:
        """The suite, ready to score."""
        suite = super().find_suite()
        if self.index is None:
            return suite
        if self.examples_from is not None or self.data.is_file():
            raise UserError("--index takes the place of --examples-from, and works on MagicBrush's test folder; leave one out")
        from xprompt_jax.data.retrieval import RetrievalIndex
        from xprompt_jax.evaluate.magicbrush import MagicBrushSuite

        assert isinstance(suite, MagicBrushSuite)
        return suite.with_retrieval(RetrievalIndex.load(self.index), self.examples, self.queries)


@dataclass
class Table4(DrawingFlags):
    """Table 4: tasks that training never saw, by several models, as one table with the paper's rows.

    Give the models and the data sets that you have. Every run lies in OUT/TASK/MODEL, as the suite of that task writes it.

    Example:
      xprompt eval table4 --xprompt runs/held/model --causal runs/causal/model --full runs/full/model --low-light LOL/eval15 \\
          --derain Rain100H --depth nyu/test --out scores/table4
    """

    xprompt: str
    """Model folder or hub name: trained through XP tokens, without the tasks asked here (`data.holdouts`). Its arm without an example is
    the first row."""
    out: Path
    """Folder for the table and its runs; started again, it goes on."""
    causal: str = ""
    """The same trained with the example in sight (data.mode causal)."""
    none: str = ""
    """The same trained without examples (data.mode none)."""
    full: str = ""
    """A model that was trained on the tasks."""
    low_light: Path | None = None
    """LOL-v1's eval15, as of `xprompt eval low_light`."""
    low_light_examples: Path | None = None
    """Where its examples come from, as --examples-from; likewise below."""
    derain: Path | None = None
    """Rain100H, as of `xprompt eval derain_heavy`."""
    derain_examples: Path | None = None
    """Where its examples come from."""
    depth: Path | None = None
    """NYUv2, as of `xprompt eval depth`, drawn in --palette."""
    depth_examples: Path | None = None
    """Where its examples come from."""
    edits: Path | None = None
    """InstructPix2Pix's clip-filtered-dataset: object addition and removal; needs --clip and --dino."""
    clip: Path | None = None
    """Folder of CLIP ViT-B/32."""
    dino: Path | None = None
    """Folder or file of DINO ViT-S/16."""
    palette: str = "spectral"
    """Colours of depth that training never showed."""
    examples: int = 3
    """Example pairs to draw every query from."""
    queries: int = 0
    """Most queries of each task; 0 takes all."""
    seed: int = 0
    """Of the choice of examples, of the images and of the bootstrap."""

    def run(self) -> None:
        """Draws, scores and prints the table."""
        from xprompt_jax.evaluate.table4 import lines, run_table
        from xprompt_jax.sample.arguments import seed_of

        if self.examples < 1 or self.queries < 0:
            raise UserError("--examples must be at least 1, and --queries at least 0")
        seed_of(self.seed, "--seed")
        models = {key: folder for key in ("xprompt", "causal", "none", "full") if (folder := getattr(self, key))}
        given = {
            "low_light": (self.low_light, self.low_light_examples), "derain_heavy": (self.derain, self.derain_examples),
            "depth": (self.depth, self.depth_examples), "object_addition": (self.edits, None), "object_removal": (self.edits, None),
        }  # fmt: skip
        result = run_table(
            self.loaded, models, {name: (data, shown) for name, (data, shown) in given.items() if data is not None}, self.out,
            clip=self.clip, dino=self.dino, palette=self.palette, examples=self.examples, per_group=self.queries, seed=self.seed,
            shard=self.part(), overwrite=self.overwrite, sampling=self.sampling(),
        )  # fmt: skip
        if result is None:
            return tell_waiting(self.out, self.part())
        print("\n".join(lines(result)))
        print(f"open {self.out / 'index.html'}")
