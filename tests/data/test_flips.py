"""Pairs in a mirror."""

import dataclasses

import numpy as np

from tests.data.jobs import opened
from tests.data.making import N, normal_map
from xprompt_jax.data import palettes
from xprompt_jax.data.flips import Mirrored, mirror, mirror_words
from xprompt_jax.data.images import open_image
from xprompt_jax.data.sources import Record


def test_a_mirror_turns_normals_and_words():
    rgb = normal_map(3)
    there, back = palettes.decode_normals(rgb[2:]), palettes.decode_normals(palettes.mirror_normals(rgb)[2:])
    np.testing.assert_allclose(back, there[:, ::-1] * [-1, 1, 1], atol=1e-6)
    assert not palettes.mirror_normals(rgb)[:2].any()
    np.testing.assert_array_equal(palettes.mirror_normals(palettes.mirror_normals(rgb)), rgb)
    exact = palettes.decode_normals(palettes.mirror_normals(palettes.encode_normals(there)))
    np.testing.assert_allclose(exact, palettes.decode_normals(palettes.encode_normals(there * [-1, 1, 1]))[:, ::-1], atol=1e-6)
    assert (
        mirror_words("Left of the leftmost cat, right; bright, turn clockwise")
        == "Right of the rightmost cat, left; bright, turn counterclockwise"
    )
    photo = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    normals = Record(photo, rgb, "normals of the left", task="normals")
    turned = mirror(normals)
    np.testing.assert_array_equal(turned.input, photo[:, ::-1])
    np.testing.assert_array_equal(turned.output, palettes.mirror_normals(rgb))
    assert turned.instruction == "normals of the right"
    np.testing.assert_array_equal(mirror(dataclasses.replace(normals, task="derain")).output, rgb[:, ::-1])
    control = mirror(Record(rgb, photo, "paint", task="control_normal", more_inputs=(photo,)))
    np.testing.assert_array_equal(control.input, palettes.mirror_normals(rgb))
    np.testing.assert_array_equal(control.more_inputs[0], photo[:, ::-1])


def test_training_pairs_are_mirrored_and_no_others(tmp_path):
    pairs = opened("gopro", "MPRNet's", tmp_path)
    turned = Mirrored(pairs)
    assert len(turned) == 3 * N and [r.split for r in turned] == ["train"] * N + ["eval"] * N + ["train"] * N
    for i in range(N):
        np.testing.assert_array_equal(turned[2 * N + i].output, np.asarray(open_image(pairs[i].output))[:, ::-1])
        assert turned[i].output == pairs[i].output
