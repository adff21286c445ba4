"""`xprompt convert` and `compile`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xprompt_jax.errors import UserError

if TYPE_CHECKING:
    from xprompt_jax import Example


@dataclass
class Convert:
    """Convert a model between our format, Hugging Face's and Meta's, exactly, in little memory; a killed run goes on.

    Examples:
      xprompt convert --source leloy/Anole-7b-v0.1-hf --out models/anole-7b
      xprompt convert --source chameleon/data/models/7b --out models/chameleon-7b --verify
      xprompt convert --source runs/rain/model --out export/hf --to huggingface --dtype bfloat16
    """

    source: str
    """Model folder (ours, Hugging Face safetensors, or Meta's consolidated*.pth), or org/name on the Hugging Face hub."""
    out: Path
    """Folder to write; must not exist, unless --verify is to check it."""
    to: Literal["xprompt", "huggingface", "meta"] = "xprompt"
    """Format to write."""
    verify: bool = False
    """Compare every tensor afterwards, and logits with Hugging Face's model where torch is installed; writes certificate.json."""
    dtype: Literal["keep", "float32", "bfloat16", "float16"] = "keep"
    """Type of the decoder's weights; the image tokenizer keeps its own."""
    image_head: Literal["auto", "keep", "zero", "he"] = "auto"
    """Head rows of the image codes. auto: keep those of models trained to draw, zero the released ones, which cannot."""
    layout: Literal["plain", "lumina"] | None = None
    """How the model frames images; by default Lumina-mGPT's folders are lumina, all others plain unless they say."""
    num_xp_tokens: int = 64
    """XP tokens to add to a model that has none."""
    vqgan: Path | None = None
    """The image tokenizer (vqgan.ckpt, or safetensors with its names), where the source has no complete one."""
    tokenizer: Path | None = None
    """A text_tokenizer.json in place of the source's own."""
    format: Literal["xprompt", "huggingface", "meta"] | None = None
    """Which format to read, where a folder holds several."""
    shards: int = 0
    """Files of a Meta folder (tensor-parallel ranks); 0 takes the fewest that hold the weights exactly."""
    seed: int = 0
    """Of new XP embeddings and of --image-head he."""

    def run(self) -> None:
        """Writes the folder."""
        if self.num_xp_tokens < 1:
            raise UserError("--num-xp-tokens must be at least 1")
        if self.shards < 0 or (self.shards and self.to != "meta"):
            raise UserError("--shards is the number of files of a Meta folder: give 1 or more, with --to meta")
        if self.seed < 0:
            raise UserError("--seed must not be negative")
        from xprompt_jax.convert.convert import Options, convert
        from xprompt_jax.convert.formats import open_source
        from xprompt_jax.convert.verify import verify

        source = open_source(
            self.source, num_xp_tokens=self.num_xp_tokens, vqgan=self.vqgan, tokenizer=self.tokenizer, format=self.format,
            layout=self.layout,
        )  # fmt: skip
        options = Options(dtype=self.dtype, image_head=self.image_head, seed=self.seed, to=self.to, shards=self.shards)
        if not (self.verify and self.out.exists()):
            convert(source, self.out, options)
        print(f"{self.out}: {self.to} model")
        if self.verify:
            proof = verify(source, self.out, options)
            tensors, logits = proof["tensors"], proof["logits"]
            print(f"{tensors['identical']} of {tensors['tensors']} tensors identical to the last bit")
            if isinstance(logits, dict):
                print(f"logits beside Hugging Face's: max difference {logits['max_abs']:.1e} ({logits['max_rel']:.1e} relative), "
                      f"KL {logits['kl']:.1e} nats")  # fmt: skip


@dataclass
class Compile:
    """Turn example pairs into a small file that does the same to any image.

    The pairs are given, or retrieved: those of an index whose instructions are nearest to --instruction.

    Examples:
      xprompt compile --model mini --inputs before.png --outputs after.png --instruction "remove the rain" --out derain.xprompt
      xprompt compile --model mini --index edits.index --instruction "make it night" --out night.xprompt
    """

    model: str
    """Model folder, or org/name on the Hugging Face hub."""
    out: Path
    """The compiled prompt to write."""
    inputs: tuple[Path, ...] = ()
    """Example input images."""
    outputs: tuple[Path, ...] = ()
    """Their outputs, in the same order."""
    instruction: str = ""
    """What the examples do, in words; may be empty unless they are retrieved."""
    index: Path | None = None
    """An index of a manifest, made by `xprompt index`, to take the examples from."""
    examples: int = 1
    """How many to take from --index."""
    clip: Path | None = None
    """The CLIP that --index was made with, where it was made with one."""

    def run(self) -> None:
        """Writes the compiled prompt."""
        if len(self.inputs) != len(self.outputs):
            raise UserError(f"--inputs has {len(self.inputs)} images and --outputs {len(self.outputs)}; give one output for each input")
        if bool(self.inputs) == (self.index is not None):
            raise UserError("give --inputs and --outputs, or --index FILE with --instruction")
        if self.examples < 1:
            raise UserError("--examples must be at least 1")
        if self.clip is not None and self.index is None:
            raise UserError("--clip is the encoder of --index; give that too")
        if self.index is not None and not self.instruction:
            raise UserError("--index needs --instruction: it finds the pairs whose instructions are nearest")
        from xprompt_jax import Example, XPrompt
        from xprompt_jax.files import real_folder

        real_folder(self.out)  # has a name
        if self.index is not None:
            pairs = self._retrieve(self.index)
        else:
            pairs = [Example(a, b, self.instruction) for a, b in zip(self.inputs, self.outputs, strict=True)]
        model = XPrompt.from_pretrained(self.model)
        task = model.compile(pairs)
        dataclasses.replace(task, instruction=self.instruction).save(self.out)
        print(f"{self.out}: {len(pairs)} example(s), {self.out.stat().st_size / 2**20:.2f} MiB")

    def _retrieve(self, path: Path) -> list[Example]:
        from xprompt_jax import Example
        from xprompt_jax.data.retrieval import RetrievalIndex

        encoder = None
        if self.clip is not None:
            from xprompt_jax.vision.clip import CLIP

            encoder = CLIP.load(self.clip)
        found = RetrievalIndex.load(path).retrieve(self.instruction, self.examples, encoder=encoder)
        for record, cosine in found:
            print(f"{record.input} -> {record.output}: {record.instruction!r}, cosine {cosine:.2f}")
        return [Example(record.input, record.output, record.instruction) for record, _ in found]
