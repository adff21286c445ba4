"""Parallel decoding is exact: the real loop, run on a toy model whose law can be written out."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from xprompt_jax.sample.logits import Sampling, choose, gumbel, narrow, probabilities
from xprompt_jax.sample.rejection import couple
from xprompt_jax.sample.speculative import decode, start
from xprompt_jax.tokens import CODE

BOI, EOI, NEWLINE, FIRST = 1, 2, 3, 4


class Toy:
    """R branches of an autoregressive law over V codes: every token depends on its place and on the two before it.

    Its memory is used as a cache is: what is fed is written at pos, and read from there."""

    def __init__(self, template, codes, branches, seed=0, scale=1.6):
        self.template, self.codes, self.branches = np.array(template, np.int32), codes, branches
        shape = (branches, len(template) + 64, codes, codes, codes)
        self.table = jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)

    def look(self, memory, fed, pos):
        memory = jax.vmap(lambda m, f, p: jax.lax.dynamic_update_slice_in_dim(m, f, p, 0))(memory, fed, pos)
        at = pos[:, None] + jnp.arange(fed.shape[1])
        code = lambda place: jnp.clip(jnp.take_along_axis(memory, jnp.maximum(place, 0), 1) - FIRST, 0, self.codes - 1)
        return self.table[:, at, code(at), code(at - 1)], memory

    @functools.partial(jax.jit, static_argnames=("self", "window"))
    def decode(self, state, template, until, keys, weights, sampling, *, window):
        """The loop under test, compiled for a window and once for all chunks, as in production."""
        return decode(self.look, state, template, until, keys, weights, FIRST, sampling, window=window)

    def draw(self, keys, weights, sampling, guess, *, window, speculative, chunks=1):
        """int32 [B, codes of an image], and the number of passes."""
        pad = ((0, 0), (0, window))
        ids = jnp.broadcast_to(jnp.pad(guess[None], pad, constant_values=EOI), (len(keys), len(guess) + window))
        state = start(jnp.zeros_like(ids), ids, FIRST, self.codes, window, speculative=speculative)
        places = np.nonzero(self.template == CODE)[0]
        template = np.pad(self.template, pad[1], constant_values=EOI)
        for chunk in range(1, chunks + 1):
            until = np.int32(places[len(places) * chunk // chunks - 1])
            state = self.decode(state, template, until, keys, weights, sampling, window=window)
        return np.asarray(state.guess)[:, places] - FIRST, state.passes

    def fill(self, codes):
        """int [n, codes of an image] -> int32 [n, tokens]."""
        ids = np.tile(self.template, (len(codes), 1))
        ids[:, self.template == CODE] = np.asarray(codes) + FIRST
        return ids

    def law(self, weights, sampling):
        """float64 [V ** codes]: the probability of every image."""
        places = np.nonzero(self.template == CODE)[0]
        images = np.array(list(itertools.product(range(self.codes), repeat=len(places))))
        ids = jnp.asarray(self.fill(images))
        logits, _ = self.look(jnp.zeros_like(ids), ids, jnp.zeros(len(ids), jnp.int32))
        p = np.asarray(jax.nn.softmax(narrow(jnp.einsum("r,rbwv->bwv", weights, logits), sampling)), np.float64)
        return np.prod([p[np.arange(len(images)), place - 1, images[:, i]] for i, place in enumerate(places)], axis=0)


SMALL = Toy([BOI, CODE, CODE, NEWLINE, CODE, CODE, EOI], 3, 2)
LARGE = Toy([BOI, *[CODE] * 20, NEWLINE, *[CODE] * 20, NEWLINE, EOI], 16, 2, scale=1.0)
ONE, GUIDED = np.array([0.0, 1.0], np.float32), np.array([-0.5, 1.5], np.float32)


def chi_square_z(counts, law):
    """Standard deviations by which counts miss the law."""
    assert counts[law == 0].sum() == 0
    expected, seen = law[law > 0] * counts.sum(), counts[law > 0]
    common = expected > 5
    expected, seen = np.append(expected[common], expected[~common].sum()), np.append(seen[common], seen[~common].sum())
    if not expected[-1]:
        expected, seen = expected[:-1], seen[:-1]
    freedom = len(expected) - 1
    return (np.sum((seen - expected) ** 2 / expected) - freedom) / np.sqrt(2 * freedom)


@pytest.mark.parametrize("weights, sampling", [(ONE, Sampling()), (GUIDED, Sampling(1.3, top_k=2))], ids=["plain", "guided, top-k"])
def test_two_million_speculative_images_have_the_exact_law(weights, sampling):
    law, counts = SMALL.law(weights, sampling), np.zeros(3**4)
    assert law.sum() == pytest.approx(1, abs=1e-4)
    guess = jnp.asarray(SMALL.fill([[0, 1, 2, 0]])[0])  # drafts from a source: not drawn, one-hot
    for turn in range(8):
        keys = jax.random.split(jax.random.key(turn), 250_000)
        codes, _ = SMALL.draw(keys, weights, sampling, guess, window=3, speculative=True)
        counts += np.bincount(np.asarray(codes) @ 3 ** np.arange(3, -1, -1), minlength=len(counts))
    assert abs(chi_square_z(counts, law)) < 4


def test_the_rule_is_the_law_and_the_best_coupling():
    """Two million drafts from q become draws from p, and as many stay as can: 1 minus the total variation."""
    p, q = (jax.nn.softmax(jnp.asarray(np.random.default_rng(s).normal(size=5) * 2, jnp.float32)) for s in (0, 1))
    keys = jax.random.split(jax.random.key(0), 2_000_000)

    @jax.jit
    def draw(keys):
        first, second = jax.vmap(jax.random.split, out_axes=1)(keys)
        drafts = jax.vmap(lambda k: jax.random.categorical(k, jnp.log(q)))(first)
        tokens = couple(jnp.broadcast_to(p, (len(keys), 5)), jnp.broadcast_to(q, (len(keys), 5)), drafts, second)
        return jnp.bincount(tokens, length=5), jnp.mean(tokens == drafts)

    counts, stayed = draw(keys)
    assert abs(chi_square_z(np.asarray(counts), np.asarray(p, np.float64) / float(p.sum()))) < 4
    assert float(stayed) == pytest.approx(1 - 0.5 * float(jnp.abs(p - q).sum()), abs=2e-3)


def test_the_rule_with_a_one_hot_draft_and_without_a_choice():
    keys = jax.random.split(jax.random.key(0), 1000)
    hot = jnp.broadcast_to(jax.nn.one_hot(2, 4), (1000, 4))
    twos = jnp.full(1000, 2)
    assert (couple(hot, hot, twos, keys) == 2).all()
    assert (couple(jnp.broadcast_to(jax.nn.one_hot(1, 4), (1000, 4)), hot, twos, keys) == 1).all()


@pytest.fixture(scope="module")
def one_by_one():
    """512 seeds of the large toy under guidance, top-k and top-p, drawn by a plain loop."""
    keys, sampling = jax.random.split(jax.random.key(7), 512), Sampling(1.2, top_k=8, top_p=0.95)
    ids = jnp.zeros((512, len(LARGE.template)), jnp.int32)
    for t, forced in enumerate(LARGE.template):
        if forced == CODE:
            table = jnp.einsum("r,rabv->abv", GUIDED, LARGE.table[:, t - 1])
            before = [jnp.clip(ids[:, max(t - i, 0)] - FIRST, 0, 15) for i in (1, 2)]
            noise = gumbel(keys, jnp.full((512, 1), t), 16)[:, 0]
            forced = choose(table[before[0], before[1]], noise, sampling) + FIRST
        ids = ids.at[:, t].set(forced)
    return keys, sampling, np.asarray(ids)[:, LARGE.template == CODE] - FIRST


@pytest.mark.parametrize("window", [1, 2, 8, 32])
def test_seed_exact_is_one_by_one(one_by_one, window):
    keys, sampling, want = one_by_one
    guess = jnp.asarray(LARGE.fill(np.arange(40)[None] % 16)[0])
    for chunks in (1, 4):
        codes, passes = LARGE.draw(keys, GUIDED, sampling, guess, window=window, speculative=False, chunks=chunks)
        np.testing.assert_array_equal(codes, want)
        assert (int(passes) == 42 - 1) if window == 1 else int(passes) < 41


def test_speculative_depends_on_seed_and_window_alone(one_by_one):
    keys, sampling, _ = one_by_one
    guess = jnp.asarray(LARGE.fill(np.arange(40)[None] % 16)[0])
    draw = functools.partial(LARGE.draw, weights=GUIDED, sampling=sampling, guess=guess, window=8, speculative=True)
    together, passes = draw(keys)
    in_chunks, _ = draw(keys, chunks=5)
    np.testing.assert_array_equal(in_chunks, together)
    for row in (0, 511):
        np.testing.assert_array_equal(draw(keys[row : row + 1])[0][0], together[row])
    assert len(np.unique(together, axis=0)) == 512
    assert int(passes) < 41


def test_without_a_choice_both_rules_agree(one_by_one):
    keys, _, _ = one_by_one
    guess, greedy = jnp.asarray(LARGE.fill(np.zeros((1, 40), int))[0]), Sampling(0.0, top_k=8, top_p=0.95)
    want, _ = LARGE.draw(keys, GUIDED, greedy, guess, window=1, speculative=False)
    assert (want == want[0]).all()
    for sampling in (greedy, Sampling(1.0, top_k=1)):
        fast, _ = LARGE.draw(keys, GUIDED, sampling, guess, window=8, speculative=True)
        np.testing.assert_array_equal(fast, want)


def test_probabilities_are_what_choose_draws():
    logits = jnp.array([1.0, 3.0, 2.0])
    np.testing.assert_array_equal(probabilities(logits, Sampling(0.0)), [0, 1, 0])
    np.testing.assert_allclose(probabilities(logits, Sampling(2.0)), jax.nn.softmax(logits / 2), rtol=1e-6)
