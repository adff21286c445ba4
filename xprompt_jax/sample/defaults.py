"""Sampling settings by name: ours, and what the authors of each family publish for it.

    name           images                          guidance          text
    plain          as the model says               off               the most likely words
    chameleon      T 0.7, top-p 0.9                image 1.2, text 3 T 0.7, top-p 0.9, repetition penalty 1.2
    anole          T 0.7, top-p 0.9                image 1.2, text 3 T 1.0, top-p 0.9, repetition penalty 1.2
    lumina         T 1.0, top-k 2000               text 4            T 1.0, top-k 10
    lumina-dense   T 1.0, top-k 200                off               T 1.0, top-k 10
    lumina2        T 1.0, top-k 4096               text 4            T 1.0, top-k 10

Sources: Meta's `Options` for chameleon, Anole's copy of it (GAIR-NLP/anole 16b958a, chameleon/inference/chameleon.py),
Lumina-mGPT's README and solver (104abe4) for text to image and for dense prediction, Lumina-mGPT-2.0's README (f44a4d7).
Neither family was published with an example to guide by: `Guidance.task` is ours.
"""

from __future__ import annotations

import dataclasses

from xprompt_jax.errors import UserError
from xprompt_jax.sample.guidance import Guidance
from xprompt_jax.sample.logits import Sampling


@dataclasses.dataclass(frozen=True)
class Defaults:
    """What a call takes where it was given nothing."""

    image: Sampling
    guidance: Guidance
    text: Sampling
    repetition_penalty: float = 1.0


_LUMINA_TEXT = Sampling(1.0, top_k=10)
_META = Defaults(Sampling(0.7, top_p=0.9), Guidance(image=1.2, text=3.0), Sampling(0.7, top_p=0.9), 1.2)

DEFAULTS: dict[str, Defaults] = {
    "plain": Defaults(Sampling(), Guidance(), Sampling(temperature=0.0)),
    "chameleon": _META,
    "anole": dataclasses.replace(_META, text=Sampling(1.0, top_p=0.9)),
    "lumina": Defaults(Sampling(1.0, top_k=2000), Guidance(text=4.0), _LUMINA_TEXT),
    "lumina-dense": Defaults(Sampling(1.0, top_k=200), Guidance(), _LUMINA_TEXT),
    "lumina2": Defaults(Sampling(1.0, top_k=4096), Guidance(text=4.0), _LUMINA_TEXT),
}


def defaults(name: str) -> Defaults:
    """Looks a name up.

    Raises:
      UserError: there is none.
    """
    if not isinstance(name, str) or name not in DEFAULTS:
        raise UserError(f"defaults {name!r} are unknown; use {', '.join(DEFAULTS)}")
    return DEFAULTS[name]


def override(sampling: Sampling, temperature: float | None, top_k: int | None, top_p: float | None) -> Sampling:
    """`sampling` with what is not None put in its place."""
    return Sampling(
        sampling.temperature if temperature is None else temperature, sampling.top_k if top_k is None else top_k,
        sampling.top_p if top_p is None else top_p,
    )  # fmt: skip
