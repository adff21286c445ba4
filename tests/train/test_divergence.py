"""Runs that break: what is told, what is saved, and where they go on from."""

import json
import shutil

import jax
import numpy as np
import pytest

from tests.train.test_training import CONFIG, data, replace
from xprompt_jax.errors import UserError
from xprompt_jax.train.loop import _LeftOut, train
from xprompt_jax.train.metrics import read_metrics


def test_rows_are_left_out_once_and_for_all(tmp_path):
    """In whatever order rollbacks fall: a step trains on the rows of its number among those that are left."""
    left = _LeftOut(tmp_path)
    left.add(10, 5)
    assert [left.index(i) for i in (9, 10, 11)] == [9, 15, 16]
    left.add(8, 4)  # a checkpoint was lost: rows 8, 9, 15 and 16 broke too
    assert [left.index(i) for i in range(7, 10)] == [7, 17, 18]
    left.add(8, 1)
    assert left.index(8) == 18 and [_LeftOut(tmp_path).index(i) for i in range(30)] == [left.index(i) for i in range(30)]


def broken_at(bad, calls=None):
    """The usual rows, with one step's weights beyond all numbers."""

    def source(step):
        if calls is not None:
            calls.append(step)
        rows = data(step)
        if step in bad:
            rows["in_context"] = rows["in_context"] | {"weights": np.full_like(rows["in_context"]["weights"], np.inf)}
        return rows

    return source


def test_divergence_stops_the_run_and_is_not_saved(tmp_path):
    with pytest.raises(UserError, match=r"step 2: .*its rows: row 1-0, row 1-1\. The run has diverged"):
        train(CONFIG, tmp_path, broken_at({1}), names=lambda step: [f"row {step}-0", f"row {step}-1"], progress=False)
    assert read_metrics(tmp_path)[0]["step"] == 1
    assert not list((tmp_path / "checkpoints").glob("[2-9]"))


def test_a_broken_run_goes_back_and_leaves_the_rows_out(tmp_path):
    """Rolled back, then stopped and resumed, it is bitwise the run that never met those rows."""
    config = replace(train={"steps": 9, "on_divergence": "roll-back", "keep": 9})
    around = train(config, tmp_path / "around", lambda step: data(step if step < 4 else step + 2), progress=False)
    met = train(config, tmp_path / "met", broken_at({5}), progress=False)
    assert json.loads((tmp_path / "met/left_out.json").read_text()) == [{"from": 4, "steps": 2}]
    for a, b in zip(jax.tree.leaves(around), jax.tree.leaves(met), strict=True):
        np.testing.assert_array_equal(a, b)
    told = lambda name: [(m["step"], m["loss"]) for m in read_metrics(tmp_path / name) if "loss" in m]
    assert told("met") == told("around")

    shutil.rmtree(tmp_path / "met/checkpoints/9")
    shutil.rmtree(tmp_path / "met/checkpoints/8")
    again = train(config, tmp_path / "met", broken_at({5}), progress=False)
    for a, b in zip(jax.tree.leaves(around), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def test_going_back_ends_somewhere(tmp_path):
    config = replace(train={"steps": 9, "on_divergence": "roll-back"})
    with pytest.raises(UserError, match=r"step 2: loss .* no checkpoint to go back to"):
        train(config, tmp_path / "early", broken_at({1}), progress=False)
    with pytest.raises(UserError, match="Rolled back 5 times already"):
        train(config, tmp_path / "often", broken_at(set(range(3, 99))), progress=False)


def test_a_resumed_run_finds_the_spikes_of_the_uninterrupted_one(tmp_path):
    """The running mean that losses are held against goes on from the checkpoint."""
    config = replace(train={"steps": 6, "spike_factor": 50.0})
    train(config, tmp_path / "whole", data, progress=False)
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    known = json.loads((cut / "mean_loss.json").read_text())
    assert list(known) == ["2", "4", "6"]
    for step in "4", "6":
        shutil.rmtree(cut / "checkpoints" / step)
    train(config, cut, data, progress=False)
    assert json.loads((cut / "mean_loss.json").read_text()) == known

    for step in "4", "6":
        shutil.rmtree(cut / "checkpoints" / step)
    (cut / "mean_loss.json").write_text(json.dumps(known | {"2": known["2"] / 100}))
    with pytest.raises(UserError, match="step 3: loss .* more than 50.0 times its running mean"):
        train(config, cut, data, progress=False)


def test_a_run_goes_back_while_it_is_profiled(tmp_path):
    config = replace(train={"steps": 9, "on_divergence": "roll-back", "profile": (5, 8)})
    assert train(config, tmp_path, broken_at({5}), progress=False).step == 9
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
