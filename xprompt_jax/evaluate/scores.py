"""`xprompt eval`: a suite's episodes drawn and scored, written as numbers, a table and a page.

`OUT/images/` holds what was drawn (runs.py), `OUT/result.json` everything else: what was measured and how, versions, scores, every query.
`scores.csv` has one line for each query, example and metric, `index.html` the same to look at, with pictures, `grid.png` these alone.
"""

from __future__ import annotations

import concurrent.futures
import functools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from xprompt_jax.evaluate import published
from xprompt_jax.evaluate.measures import Metric, Sums
from xprompt_jax.evaluate.modes import Mode
from xprompt_jax.evaluate.pages import write_tables
from xprompt_jax.evaluate.pairs import NO_EXAMPLE, Episode, paired_bootstrap, pairs_in
from xprompt_jax.evaluate.results import FORMAT, WHOLE, Shard, fingerprint, finite, read_json, versions, write_json
from xprompt_jax.evaluate.runs import ARMS, OF_A_QUERY, OF_AN_EXAMPLE, Plan, draw_missing, make_plan, missing, open_images
from xprompt_jax.evaluate.suites import Suite

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

Scores = Sequence[Mapping[str, Mapping[str, Sums]]]
"""For each episode: metric -> arm -> sums."""

WORKERS = 8
"""Episodes that are scored at the same time, if there are so many processors."""

CONTROLS = ("wrong", NO_EXAMPLE)
"""Arms that the drawn one is compared with, query by query."""


