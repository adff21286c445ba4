"""Episodes from columns against the oracle that goes pair by pair, and what is drawn of them."""

import dataclasses
import itertools

import numpy as np
import pytest

from tests.data.slow_pipeline import SlowEpisodes, made_store
from tests.helpers import tiny_tokenizer
from xprompt_jax.config import BucketConfig, DataConfig
from xprompt_jax.data.palettes import HELD_OUT
from xprompt_jax.data.pipeline import Episodes, Rows
from xprompt_jax.data.table import Pair, Pairs
from xprompt_jax.errors import UserError
from xprompt_jax.prompt import Prompter, SlotShape
from xprompt_jax.tokens import Layout, train_tokenizer

PROMPTER = Prompter(tiny_tokenizer(), Layout("plain", tiny_tokenizer().vocab, 4))
BUCKETS = (
    BucketConfig("in_context", examples=1, context=80, todo=80, answer=19, rows=8),
    BucketConfig("two", examples=2, context=80, todo=80, answer=19, rows=4),
    BucketConfig("none", examples=0, context=0, todo=112, answer=19, rows=4),
    BucketConfig("several", examples=0, context=0, todo=112, answer=19, rows=4, several_inputs=True),
    BucketConfig("describe", examples=1, context=64, todo=90, answer=40, rows=4, kind="describe"),
    BucketConfig("text", examples=0, context=0, todo=50, answer=19, rows=4, kind="text_to_image"),
)
ALL = ("derain", "low_light", "add_remove", "depth_spectrum")
IMAGES, PAIRS = 40, 150


def made_pairs(seed, count=PAIRS):
    """Pairs of every kind, with few images, so that scenes are shared, and texts of all lengths, none included."""
    rng = np.random.default_rng(seed)
    tasks = ("derain", "low_light", "edit", "add_object", f"depth/{HELD_OUT[0]}", "denoise")
    verbs = ("", "add a dog", "remove the rain", "paint it red", "make the rain fall in grey until the output image has no rain at all")
    text = lambda: str(rng.choice(verbs)) * int(rng.integers(1, 3))
    for _ in range(count):
        task = str(rng.choice(tasks))
        more = tuple(int(i) for i in rng.integers(0, IMAGES, rng.integers(1, 3))) if rng.random() < 0.15 else ()
        yield Pair(
            int(rng.integers(IMAGES)), int(rng.integers(IMAGES)), text(), text(), text(), text(), task, f"g{rng.integers(12)}", text(),
            "train" if rng.random() < 0.8 else "eval", more, str(rng.choice(["", "yes", "no"])), f"d{rng.integers(3)}",
        )  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return made_store(tmp_path_factory.mktemp("pairs") / "store", list(made_pairs(0)), tiny_tokenizer(), images=IMAGES, crops=3)


SETTINGS = (
    {}, {"holdouts": ALL}, {"holdouts": ("derain", "low_light"), "strict_holdouts": True}, {"same_scene_partner": True},
    {"reverse": False, "holdouts": ("add_remove",)},
)  # fmt: skip


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("bucket", BUCKETS, ids=lambda b: b.name)
def test_episodes_are_those_of_the_slow_form(store, bucket, settings):
    config = DataConfig(buckets=(bucket,), **settings)
    training = [i for i, p in enumerate(store.pairs) if p.split == "train"]
    near = np.random.default_rng(1).choice([-1, *training], (PAIRS, 3))
    for split, neighbours in itertools.product(("train", "eval"), (None, near)):
        slow = SlowEpisodes(store, PROMPTER, config, bucket, split, neighbours)
        fast = Episodes(store, PROMPTER, config, bucket, 3, split, neighbours)
        assert list(fast.specs) == slow.specs
        fits = fast.fits()
        assert [slow.fits(p) for p in slow.table] == fits.tolist() and 0 < fits.sum() < PAIRS
        if bucket.kind != "image" or not bucket.examples:
            continue
        for number, reverse in fast.specs:
            assert sorted(fast.partners[reverse].of(number)) == slow.partners(number, reverse)
            assert int(fast.partners[reverse].count(np.array([number]))[0]) == len(slow.partners(number, reverse))
            if neighbours is not None:
                assert fast.near(number, reverse).tolist() == slow.near(number, reverse)


