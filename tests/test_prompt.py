"""A sample becomes slots."""

import numpy as np
import pytest

from tests.helpers import random_rows, tiny_tokenizer
from xprompt_jax.config import BucketConfig
from xprompt_jax.errors import UserError
from xprompt_jax.prompt import Prompter, Role, Sample, SlotShape, fill, stack
from xprompt_jax.tokens import Layout

SHAPE = SlotShape(examples=2, context=4, xp=2, todo=6)


def sample():
    return Sample((np.array([10, 11, 12]), np.array([20])), np.array([30, 31]), np.array([40, 41]))


def test_a_row_worked_by_hand():
    row = fill(sample(), SHAPE, bos=0, pad=1)
    S, I, X, T, P = Role.SINK, Role.IE, Role.XP, Role.TD, Role.PAD
    assert row.ids.tolist() == [0, 10, 11, 12, 1, 20, 1, 1, 1, 1, 1, 1, 1, 30, 31, 40, 41, 1, 1]
    assert row.roles.tolist() == [S, I, I, I, P, I, P, P, P, X, X, X, X, T, T, T, T, P, P]
    assert row.groups.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0]
    # Each example is numbered alone; the task goes on after the longest, 1 + 3 + 2.
    assert row.positions.tolist() == [0, 1, 2, 3, 0, 1, 0, 0, 0, 4, 5, 2, 3, 6, 7, 8, 9, 0, 0]
    assert np.nonzero(row.weights)[0].tolist() == [15, 16]
    assert row.example_lengths.tolist() == [3, 1]


def test_loss_on_the_whole_task():
    assert np.nonzero(fill(sample(), SHAPE, bos=0, pad=1, loss="todo").weights)[0].tolist() == [13, 14, 15, 16]


@pytest.mark.parametrize("mode, todo", [("causal", [10, 11, 12, 20, 30, 31, 40, 41]), ("none", [30, 31, 40, 41])])
def test_ablation_modes(mode, todo):
    shape = SlotShape.of(BucketConfig("b", 2, 4, 6, 2, 1), 2, mode)
    row = fill(sample(), shape, bos=0, pad=1, mode=mode)
    assert row.ids[row.roles == Role.TD].tolist() == todo
    assert not np.isin(row.roles, [Role.IE, Role.XP]).any()
    assert row.positions[: 1 + len(todo)].tolist() == list(range(1 + len(todo)))
    assert row.ids[row.weights > 0].tolist() == [40, 41]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"examples": (np.arange(5), np.arange(1))}, "example of 5 tokens does not fit 4"),
        ({"answer": np.arange(5)}, "task of 7 tokens does not fit 6"),
        ({"examples": (np.arange(1),)}, "has 1 examples, the bucket holds 2"),
    ],
)
def test_nothing_is_cut_through(change, message):
    import dataclasses

    with pytest.raises(UserError, match=message):
        fill(dataclasses.replace(sample(), **change), SHAPE, bos=0, pad=1)


def test_stack_points_at_loss_tokens():
    rows = random_rows(0, SHAPE)
    batch = stack(rows, 6)
    for i, row in enumerate(rows):
        kept = batch["weights"][i] > 0
        assert batch["targets"][i][kept].tolist() == np.nonzero(row.weights)[0].tolist()
        assert (batch["targets"][i][~kept] == 0).all()
    with pytest.raises(UserError, match="loss tokens"):
        stack(rows, 0)


def test_examples_without_xp_tokens_are_refused():
    with pytest.raises(UserError, match="num_xp_tokens"):
        SlotShape(1, 4, 0, 4)


def test_prompt_parts():
    tokenizer = tiny_tokenizer()
    v = tokenizer.vocab
    prompter = Prompter(tokenizer, Layout("plain", v))
    before, after = np.zeros((2, 2), int), np.full((2, 2), 5)
    words = tokenizer.encode("remove the rain")
    image = lambda code: [v.boi, *[v.image_start + code] * 4, v.eoi]
    assert prompter.example("remove the rain", before, after).tolist() == [*words, *image(0), v.sep, *image(5)]
    assert prompter.task("", before).tolist() == [*image(0), v.sep]
    assert prompter.image_answer(after).tolist() == [*image(5), v.eos]
    assert prompter.text_answer("remove the rain").tolist() == [*words, v.eos]
