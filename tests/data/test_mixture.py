"""What is drawn how often; and the paper's tables."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from tests.data.slow_pipeline import made_store
from tests.helpers import TINY, tiny_tokenizer
from xprompt_jax.cli import main
from xprompt_jax.commands.train import load_config
from xprompt_jax.config import BucketConfig, Config, DataConfig, from_json, to_json
from xprompt_jax.convert.native import save_tokenizers
from xprompt_jax.data.datasets import DATASETS
from xprompt_jax.data.mixture import PAPER, PAPER_WEIGHTS, REST, Mixture, report, totals
from xprompt_jax.data.pipeline import Rows
from xprompt_jax.data.table import Pair
from xprompt_jax.errors import UserError
from xprompt_jax.prompt import Prompter
from xprompt_jax.tokens import Layout

PROMPTER = Prompter(tiny_tokenizer(), Layout("plain", tiny_tokenizer().vocab, 4))
BUCKETS = (
    BucketConfig("in_context", examples=1, context=80, todo=80, answer=19, rows=16),
    BucketConfig("describe", examples=1, context=64, todo=90, answer=40, rows=8, kind="describe"),
)
SIZES = {
    ("gopro", "deblur"): 40, ("rain13k", "derain"): 10, ("multigen", "control_depth"): 20, ("multigen", "control_hed"): 6, ("", "mine"): 24,
}  # fmt: skip
"""(dataset, task) -> pairs."""


def made_pairs():
    """Of each dataset and task, so many; only GoPro's and our own are described, and Rain13K has no way back."""
    image = iter(range(10_000))
    for (dataset, task), count in SIZES.items():
        words = "more" if task in ("deblur", "mine") else ""
        for _ in range(count):
            back = "" if task == "derain" else "undo"
            yield Pair(next(image) % 300, next(image) % 300, "do", back, words, words, task, task, "", "train", dataset=dataset)
        yield Pair(next(image) % 300, next(image) % 300, "do", "undo", "", "", task, task, "", "eval", dataset=dataset)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return made_store(tmp_path_factory.mktemp("mixture") / "store", list(made_pairs()), tiny_tokenizer(), images=300)


def drawn(store, weights, steps=40, **options):
    """Task -> share of the rows of each bucket."""
    rows = Rows(store, PROMPTER, DataConfig(buckets=BUCKETS, weights=weights, seed=2), 3, **options)
    names = store.pairs.task.names
    tasks = {b.name: [names[store.pairs.task.codes[c.pair]] for step in range(steps) for c in rows.choices(step)[b.name]] for b in BUCKETS}
    return {bucket: {name: found.count(name) / len(found) for name in names} for bucket, found in tasks.items()}


@pytest.mark.parametrize("weights, counts", [
    ({}, {"deblur": 80, "derain": 10, "control_depth": 40, "control_hed": 12, "mine": 48}),  # episodes, both ways where there are two
    ({"gopro": 10, "rain13k": 100}, {"deblur": 20, "derain": 100, "control_depth": 40, "control_hed": 12, "mine": 48}),
    ({"multigen": 52, "mine": 0}, {"deblur": 80, "derain": 10, "control_depth": 80, "control_hed": 24, "mine": 0}),
    ({"multigen": 60, "control_depth": 1}, {"deblur": 80, "derain": 10, "control_depth": 2, "control_hed": 120, "mine": 48}),
])  # fmt: skip
def test_rows_come_as_often_as_their_weights_say(store, weights, counts):
    shares = drawn(store, weights)
    for task, count in counts.items():
        assert shares["in_context"][task] == pytest.approx(count / sum(counts.values()), abs=0.02)
    described = {task: counts[task] for task in ("deblur", "mine")}
    for task, count in described.items():
        assert shares["describe"][task] == pytest.approx(count / sum(described.values()), abs=0.03)


def test_every_episode_of_a_part_comes_before_any_comes_again(store):
    rows = Rows(store, PROMPTER, DataConfig(buckets=BUCKETS[:1], weights={"rain13k": 95}, seed=2), 3)  # every 2nd row, of 10 pairs
    task = store.pairs.task
    pairs = [c.pair for step in range(10) for c in rows.choices(step)["in_context"]]
    derain = [i for i in pairs if task.names[task.codes[i]] == "derain"]
    epochs = [derain[first : first + 10] for first in range(0, len(derain) - 9, 10)]
    assert len(epochs) >= 5 and all(len({*epoch}) == 10 for epoch in epochs) and epochs[0] != epochs[1]


