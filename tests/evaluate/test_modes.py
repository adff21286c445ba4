"""Examples in sight and no examples: what is drawn, against the model's own logits."""

import dataclasses

import numpy as np
import pytest

from tests.helpers import TINY
from xprompt_jax import Example
from xprompt_jax.data.sources import Record
from xprompt_jax.evaluate.modes import draw_shown, show
from xprompt_jax.evaluate.pairs import make_episodes, run_pairs
from xprompt_jax.tokens import CODE

SIZE, GRID = TINY.vq.image_size, TINY.vq.grid


@pytest.fixture
def model(loud_model):
    return loud_model


def photo(*seed):
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def greedy(model, tokens):
    """Codes by the most likely token, one after the other, by the oracle."""
    v, layout = model.tokenizer.vocab, model.prompter.layout
    ids = [v.bos, *tokens]
    template = layout.template(GRID, GRID)
    length = len(ids) + len(template)
    for forced in template:
        if forced == CODE:
            row = np.full((1, length), v.eoi, np.int32)
            row[0, : len(ids)] = ids
            logits = np.asarray(model.logits(row))[0, len(ids) - 1]
            forced = v.image_start + int(logits[v.image_start : v.image_start + v.num_codes].argmax())
        ids.append(int(forced))
    drawn = np.array(ids[-len(template) :])[template == CODE] - v.image_start
    return drawn.reshape(GRID, GRID)


def test_an_example_in_sight_stands_before_the_task(model):
    pair, query = Example(photo(0), photo(1), "remove the rain"), photo(2)
    codes = model.encode_images([pair.input, pair.output, query])
    before, task = model.prompter.example(pair.instruction, codes[0], codes[1]), model.prompter.task("paint the depth", codes[2])
    for mode, shown, tokens in (
        ("causal", pair, [*before, *task]), ("causal", None, task), ("none", pair, task),
    ):  # fmt: skip
        (image,) = draw_shown(model, [show(model, mode, shown)], ["paint the depth"], [query], temperature=0.0)
        (wanted,) = model.decode_images(greedy(model, tokens)[None])
        np.testing.assert_array_equal(image, np.asarray(wanted))
    drawn = [
        draw_shown(model, [show(model, "causal", e)], ["paint the depth"], [query], temperature=0.0, guidance=g)[0]
        for e, g in ((pair, 1.0), (None, 1.0), (pair, 4.0))
    ]
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2]), "example and guidance must matter"


def test_xp_tokens_are_those_of_generate(model):
    pair, query = Example(photo(0), photo(1), "remove the rain"), photo(2)
    (image,) = draw_shown(model, [show(model, "xprompt", pair)], ["add rain"], [query], seed=3, top_k=8)
    (wanted,) = model.generate([pair], [query], "add rain", seed=3, top_k=8)
    np.testing.assert_array_equal(image, np.asarray(wanted))


def test_arms_under_each_mode(model):
    records = [Record(photo(i, 0), photo(i, 1), "remove the rain", "add rain", task=str(i // 2), group=str(i // 2)) for i in range(4)]
    outcomes = {
        mode: list(run_pairs(model, make_episodes(records), no_example=True, mode=mode, progress=False, temperature=0.2))
        for mode in ("causal", "none")
    }
    for causal, none in zip(*outcomes.values(), strict=True):
        for arm in ("wrong", "drawn", "none"):
            np.testing.assert_array_equal(none.images[arm], causal.images["none"])  # without examples all arms are one
        assert not np.array_equal(causal.images["drawn"], causal.images["wrong"])
        e = causal.episode
        shown = show(model, "causal", Example(e.wrong.input, e.wrong.output, e.wrong.instruction))
        (alone,) = draw_shown(model, [shown], [e.query.instruction], [e.query.input], temperature=0.2)
        np.testing.assert_array_equal(causal.images["wrong"], alone)
        assert dataclasses.replace(causal, images={}).target.shape == (SIZE, SIZE, 3)
