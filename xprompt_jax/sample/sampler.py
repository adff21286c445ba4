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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
from tqdm import tqdm

from xprompt_jax.config import ComputeConfig, ModelConfig
from xprompt_jax.data.images import Recipe, open_image, postprocess, preprocess
from xprompt_jax.errors import UserError
from xprompt_jax.model.chameleon import Chameleon, unstacked
from xprompt_jax.model.params import flatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.prompt import DESCRIBE_QUESTION, Prompter, Role, Sample, SlotShape, fill, stack
from xprompt_jax.sample.compiled import CompiledPrompt
from xprompt_jax.sample.guidance import Guidance
from xprompt_jax.sample.logits import Sampling
from xprompt_jax.sample.prefill import PROMPT_STEP, prefill
from xprompt_jax.sample.speculative import decode_image
from xprompt_jax.sample.text import decode_text
from xprompt_jax.sample.thumbnails import thumbnail
from xprompt_jax.tokens import Layout, Tokenizer

log = logging.getLogger(__name__)

ImageLike = Any  # a PIL image, a path, a uint8 array [height, width, 3], or codes of the model's VQGAN, int32 [grid, grid]

MAX_BATCH = 16
"""Images drawn at once; more are drawn in turns."""


@dataclasses.dataclass(frozen=True)
class Example:
    """One demonstration: what goes in, what comes out, and (optionally) what was asked for."""

    input: ImageLike
    output: ImageLike
    instruction: str = ""


