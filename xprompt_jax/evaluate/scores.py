"""`xprompt eval`: a suite's episodes drawn and scored, written as numbers, a table and a page.

`OUT/result.json` holds everything: what was measured and how, versions, scores, every query. `scores.csv` has one line for each
query, example and metric, `index.html` the same to look at, with pictures.
"""

from __future__ import annotations

import csv
import hashlib
import importlib.metadata
import json
import math
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image

from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.pairs import ARMS, Episode, Outcome, make_episodes, paired_bootstrap, run_pairs
from xprompt_jax.evaluate.report import ReportRow, Table, write_report
from xprompt_jax.evaluate.suites import Metric, Suite, Sums, find_records, reduce_sums
from xprompt_jax.files import atomic_path

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

FORMAT = "xprompt-eval-1"
SHOWN = 12
"""Rows of pictures on the page."""
LIBRARIES = ("xprompt-jax", "jax", "jaxlib", "flax", "numpy", "pillow")

NAMES = {
    "drawn": "drawn from the right example", "wrong": "drawn from a wrong example", "copied": "the input, unchanged",
    "ceiling": "the target through the image tokenizer",
}  # fmt: skip

Scores = Sequence[Mapping[str, Mapping[str, Sums]]]
"""For each episode: metric -> arm -> sums."""


