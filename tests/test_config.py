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
    code = "\n".join(p.read_text() for p in PACKAGE.rglob("*.py") if p.name not in ("config.py", "demo.py"))
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