def test_no_pair_is_read_before_the_first_row(store, monkeypatch):
    """What there is to draw follows from columns: a store of millions starts as fast as its columns are read."""
    config, asked = DataConfig(buckets=BUCKETS, holdouts=("derain",), weights={"d0": 10.0}), []
    for name in ("__getitem__", "text"):
        original = getattr(Pairs, name)
        monkeypatch.setattr(Pairs, name, lambda self, *args, original=original: (asked.append(args), original(self, *args))[1])
    rows = Rows(store, PROMPTER, config, 3)
    assert not asked and rows.num_episodes > 100
    rows(0)
    assert 0 < len([1 for args in asked if len(args) == 1]) <= sum(b.rows * (1 + b.examples) for b in BUCKETS)


def test_partners_are_drawn_evenly(store):
    config = DataConfig(buckets=BUCKETS[:1], holdouts=("derain",))
    episodes, rng = Episodes(store, PROMPTER, config, BUCKETS[0], 3, "train"), np.random.default_rng(0)
    number, reverse = max(episodes.specs, key=lambda spec: len(episodes.partners[spec[1]].of(spec[0])))
    allowed = episodes.partners[reverse].of(number)
    drawn = [episodes.choose(episodes.specs.index((number, reverse)), rng).partners[0] for _ in range(400 * len(allowed))]
    counts = np.array([drawn.count(j) for j in allowed])
    assert len(allowed) > 2 and counts.sum() == len(drawn) and (abs(counts - 400) < 100).all()  # five standard deviations


def test_counts_of_another_text_tokenizer(store):
    """Texts are counted as the model's tokenizer sees them, not as the store's did."""
    other = train_tokenizer(["no words in common"], num_codes=32, vocab_size=330)
    prompter = Prompter(other, Layout("plain", other.vocab, 4))
    bucket = dataclasses.replace(BUCKETS[-2], todo=130, answer=60)
    config = DataConfig(buckets=(bucket,))
    slow = SlowEpisodes(store, prompter, config, bucket, "train")
    assert list(Episodes(store, prompter, config, bucket, 3, "train").specs) == slow.specs
    assert list(Episodes(store, PROMPTER, config, bucket, 3, "train").specs) != slow.specs


def test_a_pair_is_one_crop_and_its_example_another(store):
    """All images of the query are of one crop, all of an example of another, and every crop comes."""
    config = DataConfig(buckets=(BUCKETS[0], BUCKETS[2]), generic_instruction=0.0)
    for bucket in config.buckets:
        episodes, seen = Episodes(store, PROMPTER, config, bucket, 3, "train"), set()
        for i in range(len(episodes)):
            choice = episodes.choose(i, np.random.default_rng(i))
            seen.add((choice.crop, *choice.partner_crops))
            sample, pair = episodes.sample(choice), store.pairs[choice.pair]
            images = [pair.output, pair.input] if choice.reverse else [pair.input, *pair.more_inputs, pair.output]
            assert codes_in(sample.prompt) + codes_in(sample.answer) == [flat(store, image, choice.crop) for image in images]
            for example, partner, crop in zip(sample.examples, choice.partners, choice.partner_crops, strict=True):
                shown = store.pairs[partner]
                two = [shown.input, shown.output][:: -1 if choice.reverse else 1]
                assert codes_in(example) == [flat(store, image, crop) for image in two]
        assert seen == set(itertools.product(range(3), repeat=1 + bucket.examples))


