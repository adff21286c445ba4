"""`xprompt tokenize`, `annotate` and `index`: pairs of images before training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xprompt_jax.errors import UserError


@dataclass
class Tokenize:
    """Turn pairs of images into a token store, once, for any number of training runs.

    Give exactly one source: --manifest, --inputs with --outputs, or --world.

    Examples:
      xprompt tokenize --model demo/model --out data/rain --inputs rainy/ --outputs clean/ --task derain --instruction "remove the rain"
      xprompt tokenize --model demo/model --out data/mine --manifest pairs.jsonl
      xprompt tokenize --model demo/model --out data/world --world 2000 --photos ~/Pictures
    """

    model: str
    """Model whose image and text tokenizers to use: a folder, or org/name on the Hugging Face hub."""
    out: Path
    """The store's folder."""
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
    eval_fraction: float = 0.05
    """Held out for evaluation."""
    recipe: Literal["meta", "hf"] = "meta"
    """Preprocessing of images: Meta's own, or Hugging Face's, which flips some codes."""
    seed: int = 0
    """Of --world."""

    def run(self) -> None:
        """Writes the store."""
        if sum(s is not None for s in (self.manifest, self.inputs or self.outputs, self.world)) != 1:
            raise UserError("give one source: --manifest FILE, --inputs DIR --outputs DIR, or --world NUMBER")
        if (self.inputs is None) != (self.outputs is None):
            raise UserError("--inputs and --outputs belong together; give both")
        from xprompt_jax.convert.formats import open_source
        from xprompt_jax.convert.weights import load_vqgan, tokenizer_of
        from xprompt_jax.data import sources
        from xprompt_jax.data.tokenise import tokenize

        source = open_source(self.model)
        vqgan, tokenizer = load_vqgan(source), tokenizer_of(source)
        if self.manifest is not None:
            records = sources.manifest(self.manifest, eval_fraction=self.eval_fraction)
        elif self.inputs is not None and self.outputs is not None:
            records = sources.paired_folders(
                self.inputs, self.outputs, task=self.task, instruction=self.instruction,
                reverse_instruction=self.reverse_instruction, rename=self.rename, eval_fraction=self.eval_fraction,
            )  # fmt: skip
        else:
            size = vqgan.config.image_size
            photos = sources.photographs(self.photos, size) if self.photos else []
            records = sources.world_pairs(
                groups=self.world or 0, pairs_per_group=4, size=size, seed=self.seed, photos=photos, eval_fraction=self.eval_fraction
            )
        store = tokenize(records, vqgan, tokenizer, self.out, recipe=self.recipe)
        print(f"{self.out}: {len(store.pairs)} pairs, {len(store.codes)} images")


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
                dry_run=self.dry_run, batch_out=self.batch_out, batch_in=self.batch_in,
            )  # fmt: skip
        if self.merge_into is not None:
            merged = merge(self.manifest, self.out, self.merge_into)
            print(f"{self.merge_into}: {merged.rows} rows, {merged.filled} with new words, {merged.dropped} dropped")


@dataclass
class Index:
    """Find the nearest instructions of every pair, for retrieval of examples (RAIE).

    The file serves two ends: `xprompt compile --index` finds the example of an instruction in it, and it lists for each pair the
    training pairs with the nearest instructions, never itself nor a pair that shares an image with it.

    Example: xprompt index --data edits.jsonl --out edits.index
    """

    data: Path
    """A manifest (JSONL) or a token store. A store's pairs have the order of the manifest it was made from: one index serves both."""
    out: Path
    """The index file."""
    neighbours: int = 8
    """Nearest pairs to list for each pair."""
    eval_fraction: float = 0.05
    """Held out of a manifest without splits, as by `xprompt tokenize`; what is held out is nobody's neighbour."""
    seed: int = 0
    """Chooses among pairs whose instructions are equally near."""

    def run(self) -> None:
        """Writes the index."""
        if self.neighbours < 1:
            raise UserError("--neighbours must be at least 1")
        from xprompt_jax.data.retrieval import build_index

        index = build_index(self.data, k=self.neighbours, eval_fraction=self.eval_fraction, seed=self.seed)
        index.save(self.out)
        short = int((index.neighbours < 0).any(axis=1).sum())
        counts = f"{len(index.neighbours)} pairs, {len(index.features)} instructions of training pairs, {self.neighbours} neighbours each"
        print(f"{self.out}: {counts}" + (f"; {short} pairs have fewer" if short else ""))
