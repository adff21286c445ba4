"""What more examples give, and what retrieved ones give, on tasks that the model has never seen.

    python tools/bench_examples.py --models xp=mini first=runs/mini_cpu/run/model
    python tools/bench_examples.py --tables        # the tables again, from the episodes that are there

joined      1, 2, 4 and 8 examples of a group, compiled one by one and joined; generic words, all three levels of `data/levels.py`
retrieved   edits under their own words: shown is the training edit whose instruction is nearest (RAIE, paper 3.3), a random training edit,
            a pair of the query's own group, nothing
likelihood  of the right output's codes, nothing drawn: as `joined`, and without an example

Drawn free-running and greedily. Writes benchmarks/in_context: examples/MODEL.csv.gz (a line for each image), examples.json and examples.md.
Intervals are 95 %, paired bootstrap over groups. `--parts` measures some; what is there of the others stays, if it is of the same model.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import gzip
import itertools
import json
import os
import platform
import shlex
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from _bench import at_least
from bench_in_context import generic, named, read
from tqdm import tqdm

from xprompt_jax import CompiledPrompt, Example, XPrompt
from xprompt_jax.data.levels import LEVELS, Level, held_pairs, training_pairs
from xprompt_jax.data.retrieval import HashedNgramEncoder
from xprompt_jax.data.sources import Record
from xprompt_jax.data.tasks import TASKS
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.metrics import changed_region_psnr, psnr_rgb
from xprompt_jax.evaluate.pairs import paired_bootstrap
from xprompt_jax.files import atomic_path
from xprompt_jax.model.chameleon import Rows, abstract_model
from xprompt_jax.model.params import flatten, unflatten
from xprompt_jax.prompt import Sample, SlotShape, fill, stack
from xprompt_jax.train.loss import cross_entropy, gather_answers

COUNTS = (1, 2, 4, 8)
TIMES: dict[Level, int] = {"parameters": 1, "combinations": 2, "tasks": 4}
"""Groups of a task, times --groups: the fewer tasks, the more."""
SHOWN = ("own", "retrieved", "random", "none")
TABLES: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], str]] = {
    "joined": (tuple(map(str, COUNTS)), "1", ("all", "changed"), "PSNR-RGB in dB, and the difference to one example"),
    "retrieved": (SHOWN, "random", ("all", "changed"), "PSNR-RGB in dB, and the difference to a random one"),
    "likelihood": (("0", *map(str, COUNTS)), "1", ("nats",), "nats a code (less is better), and the difference to one example"),
}
"""Part -> what is shown, what it is compared with, measures, title."""
OVER = {"all": "all pixels", "changed": "changed pixels", "nats": "codes"}
COLUMNS = ("part", "shown", "level", "task", "group", "query", "all", "changed", "nats")
HELD_EDITS = ("add_object", "remove_object")
POOL = 600
"""Groups of training edits to retrieve from."""


def main() -> None:
    """Parses the flags, asks the model, writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[], type=named, metavar="NAME=FOLDER")
    parser.add_argument("--parts", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument(
        "--groups", type=at_least(1), default=4, help="draws of parameters of each task; twice and four times where tasks are few"
    )
    parser.add_argument("--queries", type=at_least(1), default=4, help="of each group")
    parser.add_argument("--seed", type=at_least(0), default=4000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/in_context"))
    parser.add_argument("--tables", action="store_true", help="only make the tables again")
    args = parser.parse_args()
    place, about = args.out / "examples", args.out / "examples.json"
    told = json.loads(about.read_text())["models"] if about.exists() else {}
    for name, folder in args.models:
        model, file = XPrompt.from_pretrained(folder), place / f"{name}.csv.gz"
        known = read(file) if file.exists() and told.get(name, {}).get("fingerprint") == model.fingerprint else []
        rows = [row for row in known if row["part"] not in args.parts]
        for part in args.parts:
            rows += {"joined": joined, "retrieved": retrieved, "likelihood": likelihood}[part](model, args)
        place.mkdir(parents=True, exist_ok=True)
        with atomic_path(file) as path, gzip.open(path, "wt", newline="", compresslevel=9) as f:
            writer = csv.DictWriter(f, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        commands = told.get(name, {}).get("commands", {}) if known else {}
        told[name] = {
            "fingerprint": model.fingerprint, "commands": commands | dict.fromkeys(args.parts, shlex.join(["python", *sys.argv])),
            "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        }  # fmt: skip
    drawn = {path.name.removesuffix(".csv.gz"): read(path) for path in sorted(place.glob("*.csv.gz"))}
    if not drawn:
        raise UserError(f"{place}: no images scored yet; name --models to ask")
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


def scored(part: str, shown: object, level: str, records: Sequence[Record], images: Iterator[np.ndarray]) -> Iterator[dict]:
    """A line for each image."""
    for i, (r, image) in enumerate(zip(records, images, strict=True)):
        yield {
            "part": part, "shown": shown, "level": level, "task": r.task, "group": r.group, "query": i,
            "all": round(psnr_rgb(image, r.output), 3), "changed": round(changed_region_psnr(r.input, image, r.output), 3),
        }  # fmt: skip


def asked(level: Level, model: XPrompt, args: argparse.Namespace) -> dict[str, list[Record]]:
    """Pairs of each group under generic words: those to show first, then `--queries`."""
    size, groups = model.config.vq.image_size, defaultdict(list)
    count = TIMES[level] * args.groups
    for r in held_pairs(level, groups=count, pairs_per_group=max(COUNTS) + args.queries, size=size, seed=args.seed):
        groups[r.group].append(dataclasses.replace(r, instruction=generic(r.group)))
    return groups


def joined(model: XPrompt, args: argparse.Namespace) -> Iterator[dict]:
    """Every query from 1, 2, 4 and 8 examples of its group; the fewer are among the more."""
    for level in LEVELS:
        groups = asked(level, model, args)
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
        count = TIMES[level] * args.groups
        records = list(held_pairs(level, groups=count, pairs_per_group=1 + args.queries, size=size, seed=args.seed + 1, tasks=edits))
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


def likelihood(model: XPrompt, args: argparse.Namespace) -> Iterator[dict]:
    """What the right output of every query costs from 0, 1, 2, 4 and 8 examples of its group."""
    for level in LEVELS:
        groups = asked(level, model, args)
        records = [r for of_group in groups.values() for r in of_group]
        sides = [side for r in records for side in (r.input, r.output)]
        codes = np.concatenate([model.encode_images(sides[i : i + 64]) for i in range(0, len(sides), 64)])
        inputs, outputs = ({id(r): c for r, c in zip(records, codes[way::2], strict=True)} for way in (0, 1))
        examples = {id(r): model.prompter.example(r.instruction, inputs[id(r)], outputs[id(r)]) for r in records}
        queries = [r for of_group in groups.values() for r in of_group[max(COUNTS) :]]
        for count in (0, *COUNTS):
            samples = [
                Sample(
                    # Without an example, one that says nothing: as training drops them.
                    tuple(examples[id(shown)] for shown in groups[r.group][:count]) or (np.zeros(0, np.int32),),
                    model.prompter.task(r.instruction, inputs[id(r)]),
                    model.prompter.image_answer(outputs[id(r)]),
                )
                for r in queries
            ]
            for i, (r, value) in enumerate(zip(queries, costs(model, samples), strict=True)):
                yield {
                    "part": "likelihood", "shown": count, "level": level, "task": r.task, "group": r.group, "query": i,
                    "nats": round(value, 4),
                }  # fmt: skip


def costs(model: XPrompt, samples: Sequence[Sample], batch: int = 16) -> Iterator[float]:
    """Mean negative log-likelihood of each answer's tokens, in nats, by the pass of training. Samples have as many examples each."""
    params, vocab = flatten(model.decoder), model.tokenizer.vocab
    most = lambda sequences: max(map(len, sequences))
    shape = SlotShape(
        len(samples[0].examples), most(e for s in samples for e in s.examples), model.config.num_xp_tokens,
        most([*s.prompt, *s.answer] for s in samples),
    )  # fmt: skip

    @jax.jit
    def nats(params: Mapping[str, jax.Array], rows: Mapping[str, jax.Array]) -> jax.Array:
        """[B]: means over the answer of each row."""
        decoder = unflatten(abstract_model(model.config), params)
        (hidden,) = decoder.hidden([Rows(rows["ids"], rows["positions"], rows["example_lengths"], shape)], model.compute)
        states, labels = gather_answers(hidden, rows)
        of_each = jnp.eye(len(states))[:, :, None] * rows["weights"]
        sums = cross_entropy(states, params["head"], labels, of_each, chunk=labels.shape[1])
        return sums.loss / sums.weight

    slots = [fill(s, shape, bos=vocab.bos, pad=vocab.pad) for s in samples]
    for first in tqdm(range(0, len(slots), batch), unit="batch"):
        part = slots[first : first + batch]
        whole = part + part[:1] * (batch - len(part))  # one shape, compiled once
        yield from np.asarray(nats(params, stack(whole, most(s.answer for s in samples))))[: len(part)].tolist()


def summary(rows: Sequence[dict]) -> list[dict]:
    """Means, and differences against one example and against the random partner; whole tasks one by one as well."""
    found = []
    for part, (arms, against, measures, _) in TABLES.items():
        for level in LEVELS:
            mine = [r for r in rows if r["part"] == part and r["level"] == level]
            by_task = sorted({r["task"] for r in mine}) if level == "tasks" and part != "retrieved" else []
            for measure, task in itertools.product(measures, ("", *by_task)):
                values: dict[str, dict[tuple, float]] = {arm: {} for arm in arms}
                for r in mine:
                    if task in ("", r["task"]) and str(r[measure]) != "nan":
                        values[str(r["shown"])][r["group"], r["query"]] = min(float(r[measure]), 60.0)
                if not values[against]:
                    continue
                line = {"part": part, "level": level, "task": task, "measure": measure, "images": len(values[against])}
                for arm in arms:
                    by_group = defaultdict(list)
                    for key, value in values[arm].items():
                        by_group[key[0]].append(value - values[against][key])
                    mean, low, high = paired_bootstrap([float(np.mean(d)) for d in by_group.values()])
                    line[arm] = [round(v, 5) for v in (float(np.mean(list(values[arm].values()))), mean, low, high)]
                found.append(line)
    return found


def markdown(tables: Sequence[dict]) -> str:
    """The tables as people read them."""
    lines = ["# More examples, and retrieved ones", "", __doc__.strip(), ""]
    for part, (arms, _, _, title) in TABLES.items():
        columns = "model", "level", "task", "over", "images", *arms
        lines += [f"## {part}: {title}", "", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        cell = "{:.3f} ({:+.3f} [{:+.3f}, {:+.3f}])" if part == "likelihood" else "{:.2f} ({:+.2f} [{:+.2f}, {:+.2f}])"
        for t in (t for t in tables if t["part"] == part):
            cells = t["model"], t["level"], t["task"] or "all", OVER[t["measure"]], t["images"], *(cell.format(*t[arm]) for arm in arms)
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"bench_examples: {e}", file=sys.stderr)
        sys.exit(2)
