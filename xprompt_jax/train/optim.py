"""The optimizer, and which parameters it sees.

AdamW with clipping and a schedule. Norms, biases and XP embeddings have no weight decay; XP embeddings may have a
learning rate of their own. Frozen parameters are not in the optimizer at all, so they cost no state.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import optax

from xprompt_jax.config import Config, OptimConfig
from xprompt_jax.tokens import IMAGE_START

Params = dict[str, jax.Array]

IMAGE_HEAD = "head.image"
"""The head's columns of the image codes, when they alone are trained."""


def schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by step: linear warm-up from 0, then cosine, linear or constant to the end."""
    peak, end, warm = config.learning_rate, config.learning_rate * config.final_fraction, min(config.warmup_steps, steps - 1)
    rest = max(steps - warm, 1)
    after = {
        "cosine": lambda: optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "linear": lambda: optax.linear_schedule(peak, end, rest),
        "constant": lambda: optax.constant_schedule(peak),
    }[config.schedule]()
    return optax.join_schedules([optax.linear_schedule(0.0, peak, max(warm, 1)), after], [warm])


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter: matrices only, and not the XP table."""
    return name != "xp" and not name.endswith(("norm", "scale", "bias"))


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optax chain over a flat dictionary of trainable parameters."""

    def adamw(multiplier: float):
        rate = schedule(config, steps)
        return optax.adamw(
            lambda count: multiplier * rate(count), b1=config.beta1, b2=config.beta2, eps=config.eps,
            weight_decay=config.weight_decay, mask=lambda params: {name: decays(name) for name in params},
        )  # fmt: skip

    by_group = optax.multi_transform(
        {"xp": adamw(config.xp_lr_multiplier), "rest": adamw(1.0)},
        lambda params: {name: "xp" if name == "xp" else "rest" for name in params},
    )
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, by_group)


def split_trainable(params: Params, config: Config) -> tuple[Params, Params]:
    """(trainable, frozen) by `config.optim.trainable`; `merge` puts them together again."""
    rule = config.optim.trainable
    if rule == "all":
        return dict(params), {}
    if rule == "xp":
        return {"xp": params["xp"]}, {n: v for n, v in params.items() if n != "xp"}
    columns = slice(IMAGE_START, IMAGE_START + config.model.vq.num_codes)
    return {IMAGE_HEAD: params["head"][:, columns]}, dict(params)


def merge(trainable: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array]) -> Params:
    """All parameters of the model."""
    params = {**frozen, **trainable}
    if IMAGE_HEAD in params:
        columns = params.pop(IMAGE_HEAD)
        params["head"] = jax.lax.dynamic_update_slice_in_dim(params["head"], columns.astype(params["head"].dtype), IMAGE_START, axis=1)
    return params
