"""The paper's Table 4, tasks that training never saw: every arm on every task, and one table with the paper's rows.

    OUT/low_light/xprompt/   ...    a run of a suite by a model, as `xprompt eval low_light` writes it
    OUT/result.json, table4.csv, index.html

    row                              model                                shown        arm
    no example                       held out of the task                 nothing      none
    no example, a model of its own   trained without examples             nothing      drawn
    in-context, without XP tokens    trained with the example in sight    causal       drawn
    in-context, X-Prompt             held out of the task                 XP tokens    drawn
    trained on the task              saw the task in training             XP tokens    drawn

All arms draw the same queries from the same examples with the same seed, so that differences are paired.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xprompt_jax.errors import UserError
from xprompt_jax.evaluate import published
from xprompt_jax.evaluate.compare import by_query
from xprompt_jax.evaluate.edits import EditSuite
from xprompt_jax.evaluate.modes import Mode
from xprompt_jax.evaluate.pairs import paired_bootstrap
from xprompt_jax.evaluate.report import Table, write_report
from xprompt_jax.evaluate.results import FORMAT, WHOLE, Shard, finite, forget, read_json, versions, write_json
from xprompt_jax.evaluate.scores import evaluate
from xprompt_jax.evaluate.suites import Suite, get_suite
from xprompt_jax.files import atomic_path

if TYPE_CHECKING:
    from xprompt_jax.sample.sampler import XPrompt

TASKS = ("low_light", "derain_heavy", "depth", "object_addition", "object_removal")
"""Suites, in the paper's order."""
MODES_OF: Mapping[str, Mode] = {"none": "none", "causal": "causal", "xprompt": "xprompt", "full": "xprompt"}
"""Model -> how it is shown examples."""
OWN_NO_EXAMPLE = f"{published.NO_EXAMPLE}, a model of its own"
ROWS: Mapping[str, tuple[str, str]] = {
    published.NO_EXAMPLE: ("xprompt", "none"), OWN_NO_EXAMPLE: ("none", "drawn"), published.CAUSAL: ("causal", "drawn"),
    published.XP: ("xprompt", "drawn"), published.FULL: ("full", "drawn"), "the input, unchanged": ("xprompt", "copied"),
    "the target through the image tokenizer": ("xprompt", "ceiling"),
}  # fmt: skip
"""Row -> model and arm of its run."""

Load = Callable[[str], AbstractContextManager["XPrompt"]]
"""A model's folder -> the model, for as long as it is used."""


