"""Configuration: what is written there is used somewhere."""

import dataclasses
import re
from pathlib import Path

import pytest

from xprompt_jax import config as configuration
from xprompt_jax.config import PRESETS, Config, ModelConfig, from_json, to_json
from xprompt_jax.errors import UserError

PACKAGE = Path(configuration.__file__).parent
CLASSES = [c for c in vars(configuration).values() if dataclasses.is_dataclass(c) and isinstance(c, type)]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_every_field_is_read_somewhere(kind):
    code = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.name != "config.py" and p.parent.name != "demo")
    unread = [f.name for f in dataclasses.fields(kind) if not re.search(rf"\.{f.name}\b", code)]
    assert not unread


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name):
    assert from_json(ModelConfig, to_json(PRESETS[name])) == PRESETS[name]
    assert PRESETS[name].vq.num_codes + 4 < PRESETS[name].vocab_size


def test_defaults_round_trip_and_heads_are_checked():
    assert from_json(Config, to_json(Config())) == Config()
    with pytest.raises(UserError, match="num_heads 32 must be a multiple"):
        ModelConfig(num_kv_heads=5)
    with pytest.raises(UserError, match="must be even"):
        ModelConfig(head_dim=7)


@pytest.mark.parametrize("make, message", [
    (lambda: configuration.TrainConfig(steps=0), "train.steps is 0; it must be at least 1"),
    (lambda: configuration.TrainConfig(dropout=1.5), "train.dropout is 1.5; it must be at most 0.99"),
    (lambda: configuration.OptimConfig(ema_decay=2), "optim.ema_decay is 2"),
    (lambda: configuration.DataConfig(drop_example=-0.1), "data.drop_example is -0.1; it must be at least 0"),
    (lambda: configuration.DataConfig(buckets=()), "give at least one"),
    (lambda: configuration.BucketConfig("a", examples=1, context=8, todo=8, answer=9, rows=1), "longer than todo"),
    (lambda: configuration.BucketConfig("a", examples=1, context=0, todo=8, answer=2, rows=1), "both are zero, or neither"),
    (lambda: configuration.VQConfig(image_size=500), "must be a multiple of 16"),
    (lambda: ModelConfig(num_layers=0), "model.num_layers is 0"),
    (lambda: from_json(configuration.TrainConfig, '{"keep": 0}'), "train.keep is 0"),
    (lambda: configuration.TrainConfig(z_loss=float("nan")), "train.z_loss is nan"),
])  # fmt: skip
def test_values_out_of_range_are_refused_by_name(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_the_quick_recipe_goes_on_from_the_mini_on_a_store_of_plain_pairs():
    """README.md and docs/training.md start with it."""
    from xprompt_jax.commands.train import load_config
    from xprompt_jax.convert.formats import open_source

    config = load_config(Path(__file__).parents[1] / "configs/debug_cpu.py")
    assert config.model == open_source("mini").config and config.train.init_from == "mini"
    assert all(bucket.kind == "image" for bucket in config.data.buckets)  # a store of plain pairs has no descriptions


def test_the_second_stage_makes_what_ships_of_what_the_first_makes():
    from xprompt_jax.commands.train import load_config
    from xprompt_jax.convert.formats import open_source

    first, config = (load_config(Path(__file__).parents[1] / "configs" / name) for name in ("mini_cpu.py", "mini_several.py"))
    assert config.model == open_source("mini").config == dataclasses.replace(first.model, num_xp_tokens=config.model.num_xp_tokens)
    assert {bucket.examples for bucket in config.data.buckets if bucket.kind == "image"} == {1, 2, 4, 8}
