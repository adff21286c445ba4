"""What more examples give, and what retrieved ones give, on tasks that the model has never seen.

    python tools/bench_examples.py --models xp=mini first=runs/mini_cpu/run/model
    python tools/bench_examples.py --tables        # the tables again, from the episodes that are there

joined      1, 2, 4 and 8 examples of a group, compiled one by one and joined; generic words, all three levels of `data/levels.py`
retrieved   edits under their own words: shown is the training edit whose instruction is nearest (RAIE, paper 3.3), a random training edit,
            a pair of the query's own group, nothing

Drawn free-running and greedily. Writes benchmarks/in_context: examples/MODEL.csv.gz (a line for each image), examples.json and examples.md.
Intervals are 95 %, paired bootstrap over groups.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import json
import os
import platform
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from bench_in_context import generic, named, read
from tqdm import tqdm

from xprompt_jax import CompiledPrompt, Example, XPrompt
from xprompt_jax.data.levels import LEVELS, held_pairs, training_pairs
from xprompt_jax.data.retrieval import HashedNgramEncoder
from xprompt_jax.data.sources import Record
from xprompt_jax.data.tasks import TASKS
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.metrics import changed_region_psnr, psnr_rgb
from xprompt_jax.evaluate.pairs import paired_bootstrap
from xprompt_jax.files import atomic_path

COUNTS = (1, 2, 4, 8)
SHOWN = ("own", "retrieved", "random", "none")
HELD_EDITS = ("add_object", "remove_object")
POOL = 600
"""Groups of training edits to retrieve from."""


def main() -> None:
    """Parses the flags, asks the model, writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[], type=named, metavar="NAME=FOLDER")
    parser.add_argument("--groups", type=int, default=4, help="draws of parameters of each task")
    parser.add_argument("--queries", type=int, default=4, help="of each group")
    parser.add_argument("--seed", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/in_context"))
    parser.add_argument("--tables", action="store_true", help="only make the tables again")
    args = parser.parse_args()
    place, about = args.out / "examples", args.out / "examples.json"
    place.mkdir(parents=True, exist_ok=True)
    told = json.loads(about.read_text())["models"] if about.exists() else {}
    for name, folder in args.models:
        model = XPrompt.from_pretrained(folder)
        rows = [*joined(model, args), *retrieved(model, args)]
        with atomic_path(place / f"{name}.csv.gz") as path, gzip.open(path, "wt", newline="", compresslevel=9) as f:
            writer = csv.DictWriter(f, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        told[name] = {
            "fingerprint": model.fingerprint, "command": shlex.join(["python", *sys.argv]),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        }  # fmt: skip
    drawn = {path.name.removesuffix(".csv.gz"): read(path) for path in sorted(place.glob("*.csv.gz"))}
    tables = [{"model": name, **line} for name, rows in drawn.items() for line in summary(rows)]
    about.write_text(json.dumps({"models": told, "tables": tables}, indent=2) + "\n")
    (args.out / "examples.md").write_text(markdown(tables))
    print(markdown(tables))


def draw(model: XPrompt, prompts: Sequence[CompiledPrompt], records: Sequence[Record]) -> Iterator[np.ndarray]:
    """An image for each record under its own words, uint8 [size, size, 3], in batches of 16."""
    for first in tqdm(range(0, len(records), 16), unit="batch"):
        part = records[first : first + 16]
        said = [dataclasses.replace(p, instruction=r.instruction) for p, r in zip(prompts[first : first + 16], part, strict=True)]
        yield from (np.asarray(image) for image in model.generate(said, [r.input for r in part], top_k=1))


def scored(asked: str, shown: object, level: str, records: Sequence[Record], images: Iterator[np.ndarray]) -> Iterator[dict]:
    """A line for each image."""
    for i, (r, image) in enumerate(zip(records, images, strict=True)):
        yield {
            "part": asked, "shown": shown, "level": level, "task": r.task, "group": r.group, "query": i,
            "all": round(psnr_rgb(image, r.output), 3), "changed": round(changed_region_psnr(r.input, image, r.output), 3),
        }  # fmt: skip


def joined(model: XPrompt, args: argparse.Namespace) -> Iterator[dict]:
    """Every query from 1, 2, 4 and 8 examples of its group; the fewer are among the more."""
    size = model.config.vq.image_size
    for level in LEVELS:
        groups: dict[str, list[Record]] = defaultdict(list)
        for r in held_pairs(level, groups=args.groups, pairs_per_group=max(COUNTS) + args.queries, size=size, seed=args.seed):
            groups[r.group].append(dataclasses.replace(r, instruction=generic(r.group)))
        alone = {
            group: [model.compile([Example(r.input, r.output, r.instruction)]) for r in of_group[: max(COUNTS)]]
            for group, of_group in groups.items()
        }  # fmt: skip
        queries = [r for of_group in groups.values() for r in of_group[max(COUNTS) :]]
        for count in COUNTS:
            prompts = {group: CompiledPrompt.join(each[:count]) for group, each in alone.items()}
            yield from scored("joined", count, level, queries, draw(model, [prompts[r.group] for r in queries], queries))


def retrieved(model: XPrompt, args: argparse.Namespace) -> Iterator[dict]:
    """Every edit from the nearest training edit, a random one, one of its own group, and none."""
    size = model.config.vq.image_size
    edits = [name for name, task in TASKS.items() if task.prototype == "edit"]
    trained = [name for name in edits if name not in HELD_EDITS]
    pool = list(training_pairs(groups=POOL, pairs_per_group=1, size=size, seed=args.seed, tasks=trained))
    encoder = HashedNgramEncoder()
    known = encoder([r.instruction for r in pool])
    rng = np.random.default_rng(args.seed)
    for level in LEVELS:
        records = list(held_pairs(level, groups=args.groups, pairs_per_group=1 + args.queries, size=size, seed=args.seed + 1, tasks=edits))
        own: dict[str, Record] = {}
        queries = [r for r in records if own.setdefault(r.group, r) is not r]
        nearest = np.argmax(encoder([r.instruction for r in queries]) @ known.T, axis=1)
        partners = {
            "own": [own[r.group] for r in queries], "retrieved": [pool[i] for i in nearest],
            "random": [pool[i] for i in rng.integers(len(pool), size=len(queries))],
        }  # fmt: skip
        distinct = {id(r): r for chosen in partners.values() for r in chosen}
        compiled = {key: model.compile([Example(r.input, r.output, r.instruction)]) for key, r in distinct.items()}
        for shown in SHOWN:
            prompts = [model._no_example] * len(queries) if shown == "none" else [compiled[id(r)] for r in partners[shown]]
            yield from scored("retrieved", shown, level, queries, draw(model, prompts, queries))


def summary(rows: Sequence[dict]) -> list[dict]:
    """Means, and differences against the first count and against the random partner."""
    found = []
    for part, arms, against in (("joined", [str(c) for c in COUNTS], "1"), ("retrieved", SHOWN, "random")):
        for level in LEVELS:
            values: dict[str, dict[tuple, float]] = {arm: {} for arm in arms}
            for measure in ("all", "changed"):
                for r in rows:
                    if r["part"] == part and r["level"] == level and str(r[measure]) != "nan":
                        values[str(r["shown"])][r["group"], r["query"]] = min(float(r[measure]), 60.0)
                if not values[against]:
                    continue
                line = {"part": part, "level": level, "measure": measure, "images": len(values[against])}
                for arm in arms:
                    by_group = defaultdict(list)
                    for key, value in values[arm].items():
                        by_group[key[0]].append(value - values[against][key])
                    mean, low, high = paired_bootstrap([float(np.mean(d)) for d in by_group.values()])
                    line[arm] = [round(v, 2) for v in (float(np.mean(list(values[arm].values()))), mean, low, high)]
                found.append(line)
    return found


def markdown(tables: Sequence[dict]) -> str:
    """The tables as people read them."""
    lines = ["# More examples, and retrieved ones", "", __doc__.strip(), ""]
    for part, arms, against in (("joined", [str(c) for c in COUNTS], "one example"), ("retrieved", SHOWN, "a random one")):
        lines += [f"## {part}: PSNR-RGB in dB, and the difference to {against}", ""]
        lines += [f"| model | level | pixels | images | {' | '.join(arms)} |", "|" + " --- |" * (4 + len(arms))]
        for t in (t for t in tables if t["part"] == part):
            cells = ["{:.2f} ({:+.2f} [{:+.2f}, {:+.2f}])".format(*t[arm]) for arm in arms]
            lines.append(f"| {t['model']} | {t['level']} | {t['measure']} | {t['images']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"bench_examples: {e}", file=sys.stderr)
        sys.exit(2)
