"""The formula behind MFU, held against what XLA counts in the program that it made."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import TINY_VQ, random_rows
from xprompt_jax.config import BucketConfig, ComputeConfig, Config, DataConfig, ModelConfig, OptimConfig
from xprompt_jax.model.chameleon import Rows, abstract_model
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.prompt import stack
from xprompt_jax.train.metrics import attention_pairs, row_flops, step_flops
from xprompt_jax.train.optim import make_optimizer
from xprompt_jax.train.state import make_state
from xprompt_jax.train.step import make_train_step, shapes_of

# XLA counts a loop's body once: layers are unrolled, and all answers are one slice of the head.
UNROLLED = ComputeConfig(dtype="float32", scan_layers=False)
NEVER_RUN = {"xla_backend_optimization_level": 0}  # LLVM's work is not looked at
ROWS, ANSWERS = 8, 64


def config_of(examples, layers, **optim):
    model = ModelConfig(
        vocab_size=1024, dim=256, num_layers=layers, num_heads=4, num_kv_heads=2, head_dim=64, ffn_dim=512, num_xp_tokens=8, vq=TINY_VQ
    )  # fmt: skip
    bucket = BucketConfig("b", examples=examples, context=64 if examples else 0, todo=ANSWERS, answer=ANSWERS, rows=ROWS)
    return Config(model=model, compute=UNROLLED, data=DataConfig(buckets=(bucket,)), optim=OptimConfig(**optim))


def hidden_pairs(shape):
    """(query, key) pairs that XLA's dense attention computes in a row though the mask hides them: a causal square is computed whole."""
    example, rest = 1 + shape.context, 1 + shape.examples * shape.xp + shape.todo
    return shape.examples * (example**2 + shape.xp * (example + shape.xp)) + rest**2 - attention_pairs(shape)


@pytest.mark.parametrize("examples", [0, 2])
def test_forward_pass(examples):
    config = config_of(examples, layers=2)
    shape = shapes_of(config)["b"]
    batch = stack(random_rows(0, shape, ROWS), ANSWERS)

    def forward(params):
        model = unflatten(abstract_model(config.model), params)
        return model.hidden([Rows(batch["ids"], batch["positions"], batch["example_lengths"], shape)], config.compute)

    counted = jax.jit(forward).lower(flatten(abstract_model(config.model))).compile(NEVER_RUN).cost_analysis()["flops"]
    heads = config.model.num_layers * config.model.num_heads * config.model.head_dim
    formula = ROWS * (row_flops(config.model, shape, answers=0) / 3 + 4 * heads * hidden_pairs(shape))
    assert formula < counted < 1.02 * formula  # norms, rotary positions, softmax and activations are the rest


@pytest.mark.parametrize("optim", [
    {}, {"trainable": "xp"}, {"trainable": "image_head"}, {"trainable": "lora", "lora_rank": 2, "lora_targets": ("wq", "down")},
], ids=str)  # fmt: skip
def test_training_step(optim):
    config = config_of(1, layers=1, **optim)
    shape, model = shapes_of(config)["b"], config.model
    optimizer = make_optimizer(config.optim, 4)
    state = jax.eval_shape(lambda: make_state(config, optimizer, jax.random.key(0)))
    batch = {name: jnp.asarray(value) for name, value in stack(random_rows(0, shape, ROWS), ANSWERS).items()}
    counted = make_train_step(config, optimizer).lower(state, {"b": batch}).compile(NEVER_RUN).cost_analysis()["flops"]
    backward = config.optim.trainable != "image_head"
    computed_though_hidden = (12 if backward else 4) * model.num_heads * model.head_dim * hidden_pairs(shape)
    # The loss and the scores of causal squares are rematerialised; the formula counts no recomputation.
    head_made_again = 2 * model.dim * model.vocab_size * ANSWERS
    squares = shape.examples * (1 + shape.context) ** 2 + (1 + shape.examples * shape.xp + shape.todo) ** 2
    scores_made_again = 2 * backward * model.num_heads * model.head_dim * squares
    formula = step_flops(config) + ROWS * (computed_though_hidden + head_made_again + scores_made_again)
    assert formula < counted < 1.025 * formula


def test_the_loss_on_whole_tasks_is_counted():
    config, answers = config_of(1, layers=1), 16
    bucket = dataclasses.replace(config.data.buckets[0], answer=answers)
    steps = {loss: step_flops(dataclasses.replace(config, data=DataConfig(buckets=(bucket,), loss=loss))) for loss in ("answer", "todo")}
    assert steps["todo"] - steps["answer"] == ROWS * 6 * config.model.dim * config.model.vocab_size * (bucket.todo - answers)


def test_without_xp_tokens_nothing_has_a_gradient():
    """A text-to-image row under trainable xp is a forward pass."""
    config = config_of(0, layers=2)
    shape = shapes_of(config)["b"]
    whole = row_flops(config.model, shape, ANSWERS)
    assert row_flops(config.model, shape, ANSWERS, OptimConfig(trainable="xp")) == pytest.approx(whole / 3)
