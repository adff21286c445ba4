"""`xprompt eval`: a suite's episodes drawn and scored, written as numbers, a table and a page.

`OUT/images/` holds what was drawn (runs.py), `OUT/result.json` everything else: what was measured and how, versions, scores, every query.
`scores.csv` has one line for each query, example and metric, `index.html` the same to look at, with pictures.
"""

from __future__ import annotations

import concurrent.futures
import csv
import functools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from tqdm import tqdm

from xprompt_jax.evaluate.pairs import NO_EXAMPLE, Episode, paired_bootstrap
from xprompt_jax.evaluate.report import ReportRow, Table, write_report
from xprompt_jax.evaluate.results import FORMAT, fingerprint, finite, read_json, versions, write_json
from xprompt_jax.evaluate.runs import ARMS, OF_A_QUERY, OF_AN_EXAMPLE, Plan, draw_missing, make_plan, open_images
from xprompt_jax.evaluate.suites import Metric, Suite, Sums
from xprompt_jax.files import atomic_path

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

SHOWN = 12
"""Rows of pictures on the page."""
WORKERS = 8
"""Episodes that are scored at the same time, if there are so many processors."""

NAMES = {
    "drawn": "drawn from the right example", "wrong": "drawn from a wrong example", "none": "drawn without an example",
    "copied": "the input, unchanged", "ceiling": "the target through the image tokenizer",
}  # fmt: skip
CONTROLS = ("wrong", NO_EXAMPLE)
"""Arms that the drawn one is compared with, query by query."""

Scores = Sequence[Mapping[str, Mapping[str, Sums]]]
"""For each episode: metric -> arm -> sums."""


