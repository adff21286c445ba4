"""`xprompt eval compare`: two results of one suite beside each other, query by query."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.pairs import paired_bootstrap
from xprompt_jax.evaluate.report import Table, write_report
from xprompt_jax.evaluate.results import read_json
from xprompt_jax.files import atomic_path

HEADER = ("metric", "arm", "a", "b", "b_minus_a", "low", "high", "queries", "better")


def compare(a: Path, b: Path, out: Path, *, seed: int = 0) -> list[dict[str, Any]]:
    """Compares two folders of `xprompt eval` and writes OUT/compare.csv and OUT/index.html.

    The scores of `a` and `b` are those of their results. The interval is of the difference b - a of single queries, over the queries
    that both have, their examples averaged first; for scores that pool all images (mean_iou, the angles of normals) single queries weigh
    alike in it. For reconstruction the arms are the sides, for GenEval a query is a prompt.

    Returns:
      A row for each metric and arm, with the keys of HEADER; None where there is no number.

    Raises:
      UserError: the results are of different suites, protocols or data, or cannot be read, or `out` holds those of a run.
    """
    if held := next((name for name in ("run.json", "result.json") if (out / name).exists()), None):
        raise UserError(f"--out {out}: holds the {held} of a run, whose index.html would be lost; choose another folder")
    results = _result(a), _result(b)
    _check(a, b, *results)
    tables = [by_query(result) for result in results]
    rows = []
    for metric, told in results[0]["protocol"]["metrics"].items():
        first, second = (result["scores"][metric] for result in results)
        for arm in (name for name, score in first.items() if "mean" in score and not name.startswith("drawn_minus") and name in second):
            x, y = (table.get((metric, arm), {}) for table in tables)
            differences = [y[query] - x[query] for query in x if query in y]
            mean, low, high = paired_bootstrap(differences, seed=seed)
            numbers = (first[arm]["mean"], second[arm]["mean"], mean, low, high)
            cells = [v if v is not None and math.isfinite(v) else None for v in numbers]
            rows.append(dict(zip(HEADER, (metric, arm, *cells, int(np.isfinite(differences).sum()), told["better"]), strict=True)))
    _write_csv(out / "compare.csv", rows)
    _write_page(out / "index.html", a, b, results, rows)
    return rows


def _result(out: Path) -> dict[str, Any]:
    """The result of the images that a folder holds now.

    Raises:
      UserError: it cannot be read, or other images have been drawn since.
    """
    result = read_json(out / "result.json")
    run = read_json(out / "run.json") if (out / "run.json").exists() else None  # images of another program have none
    of = lambda model, told: (model, told.get("seed"), told.get("sampling"))
    if run is not None and of(run["model"], run) != of(result["model"]["fingerprint"], result):
        raise UserError(f"{out / 'result.json'}: not of the run that {out / 'run.json'} tells; finish that with `xprompt eval`")
    return result


def _check(a: Path, b: Path, first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    """Refuses what cannot be compared."""
    if first["suite"] != second["suite"]:
        raise UserError(f"{a} is of suite {first['suite']}, {b} of {second['suite']}; compare results of one suite")
    if first["suite"] == "table4":
        raise UserError(f"{a} is a whole table; compare the folders of its runs, such as {a}/low_light/xprompt")
    if first["protocol"]["metrics"] != second["protocol"]["metrics"]:
        raise UserError(f"{a} and {b} were scored by different protocols; run one of them again with the other's version and flags")
    if first["suite"] == "pairs" and first["protocol"]["frame"] != second["protocol"]["frame"]:
        raise UserError(f"{a} and {b} were scored at different sizes ({first['model']['image_size']} and {second['model']['image_size']} "
                        "pixels); compare models of one size, or use a suite that scores whole images")  # fmt: skip
    if not {q["sha256"] for q in first["queries"]} & {q["sha256"] for q in second["queries"]}:
        marks = [result["data"]["fingerprint"] for result in (first, second)]
        raise UserError(f"{a} (data {marks[0]}) and {b} (data {marks[1]}) have no query in common; compare results on the same data")


def by_query(result: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, float]]:
    """(metric, arm) of a result.json -> query -> score, the mean over its examples; nan where there is none."""
    scores: dict[tuple[str, str], dict[str, list[float]]] = {}
    for query in result["queries"]:
        for metric, arms in query["scores"].items():
            for arm, score in arms.items():
                scores.setdefault((metric, arm), {}).setdefault(query["sha256"], []).append(math.nan if score is None else score)
    return {key: {query: float(np.mean(values)) for query, values in queries.items()} for key, queries in scores.items()}


def _text(value: float | None, form: str = ".3f") -> str:
    return "-" if value is None else f"{value:{form}}"


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each row."""
    return [
        f"{r['metric']} {r['arm']}: {_text(r['a'])} and {_text(r['b'])}, difference {_text(r['b_minus_a'], '+.3f')} "
        f"[{_text(r['low'], '+.3f')}, {_text(r['high'], '+.3f')}] over {r['queries']} queries ({r['better']} is better)"
        for r in rows
    ]


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", newline="") as f:
        writer = csv.DictWriter(f, HEADER)
        writer.writeheader()
        writer.writerows(rows)


def _write_page(path: Path, a: Path, b: Path, results: tuple[dict[str, Any], dict[str, Any]], rows: list[dict[str, Any]]) -> None:
    body = tuple(
        (f"{r['metric']} {r['arm']}, {r['better']} is better", _text(r["a"]), _text(r["b"]), _text(r["b_minus_a"], "+.3f"),
         f"{_text(r['low'], '+.3f')} to {_text(r['high'], '+.3f')}", str(r["queries"]))
        for r in rows
    )  # fmt: skip
    first, second = results
    facts = [("a", str(a)), ("model of a", str(first["model"]["fingerprint"])), ("b", str(b)),
             ("model of b", str(second["model"]["fingerprint"])), ("suite", first["suite"])]  # fmt: skip
    lead = f"{first['measures']} Differences are b - a over the queries that both have, with a 95 % paired bootstrap interval."
    if first["data"]["fingerprint"] != second["data"]["fingerprint"]:
        lead += " The two do not have all queries in common, so a and b alone are not over the same ones."
    table = Table("Scores", ("metric and arm", "a", "b", "b - a", "95 % interval", "queries"), body)
    write_report(path, title="xprompt eval compare", lead=lead, facts=facts, rows=[], curves=[], tables=[table])