def evaluate(
    model: XPrompt, suite: Suite, data: Path, out: Path, *, examples_from: Path | None = None, examples: int = 3, per_group: int = 0,
    eval_fraction: float = 1.0, seed: int = 0, mode: Mode = "xprompt", shard: Shard = WHOLE, overwrite: bool = False,
    progress: bool = True, sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """Runs a suite and writes its files; what `out` holds of the same run already is not drawn again.

    Args:
      data, examples_from, examples, per_group, eval_fraction: see `make_plan`.
      seed: of the examples, the images and the bootstrap.
      mode: how examples are shown.
      shard: the part of the queries to draw. Parts share `out`; whichever of them finds it complete scores the whole.
      overwrite: draw again what other settings drew.
      sampling: see `run_pairs`.

    Returns:
      What result.json holds; None while other parts are missing.

    Raises:
      UserError: data is missing or cannot be read (says where it is expected), or `out` holds images of other settings.
    """
    plan = make_plan(
        suite, data, examples_from=examples_from, examples=examples, per_group=per_group, eval_fraction=eval_fraction, seed=seed
    )
    draw_missing(model, plan, out, sampling=sampling or {}, mode=mode, shard=shard, overwrite=overwrite, progress=progress)
    if missing(plan, out):
        return None
    run = read_json(out / "run.json")
    scores = score_plan(plan, out, run["image_size"], progress=progress)
    result = finite(_result(plan, run, scores, model))
    write_json(out / "result.json", result)
    write_tables(out, plan, out, result)
    return result


def score_plan(plan: Plan, out: Path, size: int, *, progress: bool = True) -> list[dict[str, dict[str, Sums]]]:
    """Scores every episode from its files.

    Raises:
      UserError: an image is missing or damaged.
    """

    one_of = {id(e.query): e for e in plan.episodes}

    @functools.lru_cache(maxsize=2 * WORKERS)  # the examples of a query stand side by side
    def of_query(key: int) -> dict[str, dict[str, Sums]]:
        return score(one_of[key], OF_A_QUERY)

    def score(episode: Episode, arms: Sequence[str]) -> dict[str, dict[str, Sums]]:
        return plan.suite.score(episode.query, open_images(plan, out, episode, size, arms), size)

    def whole(episode: Episode) -> dict[str, dict[str, Sums]]:
        own, shared = score(episode, OF_AN_EXAMPLE), of_query(id(episode.query))
        return {metric: {**own[metric], **shared[metric]} for metric in own}

    with concurrent.futures.ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        done = tqdm(pool.map(whole, plan.episodes), total=len(plan.episodes), unit="episode", desc="scoring", disable=not progress)
        return list(done)


def _result(plan: Plan, run: Mapping[str, Any], scores: Scores, model: XPrompt) -> dict[str, Any]:
    suite, episodes, size = plan.suite, plan.episodes, run["image_size"]
    return {
        "format": FORMAT,
        "suite": suite.name,
        "measures": suite.measures,
        "model": {"fingerprint": run["model"], "image_size": size, "xp_tokens": model.config.num_xp_tokens, "mode": run["mode"]},
        "data": {
            "path": plan.where["data"], "examples_from": plan.where["examples_from"],
            "fingerprint": fingerprint(*sorted(plan.marks.values())),
            "queries": len(plan.marks), "groups": len({e.query.group for e in episodes}), "episodes": len(episodes),
            "wrong_example": _what_is_wrong(episodes),
        },
        "protocol": {
            "frame": _frame(suite, size),
            "prompt": f"words, input, separator, output; images framed as {model.config.layout}; the words are those of each query",
            "metrics": {m.name: {"protocol": m.protocol, "unit": m.unit, "better": m.better} for m in suite.metrics},
            "mean": "over the examples, of the score over all queries drawn from example number j of their group",
            "spread": "sample standard deviation of the same over the examples",
            "drawn_minus": "paired bootstrap over queries, examples averaged first, 5000 resamples, 95 % percentile interval",
        },
        "seed": run["seed"],
        "sampling": run["sampling"],
        "versions": versions(),
        "scores": summarise_all(plan, scores),
        "published": {"source": published.SOURCE, "rows": suite.published, "note": suite.caveat(len(plan.marks))},
        "queries": list_queries(plan, scores),
    }  # fmt: skip


def summarise_all(plan: Plan, scores: Scores) -> dict[str, dict[str, Any]]:
    """Metric -> `summarise`."""
    return {m.name: summarise(m, plan.episodes, scores, plan.settings["seed"]) for m in plan.suite.metrics}


def list_queries(plan: Plan, scores: Scores) -> list[dict[str, Any]]:
    """What result.json says of each episode."""
    name = lambda image: str(image) if isinstance(image, str | Path) else None
    return [
        {
            "number": plan.numbers[id(e.query)], "input": name(e.query.input), "target": name(e.query.output),
            "sha256": plan.marks[id(e.query)], "example": name(e.example.input), "wrong": name(e.wrong.input), "choice": e.choice,
            "task": e.query.task, "group": e.query.group, "words": [pair.instruction for pair in pairs_in(e.query)],
            "scores": {m.name: {arm: m.reduce([sums]) for arm, sums in s[m.name].items()} for m in plan.suite.metrics},
        }
        for e, s in zip(plan.episodes, scores, strict=True)
    ]  # fmt: skip


def summarise(metric: Metric, episodes: Sequence[Episode], scores: Scores, seed: int = 0) -> dict[str, Any]:
    """Of each arm the score from every example, its mean and spread; and the intervals of drawn - wrong and of drawn - none."""
    choices = sorted({e.choice for e in episodes})
    arms = scores[0][metric.name]
    summary: dict[str, Any] = {}
    for arm in arms:
        by_example = [
            metric.reduce(s[metric.name][arm] for e, s in zip(episodes, scores, strict=True) if e.choice == choice) for choice in choices
        ]
        with np.errstate(invalid="ignore"):  # infinities have no spread
            spread = float(np.std(by_example, ddof=1)) if len(by_example) > 1 else None
        summary[arm] = {"mean": float(np.mean(by_example)), "spread": spread, "by_example": by_example}
    for control in CONTROLS:
        if control not in arms:
            continue
        per_query: dict[int, list[float]] = {}
        for e, s in zip(episodes, scores, strict=True):
            drawn, other = (metric.reduce([s[metric.name][arm]]) for arm in ("drawn", control))
            per_query.setdefault(id(e.query), []).append(drawn - other)
        mean, low, high = paired_bootstrap([float(np.mean(d)) for d in per_query.values()], seed=seed)
        summary[f"drawn_minus_{control}"] = {"mean": mean, "low": low, "high": high}
    return summary


def lines(suite: Suite, result: Mapping[str, Any]) -> list[str]:
    """One line for each score, beside the paper's."""
    return [_line(suite, metric, result["scores"][metric.name]) for metric in suite.metrics]


def _line(suite: Suite, metric: Metric, scores: Mapping[str, Any]) -> str:
    number = lambda value: "-" if value is None else f"{value:.{metric.digits}f}"
    signed = lambda value: "-" if value is None else f"{value:+.{metric.digits}f}"
    spread, gap = scores["drawn"]["spread"], scores["drawn_minus_wrong"]
    rows = [(row, columns[metric.column]) for row, columns in suite.published.items() if metric.column in columns]
    rows.sort(key=lambda row: "X-Prompt" not in row[0])  # the others keep their order
    parts = [
        f"drawn {number(scores['drawn']['mean'])}{f' ± {number(spread)}' if spread is not None else ''}",
        *(f"{arm} {number(scores[arm]['mean'])}" for arm in ARMS[1:]),
        f"drawn - wrong {signed(gap['mean'])} [{signed(gap['low'])}, {signed(gap['high'])}]",
    ]
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{suite.name} {metric.name}{unit}: {', '.join(parts)}" + (f"; paper: {rows[0][0]} {rows[0][1]:g}" if rows else "")


def _frame(suite: Suite, size: int) -> str:
    if suite.whole:
        return f"whole images, stretched to {size} x {size} pixels and the drawn ones back to the target's size; scored there"
    return f"short side to {size} pixels and the centre crop, of inputs and targets alike; scored there"


def _what_is_wrong(episodes: Sequence[Episode]) -> str:
    if episodes[0].backwards:  # there is one group
        return "the right example, shown backwards"
    if any(e.wrong.task == e.query.task for e in episodes):
        return "a pair of another group"
    return "a pair of another task"
