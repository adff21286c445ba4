"""`xprompt eval recompute`: every number of a result once more, from the images and verdicts that lie beside it.

The scores of result.json are computed again from the files. Its tables and its page are written again from result.json, and must say what
they say; pictures on the page are not compared, which another version of the PNG writer may pack otherwise.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xprompt_jax.data.images import list_images
from xprompt_jax.data.retrieval import RetrievalIndex
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate import geneval, pages, reconstruction, table4
from xprompt_jax.evaluate.edits import EditSuite
from xprompt_jax.evaluate.magicbrush import MagicBrushSuite
from xprompt_jax.evaluate.results import file_fingerprint, fingerprint, finite, read_json
from xprompt_jax.evaluate.runs import plan_again
from xprompt_jax.evaluate.scores import list_queries, score_plan, summarise_all
from xprompt_jax.evaluate.suites import get_suite

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
      UserError: a number differs, of result.json or of a table or page; the data has changed, or a file is missing.
    """
    result = read_json(out / "result.json")
    if result["suite"] == "geneval":
        return _geneval(out, result)
    if result["suite"] == "table4":
        return _table(out, result, clip, dino, progress)
    run = read_json(out / "run.json")
    if result["suite"] == "reconstruction":
        paths = list_images(data or Path(run["where"]["data"]))
        if fingerprint(*map(file_fingerprint, paths)) != run["images"]:
            raise UserError(f"--data {data or run['where']['data']}: not the images that {out} was made of; say with --data where they are")
        count = _compare(out, result, reconstruction.score_reconstructions(out, paths, result["sides"]))
        _check_tables(out, lambda to: reconstruction.write_tables(to, out, paths, result))
        return count
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
    count = _compare(out, result, again, TOLERANCE_FEATURES if isinstance(suite, EditSuite) else TOLERANCE)
    _check_tables(out, lambda to: pages.write_tables(to, plan, out, result))
    return count


def _table(out: Path, result: dict[str, Any], clip: Path | None, dino: Path | None, progress: bool) -> int:
    """Of every run of a table, and then of the table."""
    counts = [
        recompute(out / suite / key, clip=clip, dino=dino, progress=progress) for suite, keys in result["runs"].items() for key in keys
    ]
    count = sum(counts) + _compare(out, result, table4.collect(out, result["runs"]))
    _check_tables(out, lambda to: table4.write_tables(to, result))
    return count


def _geneval(out: Path, result: dict[str, Any]) -> int:
    """From results.jsonl and the prompts' own metadata.jsonl."""
    folders = sorted(path.parent for path in out.glob("[0-9]*/metadata.jsonl"))
    metadata = [row for folder in folders for row in geneval.read_metadata(folder / "metadata.jsonl")]
    num_images = len(list((folders[0] / "samples").glob("*.png"))) if folders else 0
    geneval.check_folder(out, metadata, num_images)
    correct = geneval.read_results(out / "results.jsonl", metadata, num_images)
    count = _compare(out, result, geneval.make_result(correct, metadata))
    _check_tables(out, lambda to: geneval.write_tables(to, out, result, correct, metadata))
    return count


def _check_tables(out: Path, write: Callable[[Path], None]) -> None:
    """Writes the tables and the page of a result again, and compares what they say.

    Raises:
      UserError: one is missing, or says something else.
    """
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        for path in sorted(p for p in Path(folder).iterdir() if p.suffix in (".csv", ".html")):
            if not (out / path.name).is_file() or _said(out / path.name) != _said(path):
                raise UserError(f"{out / path.name}: missing, or not what result.json says; remove it and run `xprompt eval` again")


def _said(path: Path) -> str:
    """A table or a page without its pictures."""
    return re.sub(r'"data:image/png;base64,[^"]*"', '""', path.read_text(encoding="utf-8"))


def _compare(out: Path, result: dict[str, Any], again: dict[str, Any], tolerance: float = TOLERANCE) -> int:
    """Counts the scores of a result that a second computation gives again."""
    if len(result["queries"]) != len(again["queries"]):
        raise UserError(f"{out / 'result.json'}: has {len(result['queries'])} queries, and its files {len(again['queries'])}")
    old, new = ({k: v for part in ("scores", "shares") for k, v in _numbers(finite(r.get(part, {})), part)} for r in (result, again))
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
