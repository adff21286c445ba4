"""`xprompt tokenize`, `annotate` and `index`: pairs of images before training."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xprompt_jax.errors import UserError

if TYPE_CHECKING:
    from xprompt_jax.data.store import Store

_SOURCES = ("dataset", "manifest", "inputs", "world", "stores")
_FLAGS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("split", "allow_partial", "palette", "classes", "expert", "password", "min_score", "mirror"), ("dataset",)),
    **dict.fromkeys(("rename", "task", "instruction", "reverse_instruction"), ("inputs",)),
    **dict.fromkeys(("photos", "seed"), ("world",)),
    **dict.fromkeys(("model", "recipe", "eval_fraction", "crops", "max_corrupt"), _SOURCES[:4]),
    "shard": _SOURCES[:3],
}
"""Flags of `tokenize` -> the sources that they work on."""
_OPTIONS = {"palette": "palettes", "classes": "classes", "expert": "expert", "password": "password", "min_score": "min_score"}
"""Flags of `tokenize` that only some datasets have a use for -> fields of `datasets.Options`."""


def check_fraction(fraction: float) -> None:
    """Refuses an --eval-fraction that is none."""
    if not 0 <= fraction <= 1:
        raise UserError(f"--eval-fraction {fraction:g} must be from 0 to 1")


@dataclass
class Tokenize:
    """Turn pairs of images into a token store, once, for any number of training runs.

    Give exactly one source: --dataset with --root, --manifest, --inputs with --outputs, --world, or --stores to make one of several.

    Examples:
      xprompt tokenize --list
      xprompt tokenize --model DIR --out data/gopro --dataset gopro --root ~/GoPro
      xprompt tokenize --model DIR --out data/rain --inputs rainy/ --outputs clean/ --task derain --instruction "remove the rain"
      xprompt tokenize --model DIR --out data/mine --manifest pairs.jsonl
      xprompt tokenize --model DIR --out data/world --world 2000 --photos ~/Pictures
      xprompt tokenize --out data/all --stores data/gopro data/rain data/mine

    A job that was stopped goes on where it was when the same command is given again. An array of jobs, each with a --shard of its own,
    makes the parts of one store:

      xprompt tokenize --model DIR --out data/laion --dataset laion_aesthetics --root ~/laion --shard $SLURM_ARRAY_TASK_ID/64
      xprompt tokenize --out data/laion --stores data/laion-*-of-00064
    """

    model: str = ""
    """Model whose image and text tokenizers to use: a folder, or org/name on the Hugging Face hub."""
    out: Path | None = None
    """The store's folder."""
    list: bool = False
    """Show the datasets that --dataset takes, with their layouts, counts, licences and sources."""
    dataset: str = ""
    """One of the known datasets (--list)."""
    root: Path | None = None
    """Folder of the dataset's copy."""
    split: str = ""
    """One split of the dataset; by default all that are there. What does not begin with "train" is marked for evaluation."""
    allow_partial: bool = False
    """Accept a copy with another number of pairs than the dataset has, with a warning."""
    palette: tuple[str, ...] = ("turbo",)
    """Colours of depth; of several, every picture gets one."""
    classes: Literal["max_separation", "painter"] = "max_separation"
    """Colours of ADE20K's classes: ours, far apart, or Painter's."""
    expert: Literal["a", "b", "c", "d", "e"] = "c"
    """Whose retouching of FiveK."""
    password: str = "MagicBrush"
    """Of MagicBrush's test archive."""
    min_score: float = 6.0
    """Least aesthetic score of LAION's pictures."""
    mirror: bool = False
    """Add every training pair of --dataset once more, mirrored; normals and the words left and right are turned around."""
    export: Path | None = None
    """Instead of a store, write a manifest and its images into this folder, for `xprompt annotate`; needs no --model."""
    manifest: Path | None = None
    """JSONL file, one pair a line: {"input": "a.png", "output": "b.png", "instruction": "..."} (see docs/data.md)."""
    inputs: Path | None = None
    """Folder of input images."""
    outputs: Path | None = None
    """Folder of output images; partners have the same name without extension."""
    rename: tuple[str, str] | None = None
    """Regular expression and replacement that turn an input's name into its output's, e.g. --rename rain- norain-."""
    task: str = "custom"
    """Name of the task of --inputs and --outputs."""
    instruction: str = ""
    """What the pairs of --inputs and --outputs do, in words."""
    reverse_instruction: str = ""
    """What they do backwards; empty: they are not trained backwards."""
    world: int | None = None
    """Number of rendered task groups to make."""
    photos: Path | None = None
    """Folder of photographs for the tasks of --world that work on any image."""
    stores: tuple[Path, ...] = ()
    """Finished stores of one model, to be one; an image that several hold is kept once."""
    shard: str = "0/1"
    """i/n, i from 0: the i-th of n parts alone, written to OUT-0000i-of-0000n; --stores joins them, in order, to one job's store."""
    crops: Literal[1, 2, 3, 4] = 1
    """Crops stored of every image, of which training draws one: the centre, and random windows, at one place in both images of a pair."""
    max_corrupt: float = 0.01
    """Pairs that may be unreadable: below 1 a fraction of all, else their number; skipped.jsonl lists them. 0 stops at the first."""
    eval_fraction: float = 0.05
    """Held out for evaluation, where the source does not say."""
    recipe: Literal["meta", "hf"] = "meta"
    """Preprocessing of images: Meta's own, or Hugging Face's, which flips some codes."""
    seed: int = 0
    """Of --world."""

    def run(self) -> None:
        """Prints the list, or writes the store."""
        if self.list:
            from xprompt_jax.data.datasets import table

            print(table())
            return
        sources_given = (self.dataset or self.root, self.manifest, self.inputs or self.outputs, self.stores or None)
        if sum(bool(s) for s in sources_given) + (self.world is not None) != 1:
            raise UserError(
                "give one source: --dataset NAME --root DIR, --manifest FILE, --inputs DIR --outputs DIR, --world NUMBER or --stores ..."
            )
        if (self.inputs is None) != (self.outputs is None):
            raise UserError("--inputs and --outputs belong together; give both")
        if bool(self.dataset) != (self.root is not None):
            raise UserError("--dataset and --root belong together; give both")
        self._check_flags()
        if self.export is not None:
            self._export(self.export)
            return
        if self.out is None:
            raise UserError("--out is missing: the store's folder")
        from xprompt_jax.files import real_folder

        real_folder(self.out)  # has a name
        if self.stores:
            from xprompt_jax.data.tokenise import merge

            store = merge(self.stores, self.out)
        else:
            store = self._tokenize(self.out)
        print(f"{store.folder}: {len(store.pairs)} pairs, {len(store.codes)} images")

    def _check_flags(self) -> None:
        """Refuses what the given source has no use for: a flag that is passed over is a wrong store."""
        source = next(name for name in _SOURCES if getattr(self, name) not in (None, "", ()))
        for field in dataclasses.fields(self):
            if field.name in _FLAGS and source not in _FLAGS[field.name] and getattr(self, field.name) != field.default:
                flag, right = field.name.replace("_", "-"), " or ".join(f"--{name}" for name in _FLAGS[field.name])
                raise UserError(f"--{flag} works on {right}, not on --{source}; leave it out")
        if self.seed < 0:
            raise UserError("--seed must not be negative")
        if not self.max_corrupt >= 0:
            raise UserError("--max-corrupt must not be negative")
        check_fraction(self.eval_fraction)
        if self.rename is not None:
            try:
                re.compile(self.rename[0]).sub(self.rename[1], "")
            except (re.error, IndexError) as e:
                raise UserError(f"--rename {' '.join(self.rename)}: no regular expression and its replacement ({e})") from None
        if self.export is not None and self.out is not None:
            raise UserError("--export writes a manifest, --out a store; give one of them")

    def _tokenize(self, out: Path) -> Store:
        if not self.model:
            raise UserError("--model is missing: a model's folder, or org/name on the Hugging Face hub")
        from xprompt_jax.convert.formats import open_source
        from xprompt_jax.convert.weights import load_vqgan, tokenizer_of
        from xprompt_jax.data import sources
        from xprompt_jax.data.tokenise import tokenize

        index, parts = self._shard()
        if parts > 1:
            out = out.with_name(f"{out.name}-{index:05d}-of-{parts:05d}")
        source = open_source(self.model)
        vqgan, tokenizer = load_vqgan(source), tokenizer_of(source)
        total = None
        records: Iterable[sources.Record]
        if self.dataset:
            records = self._pairs()
        elif self.manifest is not None:
            records = sources.ManifestRecords(self.manifest, eval_fraction=self.eval_fraction)
        elif self.inputs is not None and self.outputs is not None:
            records = list(sources.paired_folders(
                self.inputs, self.outputs, task=self.task, instruction=self.instruction,
                reverse_instruction=self.reverse_instruction, rename=self.rename, eval_fraction=self.eval_fraction,
            ))  # fmt: skip
        else:
            size = vqgan.config.image_size
            photos = sources.photographs(self.photos, size) if self.photos else []
            groups, pairs = self.world or 0, 4
            total = groups * pairs
            records = sources.world_pairs(
                groups=groups, pairs_per_group=pairs, size=size, seed=self.seed, photos=photos, eval_fraction=self.eval_fraction
            )
        return tokenize(
            records, vqgan, tokenizer, out, recipe=self.recipe, crops=self.crops, shard=(index, parts), max_corrupt=self.max_corrupt,
            job=self._job(), total=total,
        )  # fmt: skip

    def _shard(self) -> tuple[int, int]:
        match = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        index, parts = (int(match[1]), int(match[2])) if match else (0, 0)
        if not index < parts:
            raise UserError(f"--shard {self.shard}: give i/n with i from 0 to n-1, as 3/64")
        return index, parts

    def _job(self) -> dict[str, str]:
        """What decides which records there are, so that a stopped job does not go on with others."""
        apart = {"model", "out", "list", "export", "stores", "shard", "max_corrupt", "recipe", "crops", "allow_partial"}
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in apart}
        job = {name: str(value) for name, value in given.items() if value not in (None, "", ())}
        if self.manifest is not None:
            with self.manifest.open("rb") as file:
                job["manifest_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return job

    def _pairs(self):
        """The pairs of --dataset."""
        from xprompt_jax.data.datasets import DATASETS, Options, get_dataset
        from xprompt_jax.data.flips import Mirrored
        from xprompt_jax.data.palettes import get_palette

        for name in self.palette:
            get_palette(name)
        dataset = get_dataset(self.dataset)
        for flag, option in _OPTIONS.items():
            if getattr(self, flag) != type(self).__dataclass_fields__[flag].default and option not in dataset.options:
                right = ", ".join(other.name for other in DATASETS.values() if option in other.options)
                raise UserError(f"--{flag.replace('_', '-')} works on {right}, not on {self.dataset}; leave it out")
        options = Options(
            palettes=self.palette, classes=self.classes, expert=self.expert, password=self.password, min_score=self.min_score,
            eval_fraction=self.eval_fraction,
        )  # fmt: skip
        pairs = dataset.open(self.root or "", self.split, options=options, allow_partial=self.allow_partial)
        return Mirrored(pairs) if self.mirror else pairs

    def _export(self, folder: Path) -> None:
        if not self.dataset:
            raise UserError("--export writes out a --dataset; the other sources are files already")
        from xprompt_jax.data.datasets.export import export

        print(f"{folder / 'pairs.jsonl'}: {export(self._pairs(), folder)} pairs")


@dataclass
class Annotate:
    """Ask a vision-language model for the words that image pairs lack: difference descriptions, reverse instructions, captions, filters.

    Answers gather in --out, which only grows; what has an answer is never asked again, so the same command goes on after a stop.
    --merge-into then writes a manifest with the words in it. A key is taken from the environment variable XPROMPT_API_KEY.

    Examples:
      xprompt annotate --manifest pairs.jsonl --out answers.jsonl --kind describe --endpoint http://localhost:8000/v1 --model qwen2.5-vl
      xprompt annotate --manifest pairs.jsonl --out answers.jsonl --kind reverse --model qwen2.5-vl --batch-out batch.jsonl
      xprompt annotate --manifest pairs.jsonl --out answers.jsonl --kind reverse --batch-in batch-answers.jsonl
      xprompt annotate --manifest pairs.jsonl --out answers.jsonl --merge-into annotated.jsonl
    """

    manifest: Path
    """JSONL file of pairs (see docs/data.md)."""
    out: Path
    """JSONL file of answers; several kinds may share it."""
    kind: Literal["describe", "reverse", "caption", "relation", "style_same", "layout_same", "holdout"] | None = None
    """What to ask; without it, nothing is asked and --merge-into takes what is there."""
    endpoint: str = ""
    """OpenAI-compatible address of the model, up to /v1."""
    model: str = ""
    """Name by which the endpoint knows its model."""
    rewrite: bool = False
    """Ask about rows too that have the words already, and put the answers in their place."""
    concurrency: int = 8
    """Requests under way at once."""
    dry_run: bool = False
    """Show the first requests and how many there are; send nothing."""
    batch_out: Path | None = None
    """Write the requests as batch files there instead of sending them."""
    batch_in: tuple[Path, ...] = ()
    """Take the answers from a batch's output and error files."""
    merge_into: Path | None = None
    """Manifest to write, with the answers in it: words fill empty fields, a "no" of a filter drops the row."""

    def run(self) -> None:
        """Asks, or merges, or both."""
        if self.kind is None and self.merge_into is None:
            raise UserError("give --kind to ask, or --merge-into FILE to write the answers into a manifest")
        if self.kind is None and (self.endpoint or self.dry_run or self.batch_out or self.batch_in):
            raise UserError("--kind is missing: say what is asked")
        if self.merge_into and (self.dry_run or self.batch_out):
            raise UserError("--merge-into needs answers; leave it out with --dry-run and --batch-out")
        from xprompt_jax.data.annotate import annotate_manifest, merge

        if self.kind is not None:
            annotate_manifest(
                self.manifest, self.out, kind=self.kind, endpoint=self.endpoint, model=self.model, concurrency=self.concurrency,
                dry_run=self.dry_run, batch_out=self.batch_out, batch_in=self.batch_in, rewrite=self.rewrite,
            )  # fmt: skip
        if self.merge_into is not None:
            merged = merge(self.manifest, self.out, self.merge_into, rewrite=self.rewrite)
            print(f"{self.merge_into}: {merged.rows} rows, {merged.filled} with new words, {merged.dropped} dropped")


@dataclass
class Index:
    """Find the nearest instructions of every pair, for retrieval of examples (RAIE).

    The index serves two ends: `xprompt compile --index` finds the example of an instruction in it, and it lists for each pair the
    training pairs with the nearest instructions, never itself nor (--exclude) a pair that shares an image with it.

    Examples:
      xprompt index --data edits.jsonl --out edits.index
      xprompt index --data edits.jsonl --out edits.index --encoder clip --clip openai/clip-vit-base-patch32
    """

    data: Path
    """A manifest (JSONL) or a token store. A store's pairs have the order of the manifest it was made from: one index serves both."""
    out: Path
    """The index, a folder: neighbours.parquet, and the instructions' features."""
    neighbours: int = 8
    """Nearest pairs to list for each pair."""
    encoder: Literal["hashed", "clip"] = "hashed"
    """What makes instructions near: shared words and letters, which needs no weights, or CLIP's text features, as in the paper."""
    clip: Path | None = None
    """CLIP's weights and tokenizer, for --encoder clip: a folder, or org/name on the Hugging Face hub (openai/clip-vit-base-patch32)."""
    eval_fraction: float = 0.05
    """Held out of a manifest without splits, as by `xprompt tokenize`; what is held out is nobody's neighbour."""
    exclude: Literal["row", "image", "session"] = "session"
    """What is never a pair's neighbour: itself, as in the paper; what shares an image with it; or does so through other pairs too, as the
    turns of one edited picture do."""
    seed: int = 0
    """Chooses among pairs whose instructions are equally near."""

    def run(self) -> None:
        """Writes the index."""
        if self.neighbours < 1:
            raise UserError("--neighbours must be at least 1")
        if self.seed < 0:
            raise UserError("--seed must not be negative")
        if (self.encoder == "clip") != (self.clip is not None):
            raise UserError("--encoder clip and --clip DIR belong together; give both")
        check_fraction(self.eval_fraction)
        from xprompt_jax.data.retrieval import PLACE, build_index
        from xprompt_jax.files import check_place

        check_place(self.out, *PLACE)
        encoder = None
        if self.clip is not None:
            from xprompt_jax.vision.clip import CLIP

            encoder = CLIP.load(self.clip)
        index = build_index(
            self.data, k=self.neighbours, eval_fraction=self.eval_fraction, seed=self.seed, encoder=encoder, exclude=self.exclude
        )
        index.save(self.out)
        short = int((index.neighbours < 0).any(axis=1).sum())
        counts = f"{len(index.neighbours)} pairs, {len(index.features)} instructions of training pairs, {self.neighbours} neighbours each"
        print(f"{self.out}: {counts}" + (f"; {short} pairs have fewer" if short else ""))
