"""The optimizer, and which parameters it sees.

AdamW with clipping and a schedule, or Muon for the matrices of the blocks and AdamW for the rest. Norms, biases and XP embeddings have
no weight decay; XP embeddings may have a learning rate of their own. Frozen parameters are not in the optimizer at all, so they cost no
state.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from xprompt_jax.config import Config, OptimConfig
from xprompt_jax.model.params import logical_axes
from xprompt_jax.tokens import IMAGE_START
from xprompt_jax.train.lora import PREFIX, SCALE, Params, adapter_axes, init_adapters, merge_adapters

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


def round_stochastic(x: jax.Array, noise: jax.Array) -> jax.Array:
    """float32 -> bfloat16, up with the probability of the part cut off: right on average, where rounding to nearest loses small steps.

    Args:
      noise: uint16, uniform, of x's shape.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    up = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), up, x.astype(jnp.bfloat16))


def in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.scale_by_adam` whose moments are bfloat16 between steps; the arithmetic of a step stays float32.

    A step moves the second moment by 1 - beta2 of its distance to the squared gradient. bfloat16's steps are 2^-7 to 2^-8 of a value:
    rounded to nearest, a moment under beta2 = 0.999 would never fall (optax has `mu_dtype` for the first moment alone). The noise
    is a function of Adam's count, so a resumed run is the uninterrupted one.
    """

    def stored(state: optax.ScaleByAdamState, key: jax.Array) -> optax.ScaleByAdamState:
        mus, tree = jax.tree.flatten(state.mu)
        nus = jax.tree.leaves(state.nu)
        words = [jax.random.bits(jax.random.fold_in(key, i), mu.shape, jnp.uint32) for i, mu in enumerate(mus)]
        mus = [round_stochastic(mu, word & 0xFFFF) for mu, word in zip(mus, words, strict=True)]
        nus = [round_stochastic(nu, word >> 16) for nu, word in zip(nus, words, strict=True)]
        return state._replace(mu=jax.tree.unflatten(tree, mus), nu=jax.tree.unflatten(tree, nus))

    def init(params):
        state = adam.init(params)
        return state._replace(mu=optax.tree.cast(state.mu, jnp.bfloat16), nu=optax.tree.cast(state.nu, jnp.bfloat16))

    def update(grads, state, params=None):
        wide = state._replace(mu=optax.tree.cast(state.mu, jnp.float32), nu=optax.tree.cast(state.nu, jnp.float32))
        updates, new = adam.update(grads, wide, params)
        return updates, stored(new, jax.random.fold_in(jax.random.key(0), new.count))

    return optax.GradientTransformation(init, update)


def sides(name: str) -> contrib.MuonDimensionNumbers | None:
    """The two sides of a stacked matrix of the blocks, the model's width being one of them; None for all other parameters."""
    axes = parameter_axes(name)
    if not name.startswith("blocks.") or "embed" not in axes:
        return None
    width = axes.index("embed")
    rest = tuple(i for i in range(1, len(axes)) if i != width)
    return contrib.MuonDimensionNumbers((width,), rest) if width == 1 else contrib.MuonDimensionNumbers(rest, (width,))


def muon(config: OptimConfig) -> optax.GradientTransformation:
    """Momentum made orthogonal, layer by layer (Jordan 2024), at AdamW's usual size: RMS 0.2 (Liu et al. 2025, arXiv 2502.16982)."""

    def numbers(tree: Params) -> dict:  # parameters of other groups come as placeholders
        return {name: leaf if isinstance(leaf, optax.MaskedNode) else sides(name) for name, leaf in tree.items()}

    def scaled(update: jax.Array, side: contrib.MuonDimensionNumbers) -> jax.Array:
        return update * (0.2 * max(np.prod([update.shape[i] for i in axes]) for axes in side) ** 0.5)

    return optax.chain(
        contrib.scale_by_muon(weight_dimension_numbers=numbers, mu_dtype=config.moment_dtype),
        optax.stateless(lambda updates, _: {n: u if isinstance(u, optax.MaskedNode) else scaled(u, sides(n)) for n, u in updates.items()}),
    )


def make_optimizer(config: OptimConfig, steps: int) -> optax.GradientTransformation:
    """The optax chain over a flat dictionary of trainable parameters."""

    def steps_of(direction: optax.GradientTransformation, multiplier: float = 1.0):  # with Adam: the parts of optax.adamw
        rate = schedule(config, steps)
        return optax.chain(
            direction,
            optax.add_decayed_weights(config.weight_decay, mask=lambda params: {name: decays(name) for name in params}),
            optax.scale_by_learning_rate(lambda count: multiplier * rate(count)),
        )

    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps)
    if config.moment_dtype == "bfloat16":
        adam = in_bfloat16(adam)

    def group(name: str) -> str:
        if name == "xp":
            return "xp"
        return "matrices" if config.name == "muon" and sides(name) else "rest"

    groups = {"xp": steps_of(adam, config.xp_lr_multiplier), "rest": steps_of(adam)}
    if config.name == "muon":
        groups["matrices"] = steps_of(muon(config))
    by_group = optax.multi_transform(groups, lambda params: {name: group(name) for name in params})
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(clip, by_group)


def split_trainable(params: Params, config: Config) -> tuple[Params, Params]:
    """(trainable, frozen) by `config.optim.trainable`; `merge` puts them together again. New adapters are drawn from `train.seed`."""
    rule = config.optim.trainable
    if rule == "all":
        return dict(params), {}
    if rule == "image_head":
        columns = slice(IMAGE_START, IMAGE_START + config.model.vq.num_codes)
        return {IMAGE_HEAD: params["head"][:, columns]}, dict(params)
    trainable, frozen = {"xp": params["xp"]}, {n: v for n, v in params.items() if n != "xp"}
    if rule == "lora":
        trainable |= init_adapters(params, config)
        frozen[SCALE] = jnp.float32(config.optim.lora_alpha / config.optim.lora_rank)
    return trainable, frozen


def assemble(trainable: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array]) -> Params:
    """All parameters as the training pass takes them: adapters stand beside the matrices that they adapt."""
    params = {**frozen, **trainable}
    if IMAGE_HEAD in params:
        columns = params.pop(IMAGE_HEAD)
        params["head"] = jax.lax.dynamic_update_slice_in_dim(params["head"].astype(columns.dtype), columns, IMAGE_START, axis=1)
    return params


def merge(trainable: Mapping[str, jax.Array], frozen: Mapping[str, jax.Array]) -> Params:
    """All parameters of the model, float32, as a model folder has them: adapters are merged into their matrices."""
    return {name: value.astype(jnp.float32) for name, value in merge_adapters(assemble(trainable, frozen)).items()}


def parameter_axes(name: str) -> tuple[str | None, ...]:
    """Logical axes of anything in a training state, one per dimension.

    Raises:
      KeyError: there is no such parameter.
    """
    return adapter_axes(name) if name.startswith(PREFIX) else logical_axes("head" if name == IMAGE_HEAD else name)
