"""What tools/bench_decode.py counts: bytes, passes and slots of a real model, and shares of lines whose answers are known."""

import argparse

import bench_decode as bench
import pytest

from tests.helpers import TINY


@pytest.mark.parametrize("precision, number, scales", [("float/float", 4, 0), ("int8/int8", 1, 4)])
def test_bytes_passes_and_slots(precision, number, scales):
    args = argparse.Namespace(one=precision, batches=[2], windows=[4], codes=8, repeats=1)
    lines = {(line["example"], line["window"]): line for line in bench.measure_ours(TINY, "float32", args)}
    assert set(lines) == {("compiled", 1), ("compiled", 4), ("kept", 1)}
    plain, kept = lines["compiled", 1], lines["kept", 1]
    d, f, h, g, k, n, codes = TINY.dim, TINY.ffn_dim, TINY.num_heads, TINY.num_kv_heads, TINY.head_dim, TINY.num_layers, TINY.vq.num_codes
    matrices, outputs = n * (2 * d * h * k + 2 * d * g * k + 3 * d * f) + d * codes, n * ((h + 2 * g) * k + d + 2 * f + d) + codes
    norms = n * (2 * d + 2 * (h + g) * k)  # of the block; of every head of queries and keys, scale and bias
    assert plain["of_which_weights"] == number * matrices + scales * outputs + 4 * norms
    slot = 2 * n * g * (number * k + scales)
    assert plain["bytes_a_pass"] == plain["of_which_weights"] + int(slot * plain["mean_filled_slots"])
    assert plain["passes"] == kept["passes"] == 8 > lines["compiled", 4]["passes"]
    # Two rows of guidance for each of two images. Compiled, both see S XP tokens; kept, one of them sees the example: two images and words.
    images = 2 * (TINY.vq.grid**2 + 2)
    assert kept["mean_filled_slots"] - plain["mean_filled_slots"] >= 2 * images - 4 * TINY.num_xp_tokens


def test_shares_and_goals():
    line = {"contender": "ours", "precision": "float/float", "example": "compiled", "batch": 16, "window": 1, "seconds_a_pass": 0.01}
    told = bench.with_floor({**line, "bytes_a_pass": 24 * 10**9, "seconds_an_image": 1.0}, 4800)
    assert told["floor_seconds_a_pass"] == 0.005 and told["share_of_bandwidth"] == 0.5
    theirs = {"contender": "eager", "example": "kept", "batch": 16, "seconds_an_image": 9.0}
    wide = {**told, "window": 8, "seconds_a_pass": 0.02}
    found = bench.compare([told, {**told, "example": "kept", "seconds_an_image": 2.0}, wide, bench.with_floor(theirs, 4800)])
    assert found["compiled prompt over example in context, batch 16"] == {"is": 2.0, "goal": 1.6}
    assert found["break_even, float/float, batch 16, window 8"] == {"codes a pass": 2.0}
    assert found["example in context, one by one, over eager, batch 16"] == {"times": 4.5}
