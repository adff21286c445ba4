"""`xprompt eval recompute`: every number of a result once more, from the images and verdicts that lie beside it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from xprompt_jax.data.images import list_images
from xprompt_jax.data.retrieval import RetrievalIndex
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate import geneval
from xprompt_jax.evaluate.edits import EditSuite
from xprompt_jax.evaluate.magicbrush import MagicBrushSuite
from xprompt_jax.evaluate.reconstruction import score_reconstructions
from xprompt_jax.evaluate.results import file_fingerprint, fingerprint, finite, read_json
from xprompt_jax.evaluate.runs import plan_again
from xprompt_jax.evaluate.scores import list_queries, score_plan, summarise_all
from xprompt_jax.evaluate.suites import get_suite
from xprompt_jax.evaluate.table4 import collect

TOLERANCE = 1e-9
"""Another processor adds in another order."""
TOLERANCE_FEATURES = 1e-4
"""Of scores by CLIP and DINO, in float32."""


def recompute(
    out: Path, *, data: Path | None = None, examples_from: Path | None = None, clip: Path | None = None, dino: Path | None = None,
    index: Path | None = None, progress: bool = True,
) -> int:  # fmt: skip
    """Computes a folder's scores again, from its files and the data's, and compares them with result.json.

    Args:
      out: what a finished `xprompt eval` wrote.
      data, examples_from: where the data lies now; None takes where it lay.
      clip, dino: weights that the suite of edits scores with.
      index: which its examples were retrieved from, if they were.

    Returns:
      How many numbers were computed again; all are equal.

    Raises:
      UserError: a number differs, the data has changed, or a file is missing.
    """
    result = read_json(out / "result.json")
    if result["suite"] == "geneval":
        return _compare(out, result, _geneval(out))
    if result["suite"] == "table4":
        return _table(out, result, clip, dino, progress)
    run = read_json(out / "run.json")
    if result["suite"] == "reconstruction":
        paths = list_images(data or Path(run["where"]["data"]))
        if fingerprint(*map(file_fingerprint, paths)) != run["images"]:
            raise UserError(f"--data {data or run['where']['data']}: not the images that {out} was made of; say with --data where they are")
        return _compare(out, result, score_reconstructions(out, paths, result["sides"]))
    suite = get_suite(run["suite"], run["palette"])
    if isinstance(suite, EditSuite):
        suite = suite.with_encoders(clip, dino)
        if index is not None and isinstance(suite, MagicBrushSuite):
            suite = suite.with_retrieval(RetrievalIndex.load(index), run["examples"], run["per_group"])
    plan = plan_again(run, suite, data, examples_from)
    for name, value in plan.settings.items():
        if run[name] != value:
            raise UserError(f"--data {plan.where['data']}: its pairs are not those that {out} was drawn from ({name} {value}, not "
                            f"{run[name]}); say with --data and --examples-from where they are")  # fmt: skip
    scores = score_plan(plan, out, run["image_size"], progress=progress)
    again = {"scores": summarise_all(plan, scores), "queries": list_queries(plan, scores)}
    return _compare(out, result, again, TOLERANCE_FEATURES if isinstance(suite, EditSuite) else TOLERANCE)


def _table(out: Path, result: dict[str, Any], clip: Path | None, dino: Path | None, progress: bool) -> int:
    """Of every run of a table, and then of the table."""
    counts = [
        recompute(out / suite / key, clip=clip, dino=dino, progress=progress) for suite, keys in result["runs"].items() for key in keys
    ]
    return sum(counts) + _compare(out, result, collect(out, result["runs"]))


def _geneval(out: Path) -> dict[str, Any]:
    """From results.jsonl and the prompts' own metadata.jsonl."""
    folders = sorted(path.parent for path in out.glob("[0-9]*/metadata.jsonl"))
    metadata = [row for folder in folders for row in geneval.read_metadata(folder / "metadata.jsonl")]
    num_images = len(list((folders[0] / "samples").glob("*.png"))) if folders else 0
    geneval.check_folder(out, metadata, num_images)
    return geneval.make_result(geneval.read_results(out / "results.jsonl", metadata, num_images), metadata)


def _compare(out: Path, result: dict[str, Any], again: dict[str, Any], tolerance: float = TOLERANCE) -> int:
    """Counts the scores of a result that a second computation gives again."""
    if len(result["queries"]) != len(again["queries"]):
        raise UserError(f"{out / 'result.json'}: has {len(result['queries'])} queries, and its files {len(again['queries'])}")
    old, new = dict(_numbers(finite(result["scores"]), "scores")), dict(_numbers(finite(again["scores"]), "scores"))
    for number, (a, b) in enumerate(zip(result["queries"], again["queries"], strict=True)):
        old |= _numbers(a["scores"], f"queries[{number}]")
        new |= _numbers(finite(b["scores"]), f"queries[{number}]")
    for name in [*old, *new]:
        a, b = old.get(name), new.get(name)
        if a != b and (a is None or b is None or not math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance)):
            raise UserError(f"{out / 'result.json'}: {name} is {a}, and {b} from its files; they were changed, or made by another version")
    return len(old)


def _numbers(value: Any, name: str) -> Iterator[tuple[str, float | None]]:
    """Every number below a value, by its place."""
    if isinstance(value, dict):
        for key, v in value.items():
            yield from _numbers(v, f"{name}.{key}")
    elif isinstance(value, list):
        for i, v in enumerate(value):
            yield from _numbers(v, f"{name}[{i}]")
    else:
        yield name, value
