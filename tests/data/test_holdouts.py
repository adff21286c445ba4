"""Novel tasks: no held-out direction reaches a batch, by any bucket, as query or as example."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from tests.data.slow_pipeline import made_store
from tests.helpers import tiny_tokenizer
from xprompt_jax.config import BucketConfig, DataConfig, from_json, to_json
from xprompt_jax.data.holdouts import addition_or_removal, held_directions
from xprompt_jax.data.palettes import HELD_OUT
from xprompt_jax.data.pipeline import CAPTION_QUESTION, GENERIC_INSTRUCTIONS, Episodes, Rows
from xprompt_jax.data.sources import Record
from xprompt_jax.data.tokenise import tokenize
from xprompt_jax.errors import UserError
from xprompt_jax.prompt import Prompter
from xprompt_jax.tokens import Layout

PROMPTER = Prompter(tiny_tokenizer(), Layout("plain", tiny_tokenizer().vocab, 4))
BUCKETS = (
    BucketConfig("in_context", examples=1, context=112, todo=112, answer=19, rows=8),
    BucketConfig("two", examples=2, context=112, todo=112, answer=19, rows=4),
    BucketConfig("none", examples=0, context=0, todo=160, answer=19, rows=4),
    BucketConfig("describe", examples=1, context=64, todo=120, answer=64, rows=4, kind="describe"),
    BucketConfig("text", examples=0, context=0, todo=64, answer=19, rows=4, kind="text_to_image"),
)
# What the paper withholds, and what it keeps: (task, instruction, judge, forwards held, backwards held), each by which holdout.
KINDS = (
    ("derain", "remove the rain", "", "derain"),
    ("low_light", "make it bright", "", "low_light"),
    ("retouch", "retouch", "", "low_light"),
    (f"depth/{HELD_OUT[0]}", "depth in spectral", "", "depth_spectrum"),
    ("edit", "add a dog", "", "add_remove"),
    ("edit", "please remove the car.", "", "add_remove"),
    ("edit", "let a bird fly there", "yes", "add_remove"),
    ("add_object", "one more", "", "add_remove"),
    ("edit", "make it winter", "", ""),
    ("edit", "remove the haze", "no", ""),
    ("depth/turbo", "depth in turbo", "", ""),
    ("denoise", "clean it", "", ""),
)
ALL = ("derain", "low_light", "add_remove", "depth_spectrum")


def image(seed):
    return np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def records():
    """Four pairs of every kind. All edits are one group, as they are in a dataset."""
    for k, (task, instruction, judge, _) in enumerate(KINDS):
        for i in range(4):
            seed = 100 * k + 10 * i
            yield Record(
                image(seed), image(seed + 1), instruction, f"undo {k}", f"made {k}{i}", f"unmade {k}{i}", task, task.partition("/")[0],
                f"caption {k}{i}", holdout=judge,
            )  # fmt: skip
    yield Record(image(9000), image(9002), "put on", more_inputs=(image(9001),), task="try_on", group="try_on")
    yield Record(image(9010), image(9010), "", task="text_to_image", group="laion", caption="a tree", description="a tree")


@pytest.fixture(scope="module")
def store(vqgan, tmp_path_factory):
    path = tmp_path_factory.mktemp("holdouts") / "store"
    return tokenize(records(), vqgan, tiny_tokenizer(), path, batch=16, progress=False), path


def pairs_in(tokens, vocab):
    """The images of a run of tokens, by their codes."""
    codes = tokens[(tokens >= vocab.image_start) & (tokens < vocab.image_start + vocab.num_codes)] - vocab.image_start
    return [tuple(codes[i : i + 16].tolist()) for i in range(0, len(codes), 16)]


def directions_seen(store, config, steps=24):
    """Every (pair, reverse) that stands in a row, as query or as example, whatever the bucket: images come two by two."""
    by_images = {}
    for number, pair in enumerate(itertools.islice(store.pairs, 4 * len(KINDS))):
        before, after = (tuple(store.codes[i].reshape(-1).tolist()) for i in (pair.input, pair.output))
        by_images[before, after], by_images[after, before] = (number, False), (number, True)
    rows, seen = Rows(store, PROMPTER, config, 3), set()
    for step in range(steps):
        for batch in rows(step).values():
            for ids in batch["ids"]:
                images = pairs_in(ids, PROMPTER.vocab)
                seen |= {by_images[two] for two in zip(images[::2], images[1::2], strict=False) if two in by_images}
    return seen


@pytest.mark.parametrize("holdouts, strict", [(ALL, False), (ALL, True), *(((name,), False) for name in ALL)])
def test_no_held_out_pair_reaches_a_batch(store, holdouts, strict):
    config = DataConfig(buckets=BUCKETS, seed=3, holdouts=holdouts, strict_holdouts=strict, generic_instruction=0.0)
    seen = directions_seen(store[0], config)
    for k, (task, _, _, holdout) in enumerate(KINDS):
        numbers = range(4 * k, 4 * k + 4)
        forwards, backwards = (any((n, reverse) in seen for n in numbers) for reverse in (False, True))
        held = holdout in holdouts
        assert forwards == (not held), (task, "forwards")
        assert backwards == (not held or (holdout != "add_remove" and not strict)), (task, "backwards")


def test_without_holdouts_everything_is_seen(store, tmp_path):
    """So the test above can fail; and evaluation rows are never thinned."""
    config = DataConfig(buckets=BUCKETS, seed=3, generic_instruction=0.0)
    seen = directions_seen(store[0], config)
    assert {(n // 4, reverse) for n, reverse in seen} == {(k, reverse) for k in range(len(KINDS)) for reverse in (False, True)}
    pairs = [dataclasses.replace(p, split="eval") for p in store[0].pairs]
    evaluated = made_store(tmp_path / "evaluated", pairs, tiny_tokenizer(), images=len(store[0].codes))
    count = lambda holdouts: len(Episodes(evaluated, PROMPTER, dataclasses.replace(config, holdouts=holdouts), BUCKETS[0], 3, "eval"))
    assert count(ALL) == count(()) > 0


def test_strict_leaves_neither_direction():
    for task, instruction, judge, holdout in KINDS:
        record = Record(None, None, instruction, task=task, holdout=judge)
        assert held_directions(record, (holdout,) if holdout else ALL, strict=True) == (bool(holdout), bool(holdout))
        assert held_directions(record, ()) == (False, False)


def test_an_unknown_holdout_is_refused():
    kept = DataConfig(buckets=BUCKETS, holdouts=("derain",), strict_holdouts=True)
    assert from_json(DataConfig, to_json(kept)) == kept
    with pytest.raises(UserError, match="holdouts"):
        from_json(DataConfig, to_json(kept).replace("derain", "fly"))


@pytest.mark.parametrize("instruction, kind", [
    ("Add a dog to the left", "add"), ("please insert a red balloon", "add"), ("could you put a hat on him", "add"),
    ("let there be birds", "add"),
    ("give the woman sunglasses", "add"), ("Remove the car", "remove"), ("get rid of the people in the background", "remove"),
    ("now take away the lamp", "remove"), ("erase all text", "remove"), ("make it winter", ""), ("turn the additional car red", ""),
    ("replace the dog with a cat", ""), ("add more contrast", ""), ("remove the noise", ""), ("add a vintage filter", ""),
    ("address the mail", ""),
    ("change the removed wall to blue", ""), ("", ""),
])  # fmt: skip
def test_the_keyword_rule(instruction, kind):
    assert addition_or_removal(instruction) == kind


def test_both_verdicts_stand_in_the_store(store):
    rows = [json.loads(line) for line in (store[1] / "holdouts.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * sum(task == "edit" for task, *_ in KINDS)
    for row in rows:
        pair = store[0].pairs[row["pair"]]
        assert row["instruction"] == pair.instruction and row["judge"] == pair.holdout
        assert row["keyword"] == addition_or_removal(pair.instruction)
    assert {(row["keyword"], row["judge"]) for row in rows} >= {("add", ""), ("remove", ""), ("", "yes"), ("", "")}


def test_several_inputs_stand_in_the_task(store):
    """A try-on has both its images before the answer, no example, and no way back."""
    codes, pairs = store[0].codes, store[0].pairs
    config = DataConfig(buckets=BUCKETS, generic_instruction=0.0)
    number = next(i for i, p in enumerate(pairs) if p.task == "try_on")
    for bucket in BUCKETS:
        wanted = [(number, False)] if bucket.name == "none" else []
        assert [spec for spec in Episodes(store[0], PROMPTER, config, bucket, 3, "train").specs if spec[0] == number] == wanted
    episodes = Episodes(store[0], PROMPTER, config, BUCKETS[2], 3, "train")
    sample = episodes.sample(episodes.choose(episodes.specs.index((number, False)), np.random.default_rng(0)))
    flat = [tuple(codes[i].reshape(-1).tolist()) for i in (pairs[number].input, *pairs[number].more_inputs, pairs[number].output)]
    assert pairs_in(sample.prompt, PROMPTER.vocab) + pairs_in(sample.answer, PROMPTER.vocab) == flat
    assert PROMPTER.tokenizer.decode(sample.prompt).startswith("put on") and (sample.prompt == PROMPTER.vocab.sep).sum() == 2
    words = max(len(PROMPTER.tokenizer.encode(text)) for text in ("put on", *GENERIC_INSTRUCTIONS))
    need = words + len(sample.prompt) - len(PROMPTER.tokenizer.encode("put on")) + len(sample.answer)
    for todo, fits in ((need, True), (need - 1, False)):
        episodes.bucket = dataclasses.replace(BUCKETS[2], todo=todo)
        assert episodes.fits()[number] == fits


def test_a_picture_alone_is_drawn_and_described(store):
    config = DataConfig(buckets=BUCKETS)
    number = next(i for i, p in enumerate(store[0].pairs) if p.task == "text_to_image")
    uses = {b.name: [s for s in Episodes(store[0], PROMPTER, config, b, 3, "train").specs if s[0] == number] for b in BUCKETS}
    assert uses == {"in_context": [], "two": [], "none": [], "describe": [(number, False)], "text": [(number, False)]}
    episodes = Episodes(store[0], PROMPTER, config, BUCKETS[3], 3, "train")
    sample = episodes.sample(episodes.choose(episodes.specs.index((number, False)), np.random.default_rng(0)))
    assert PROMPTER.tokenizer.decode(sample.prompt) == CAPTION_QUESTION and PROMPTER.tokenizer.decode(sample.answer) == "a tree"
    assert len(pairs_in(sample.examples[0], PROMPTER.vocab)) == 1
