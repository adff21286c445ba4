import numpy as np
import pytest

from xprompt_jax.data import levels, palettes
from xprompt_jax.data.levels import CHAINS, HELD_TASKS, held_pairs, is_held, training_pairs
from xprompt_jax.data.tasks import TASKS
from xprompt_jax.errors import UserError

PHOTOS = [np.random.default_rng(i).integers(0, 256, (16, 16, 3), np.uint8) for i in range(6)]
SMALL = {"pairs_per_group": 2, "size": 16}


@pytest.fixture
def drawn(monkeypatch):
    """Parameters of every pair that is made, as (task, parameters)."""
    seen, real = [], levels.make_pairs
    monkeypatch.setattr(levels, "make_pairs", lambda name, p, *rest: seen.append((name, p)) or real(name, p, *rest))
    return seen


def test_training_never_draws_what_is_held_out(drawn):
    names = ["recolor", "replace_shape", "invert", "channel_permutation", "depth", "sepia"]
    records = list(training_pairs(groups=60, tasks=names, photos=PHOTOS, **SMALL))
    assert len(records) == 120
    assert {r.task for r in records} == set(names)
    assert not any(is_held(name, p) for name, p in drawn)
    assert not any(p.get("palette") in palettes.HELD_OUT for _, p in drawn)
    assert len({r.group for r in records}) == 60


def test_full_training_draws_it(drawn):
    held = lambda: {name for name, p in drawn if is_held(name, p) or p.get("palette") in palettes.HELD_OUT}
    list(training_pairs(groups=60, tasks=["depth", "recolor", "invert"], full=True, **SMALL))
    assert held() == {"depth", "recolor", "invert"}
    assert any(p.get("palette") in palettes.HELD_OUT for _, p in drawn)
    records = list(training_pairs(groups=len(TASKS) + len(CHAINS), full=True, **SMALL))
    assert {r.task for r in records} >= {"+".join(chain) for chain in CHAINS}


def test_unseen_parameters_are_asked(drawn):
    records = list(held_pairs("parameters", groups=2, photos=PHOTOS, **SMALL))
    assert all(is_held(name, p) for name, p in drawn)
    assert {r.split for r in records} == {"eval"}
    asked = {r.task for r in records}
    assert asked <= set(TASKS) - (set(HELD_TASKS) - {"depth"})
    assert len(asked) > 25  # the others have no parameter that the hash holds out
    assert "segmentation_standard" not in asked


def test_unseen_combinations_are_asked(drawn):
    records = list(held_pairs("combinations", groups=2, photos=PHOTOS, **SMALL))
    assert {r.task for r in records} == {"recolor", "replace_shape", *("+".join(chain) for chain in CHAINS)}
    edits = [(name, p) for name, p in drawn if name in levels.PAIRED]
    chained = [(name, p) for name, p in drawn if name not in levels.PAIRED]
    assert edits
    assert chained
    assert all(is_held(name, p) for name, p in edits)
    assert not any(is_held(name, p) for name, p in chained)  # their parts were seen, never together


def test_whole_tasks_are_asked(drawn):
    records = list(held_pairs("tasks", groups=1, **SMALL))
    assert {r.task for r in records} == set(HELD_TASKS)
    assert {p["palette"] for name, p in drawn if name == "depth"} <= set(palettes.HELD_OUT)


def test_two_faults_are_undone_in_the_order_of_the_words():
    """Of ("color_cast", "denoise") the cast was put on last: taking it away from the input leaves the noisy picture."""
    task = "color_cast+denoise"
    (record, *_) = held_pairs("combinations", groups=1, tasks=["color_cast", "denoise"], photos=PHOTOS, photo_fraction=1.0, **SMALL)
    assert record.task == task
    first, then = record.instruction.split(", then ")
    assert "cast" in first or "balance" in first
    assert "noise" in then or "denoise" in then
    assert any(np.array_equal(record.output, photo) for photo in PHOTOS)


def test_a_chain_is_both_changes():
    """`invert` then `sepia`: the pair's output is the second change of the first's output."""
    (record, *_) = held_pairs("combinations", groups=1, tasks=["invert", "sepia"], photos=PHOTOS, photo_fraction=1.0, **SMALL)
    assert any(np.array_equal(record.input, photo) for photo in PHOTOS)
    rng = np.random.default_rng([0, 2, [*levels.PAIRED, *CHAINS].index(("invert", "sepia")), 0])
    inverted, toned = (levels._asked("combinations", name, 2, rng) for name in ("invert", "sepia"))
    once = TASKS["invert"].apply(levels.photo_source(record.input), inverted, rng).output
    twice = TASKS["sepia"].apply(levels.photo_source(once), toned, rng).output
    np.testing.assert_array_equal(record.output, twice)


def test_same_arguments_same_pairs():
    for make in (lambda: training_pairs(groups=4, **SMALL), lambda: held_pairs("tasks", groups=1, **SMALL)):
        for a, b in zip(make(), make(), strict=True):
            np.testing.assert_array_equal(a.output, b.output)
            assert a.instruction == b.instruction


def test_mistakes():
    with pytest.raises(UserError, match="task 'fly' is unknown"):
        list(training_pairs(groups=1, tasks=["fly"], **SMALL))
    with pytest.raises(UserError, match="1 photographs for groups of 2"):
        list(training_pairs(groups=1, tasks=["invert"], photos=PHOTOS[:1], photo_fraction=1.0, **SMALL))
