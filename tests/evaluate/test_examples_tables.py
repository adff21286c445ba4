"""tools/bench_examples.py: its tables, from images whose scores are known, and its likelihoods against the oracle."""

import jax
import numpy as np
import pytest

from tools import bench_examples as bench
from xprompt_jax import XPrompt
from xprompt_jax.prompt import Sample, SlotShape, fill


def rows(level: str, **gains: float) -> list[dict[str, str]]:
    """Two groups of two queries for each task, as they are read from a file; every doubling of the examples gains that much."""
    return [
        {"part": part, "shown": str(shown), "level": level, "task": task, "group": f"{task}{group}", "query": str(query)}
        | {"all": str(10.0 + group + gain * step), "changed": "nan" if query else str(5.0 + gain * step), "nats": str(2 - gain * step)}
        for task, gain in gains.items()
        for group in range(2)
        for query in range(2)
        for part in ("joined", "likelihood")
        for step, shown in enumerate((0, *bench.COUNTS), -1)
        if shown or part == "likelihood"
    ]


def test_whole_tasks_have_lines_of_their_own():
    told = bench.summary([*rows("parameters", blur=1.0), *rows("tasks", depth=1.0, derain=0.0)])
    line = lambda **at: next(t for t in told if at.items() <= t.items())
    assert line(part="joined", level="parameters", measure="all")["8"] == [13.5, 3.0, 3.0, 3.0]
    assert line(part="joined", level="tasks", task="depth")["4"] == [12.5, 2.0, 2.0, 2.0]
    assert line(part="likelihood", level="tasks", task="")["2"][:2] == [1.5, -0.5]
    assert line(part="likelihood", level="tasks", task="derain")["2"] == [2.0, 0.0, 0.0, 0.0]
    assert not [t for t in told if t["level"] == "parameters" and t["task"]]
    # Where nothing changes there are no changed pixels: such an image counts for nothing, not for its other score.
    assert line(part="joined", level="parameters", measure="changed") | {"images": 2, "1": [5.0, 0.0, 0.0, 0.0]} in told
    assert "| m | tasks | depth | all pixels | 4 | 10.50 (+0.00 [+0.00, +0.00]) |" in bench.markdown([{"model": "m", **t} for t in told])


@pytest.mark.parametrize("examples", [0, 1, 3])
def test_likelihoods_are_those_of_the_oracle(examples):
    model, rng = XPrompt.from_pretrained("mini"), np.random.default_rng(examples)
    vocab, image = model.tokenizer.vocab, lambda: rng.integers(0, 1024, (8, 8))
    samples = [
        Sample(
            # None is one that says nothing.
            tuple(model.prompter.example("do the same", image(), image()) for _ in range(examples)) or (np.zeros(0, np.int32),),
            model.prompter.task("remove the rain" if i else "again", image()),
            model.prompter.image_answer(image()),
        )
        for i in range(3)
    ]
    found = list(bench.costs(model, samples, batch=2))
    for sample, cost in zip(samples, found, strict=True):
        shape = SlotShape(
            len(sample.examples), len(sample.examples[0]), model.config.num_xp_tokens, len(sample.prompt) + len(sample.answer)
        )
        row = fill(sample, shape, bos=vocab.bos, pad=vocab.pad)
        logits = model.logits(row.ids[None], row.roles[None], row.groups[None], row.positions[None])[0]
        (answer,) = np.nonzero(row.weights)
        expected = -float(np.mean(jax.nn.log_softmax(logits)[answer - 1, row.ids[answer]]))
        assert cost == pytest.approx(expected, abs=2e-4)
