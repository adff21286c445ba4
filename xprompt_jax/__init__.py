"""X-Prompt in JAX: in-context image generation with XP tokens on the Chameleon family (arXiv 2412.01824)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from xprompt_jax.config import Config, ModelConfig
    from xprompt_jax.errors import UserError
    from xprompt_jax.prompt import Role
    from xprompt_jax.sample.compiled import CompiledPrompt
    from xprompt_jax.sample.guidance import Guidance
    from xprompt_jax.sample.logits import Sampling
    from xprompt_jax.sample.sampler import Example, XPrompt

_HOMES = {
    "Config": "config",
    "ModelConfig": "config",
    "UserError": "errors",
    "Role": "prompt",
    "CompiledPrompt": "sample.compiled",
    "Guidance": "sample.guidance",
    "Sampling": "sample.logits",
    "Example": "sample.sampler",
    "XPrompt": "sample.sampler",
}

__all__ = ["CompiledPrompt", "Config", "Example", "Guidance", "ModelConfig", "Role", "Sampling", "UserError", "XPrompt"]


def __getattr__(name: str):
    # Loaded on first use, so that `import xprompt_jax` and `xprompt --help` do not wait for JAX.
    if name in _HOMES:
        return getattr(importlib.import_module(f"xprompt_jax.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'xprompt_jax' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOMES])
