"""Text and images in one answer, against a plain loop over `XPrompt.logits`, one row and one token at a time."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import pytest

from tests.helpers import FP32, TINY, TINY_VQ, tiny_tokenizer
from xprompt_jax.errors import UserError
from xprompt_jax.model.chameleon import Chameleon
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.sample import write as module
from xprompt_jax.sample.logits import Sampling, choose, gumbel, penalise_repeats
from xprompt_jax.sample.sampler import Example, XPrompt
from xprompt_jax.sample.write import parts

TEXT, IMAGE = Sampling(1.2, top_p=0.9), Sampling(0.9, top_k=12)
LENGTH = 128


def make(config):
    """A model that likes to begin images."""
    decoder = Chameleon(config, jax.random.key(0))
    params, vocab = flatten(decoder), tiny_tokenizer().vocab
    params["head"] = (params["head"] * 2).at[:, vocab.boi].multiply(4)
    params["blocks.attention.wv"] = params["blocks.attention.wv"] * 4  # what stands before should matter
    return XPrompt(unflatten(decoder, params), VQGAN(config.vq, jax.random.key(1)), tiny_tokenizer(), compute=FP32)


@pytest.fixture(scope="module")
def model():
    return make(TINY)


def write(*args, **options):
    """All there is at the end."""
    *_, rows = module.write(*args, **options)
    return rows


def by_the_oracle(model, prompt, *, seed, limit, max_images, scale, penalty):
    """The rules of write.py once more, in Python."""
    v, grid = model.tokenizer.vocab, model.config.vq.grid
    codes = np.arange(v.image_start, v.image_start + v.num_codes)
    key, written, image, images = jax.random.fold_in(jax.random.key(seed), 0)[None], [], None, 0

    def last(ids):
        logits = model.logits(np.pad([ids], ((0, 0), (0, LENGTH - len(ids)))))
        return logits[0, len(ids) - 1]

    while len(written) < limit:
        logits = last([v.bos, *prompt, *written])
        noise = lambda size: gumbel(key, jnp.array([[len(written)]]), size)[0, 0]
        if image is None:
            allowed = np.isin(np.arange(len(logits)), [*v.text_ids, v.eos])
            allowed[v.boi] = images < max_images and len(written) + grid * grid + 2 <= limit
            seen = np.isin(np.arange(len(logits)), written)
            token = int(choose(jnp.where(allowed, penalise_repeats(logits, seen, penalty), -jnp.inf), noise(len(logits)), TEXT))
            if token == v.boi:
                image, images = [token], images + 1
        elif len(image) == 1 + grid * grid:
            token, image = v.eoi, None
        else:
            guided = logits[codes]
            if scale != 1:
                alone = last([v.bos, *image])[codes]
                guided = alone + scale * (guided - alone)
            token = int(codes[choose(guided, noise(len(codes)), IMAGE)])
            image.append(token)
        written.append(token)
        if token == v.eos:
            break
    return written


@pytest.mark.parametrize("scale, window", [(1.0, 5), (2.5, 1), (2.5, 32)])
def test_rows_are_what_a_plain_loop_writes(model, scale, window):
    sep, v = model.tokenizer.vocab.sep, model.tokenizer.vocab
    picture = model.prompter.layout.encode(np.arange(16).reshape(4, 4) + 3)
    prompts = [np.array([*model.tokenizer.encode(t), sep]) for t in ("paint the depth", "add rain", "remove the rain and add rain")]
    prompts.append(np.array([*picture, sep]))
    settings = dict(seed=5, max_images=2, repetition_penalty=1.3, text=TEXT, image=IMAGE, scale=scale, window=window)
    rows = write(model, [(None, p) for p in prompts], max_tokens=70, **settings)
    assert len({tuple(r[:40]) for r in rows}) == 4
    for prompt, row in zip(prompts, rows, strict=True):
        want = by_the_oracle(model, prompt.tolist(), seed=5, limit=70, max_images=2, scale=scale, penalty=1.3)
        assert row.tolist() == want
    begins = [np.nonzero(r == v.boi)[0].tolist() for r in rows]
    assert sum(map(len, begins)) > 0 and len({tuple(b) for b in begins}) > 1, "rows should be in different states at times"
    if (scale, window) == (2.5, 32):
        (alone,) = write(model, [(None, prompts[1])], max_tokens=70, **settings)
        np.testing.assert_array_equal(alone, rows[1])


def test_an_image_that_cannot_fit_is_not_begun(model, monkeypatch):
    monkeypatch.setattr(module, "_ROOM", 64)  # one shape for all limits
    v = model.tokenizer.vocab
    prompts = [(None, np.array([word, v.sep])) for word in v.text_ids[:16]]
    settings = dict(scale=1.0, text=Sampling(), image=Sampling(), repetition_penalty=1.0, window=7)
    ends_at_the_limit = 0
    for limit, max_images in ((17, 9), (18, 9), (40, 1), (40, 0)):
        for row in write(model, prompts, seed=limit, max_tokens=limit, max_images=max_images, **settings):
            begins = np.nonzero(row == v.boi)[0]
            assert len(row) <= limit and len(begins) <= (0 if limit < 18 else max_images)
            assert not np.isin(row, [v.bos, v.pad, v.sep, v.newline]).any() and (row < v.size).all()
            for at in begins:
                assert row[at + 17] == v.eoi
                assert ((row[at + 1 : at + 17] >= v.image_start) & (row[at + 1 : at + 17] < v.image_start + v.num_codes)).all()
            ends_at_the_limit += limit == 18 and len(begins)
    assert ends_at_the_limit, "no image took the last place it could"


def test_lumina_layout_is_forced():
    model = make(dataclasses.replace(TINY, layout="lumina", vq=dataclasses.replace(TINY_VQ, image_size=32)))
    answers = model.interleave(["add rain", "remove the rain"] * 2, seed=1, max_tokens=100, text=Sampling(), image=Sampling())
    drawn = [part for answer in answers for part in answer if not isinstance(part, str)]
    assert drawn and all(image.size == (32, 32) for image in drawn)


def test_interleave(model):
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    pair = [Example(image, 255 - image, "remove the rain")]
    ask = lambda prompts, **kw: model.interleave(prompts, seed=2, max_tokens=60, text=TEXT, image=IMAGE, **kw)
    answers = ask(["add rain", ["what is this", image]], task=pair, max_images=2)
    kinds = [isinstance(part, str) for answer in answers for part in answer]
    assert any(kinds) and not all(kinds)
    with_task, without = ask([[image]] * 2, task=pair, max_images=0), ask([[image]] * 2, max_images=0)
    assert with_task != without and all(isinstance(part, str) for part in with_task[0])
    with pytest.raises(UserError, match="put the prompt into"):
        model.interleave("add rain")
    with pytest.raises(UserError, match="at least one prompt"):
        model.interleave([])
    with pytest.raises(UserError, match="do not fit"):
        model.interleave(["add rain"], max_tokens=20_000)
    for wrong, value in (
        ("max_tokens", 0), ("window", 0), ("max_images", -1), ("repetition_penalty", 0), ("repetition_penalty", np.nan),
        ("max_tokens", "a"), ("repetition_penalty", "a"), ("guidance", "a"), ("seed", "a"), ("text", 0.7),
    ):  # fmt: skip
        with pytest.raises(UserError, match=wrong):
            model.interleave(["add rain"], **{wrong: value})
    for prompt in (5, PIL.Image.fromarray(image)):
        with pytest.raises(UserError, match="a text, or a list of texts and images"):
            model.interleave([prompt])
    with pytest.raises(UserError, match="question must be a text"):
        model.describe(pair, 5)
    with pytest.raises(UserError, match="a prompt must be a text"):
        model.text_to_image([5])


def test_images_take_fewer_passes_in_a_window(model, monkeypatch):
    """At a high temperature the noise of a place decides more than what stands before it, and drafts are often right."""
    passes, write_tokens = [], module.write_tokens

    def counting(*args, **options):
        rows = write_tokens(*args, **options)
        passes.append(int(rows.passes))
        return rows

    monkeypatch.setattr(module, "write_tokens", counting)
    ask = lambda window: model.interleave(
        ["add rain", "remove the rain"], seed=2, max_tokens=100, max_images=3, text=TEXT, image=Sampling(4.0), window=window
    )  # fmt: skip
    want, one_by_one = ask(1), passes[-1]
    assert sum(not isinstance(part, str) for answer in want for part in answer) > 2
    got = ask(16)
    assert all(np.array_equal(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True))
    assert passes[-1] < 0.7 * one_by_one


def test_answers_come_as_they_are_written(model):
    """Each is the beginning of the next, and the last is what `interleave` returns; an image begins before it is done."""
    prompts, options = ["add rain", "remove the rain"] * 9, dict(seed=2, max_tokens=100, max_images=3, text=TEXT, image=IMAGE, window=1)
    stream = list(model.stream_interleave(prompts, **options))
    want = model.interleave(prompts, **options)
    same = lambda a, b: len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(stream) > 4 and all(same(a, b) for a, b in zip(stream[-1], want, strict=True))
    for before, after in itertools.pairwise(stream):
        for a, b in zip(before, after, strict=True):
            assert len(a) <= len(b) and same(a[:-1], b[: max(len(a) - 1, 0)])
    assert stream[0][16:] == [[], []], "what is written in a second turn is empty before it"


def test_a_half_drawn_image_is_shown(model):
    v, codes = model.tokenizer.vocab, np.array([7, 3, 5])
    words = model.tokenizer.encode("add rain")
    for count in (0, 1, 3):
        text, image = parts(model, np.array([*words, v.boi, *(codes[:count] + v.image_start)]))
        square = np.concatenate([codes[:count], np.full(16 - count, codes[0] if count else 0)]).reshape(1, 4, 4)
        assert text == "add rain" and np.array_equal(image, model.decode_images(square)[0])


def test_descriptions_of_several_pairs_are_those_of_each(model):
    images = list(np.random.default_rng(1).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8))
    pairs = [[Example(images[i], images[i + 1])] for i in (0, 2, 4)]
    options = dict(seed=3, max_tokens=40, temperature=1.0, repetition_penalty=1.2)
    together = model.describe_all(pairs, **options)
    assert together == [model.describe(p, **options) for p in pairs]
    assert len(set(together)) > 1
    assert model.describe_all([model.compile(pairs[1]), pairs[2], pairs[0]], **options) == [*together[1:], together[0]]
    assert model.describe(pairs[0], defaults="chameleon", max_tokens=40) != model.describe(pairs[0], max_tokens=40)
