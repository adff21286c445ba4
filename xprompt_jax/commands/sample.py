"""`xprompt sample` and `describe`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xprompt_jax.commands.sampling import PrecisionFlags, SamplingFlags
from xprompt_jax.errors import UserError


@dataclass
class Sample(PrecisionFlags, SamplingFlags):
    """Draw images: do to each input what a compiled prompt or an example pair shows, or draw texts.

    OUT gets the images, named by their inputs, samples.jsonl (a line for each: input, task, seed, settings), errors.jsonl (inputs that
    could not be used) and contact.png. A run goes on after a bad input, and started again it draws only what is missing.

    Examples:
      xprompt sample --model mini --task derain.xprompt --inputs rainy/ --out drawn/
      xprompt sample --model mini --example before.png after.png --instruction "remove the rain" --inputs a.png b.png --out drawn/
      xprompt sample --model mini --texts "a red sphere on a grey floor" --out drawn/
    """

    model: str
    """Model folder, or org/name on the Hugging Face hub."""
    out: Path
    """Folder for the images."""
    task: Path | None = None
    """Compiled prompt, made by `xprompt compile`."""
    example: tuple[Path, ...] = ()
    """BEFORE AFTER, an example pair to compile on the way in place of --task; several pairs one after the other."""
    inputs: tuple[Path, ...] = ()
    """Images, folders of images, and .jsonl manifests: {"input": path}, perhaps with "instruction", "task", "seed", "name"."""
    texts: tuple[str, ...] = ()
    """Texts to draw instead."""
    instruction: str | None = None
    """Overrides the compiled prompt's instruction; with --example, what the example does."""
    seed: int = 0
    """The same seed draws the same images, whatever else is drawn beside them."""
    num_images: int = 1
    """Images for each input or text."""
    overwrite: bool = False
    """Draw again what OUT holds; needed when settings have changed."""

    def run(self) -> None:
        """Writes the images."""
        if bool(self.texts) == bool(self.inputs):
            raise UserError("give --inputs with --task, or --texts")
        if self.task is not None and self.example:
            raise UserError("give --task or --example, not both")
        if self.texts and (self.task is not None or self.example or self.instruction is not None):
            raise UserError("--texts are drawn without an example: leave out --task, --example and --instruction")
        if len(self.example) % 2:
            raise UserError(f"--example takes pairs BEFORE AFTER, and {self.example[-1]} has no output; give its output too")
        if self.num_images < 1:
            raise UserError("--num-images must be at least 1")
        sampling = self.sampling()
        from xprompt_jax import XPrompt
        from xprompt_jax.sample.arguments import seed_of
        from xprompt_jax.sample.batch import draw_folder
        from xprompt_jax.sample.requests import Request, Task, find_requests

        seed_of(self.seed, "--seed")
        requests = find_requests(self.inputs, self.out)  # mistakes are named before the model is loaded
        requests += [Request(f"{i:04d}", None, instruction=text) for i, text in enumerate(self.texts)]
        if self.inputs and self.task is None and not self.example and any(r.task is None for r in requests):
            raise UserError("--inputs needs --task FILE (make one with `xprompt compile`) or --example BEFORE AFTER")
        task = Task.load(self.task) if self.task else None
        model = XPrompt.from_pretrained(self.model, **self.precision())
        if self.example:
            task = Task.of_examples(model, self.example, self.instruction or "")
        done = draw_folder(
            model, requests, self.out, task=task, instruction=self.instruction, seed=self.seed, num_images=self.num_images,
            sampling=sampling, overwrite=self.overwrite,
        )  # fmt: skip
        print(f"{self.out}: {done.drawn} image(s) drawn, {done.kept} kept")
        if done.failed:
            raise UserError(f"{done.failed} of {len(requests)} inputs could not be used; see {self.out / 'errors.jsonl'}, correct them "
                            "and run again")  # fmt: skip


@dataclass
class Describe:
    """Say in words what changes from one image to another.

    Example: xprompt describe --model mini --input before.png --output after.png
    """

    model: str
    """Model folder, or org/name on the Hugging Face hub."""
    input: Path
    """The first image."""
    output: Path
    """The second image."""
    seed: int = 0
    """Of the words, when the temperature is above 0."""
    temperature: float = 0.0
    """0 takes the most likely words."""

    def run(self) -> None:
        """Prints the description."""
        from xprompt_jax import Example, XPrompt
        from xprompt_jax.data.images import open_image
        from xprompt_jax.sample.arguments import seed_of

        seed_of(self.seed, "--seed")
        pair = Example(open_image(self.input), open_image(self.output))
        model = XPrompt.from_pretrained(self.model)
        print(model.describe([pair], seed=self.seed, temperature=self.temperature))
