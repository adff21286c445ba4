"""Nearest neighbours against brute force, and what the hashed encoder finds close."""

import numpy as np
import pytest

from xprompt_jax.data.retrieval import HashedNgramEncoder, neighbours


@pytest.mark.parametrize("chunk", [7, 64, 1000])
def test_neighbours_are_brute_force(chunk):
    rng = np.random.default_rng(0)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
    queries, keys = unit(rng.normal(size=(9, 16))).astype(np.float32), unit(rng.normal(size=(50, 16))).astype(np.float32)
    keys[10] = keys[40] = keys[3]  # ties
    query_groups, key_groups = rng.integers(0, 3, 9), rng.integers(0, 3, 50)
    index, cosine = neighbours(queries, keys, 5, query_groups=query_groups, key_groups=key_groups, chunk=chunk)
    scores = (queries @ keys.T).astype(np.float64)
    scores[:, [10, 40]] = scores[:, [3]]
    scores[query_groups[:, None] == key_groups] = -np.inf
    for row in range(9):
        want = np.lexsort((np.arange(50), -scores[row]))[:5]
        assert index[row].tolist() == want.tolist()
        np.testing.assert_allclose(cosine[row], scores[row, want], atol=1e-5)


def test_too_few_keys_are_marked():
    keys = np.eye(3, dtype=np.float32)
    index, cosine = neighbours(keys[:1], keys, 3, query_groups=np.array([0]), key_groups=np.array([0, 1, 0]))
    assert index.tolist() == [[1, -1, -1]] and np.isneginf(cosine[0, 1:]).all()


def test_encoder_brings_like_instructions_together():
    texts = ["remove the rain", "please remove the rain!", "add a red sphere", "Add one red sphere", "make it night", ""]
    vectors = HashedNgramEncoder()(texts)
    np.testing.assert_allclose(np.linalg.norm(vectors[:5], axis=1), 1, atol=1e-5)
    assert (vectors[5] == 0).all()
    index, _ = neighbours(vectors[:4], vectors, 1, query_groups=np.arange(4), key_groups=np.arange(6))
    assert index[:, 0].tolist() == [1, 0, 3, 2]
    np.testing.assert_array_equal(HashedNgramEncoder()(texts[:1]), vectors[:1])