def test_repeated_examples_are_the_query_itself(store):
    """As often as asked, at any place among the examples, in the query's own crop; never in held-out rows; all else is drawn as without."""
    bucket, trials = BUCKETS[0], 400

    def draw(share, split):
        episodes = Episodes(store, PROMPTER, DataConfig(buckets=(bucket,), repeat_example=share), bucket, 3, split)
        return [episodes.choose(i % len(episodes), np.random.default_rng(i)) for i in range(trials)]

    plain, places = draw(0.0, "train"), []
    for before, after in zip(plain, draw(0.25, "train"), strict=True):
        if after == before:
            continue
        at = after.partners.index(after.pair)
        places.append(at)
        assert after.partner_crops[at] == after.crop
        others = lambda of: [*of[:at], *of[at + 1 :]]  # noqa: B023
        assert others(after.partners) == others(before.partners) and others(after.partner_crops) == others(before.partner_crops)
        assert dataclasses.replace(after, partners=before.partners, partner_crops=before.partner_crops) == before
    assert 60 < len(places) < 140  # 100 of 400, within four standard deviations
    assert set(places) == set(range(bucket.examples))
    assert draw(0.25, "eval") == draw(0.0, "eval")


def flat(store, image, crop):
    return tuple(store.codes.crops(image)[crop].reshape(-1).tolist())


def codes_in(tokens):
    """Codes of every image among the tokens, 16 each."""
    vocab = PROMPTER.vocab
    codes = tokens[(tokens >= vocab.image_start) & (tokens < vocab.image_start + vocab.num_codes)] - vocab.image_start
    return [tuple(codes[i : i + 16].tolist()) for i in range(0, len(codes), 16)]


def test_choices_are_what_the_rows_show(store):
    config = DataConfig(buckets=BUCKETS, seed=5, generic_instruction=0.3, drop_example=0.2, holdouts=("derain",))
    rows = Rows(store, PROMPTER, config, 3)
    for step in (0, 3):
        batches, choices = rows(step), rows.choices(step)
        assert list(choices) == [b.name for b in BUCKETS]
        for bucket in BUCKETS:
            episodes = Episodes(store, PROMPTER, config, bucket, 3, "train")
            for row, choice in enumerate(choices[bucket.name]):
                np.testing.assert_array_equal(episodes.slots(choice).ids, batches[bucket.name]["ids"][row])
        assert [name.split(" pair ")[1] for name in rows.names(step)] == [
            f"{c.pair + 1}{' reversed' if c.reverse else ''}" for b in BUCKETS for c in choices[b.name]
        ]


@pytest.mark.parametrize("mode", ["xprompt", "causal", "none"])
def test_the_loss_on_whole_tasks_needs_no_setting_beside(store, mode):
    # Of every bucket: answers are a small part of these rows.
    for name, batch in Rows(store, PROMPTER, DataConfig(buckets=BUCKETS, mode=mode, loss="todo"), 3)(0).items():
        answers = Rows(store, PROMPTER, DataConfig(buckets=BUCKETS, mode=mode), 3)(0)[name]
        shape = SlotShape.of(next(b for b in BUCKETS if b.name == name), 3, mode)
        for row, of_answer in zip(range(len(batch["ids"])), answers["targets"], strict=True):
            asked = set(batch["targets"][row]) - {0}
            assert asked > set(of_answer) - {0}
            assert asked == set(shape.xp_end + np.flatnonzero(batch["positions"][row, shape.xp_end :]))


def test_several_inputs_need_a_bucket_without_examples():
    with pytest.raises(UserError, match="several_inputs is for rows of kind image without examples"):
        BucketConfig("x", examples=1, context=8, todo=8, answer=4, rows=1, several_inputs=True)


def test_words_that_point_to_an_example_need_one(store):
    """Rows without examples keep their instruction."""
    for bucket in BUCKETS[:4]:
        episodes = Episodes(store, PROMPTER, DataConfig(generic_instruction=1.0), bucket, 3, "train")
        assert {bool(episodes.choose(i, np.random.default_rng(i)).generic) for i in range(6)} == {bucket.examples > 0}