def evaluate(
    model: XPrompt, suite: Suite, data: Path, out: Path, *, examples_from: Path | None = None, examples: int = 3, per_group: int = 0,
    eval_fraction: float = 1.0, seed: int = 0, progress: bool = True, sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Runs a suite and writes its three files.

    Args:
      data: a manifest, or a folder in the suite's layout.
      examples_from: another one, to take the example pairs from; without it, training pairs of `data`, or held-out ones set aside.
      examples: example pairs of each group.
      per_group: most queries of each group; 0 takes all.
      eval_fraction: held out where a manifest does not say.
      seed: of the examples, the images and the bootstrap.
      sampling: see `run_pairs`.

    Returns:
      What result.json holds.

    Raises:
      UserError: data is missing or cannot be read; says where it is expected.
    """
    size = model.config.vq.image_size
    records = find_records(suite, data, eval_fraction=eval_fraction)
    queries, shown = [r for r in records if r.split == "eval"], [r for r in records if r.split != "eval"]
    if not queries:
        raise UserError(f'--data {data}: no pair is held out; mark some "split": "eval", or give --eval-fraction')
    if examples_from is not None:
        shown = find_records(suite, examples_from, flag="--examples-from")
        if missing := {r.group for r in queries} - {r.group for r in shown}:
            raise UserError(f"--examples-from {examples_from}: no pair of group {min(missing)!r}, which --data asks for")
    episodes = make_episodes(queries, shown, examples=examples, per_group=per_group, seed=seed)
    sampling = dict(sampling or {})

    scores: list[dict[str, dict[str, Sums]]] = []
    rows: list[ReportRow] = []
    shown_of, tasks = Counter[str](), len({e.query.task for e in episodes})
    digest = hashlib.sha256()
    for outcome in run_pairs(model, episodes, read=lambda r: suite.read(r, size), seed=seed, progress=progress, **sampling):
        query = outcome.episode.query
        scores.append(suite.score(query, outcome.images, size))
        if outcome.episode.choice == 0:
            digest.update(outcome.images["copied"].tobytes() + outcome.target.tobytes())
            if len(rows) < SHOWN and shown_of[query.task] < max(1, SHOWN // tasks):
                rows.append(_row(outcome, suite, scores[-1]))
                shown_of[query.task] += 1
    result = {
        "format": FORMAT,
        "suite": suite.name,
        "measures": suite.measures,
        "model": {"fingerprint": model.fingerprint, "image_size": size, "xp_tokens": model.config.num_xp_tokens},
        "data": {
            "path": str(data), "examples_from": str(examples_from) if examples_from else None, "fingerprint": digest.hexdigest()[:16],
            "queries": len({id(e.query) for e in episodes}), "groups": len({e.query.group for e in episodes}),
            "episodes": len(episodes), "wrong_example": _what_is_wrong(episodes),
        },
        "protocol": {
            "frame": _frame(suite, size),
            "metrics": {m.name: {"protocol": m.protocol, "unit": m.unit, "better": m.better} for m in suite.metrics},
            "mean": "over the examples, of the score over all queries drawn from example number j of their group",
            "spread": "sample standard deviation of the same over the examples",
            "drawn_minus_wrong": "paired bootstrap over queries, examples averaged first, 5000 resamples, 95 % percentile interval",
        },
        "seed": seed,
        "sampling": sampling,
        "versions": versions(),
        "scores": {m.name: summarise(m, episodes, scores, seed) for m in suite.metrics},
        "published": {"source": "arXiv 2412.01824", "rows": suite.published, "note": suite.note},
        "queries": [_query(e, s) for e, s in zip(episodes, scores, strict=True)],
    }  # fmt: skip
    result = _finite(result)
    with atomic_path(out / "result.json") as temporary:
        temporary.write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False))
    _write_csv(out / "scores.csv", result)
    _write_page(out / "index.html", suite, result, rows)
    return result


def summarise(metric: Metric, episodes: Sequence[Episode], scores: Scores, seed: int = 0) -> dict[str, Any]:
    """Of each arm the score from every example, its mean and spread; and the interval of drawn - wrong."""
    choices = sorted({e.choice for e in episodes})
    summary: dict[str, Any] = {}
    for arm in ARMS:
        by_example = [
            reduce_sums(s[metric.name][arm] for e, s in zip(episodes, scores, strict=True) if e.choice == choice) for choice in choices
        ]
        with np.errstate(invalid="ignore"):  # infinities have no spread
            spread = float(np.std(by_example, ddof=1)) if len(by_example) > 1 else None
        summary[arm] = {"mean": float(np.mean(by_example)), "spread": spread, "by_example": by_example}
    per_query: dict[int, list[float]] = {}
    for e, s in zip(episodes, scores, strict=True):
        drawn, wrong = (reduce_sums([s[metric.name][arm]]) for arm in ("drawn", "wrong"))
        per_query.setdefault(id(e.query), []).append(drawn - wrong)
    mean, low, high = paired_bootstrap([float(np.mean(d)) for d in per_query.values()], seed=seed)
    summary["drawn_minus_wrong"] = {"mean": mean, "low": low, "high": high}
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


def _query(episode: Episode, scores: Mapping[str, Mapping[str, Sums]]) -> dict[str, Any]:
    name = lambda image: str(image) if isinstance(image, str | Path) else None
    return {
        "input": name(episode.query.input), "example": name(episode.example.input), "wrong": name(episode.wrong.input),
        "choice": episode.choice, "task": episode.query.task, "group": episode.query.group,
        "scores": {metric: {arm: reduce_sums([sums]) for arm, sums in arms.items()} for metric, arms in scores.items()},
    }  # fmt: skip


def versions() -> dict[str, str]:
    """Of the interpreter and of the libraries that decide numbers."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout
            import xprompt_jax

            found[name] = xprompt_jax.__version__
    return found


def _finite(value: Any) -> Any:
    """JSON has no infinities: what is not finite becomes null (the PSNR of equal images, a score of nothing)."""
    if isinstance(value, Mapping):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_csv(path: Path, result: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as f:
        writer = csv.writer(f)
        writer.writerow(["task", "group", "input", "example", "choice", "metric", *ARMS])
        for query in result["queries"]:
            for metric, arms in query["scores"].items():
                head = [query[name] for name in ("task", "group", "input", "example", "choice")]
                writer.writerow([*head, metric, *(arms[arm] for arm in ARMS)])


def _row(outcome: Outcome, suite: Suite, scores: Mapping[str, Mapping[str, Sums]]) -> ReportRow:
    query, pictures = outcome.episode.query, outcome.images
    metric = suite.metrics[0]
    shown = (
        ("example input", outcome.example[0]), ("example output", outcome.example[1]), ("input", pictures["copied"]),
        ("generated", pictures["drawn"]), ("target", outcome.target), ("from a wrong example", pictures["wrong"]),
        ("ceiling", pictures["ceiling"]),
    )  # fmt: skip
    numbers = tuple((f"{metric.name}, {arm}", f"{reduce_sums([sums]):.{_digits(metric)}f}") for arm, sums in scores[metric.name].items())
    return ReportRow(query.task or suite.name, query.instruction, tuple((label, _small(image)) for label, image in shown), numbers)


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
        gap = scores["drawn_minus_wrong"]
        body.append(("drawn - wrong, 95 % interval", text(gap["mean"]), f"{text(gap['low'])} to {text(gap['high'])}"))
        paper = [(row, columns[metric.column]) for row, columns in suite.published.items() if metric.column in columns]
        body += [(f"published: {row}", text(value), "") for row, value in paper]
        unit = f" in {metric.unit}" if metric.unit else ""
        title = f"{metric.name}{unit}, {metric.better} is better: {metric.protocol}"
        tables.append(Table(title, ("what", "mean", "spread over examples"), tuple(body)))
    data = result["data"]
    facts = [
        ("model", result["model"]["fingerprint"]), ("queries", str(data["queries"])), ("images drawn", str(2 * data["episodes"])),
        ("seed", str(result["seed"])), ("data", data["fingerprint"]),
    ]  # fmt: skip
    frame = result["protocol"]["frame"].capitalize()
    lead = f"{suite.measures} {frame}. The wrong example is {data['wrong_example']}, under the right words."
    if suite.note:
        lead += f" Beside published numbers: {suite.note}."
    write_report(path, title=f"xprompt eval {suite.name}", lead=lead, facts=facts, rows=rows, curves=[], tables=tables)