def test_a_mixture_is_the_same_on_any_number_of_hosts_and_after_a_stop(store):
    config = DataConfig(buckets=BUCKETS, weights={"gopro": 7.5, "control_hed": 31}, seed=2)
    whole = Rows(store, PROMPTER, config, 3)
    for step in (0, 11):
        for hosts in (1, 2, 4):
            parts = [Rows(store, PROMPTER, config, 3, host=(i, hosts))(step) for i in range(hosts)]
            for name, batch in whole(step).items():
                together = np.concatenate([part[name]["ids"] for part in parts])
                assert sorted(map(bytes, together)) == sorted(map(bytes, batch["ids"]))


def test_weights_that_mean_nothing_are_told(store):
    make = lambda weights: Rows(store, PROMPTER, DataConfig(buckets=BUCKETS, weights=weights), 3)
    with pytest.raises(UserError, match="data.weights: 'gorpo' is no dataset and no task of the store; it has control_depth, .*gopro"):
        make({"gorpo": 1})
    with pytest.raises(UserError, match="data.weights leave no pair of a bucket"):
        make({"gopro": 0, "mine": 0})  # nothing left to describe
    with pytest.raises(UserError, match="'gopro' has -1"):
        DataConfig(weights={"gopro": -1})
    make({"gopro": 1, "ultraedit": 500_000})  # of the paper, but not in this store
    config = DataConfig(weights={"gopro": 2, "x": 0.5})
    assert from_json(DataConfig, to_json(config)) == config


def test_the_tables_add_up_as_in_the_paper():
    assert totals() == {"table_6": 1_942_700, "table_6_augmented": 6_770_800, "table_7": 240_000, "table_7_augmented": 240_000}
    assert sum(PAPER_WEIGHTS.values()) == pytest.approx(1_942_700 + 240_000)
    assert PAPER_WEIGHTS["lol_v1"] + PAPER_WEIGHTS["lol_v2_real"] + PAPER_WEIGHTS["lol_v2_synthetic"] == pytest.approx(6_000)
    names = {*DATASETS, *(task for dataset in DATASETS.values() for task in dataset.card.tasks)}
    for row in PAPER:
        assert {*row.ours} <= names, row.name


def test_the_papers_mixture_is_a_configuration(store):
    config = load_config(Path(__file__).parents[2] / "configs/paper_mixture.py")
    assert dict(config.data.weights) == PAPER_WEIGHTS
    rows = {b.name: b.rows for b in config.data.buckets}
    assert sum(rows.values()) == 1024
    samples = {"in_context": 2_885_400, "describe": 3_385_400, "text_to_image": 500_000, "several_inputs": 240_000}
    for name, count in samples.items():  # multiples of 32
        assert abs(rows[name] - 1024 * count / sum(samples.values())) < 32
    assert sum(samples.values()) == totals()["table_6_augmented"] + totals()["table_7_augmented"]
    mixture = Mixture.of(store.pairs, PAPER_WEIGHTS, np.ones(len(store.pairs), bool))
    assert mixture.factors[mixture.names.index("gopro")] == 17_000 / 41 and mixture.factors[mixture.names.index(REST)] == 1


def test_the_report_puts_paper_and_store_side_by_side(vqgan, tmp_path, capsys):
    store = made_store(tmp_path / "store", list(made_pairs()), tiny_tokenizer(), images=300)
    save_tokenizers(store.folder / "tokenizers", vqgan, tiny_tokenizer())
    data = DataConfig(store=str(store.folder), buckets=BUCKETS, weights={"rain13k": 95})
    (tmp_path / "config.json").write_text(to_json(Config(model=TINY, data=data)))
    main(["inspect", "--workdir", str(tmp_path), "--mixture"])
    lines = capsys.readouterr().out.splitlines()
    cells = {line.split()[0]: line.split() for line in lines if line}
    assert cells["GoPro"][1:5] == ["17,000", "4", "68,000", "40"] and cells["hed2img"][4] == "6"
    assert cells["Table"][1:] == ["7", "240,000", "240,000", "0"] and cells["not"][-1] == "24"
    assert any(line.split()[:2] == ["Table", "6"] and line.split()[2:] == ["1,942,700", "6,770,800", "76"] for line in lines)
    shares = [line.split() for line in lines if "rows a step" in line and "episodes" in line]
    assert shares[0][:2] == ["rain13k", "10"] and float(shares[0][3]) == pytest.approx(100 * 95 / 275, abs=0.01)
    empty = dataclasses.replace(data, buckets=(dataclasses.replace(BUCKETS[0], several_inputs=True, examples=0, context=0),))
    assert "finds no train pair" in report(Config(model=TINY, data=empty))
