"""`xprompt sample` and `describe`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from xprompt_jax.commands.sampling import SamplingFlags
from xprompt_jax.errors import UserError


@dataclass
class Sample(SamplingFlags):
    """Draw images: do to each input what a compiled prompt shows, or draw texts.

    Examples:
      xprompt sample --model demo/model --task derain.xprompt --inputs rainy/*.png --out drawn/
      xprompt sample --model demo/model --texts "a red sphere on a grey floor" --out drawn/
    """

    model: str
    """Model folder, or org/name on the Hugging Face hub."""
    out: Path
    """Folder for the PNG files."""
    task: Path | None = None
    """Compiled prompt, made by `xprompt compile`."""
    inputs: tuple[Path, ...] = ()
    """Images to work on."""
    texts: tuple[str, ...] = ()
    """Texts to draw instead."""
    instruction: str | None = None
    """Overrides the compiled prompt's instruction."""
    seed: int = 0
    """The same seed draws the same images, whatever else is drawn beside them."""
    num_images: int = 1
    """Images for each input or text."""

    def run(self) -> None:
        """Writes the images."""
        if bool(self.texts) == bool(self.inputs):
            raise UserError("give --inputs with --task, or --texts")
        if self.inputs and self.task is None:
            raise UserError("--inputs needs --task FILE; make one with `xprompt compile`")
        from xprompt_jax import CompiledPrompt, XPrompt
        from xprompt_jax.data.images import open_image, save_png

        images = [open_image(path) for path in self.inputs]  # a bad file is named before the model is loaded
        model = XPrompt.from_pretrained(self.model)
        options = self.sampling() | {"seed": self.seed, "num_images": self.num_images, "progress": True}
        if self.task is not None and images:
            drawn = model.generate(CompiledPrompt.load(self.task), images, self.instruction, **options)
            names = [f"{i:04d}-{path.stem}" for i, path in enumerate(self.inputs)]
        else:
            drawn = model.text_to_image(self.texts, **options)
            names = [f"{i:04d}" for i in range(len(self.texts))]
        for i, image in enumerate(drawn):
            part = f"-{i % self.num_images}" if self.num_images > 1 else ""
            save_png(image, self.out / f"{names[i // self.num_images]}{part}.png")
        print(f"{self.out}: {len(drawn)} image(s)")


@dataclass
class Describe:
    """Say in words what changes from one image to another.

    Example: xprompt describe --model demo/model --input before.png --output after.png
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

        pair = Example(open_image(self.input), open_image(self.output))
        model = XPrompt.from_pretrained(self.model)
        print(model.describe([pair], seed=self.seed, temperature=self.temperature))
