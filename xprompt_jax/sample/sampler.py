"""The Python API: a model, its tokenizers, and what a person does with them.

model = XPrompt.from_pretrained(folder)
task  = model.compile([Example(input=before, output=after, instruction="remove the rain")])
out   = model.generate(task, inputs=[photo])
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from flax import nnx

from xprompt_jax.config import ComputeConfig, ModelConfig
from xprompt_jax.data.images import Recipe, open_image, postprocess, preprocess
from xprompt_jax.errors import UserError
from xprompt_jax.model.chameleon import Chameleon, restacked, unstacked
from xprompt_jax.model.params import flatten
from xprompt_jax.model.quantize import Int8
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.prompt import DESCRIBE_QUESTION, Prompter, Sample, SlotShape, fill, stack
from xprompt_jax.sample.arguments import check_list, check_text, check_tokenizer, whole
from xprompt_jax.sample.compiled import CompiledPrompt
from xprompt_jax.sample.defaults import defaults as settings
from xprompt_jax.sample.defaults import override
from xprompt_jax.sample.draw import MAX_BATCH as MAX_BATCH
from xprompt_jax.sample.draw import draw
from xprompt_jax.sample.example import Example as Example
from xprompt_jax.sample.example import ImageLike
from xprompt_jax.sample.guidance import Guidance
from xprompt_jax.sample.logits import Sampling
from xprompt_jax.sample.oracle import check_slots
from xprompt_jax.sample.prefill import PROMPT_STEP, check_room, round_up
from xprompt_jax.sample.thumbnails import thumbnail
from xprompt_jax.sample.write import answers, mixed, write
from xprompt_jax.tokens import Layout, Tokenizer

if TYPE_CHECKING:
    from xprompt_jax.data.retrieval import Encoder, RetrievalIndex

log = logging.getLogger(__name__)


class XPrompt:
    """A decoder with its image and text tokenizers, ready to draw and to write."""

    # Models of one shape share their programs.
    _encode, _decode = staticmethod(jax.jit(VQGAN.encode)), staticmethod(jax.jit(VQGAN.decode))
    _compiled_examples = staticmethod(jax.jit(Chameleon.encode_examples, static_argnames=("shape", "compute")))
    _logits = staticmethod(jax.jit(Chameleon.logits, static_argnames=("compute",)))

    def __init__(
        self, decoder: Chameleon, vqgan: VQGAN, tokenizer: Tokenizer, *, compute: ComputeConfig | None = None, cache: str = "float"
    ):  # fmt: skip
        self.config: ModelConfig = decoder.config
        self.compute = compute or ComputeConfig(dtype="float32")
        if cache not in ("float", "int8"):
            raise UserError(f"cache {cache!r} is unknown; use float or int8")
        self.cache_dtype = "int8" if cache == "int8" else self.compute.dtype
        # The one copy of the weights that is kept, as decoding reads it.
        self.layers_apart = decoder if isinstance(decoder.blocks, nnx.List) else jax.jit(unstacked)(decoder)
        self.vqgan, self.tokenizer = vqgan, tokenizer
        check_tokenizer(tokenizer.vocab, self.config)
        self.prompter = Prompter(tokenizer, Layout(self.config.layout, tokenizer.vocab, self.config.vq.downsample))

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, compute: ComputeConfig | None = None, mesh: Any = None, dtype: Any = None, **options: Any
    ) -> XPrompt:  # fmt: skip
        """Loads a model folder or a hub name; see `sample.pretrained.load`, also for weights and cache of int8."""
        from xprompt_jax.sample.pretrained import load

        return load(model, compute=compute, mesh=mesh, dtype=dtype, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that `from_pretrained` reads."""
        from xprompt_jax.sample.pretrained import save

        save(self, folder)

    @property
    def xp_embeddings(self) -> jax.Array:
        """[S, D]."""
        return self.layers_apart.xp[...]

    @property
    def precision(self) -> dict[str, str]:
        """What images depend on besides the weights' values: types of the computation, of the weights and of the cache."""
        weights = "int8" if isinstance(self.layers_apart.head[...], Int8) else "float"
        return {"compute": self.compute.dtype, "weights": weights, "cache": self.cache_dtype}

    @property
    def decoder(self) -> Chameleon:
        """The decoder with its layers stacked, as training has it: made anew, a second copy of the layers for as long as it is held."""
        return restacked(self.layers_apart)

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the configuration, the weights or the tokenizer."""
        from xprompt_jax.sample.pretrained import fingerprint

        return fingerprint(self.config, flatten(self.layers_apart), self.tokenizer)

    @functools.cached_property
    def image_head(self) -> jax.Array | Int8:
        """[D, codes], the head's columns of the image codes."""
        v = self.tokenizer.vocab
        head = self.layers_apart.head[...][:, v.image_start : v.image_start + v.num_codes]
        if not any(jnp.any(part) for part in jax.tree.leaves(head)):
            log.warning("the head's rows for image codes are all zero (released Chameleon models cannot draw): every image will be noise; "
                        "train it, or load a fork that draws")  # fmt: skip
        return head if isinstance(head, Int8) else head.astype(self.compute.dtype)

    # --- images and codes

    def encode_images(self, images: Sequence[ImageLike], recipe: Recipe = "meta") -> np.ndarray:
        """Images -> int32 [n, grid, grid] codes, after the recipe's resize and centre crop (data/images.py).

        One image at a time: memory does not grow with their number, and no code depends on the other images. What is codes
        already (int32 [grid, grid]) is passed through.

        Raises:
          UserError: an image cannot be read, or the recipe is unknown.
        """
        codes = np.zeros((len(images), self.config.vq.grid, self.config.vq.grid), np.int32)
        for i, image in enumerate(images):
            if self._is_codes(image):
                codes[i] = image
                continue
            pixels = preprocess(open_image(image, recipe), self.config.vq.image_size, recipe)
            codes[i] = np.asarray(self._encode(self.vqgan, pixels[None]))[0]
        return codes

    def decode_images(self, codes: np.ndarray) -> list[PIL.Image.Image]:
        """int32 [n, rows, columns] codes -> PIL images of any proportions, one at a time.

        Raises:
          UserError: not codes of this VQGAN.
        """
        codes, num_codes = np.asarray(codes), self.config.vq.num_codes
        if codes.ndim != 3 or codes.dtype.kind not in "iu" or ((codes < 0) | (codes >= num_codes)).any():
            raise UserError(f"decode_images: codes must be int [n, rows, columns] in 0..{num_codes - 1}, not vocabulary ids")
        return [PIL.Image.fromarray(postprocess(np.asarray(self._decode(self.vqgan, c[None]))[0])) for c in codes]

    def _is_codes(self, image: ImageLike) -> bool:
        grid = self.config.vq.grid
        return isinstance(image, np.ndarray) and image.dtype == np.int32 and image.shape == (grid, grid)

    def _open(self, image: ImageLike) -> PIL.Image.Image:
        return self.decode_images(image[None])[0] if self._is_codes(image) else open_image(image)

    # --- examples

    def compile(self, examples: Sequence[Example]) -> CompiledPrompt:
        """Encodes examples into XP tokens, each on its own; nothing else of them is needed to run the task.

        Raises:
          UserError: no example, an image that cannot be read, or an instruction too long.
        """
        check_list(examples, "compile", "example")
        if not all(isinstance(e, Example) for e in examples):
            raise UserError("compile takes a list of Example(input, output, instruction); CompiledPrompt.load reads a .xprompt file")
        codes = self.encode_images([image for e in examples for image in (e.input, e.output)])
        tokens = [self.prompter.example(e.instruction, codes[2 * i], codes[2 * i + 1]) for i, e in enumerate(examples)]
        check_room(max(map(len, tokens)), self.config.num_xp_tokens)
        return dataclasses.replace(
            self._compile_tokens(tokens), instruction=examples[0].instruction,
            thumbnails=tuple(thumbnail(self._open(e.input), self._open(e.output)) for e in examples),
        )  # fmt: skip

    def _compile_tokens(self, examples: Sequence[np.ndarray]) -> CompiledPrompt:
        vocab = self.tokenizer.vocab
        context = round_up(max(len(e) for e in examples), PROMPT_STEP)
        shape = SlotShape(1, context, self.config.num_xp_tokens, 0)
        nothing = np.zeros(0, np.int32)
        rows = [fill(Sample((e,), nothing, nothing), shape, bos=vocab.bos, pad=vocab.pad) for e in examples]
        batch = stack(rows, 1)
        k, v = self._compiled_examples(self.layers_apart, batch["ids"], batch["positions"], shape, batch["example_lengths"], self.compute)
        return CompiledPrompt(np.asarray(k).swapaxes(0, 1), np.asarray(v).swapaxes(0, 1), batch["example_lengths"][:, 0], self.fingerprint,
                              self.tokenizer.fingerprint)  # fmt: skip

    @functools.cached_property
    def _no_example(self) -> CompiledPrompt:
        """What XP tokens say when they have seen nothing: the branch that guidance moves away from."""
        return self._compile_tokens([np.zeros(0, np.int32)])

    def _contexts(self, task, count: int) -> list[CompiledPrompt]:
        if isinstance(task, str | Path):
            raise UserError(f"{task}: a name is no task; give CompiledPrompt.load({str(task)!r}), or a list of Example")
        if isinstance(task, Example):
            raise UserError("an Example is no task; put it into [ ]")
        if isinstance(task, CompiledPrompt):
            contexts = [task] * count
        elif task and all(isinstance(t, CompiledPrompt) for t in task):
            if len(task) != count:
                raise UserError(f"{len(task)} compiled prompts for {count} inputs; give one for all, or one for each")
            contexts = list(task)
        else:
            contexts = [self.compile(task)] * count
        for context in contexts:
            context.check(self)
        return contexts

    # --- drawing

    def generate(
        self, task: CompiledPrompt | Sequence[CompiledPrompt] | Sequence[Example] | None, inputs: Sequence[ImageLike],
        instruction: str | None = None, *, retrieve_from: RetrievalIndex | None = None, encoder: Encoder | None = None, seed: int = 0,
        num_images: int = 1, first_image: int = 0, defaults: str = "plain", guidance: float | Guidance | None = None,
        temperature: float | None = None, top_k: int | None = None, top_p: float | None = None, decoding: str = "jacobi",
        window: int = 16, progress: bool = False,
    ) -> list[PIL.Image.Image]:  # fmt: skip
        """Does to each input what the example shows.

        Args:
          task: one compiled prompt for all inputs, one for each input, or examples (compiled on the way).
          inputs: images.
          instruction: of the task; None takes the example's.
          retrieve_from, encoder: in place of a task (None), an index whose nearest pair to the instruction is the example, and the
            encoder it was made with, if not the default one.
          seed: image j of every input depends on (seed, j) and its prompt alone, not on the batch.
          num_images: images per input.
          first_image: number of the first of them: 16 goes on where `num_images` of 16 ended.
          defaults: name of the settings that stand where an argument is None; see sample/defaults.py.
          guidance: scale on the example, or a `Guidance`.
          temperature, top_k, top_p: see `Sampling`.
          decoding: "jacobi" (parallel, the same images as one by one), "speculative" (parallel, fewer passes; images depend
            on the window, their distribution does not) or "sequential" (one token at a time).
          window: tokens per pass of the parallel ones.

        Returns:
          PIL images, all of the first input first.

        Raises:
          UserError: an unreadable input, a compiled prompt of another model, an unknown name, a number out of its range, a
            prompt too long, a model whose logits are no numbers.
        """
        if retrieve_from is not None:
            if task is not None or not instruction:
                raise UserError("retrieve_from finds the example by the instruction: give an instruction, and None for the task")
            ((found, _),) = retrieve_from.retrieve(instruction, encoder=encoder)
            task = [Example(found.input, found.output, found.instruction)]
        *_, images = self.stream(
            task, inputs, instruction, seed=seed, num_images=num_images, first_image=first_image, defaults=defaults, guidance=guidance,
            temperature=temperature, top_k=top_k, top_p=top_p, decoding=decoding, window=window, progress=progress, partial=False,
        )  # fmt: skip
        return images

    def stream(
        self, task, inputs: Sequence[ImageLike], instruction: str | None = None, *, seed: int = 0, num_images: int = 1,
        first_image: int = 0, defaults: str = "plain", guidance: float | Guidance | None = None, temperature: float | None = None,
        top_k: int | None = None, top_p: float | None = None, decoding: str = "jacobi", window: int = 16, progress: bool = False,
        partial: bool = True,
    ) -> Iterator[list[PIL.Image.Image]]:  # fmt: skip
        """As `generate`, but yields all images after every row of codes; what is not drawn yet repeats the first code."""
        check_list(inputs, "generate", "input image")
        if instruction is not None:
            check_text("instruction", instruction)
        base = settings(defaults)
        scale = base.guidance if guidance is None else Guidance.of(guidance)
        sampling = override(base.image, temperature, top_k, top_p)
        contexts = self._contexts(task, len(inputs))
        codes = self.encode_images(inputs)
        branches: dict[str, list] = {"nothing": [], "image": [], "example": [], "full": []}
        for context, code in zip(contexts, codes, strict=True):
            text = context.instruction if instruction is None else instruction
            branches["nothing"].append((None, np.zeros(0, np.int32)))
            branches["image"].append((self._no_example, self.prompter.task("", code)))
            branches["example"].append((context, self.prompter.task("", code)))
            branches["full"].append((context, self.prompter.task(text, code)))
        for drawn in draw(
            self, branches, codes, scale.weights(), seed=seed, num_images=num_images, first_image=first_image, decoding=decoding,
            window=window, sampling=sampling, progress=progress, partial=partial,
        ):  # fmt: skip
            yield self.decode_images(drawn)

    def text_to_image(
        self, prompts: Sequence[str], *, seed: int = 0, num_images: int = 1, first_image: int = 0, defaults: str = "plain",
        guidance: float | Guidance | None = None, temperature: float | None = None, top_k: int | None = None,
        top_p: float | None = None, decoding: str = "jacobi", window: int = 16, progress: bool = False,
    ) -> list[PIL.Image.Image]:  # fmt: skip
        """Draws images of texts; guidance is a scale on the text. Arguments and errors as of `generate`."""
        check_list(prompts, "text_to_image", "prompt")
        for prompt in prompts:
            check_text("a prompt", prompt)
        base = settings(defaults)
        # There is no image and no example to be guided by.
        text = Guidance.of(base.guidance if guidance is None else guidance, "text").text
        nothing = [(None, np.zeros(0, np.int32))] * len(prompts)
        branches = {"example": nothing, "full": [(None, self.prompter.text_task(p)) for p in prompts]}
        *_, drawn = draw(
            self, branches, None, Guidance(text=text).weights(), seed=seed, num_images=num_images, first_image=first_image,
            decoding=decoding, window=window, sampling=override(base.image, temperature, top_k, top_p), progress=progress, partial=False,
        )  # fmt: skip
        return self.decode_images(drawn)

    # --- writing

    def describe(self, examples: CompiledPrompt | Sequence[Example], question: str = DESCRIBE_QUESTION, **options: Any) -> str:
        """Answers a question about an example pair, which it sees through the XP tokens alone; options of `describe_all`."""
        return self.describe_all([examples], question, **options)[0]

    def describe_all(
        self, tasks: Sequence[CompiledPrompt | Sequence[Example]], question: str = DESCRIBE_QUESTION, *, seed: int = 0,
        max_tokens: int = 256, defaults: str = "plain", temperature: float | None = None, top_k: int | None = None,
        top_p: float | None = None, repetition_penalty: float | None = None,
    ) -> list[str]:  # fmt: skip
        """Answers a question about each of several tasks, all at once; see `interleave` for the options.

        Raises:
          UserError: as `interleave`.
        """
        check_list(tasks, "describe", "task")
        check_text("question", question)
        base = settings(defaults)
        contexts = [self._contexts(task, 1)[0] for task in tasks]
        *_, rows = write(
            self, [(c, self.prompter.text_task(question)) for c in contexts], seed=seed, max_tokens=max_tokens, max_images=0, scale=1.0,
            text=override(base.text, temperature, top_k, top_p), image=base.image, window=1,
            repetition_penalty=base.repetition_penalty if repetition_penalty is None else repetition_penalty,
        )  # fmt: skip
        return [self.tokenizer.decode(row).strip() for row in rows]

    def interleave(
        self, prompts: Sequence[str | Sequence[str | ImageLike]], task: CompiledPrompt | Sequence[Example] | None = None, *,
        seed: int = 0, max_tokens: int | None = None, max_images: int | None = None, defaults: str = "plain",
        guidance: float | Guidance | None = None, text: Sampling | None = None, image: Sampling | None = None,
        repetition_penalty: float | None = None, window: int = 16,
    ) -> list[list[str | PIL.Image.Image]]:  # fmt: skip
        """Answers prompts of texts and images with texts and images, as the model likes.

        Args:
          prompts: each a text, or texts and images in their order, such as `["what is this?", photo]`; a str is always text.
          task: compiled prompt or examples that all of them follow.
          seed: an answer depends on it and on its own prompt, not on the batch.
          max_tokens: of an answer; None leaves room for one image and 256 words. An image that cannot fit is not begun.
          max_images: of an answer; 0 writes text alone (captions, questions about images).
          defaults: name of the settings that stand where an argument is None; see sample/defaults.py.
          guidance: scale on everything before an image, while it is drawn.
          text, image: how words and codes are drawn.
          repetition_penalty: makes words that were written already less likely; 1 is off.
          window: tokens of an image computed in a pass, as of `generate` under "jacobi": it changes nothing but time.

        Returns:
          For each prompt its texts and PIL images in order; empty if the model has nothing to say.

        Raises:
          UserError: no prompt, an unreadable image, an unknown name, a number out of its range, a prompt too long, a model
            whose logits are no numbers.
        """
        *_, answer = self.stream_interleave(
            prompts, task, seed=seed, max_tokens=max_tokens, max_images=max_images, defaults=defaults, guidance=guidance, text=text,
            image=image, repetition_penalty=repetition_penalty, window=window, partial=False,
        )  # fmt: skip
        return answer

    def stream_interleave(
        self, prompts: Sequence[str | Sequence[str | ImageLike]], task: CompiledPrompt | Sequence[Example] | None = None, *,
        seed: int = 0, max_tokens: int | None = None, max_images: int | None = None, defaults: str = "plain",
        guidance: float | Guidance | None = None, text: Sampling | None = None, image: Sampling | None = None,
        repetition_penalty: float | None = None, window: int = 16, partial: bool = True,
    ) -> Iterator[list[list[str | PIL.Image.Image]]]:  # fmt: skip
        """As `interleave`, but yields all answers so far every few words and rows of codes, as `stream` does."""
        check_list(prompts, "interleave", "prompt")
        base, frame = settings(defaults), self.prompter.layout.num_tokens(self.config.vq.grid, self.config.vq.grid)
        scale = Guidance.of(base.guidance if guidance is None else guidance, "text").text
        max_tokens = 256 + frame if max_tokens is None else whole("max_tokens", max_tokens, 1)
        if not all(isinstance(sampling, Sampling | None) for sampling in (text, image)):
            raise UserError("interleave takes text=Sampling(...) and image=Sampling(...): how words and codes are drawn")
        context = None if task is None else self._contexts(task, 1)[0]
        yield from answers(
            self, [(context, mixed(self, p)) for p in prompts], partial=partial, seed=seed, max_tokens=max_tokens,
            max_images=max_tokens // frame if max_images is None else max_images,
            scale=scale, text=text or base.text, image=image or base.image, window=window,
            repetition_penalty=base.repetition_penalty if repetition_penalty is None else repetition_penalty,
        )  # fmt: skip

    # --- the oracle

    def logits(self, ids, roles=None, groups=None, positions=None, segments=None) -> jax.Array:
        """Float32 [B, L, V] under the contract of prompt.py, for any arrangement of roles.

        Args:
          ids: int [B, L]; ignored at XP roles, where the i-th XP token of a group takes row i of the XP table.
          roles: int [B, L] of `Role`; None means plain causal tokens (all TD).
          groups: int [B, L], which example; None means one.
          positions: int [B, L]; None counts from 0.
          segments: int [B, L], which document; None means one (and none for PAD).

        Raises:
          UserError: shapes differ, a role or id is unknown, or a group has more XP tokens than the model.
        """
        checked = check_slots(self.config, ids, roles, groups, positions, segments)
        return self._logits(self.layers_apart, *checked, self.compute)
