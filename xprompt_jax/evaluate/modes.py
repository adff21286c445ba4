"""How a model is shown an example: the paper's way and its ablations, as in training (`config.TrainConfig.mode`).

xprompt   SINK | XP tokens that saw the example | task        the example itself is out of sight
causal    SINK | example | task                               no XP tokens: the paper's baseline
none      SINK | task                                         a model that was trained without examples
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    from xprompt_jax.sample.compiled import CompiledPrompt
    from xprompt_jax.sample.sampler import Example, XPrompt

Mode = Literal["xprompt", "causal", "none"]
MODES: tuple[Mode, ...] = get_args(Mode)

_NOTHING = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True, eq=False)
class Shown:
    """An example as a mode shows it."""

    prompt: CompiledPrompt | None
    """What XP tokens keep of it; None where there are none."""
    tokens: np.ndarray
    """int32 [n], what stands in front of the task; empty with XP tokens."""


def show(model: XPrompt, mode: Mode, pair: Example | None) -> Shown:
    """Encodes an example once, for any number of tasks; None shows nothing.

    Raises:
      UserError: an image cannot be read.
    """
    if mode == "xprompt":
        return Shown(model._no_example if pair is None else model.compile([pair]), _NOTHING)
    if mode == "none" or pair is None:
        return Shown(None, _NOTHING)
    before, after = model.encode_images([pair.input, pair.output])
    return Shown(None, model.prompter.example(pair.instruction, before, after))


def draw_shown(
    model: XPrompt, shown: Sequence[Shown], instructions: Sequence[str], inputs: Sequence[np.ndarray], *, seed: int = 0, **sampling: Any
) -> list[np.ndarray]:
    """Draws an image for each input.

    Args:
      shown: of one mode, one for each input.
      instructions: one for each input.
      inputs: uint8 [size, size, 3], or their codes, int32 [grid, grid].
      seed: an image depends on it and on its own prompt alone.
      sampling: defaults, temperature, top_k, top_p, guidance, decoding, window of `XPrompt.generate`.

    Returns:
      uint8 [size, size, 3] for each input.

    Raises:
      UserError: as `XPrompt.generate`.
    """
    compiled = [s.prompt for s in shown if s.prompt is not None]
    if len(compiled) == len(shown):
        prompts = [dataclasses.replace(p, instruction=words) for p, words in zip(compiled, instructions, strict=True)]
        return [np.asarray(image) for image in model.generate(prompts, inputs, seed=seed, **sampling)]
    return _draw_in_front(model, shown, instructions, inputs, seed, **sampling)


def _draw_in_front(
    model: XPrompt, shown: Sequence[Shown], instructions: Sequence[str], inputs: Sequence[np.ndarray], seed: int, *,
    defaults: str = "plain", guidance: Any = None, temperature: float | None = None, top_k: int | None = None,
    top_p: float | None = None, decoding: str = "jacobi", window: int = 16,
) -> list[np.ndarray]:  # fmt: skip
    """`XPrompt.generate` without XP tokens: the example's own tokens come before the task's."""
    from xprompt_jax.sample.defaults import defaults as settings
    from xprompt_jax.sample.defaults import override
    from xprompt_jax.sample.draw import draw
    from xprompt_jax.sample.guidance import Guidance

    base, task = settings(defaults), model.prompter.task
    scale = base.guidance if guidance is None else Guidance.of(guidance)
    codes = model.encode_images(inputs)
    branches: dict[str, list] = {"nothing": [], "image": [], "example": [], "full": []}
    for example, words, code in zip(shown, instructions, codes, strict=True):
        branches["nothing"].append((None, _NOTHING))
        branches["image"].append((None, task("", code)))
        branches["example"].append((None, np.concatenate([example.tokens, task("", code)])))
        branches["full"].append((None, np.concatenate([example.tokens, task(words, code)])))
    *_, drawn = draw(
        model, branches, codes, scale.weights(), seed=seed, num_images=1, decoding=decoding, window=window,
        sampling=override(base.image, temperature, top_k, top_p), progress=False, partial=False,
    )  # fmt: skip
    return [np.asarray(image) for image in model.decode_images(drawn)]