def evaluate(
    model: XPrompt, suite: Suite, data: Path, out: Path, *, examples_from: Path | None = None, examples: int = 3, per_group: int = 0,
    eval_fraction: float = 1.0, seed: int = 0, overwrite: bool = False, progress: bool = True, sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs a suite and writes its files; what `out` holds of the same run already is not drawn again.

    Args:
      data, examples_from, examples, per_group, eval_fraction: see `make_plan`.
      seed: of the examples, the images and the bootstrap.
      overwrite: draw again what other settings drew.
      sampling: see `run_pairs`.

    Returns:
      What result.json holds.

    Raises:
      UserError: data is missing or cannot be read (says where it is expected), or `out` holds images of other settings.
    """
    plan = make_plan(
        suite, data, examples_from=examples_from, examples=examples, per_group=per_group, eval_fraction=eval_fraction, seed=seed
    )
    draw_missing(model, plan, out, sampling=sampling or {}, overwrite=overwrite, progress=progress)
    run = read_json(out / "run.json")
    scores = score_plan(plan, out, run["image_size"], progress=progress)
    result = finite(_result(plan, run, scores, model.config.num_xp_tokens))
    write_json(out / "result.json", result)
    _write_csv(out / "scores.csv", result)
    _write_page(out / "index.html", suite, result, _rows(plan, out, run["image_size"], scores))
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


def _result(plan: Plan, run: Mapping[str, Any], scores: Scores, xp_tokens: int) -> dict[str, Any]:
    suite, episodes, size = plan.suite, plan.episodes, run["image_size"]
    return {
        "format": FORMAT,
        "suite": suite.name,
        "measures": suite.measures,
        "model": {"fingerprint": run["model"], "image_size": size, "xp_tokens": xp_tokens},
        "data": {
            "path": plan.where["data"], "examples_from": plan.where["examples_from"],
            "fingerprint": fingerprint(*sorted(plan.marks.values())),
            "queries": len(plan.marks), "groups": len({e.query.group for e in episodes}), "episodes": len(episodes),
            "wrong_example": _what_is_wrong(episodes),
        },
        "protocol": {
            "frame": _frame(suite, size),
            "metrics": {m.name: {"protocol": m.protocol, "unit": m.unit, "better": m.better} for m in suite.metrics},
            "mean": "over the examples, of the score over all queries drawn from example number j of their group",
            "spread": "sample standard deviation of the same over the examples",
            "drawn_minus": "paired bootstrap over queries, examples averaged first, 5000 resamples, 95 % percentile interval",
        },
        "seed": run["seed"],
        "sampling": run["sampling"],
        "versions": versions(),
        "scores": summarise_all(plan, scores),
        "published": {"source": "arXiv 2412.01824", "rows": suite.published, "note": suite.note},
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
            "task": e.query.task, "group": e.query.group,
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
    number = lambda value: "-" if value is None else f"{value:.{_digits(metric)}f}"
    signed = lambda value: "-" if value is None else f"{value:+.{_digits(metric)}f}"
    spread, gap = scores["drawn"]["spread"], scores["drawn_minus_wrong"]
    paper = [f"{row} {columns[metric.column]:g}" for row, columns in suite.published.items() if metric.column in columns]
    parts = [
        f"drawn {number(scores['drawn']['mean'])}{f' ± {number(spread)}' if spread is not None else ''}",
        *(f"{arm} {number(scores[arm]['mean'])}" for arm in ARMS[1:]),
        f"drawn - wrong {signed(gap['mean'])} [{signed(gap['low'])}, {signed(gap['high'])}]",
    ]
    unit = f" ({metric.unit})" if metric.unit else ""
    return f"{suite.name} {metric.name}{unit}: {', '.join(parts)}" + (f"; paper: {paper[0]}" if paper else "")


def _digits(metric: Metric) -> int:
    return 2 if metric.unit in ("dB", "%", "degrees", "levels") else 3


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


def _write_csv(path: Path, result: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["task", "group", "input", "example", "choice", "metric", *ARMS])
        for query in result["queries"]:
            for metric, arms in query["scores"].items():
                head = [query[name] for name in ("task", "group", "input", "example", "choice")]
                writer.writerow([*head, metric, *(arms[arm] for arm in ARMS)])


def _rows(plan: Plan, out: Path, size: int, scores: Scores) -> list[ReportRow]:
    """The first queries of each task."""
    rows: list[ReportRow] = []
    shown, tasks, metric = Counter[str](), len({e.query.task for e in plan.episodes}), plan.suite.metrics[0]
    for episode, sums_of in zip(plan.episodes, scores, strict=True):
        query = episode.query
        if episode.choice or len(rows) == SHOWN or shown[query.task] == max(1, SHOWN // tasks):
            continue
        shown[query.task] += 1
        images, example = open_images(plan, out, episode, size), plan.suite.read(episode.example, size)
        pictures = (
            ("example input", example[0]), ("example output", example[1]), ("input", images["copied"]), ("generated", images["drawn"]),
            ("target", plan.suite.read(query, size)[1]), ("from a wrong example", images["wrong"]), ("without an example", images["none"]),
            ("ceiling", images["ceiling"]),
        )  # fmt: skip
        numbers = tuple((f"{metric.name}, {arm}", f"{metric.reduce([s]):.{_digits(metric)}f}") for arm, s in sums_of[metric.name].items())
        small = tuple((label, _small(image)) for label, image in pictures)
        rows.append(ReportRow(query.task or plan.suite.name, query.instruction, small, numbers))
    return rows


def _small(image: np.ndarray, side: int = 256) -> np.ndarray:
    """At most `side` pixels: the page holds many."""
    if image.shape[0] <= side:
        return image
    return np.asarray(PIL.Image.fromarray(image).resize((side, side), PIL.Image.Resampling.LANCZOS))


def _write_page(path: Path, suite: Suite, result: Mapping[str, Any], rows: Sequence[ReportRow]) -> None:
    tables = []
    for metric in suite.metrics:
        scores, digits = result["scores"][metric.name], _digits(metric)
        text = lambda value, digits=digits: "" if value is None else f"{value:.{digits}f}"
        body = [(NAMES[arm], text(scores[arm]["mean"]), text(scores[arm]["spread"])) for arm in ARMS]
        for control in CONTROLS:
            gap = scores[f"drawn_minus_{control}"]
            body.append((f"drawn - {control}, 95 % interval", text(gap["mean"]), f"{text(gap['low'])} to {text(gap['high'])}"))
        paper = [(row, columns[metric.column]) for row, columns in suite.published.items() if metric.column in columns]
        body += [(f"published: {row}", text(value), "") for row, value in paper]
        unit = f" in {metric.unit}" if metric.unit else ""
        title = f"{metric.name}{unit}, {metric.better} is better: {metric.protocol}"
        tables.append(Table(title, ("what", "mean", "spread over examples"), tuple(body)))
    data = result["data"]
    facts = [
        ("model", result["model"]["fingerprint"]), ("queries", str(data["queries"])),
        ("images drawn", str(2 * data["episodes"] + data["queries"])),
        ("seed", str(result["seed"])), ("data", data["fingerprint"]),
    ]  # fmt: skip
    frame = result["protocol"]["frame"].capitalize()
    lead = f"{suite.measures} {frame}. The wrong example is {data['wrong_example']}, under the right words."
    if suite.note:
        lead += f" Beside published numbers: {suite.note}."
    write_report(path, title=f"xprompt eval {suite.name}", lead=lead, facts=facts, rows=rows, curves=[], tables=tables)