class XPrompt:
    """A decoder with its image and text tokenizers, ready to draw and to write."""

    def __init__(
        self, decoder: Chameleon, vqgan: VQGAN, tokenizer: Tokenizer, *, compute: ComputeConfig | None = None
    ):  # fmt: skip
        self.config: ModelConfig = decoder.config
        self.compute = compute or ComputeConfig(dtype="float32")
        self.decoder, self.vqgan, self.tokenizer = decoder, vqgan, tokenizer
        if tokenizer.vocab.size > self.config.vocab_size:
            raise UserError(f"the tokenizer has {tokenizer.vocab.size} words, the model only {self.config.vocab_size}; "
                            "use the text_tokenizer.json that belongs to the weights")  # fmt: skip
        if tokenizer.vocab.num_codes != self.config.vq.num_codes:
            raise UserError(f"the tokenizer has {tokenizer.vocab.num_codes} image words, the VQGAN {self.config.vq.num_codes} codes; "
                            "use files that belong together")  # fmt: skip
        self.prompter = Prompter(tokenizer, Layout(self.config.layout, tokenizer.vocab, self.config.vq.downsample))
        self._encode = jax.jit(lambda model, pixels: model.encode(pixels))
        self._decode = jax.jit(lambda model, codes: model.decode(codes))
        self._compiled_examples = jax.jit(Chameleon.encode_examples, static_argnames=("shape", "compute"))

    @classmethod
    def from_pretrained(
        cls, model: str | Path, *, compute: ComputeConfig | None = None, mesh: Any = None, dtype: Any = None, **options: Any
    ) -> XPrompt:  # fmt: skip
        """Loads a model folder or a hub name; see `sample.pretrained.load`."""
        from xprompt_jax.sample.pretrained import load

        return load(model, compute=compute, mesh=mesh, dtype=dtype, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes a folder that `from_pretrained` reads."""
        from xprompt_jax.sample.pretrained import save

        save(self, folder)

    @property
    def xp_embeddings(self) -> jax.Array:
        """[S, D]."""
        return self.decoder.xp[...]

    @functools.cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the configuration, the weights or the tokenizer."""
        from xprompt_jax.sample.pretrained import fingerprint

        return fingerprint(self.config, flatten(self.decoder), self.tokenizer)

    @functools.cached_property
    def _apart(self) -> Chameleon:
        return jax.jit(unstacked)(self.decoder)

    @functools.cached_property
    def _image_head(self) -> jax.Array:
        v = self.tokenizer.vocab
        head = self.decoder.head[...][:, v.image_start : v.image_start + v.num_codes]
        if not jnp.any(head):
            log.warning("the head's rows for image codes are all zero (released Chameleon models cannot draw): every image will be noise; "
                        "train it, or load a fork that draws")  # fmt: skip
        return head.astype(self.compute.dtype)

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
          UserError: no example, or an image that cannot be read.
        """
        if not examples:
            raise UserError("compile needs at least one example")
        codes = self.encode_images([image for e in examples for image in (e.input, e.output)])
        tokens = [self.prompter.example(e.instruction, codes[2 * i], codes[2 * i + 1]) for i, e in enumerate(examples)]
        return dataclasses.replace(
            self._compile_tokens(tokens), instruction=examples[0].instruction,
            thumbnails=tuple(thumbnail(self._open(e.input), self._open(e.output)) for e in examples),
        )  # fmt: skip

    def _compile_tokens(self, examples: Sequence[np.ndarray]) -> CompiledPrompt:
        vocab = self.tokenizer.vocab
        shape = SlotShape(1, _round_up(max(len(e) for e in examples), PROMPT_STEP), self.config.num_xp_tokens, 0)
        nothing = np.zeros(0, np.int32)
        rows = [fill(Sample((e,), nothing, nothing), shape, bos=vocab.bos, pad=vocab.pad) for e in examples]
        batch = stack(rows, 1)
        k, v = self._compiled_examples(
            self.decoder, batch["ids"], batch["positions"], shape, batch["example_lengths"], self.compute
        )  # fmt: skip
        return CompiledPrompt(np.asarray(k).swapaxes(0, 1), np.asarray(v).swapaxes(0, 1), batch["example_lengths"][:, 0], self.fingerprint)

    @functools.cached_property
    def _no_example(self) -> CompiledPrompt:
        """What XP tokens say when they have seen nothing: the branch that guidance moves away from."""
        return self._compile_tokens([np.zeros(0, np.int32)])

    def _contexts(self, task, count: int) -> list[CompiledPrompt]:
        if isinstance(task, CompiledPrompt):
            contexts = [task] * count
        elif task and all(isinstance(t, CompiledPrompt) for t in task):
            if len(task) != count:
                raise UserError(f"{len(task)} compiled prompts for {count} inputs; give one for all, or one for each")
            contexts = list(task)
        else:
            contexts = [self.compile(task)] * count
        for context in contexts:
            context.check(self.fingerprint)
        return contexts

    # --- drawing

    def generate(
        self, task: CompiledPrompt | Sequence[CompiledPrompt] | Sequence[Example], inputs: Sequence[ImageLike],
        instruction: str | None = None, *, seed: int = 0, num_images: int = 1, guidance: float | Guidance = 1.0,
        decoding: str = "jacobi", window: int = 16, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
        progress: bool = False,
    ) -> list[PIL.Image.Image]:  # fmt: skip
        """Does to each input what the example shows.

        Args:
          task: one compiled prompt for all inputs, one for each input, or examples (compiled on the way).
          inputs: images.
          instruction: of the task; None takes the example's.
          seed: image j of every input depends on (seed, j) and its prompt alone, not on the batch.
          num_images: images per input.
          guidance: scale on the example, or a `Guidance`.
          decoding: "jacobi" (parallel, same images) or "sequential" (one token at a time).
          window: tokens per pass of "jacobi".

        Returns:
          PIL images, all of the first input first.

        Raises:
          UserError: an unreadable input, a compiled prompt of another model, an unknown `decoding`.
        """
        *_, images = self.stream(
            task, inputs, instruction, seed=seed, num_images=num_images, guidance=guidance, decoding=decoding,
            window=window, temperature=temperature, top_k=top_k, top_p=top_p, progress=progress, partial=False,
        )  # fmt: skip
        return images

    def stream(
        self, task, inputs: Sequence[ImageLike], instruction: str | None = None, *, seed: int = 0, num_images: int = 1,
        guidance: float | Guidance = 1.0, decoding: str = "jacobi", window: int = 16, temperature: float = 1.0, top_k: int = 0,
        top_p: float = 1.0, progress: bool = False, partial: bool = True,
    ) -> Iterator[list[PIL.Image.Image]]:  # fmt: skip
        """As `generate`, but yields all images after every row of codes; what is not drawn yet repeats the first code."""
        if not inputs:
            raise UserError("generate needs at least one input image")
        contexts = self._contexts(task, len(inputs))
        codes = self.encode_images(inputs)
        branches: dict[str, list] = {"nothing": [], "image": [], "example": [], "full": []}
        for context, code in zip(contexts, codes, strict=True):
            text = context.instruction if instruction is None else instruction
            branches["nothing"].append((None, np.zeros(0, np.int32)))
            branches["image"].append((self._no_example, self.prompter.task("", code)))
            branches["example"].append((context, self.prompter.task("", code)))
            branches["full"].append((context, self.prompter.task(text, code)))
        options = Sampling(temperature, top_k, top_p)
        scale = Guidance.of(guidance)
        for drawn in self._draw(branches, codes, seed, num_images, scale, decoding, window, options, progress, partial):
            yield self.decode_images(drawn)

    def text_to_image(
        self, prompts: Sequence[str], *, seed: int = 0, num_images: int = 1, guidance: float | Guidance = 1.0,
        decoding: str = "jacobi", window: int = 16, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0,
        progress: bool = False,
    ) -> list[PIL.Image.Image]:  # fmt: skip
        """Draws images of texts; a plain number as guidance is a scale on the text."""
        if not prompts:
            raise UserError("text_to_image needs at least one prompt")
        scale = guidance if isinstance(guidance, Guidance) else Guidance(text=float(guidance))
        nothing = [(None, np.zeros(0, np.int32))] * len(prompts)
        full = [(None, self.prompter.text_task(p)) for p in prompts]
        branches = {"nothing": nothing, "image": nothing, "example": nothing, "full": full}
        options = Sampling(temperature, top_k, top_p)
        *_, drawn = self._draw(branches, None, seed, num_images, scale, decoding, window, options, progress, False)
        return self.decode_images(drawn)

    def _draw(self, branches, drafts, seed, num_images, guidance, decoding, window, sampling, progress, partial):
        """Draws in batches of MAX_BATCH; yields int32 [n, rows, columns] codes, all images each time."""
        if decoding not in ("jacobi", "sequential"):
            raise UserError(f"decoding {decoding!r} is unknown; use jacobi or sequential")
        if num_images < 1 or window < 1:
            raise UserError(f"num_images {num_images} and window {window} must be at least 1")
        window = window if decoding == "jacobi" else 1
        grid, weights = self.config.vq.grid, guidance.weights()
        total = len(branches["full"]) * num_images
        codes = np.zeros((total, grid, grid), np.int32)
        with tqdm(total=total * grid * grid, unit="token", disable=not progress, desc="drawing") as bar:
            for first in range(0, total, MAX_BATCH):
                images = list(range(first, min(first + MAX_BATCH, total)))
                padded = images + [images[-1]] * (_bucket(len(images)) - len(images))
                rows = [branches[name][i // num_images] for name in weights for i in padded]
                keys = jnp.stack([jax.random.fold_in(jax.random.key(seed), i % num_images) for i in padded])
                guess = np.zeros((len(padded), grid, grid), np.int32) if drafts is None else drafts[[i // num_images for i in padded]]
                chunks = grid if partial or progress else 1
                scales = np.array(list(weights.values()), np.float32)
                for done, drawn in self._draw_batch(rows, scales, keys, guess, window, sampling, chunks):
                    codes[images] = np.where(done, drawn[: len(images)], drawn[: len(images), :1, :1])
                    bar.update(len(images) * grid * grid // chunks)
                    if partial:
                        yield codes.copy()
        if not partial:
            yield codes

    def _draw_batch(self, rows, weights, keys, drafts, window, sampling, chunks):
        """Yields (bool [grid, grid] of codes that are final, int32 [B, grid, grid] codes)."""
        vocab, grid = self.tokenizer.vocab, self.config.vq.grid
        template = self.prompter.layout.template(grid, grid)
        places = np.nonzero(template == -1)[0]
        guess = np.stack([self.prompter.layout.encode(d) for d in drafts])
        pad = lambda ids: np.pad(ids, [(0, 0)] * (ids.ndim - 1) + [(0, window)], constant_values=vocab.eoi)
        cache = prefill(
            self._apart, self.config, [c for c, _ in rows], [p for _, p in rows], vocab.bos,
            room=len(template) + window, dtype=self.compute.dtype,
        )  # fmt: skip
        state = cache, jnp.asarray(pad(guess)), jnp.zeros(len(drafts), jnp.int32)
        for chunk in range(1, chunks + 1):
            final = chunk * grid * grid // chunks
            cache, tokens, pos, _ = decode_image(
                self._apart, self._image_head, np.int32(vocab.image_start), *state, pad(template), np.int32(places[final - 1]),
                keys, weights, window=window, sampling=sampling,
            )  # fmt: skip
            state = cache, tokens, pos
            codes = np.asarray(tokens)[:, places].reshape(-1, grid, grid) - vocab.image_start
            yield (np.arange(grid * grid) < final).reshape(grid, grid), codes

    # --- writing

    def describe(
        self, examples: CompiledPrompt | Sequence[Example], question: str = DESCRIBE_QUESTION, *, seed: int = 0, max_tokens: int = 256,
        temperature: float = 0.0, top_p: float = 1.0, repetition_penalty: float = 1.0,
    ) -> str:  # fmt: skip
        """Answers a question about an example pair, which it sees through the XP tokens alone."""
        vocab = self.tokenizer.vocab
        context = self._contexts(examples, 1)[0]
        prompt = self.prompter.text_task(question)
        cache = prefill(self._apart, self.config, [context], [prompt[:-1]], vocab.bos, room=max_tokens + 1, dtype=self.compute.dtype)
        allowed = np.zeros(self.config.vocab_size, bool)
        allowed[: vocab.size] = vocab.text_mask
        token, done = jnp.asarray(prompt[-1:]), jnp.zeros(1, bool)
        seen = jnp.zeros((1, self.config.vocab_size), bool)
        written: list[int] = []
        keys = jax.random.fold_in(jax.random.key(seed), 0)[None]
        steps = min(16, max_tokens)
        while len(written) + steps <= max_tokens and not bool(done[0]):
            cache, token, seen, done, new = decode_text(
                self._apart, cache, token, jnp.int32(len(written)), seen, done, allowed, jnp.int32(vocab.eos), keys,
                steps=steps, sampling=Sampling(temperature, 0, top_p), repetition_penalty=repetition_penalty,
            )  # fmt: skip
            written += np.asarray(new)[0].tolist()
        end = written.index(vocab.eos) if vocab.eos in written else len(written)
        return self.tokenizer.decode(written[:end]).strip()

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
        ids = np.asarray(ids, np.int32)
        full = lambda value, default: np.asarray(default if value is None else value, np.int32)
        roles = full(roles, np.full_like(ids, Role.TD))
        groups = full(groups, np.zeros_like(ids))
        positions = full(positions, np.broadcast_to(np.arange(ids.shape[-1]), ids.shape))
        segments = full(segments, np.zeros_like(ids))
        if ids.ndim != 2 or any(a.shape != ids.shape for a in (roles, groups, positions, segments)):
            raise UserError("logits: ids, roles, groups, positions and segments must all be [B, L]")
        if not np.isin(roles, [r.value for r in Role]).all():
            raise UserError(f"logits: roles must be values of Role, {[r.value for r in Role]}")
        table = (roles != Role.XP) & (roles != Role.PAD)
        if ((ids < 0) | (ids >= self.config.vocab_size))[table].any():
            raise UserError(f"logits: ids must be in 0..{self.config.vocab_size - 1}")
        for row, (role, group, segment) in enumerate(zip(roles, groups, segments, strict=True)):
            is_xp = role == Role.XP
            blocks, counts = np.unique(np.stack([segment[is_xp], group[is_xp]]), axis=1, return_counts=True)
            if blocks.size and counts.max() > self.config.num_xp_tokens:
                raise UserError(f"logits: row {row} has a group of {counts.max()} XP tokens, the model has {self.config.num_xp_tokens}")
        return self._logits(self.decoder, np.where(table, ids, 0), roles, groups, positions, segments)

    @functools.cached_property
    def _logits(self):
        return jax.jit(functools.partial(Chameleon.logits, compute=self.compute))


def _round_up(n: int, step: int) -> int:
    return max(step, -(-n // step) * step)


def _bucket(n: int) -> int:
    """The smallest power of two that holds n rows."""
    return 1 << (n - 1).bit_length()