def run_table(
    load: Load, models: Mapping[str, str], data: Mapping[str, tuple[Path, Path | None]], out: Path, *, clip: Path | None = None,
    dino: Path | None = None, palette: str = "spectral", examples: int = 3, per_group: int = 0, seed: int = 0, shard: Shard = WHOLE,
    overwrite: bool = False, progress: bool = True, sampling: Mapping[str, Any] | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """Draws and scores what is missing of every arm and task, and writes the table.

    Args:
      load: one model after the other.
      models: keys of MODES_OF -> folder; "xprompt" is needed.
      data: suites of TASKS -> where their queries and (None: where `evaluate` finds them) their examples lie.
      clip, dino: weights, for the tasks that add and remove objects.
      palette: the colours of depth, which training must not have shown.
      examples, per_group, seed, shard, overwrite, progress, sampling: see `scores.evaluate`.

    Returns:
      What result.json holds; None while parts of other shards are missing.

    Raises:
      UserError: no task, an absent data set (before a model is loaded), or as `scores.evaluate`.
    """
    if not data:
        raise UserError("no data: give at least one of --low-light, --derain, --depth and --edits")
    suites = {name: _suite(name, palette, clip, dino) for name in TASKS if name in data}
    for name, suite in suites.items():
        _find(suite, *data[name])
    complete = True
    for key, folder in models.items():
        with load(folder) as model:
            if overwrite and (out / "result.json").exists():
                forget(out)
            for name, suite in suites.items():
                where, shown = data[name]
                found = evaluate(
                    model, suite, where, out / name / key, examples_from=shown, examples=examples, per_group=per_group, seed=seed,
                    mode=MODES_OF[key], shard=shard, overwrite=overwrite, progress=progress, sampling=sampling,
                )  # fmt: skip
                complete = complete and found is not None
    if not complete:
        return None
    result = collect(out, {name: list(models) for name in suites})
    result = finite(result)
    write_json(out / "result.json", result)
    write_tables(out, result)
    return result


def write_tables(out: Path, result: Mapping[str, Any]) -> None:
    """table4.csv and index.html, from what result.json holds."""
    _write_csv(out / "table4.csv", result)
    _write_page(out / "index.html", result)


def _suite(name: str, palette: str, clip: Path | None, dino: Path | None) -> Suite:
    suite = get_suite(name, palette if name == "depth" else "")
    return suite.with_encoders(clip, dino) if isinstance(suite, EditSuite) else suite


def _find(suite: Suite, data: Path, examples_from: Path | None) -> None:
    from xprompt_jax.evaluate.suites import find_records

    find_records(suite, data)
    if examples_from is not None:
        find_records(suite, examples_from, flag="the examples")


def collect(out: Path, runs: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """The table from the results of its runs.

    Args:
      runs: suite -> models.

    Raises:
      UserError: a result is missing or of another version, or two arms drew other queries.
    """
    scores: dict[str, dict[str, Any]] = {}
    for suite, keys in runs.items():
        results = {key: read_json(out / suite / key / "result.json") for key in keys}
        if len({result["data"]["fingerprint"] for result in results.values()}) > 1:
            raise UserError(f"{out / suite}: its arms have not drawn the same queries; give --overwrite to draw all again")
        tables = {key: by_query(result) for key, result in results.items()}
        scores[suite] = {metric: _rows(metric, results, tables) for metric in results["xprompt"]["scores"]}
    metrics = {suite: read_json(out / suite / "xprompt" / "result.json")["protocol"]["metrics"] for suite in runs}
    return {
        "format": FORMAT, "suite": "table4", "measures": "Table 4: tasks that training never saw.", "runs": runs, "queries": [],
        "protocol": {
            "metrics": metrics, "mean": "over the examples, with the sample standard deviation over them",
            "xp_minus": "paired bootstrap over queries, examples averaged first, 5000 resamples, 95 % percentile interval",
        },
        "versions": versions(), "scores": scores,
        "published": {"source": published.SOURCE, "rows": {suite: published.TABLE_4[suite] for suite in runs},
                      "note": published.CLASHES["Table 4"]},
    }  # fmt: skip


def _rows(metric: str, results: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    """Row -> score, and the intervals of X-Prompt's row against the others."""
    rows = {row: (key, arm) for row, (key, arm) in ROWS.items() if key in results}
    scores: dict[str, Any] = {
        row: {name: results[key]["scores"][metric][arm][name] for name in ("mean", "spread")} for row, (key, arm) in rows.items()
    }
    own = tables["xprompt"].get((metric, "drawn"), {})
    gaps = {}
    for row in (published.NO_EXAMPLE, OWN_NO_EXAMPLE, published.CAUSAL, published.FULL):
        if row in rows:
            key, arm = rows[row]
            other = tables[key].get((metric, arm), {})
            mean, low, high = paired_bootstrap([own[query] - other[query] for query in own if query in other])
            gaps[row] = {"mean": mean, "low": low, "high": high}
    return scores | {"xp_minus": gaps}


def _cells(result: Mapping[str, Any]) -> list[tuple[str, str, str, float | None]]:
    """(suite, metric, row, the paper's number) of every cell, in the paper's order of rows."""
    cells = []
    for suite, metrics in result["scores"].items():
        columns = {m.name: m.column for m in get_suite(suite).metrics}
        for metric, rows in metrics.items():
            for row in ROWS:
                if row in rows:
                    paper = published.TABLE_4[suite].get(row, {}).get(columns[metric]) if columns[metric] else None
                    cells.append((suite, metric, row, paper))
    return cells


def _others(result: Mapping[str, Any]) -> list[tuple[str, str, str, float]]:
    """The same of the paper's rows that are no model of ours."""
    return [
        (suite, m.name, row, columns[m.column])
        for suite in result["scores"] for m in get_suite(suite).metrics
        for row, columns in published.TABLE_4[suite].items() if row not in ROWS and m.column in columns
    ]  # fmt: skip


def _write_csv(path: Path, result: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(["row", "suite", "metric", "mean", "spread", "published"])
        for suite, metric, row, paper in _cells(result):
            score = result["scores"][suite][metric][row]
            writer.writerow([row, suite, metric, score["mean"], score["spread"], paper])
        writer.writerows([row, suite, metric, None, None, paper] for suite, metric, row, paper in _others(result))


def _text(value: float | None, form: str = ".3f") -> str:
    return "" if value is None or not np.isfinite(value) else f"{value:{form}}"


def lines(result: Mapping[str, Any]) -> list[str]:
    """One line for each cell, and one for each interval."""
    told = []
    for suite, metric, row, paper in _cells(result):
        score = result["scores"][suite][metric][row]
        spread = f" ± {_text(score['spread'])}" if score["spread"] is not None else ""
        beside = f"; paper: {paper:g}" if paper is not None else ""
        told.append(f"table4 {suite} {metric}: {row} {_text(score['mean']) or '-'}{spread}{beside}")
    for suite, metrics in result["scores"].items():
        for metric, rows in metrics.items():
            for row, gap in rows["xp_minus"].items():
                told.append(f"table4 {suite} {metric}: X-Prompt - {row} {_text(gap['mean'], '+.3f') or '-'} "
                            f"[{_text(gap['low'], '+.3f') or '-'}, {_text(gap['high'], '+.3f') or '-'}]")  # fmt: skip
    return told


def _write_page(path: Path, result: Mapping[str, Any]) -> None:
    tables = []
    for suite, metrics in result["scores"].items():
        names = list(metrics)
        paper = {(metric, row): number for s, metric, row, number in _cells(result) if s == suite}
        body = []
        for row in ROWS:
            if row in metrics[names[0]]:
                ours = [f"{_text(metrics[m][row]['mean'])}" + (f" ± {_text(s)}" if (s := metrics[m][row]["spread"]) else "") for m in names]
                beside = [f" ({number:g})" if (number := paper[m, row]) is not None else "" for m in names]
                body.append((row, *(a + b for a, b in zip(ours, beside, strict=True))))
        others = {(metric, row): number for s, metric, row, number in _others(result) if s == suite}
        for row in dict.fromkeys(row for _, row in others):
            body.append((row, *(f"({others[m, row]:g})" if (m, row) in others else "" for m in names)))
        for row in metrics[names[0]]["xp_minus"]:
            gaps = [metrics[m]["xp_minus"][row] for m in names]
            cells = (f"{_text(g['mean'], '+.3f')} [{_text(g['low'], '+.3f')}, {_text(g['high'], '+.3f')}]" for g in gaps)
            body.append((f"X-Prompt - {row}", *cells))
        tables.append(Table(f"{suite}: ours (the paper's)", ("row", *names), tuple(body)))
    write_report(
        path, title="xprompt eval table4",
        lead=f"{result['measures']} In brackets the numbers of {published.SOURCE} ({result['published']['note']}). Intervals are 95 %, "
             "over queries.",
        facts=[("tasks", ", ".join(result["runs"])), ("arms", ", ".join(next(iter(result["runs"].values()))))],
        rows=[], curves=[], tables=tables,
    )  # fmt: skip
