"""Does in-context generation through XP tokens work here? The proof, on tasks that the models have never seen.

    python tools/bench_in_context.py --models xp=runs/mini_cpu/run/model causal=... full=... --photos PHOTOS --out DIR
    python tools/bench_in_context.py --tables       # the tables again, from the episodes that are there

Each model is asked pairs of the three levels of `xprompt_jax/data/levels.py`, drawn free-running and, unless flags say otherwise, greedily,
under named words ("remove the rain") and under generic ones ("do the same to this image"), which leave the task to the example. Arms:

    copied      the query left as it is
    none        the model's own drawing without an example
    wrong       drawn from a pair of another task, under the right words
    drawn       drawn from the right example; models named causal* see the example itself, all others their XP tokens
    ceiling     the target through the image tokenizer: what no model can pass
    full        `drawn` of the model named full and the same number, which was trained on everything

Models are compared with each other, episode by episode, where their names end in the same number, such as the steps that each was
trained for: xp2400, causal2400, full2400 (and names without a number among themselves), and the same was asked with the same flags.

PHOTOS of the stored episodes are the 300 training and validation photographs of BSDS500; other photographs ask something else.
The same command goes on where it was stopped. Writes to --out, by default over the stored results in benchmarks/in_context:
episodes/MODEL.csv.gz (a line for each episode, PSNR-RGB in dB over all pixels and over those that the task changes), results.json
(machine, versions, commands, tables) and tables.md. Intervals are 95 %, paired bootstrap over groups: the queries of a group share
their example.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import gzip
import hashlib
import json
import multiprocessing
import os
import platform
import re
import shlex
import sys
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
from _bench import at_least

from xprompt_jax import XPrompt
from xprompt_jax.data.levels import LEVELS, Level, held_pairs
from xprompt_jax.data.pipeline import GENERIC_INSTRUCTIONS
from xprompt_jax.data.sources import photographs
from xprompt_jax.errors import UserError
from xprompt_jax.evaluate.metrics import changed_region_psnr, psnr_rgb
from xprompt_jax.evaluate.pairs import NO_EXAMPLE, make_episodes, paired_bootstrap, run_pairs
from xprompt_jax.files import atomic_path

WORDS = ("named", "generic")
ARMS = ("copied", NO_EXAMPLE, "wrong", "drawn", "ceiling")
KEYS = ("level", "words", "seed", "task", "group", "query")
MEASURES = ("all", "changed")
ASKED = ("groups", "queries", "photos", "photos_sha256", "guidance", "temperature")
"""Settings that an episode depends on besides its model: the example of a group, for one, is another where it has more queries."""
Row = Mapping[str, str | float]


def main() -> None:
    """Parses the flags; asks the models; writes the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="*", default=[], type=named, metavar="NAME=FOLDER")
    parser.add_argument("--photos", type=Path, help="photographs that no model was trained on, for the restoration and style tasks")
    parser.add_argument("--groups", type=at_least(1), default=10, help="draws of parameters of each task and seed")
    parser.add_argument(
        "--queries", type=at_least(1), default=7, help="queries of a group; 10 groups x 7 queries x 3 seeds are 210 episodes a task"
    )
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--guidance", type=float, help="scale on the example; without it there is none")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 draws greedily")
    parser.add_argument(
        "--window", type=at_least(1), default=1,
        help="codes computed at once; the images are the same: one is fastest on a CPU, 16 on an accelerator",
    )  # fmt: skip
    parser.add_argument(
        "--no-controls", action="store_true", help="leave out `none` and `wrong`: a third of the drawing, to compare models with each other"
    )
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS)
    parser.add_argument("--tasks", nargs="+", help="these alone")
    parser.add_argument(
        "--processes", type=at_least(1), default=1, help="that draw, each on its share of the cores: small models are faster so"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/in_context"))
    parser.add_argument("--tables", action="store_true", help="only make the tables again")
    args = parser.parse_args()
    place = args.out / "episodes"
    about = args.out / "results.json"
    told = json.loads(about.read_text()) if about.exists() else {"models": {}}
    for name, folder in args.models:
        model, photos = opened(folder, args.photos)
        settings = {"fingerprint": model.fingerprint, "groups": args.groups, "queries": args.queries, "photos": len(photos)}
        settings |= {"photos_sha256": hashlib.sha256(b"".join(photo.tobytes() for photo in photos)).hexdigest()[:16]}
        settings |= {"guidance": args.guidance, "temperature": args.temperature, "controls": not args.no_controls}
        file, known = place / f"{name}.csv.gz", {"controls": True} | told["models"].get(name, {})
        rows = read(file) if file.exists() and settings.items() <= known.items() else []
        done = {(row["level"], int(row["seed"])) for row in rows}
        jobs = [(level, seed) for seed in range(args.seeds) for level in args.levels if (level, seed) not in done]
        for found in answers(jobs, name, folder, args):
            rows += found
            place.mkdir(parents=True, exist_ok=True)
            with atomic_path(file) as path, gzip.open(path, "wt", newline="", compresslevel=9) as f:
                writer = csv.DictWriter(f, [*KEYS, *(f"{arm}/{measure}" for arm in ARMS for measure in MEASURES)])
                writer.writeheader()
                writer.writerows(rows)
            told["models"][name] = {
                **settings, "num_xp_tokens": model.config.num_xp_tokens, "episodes": len(rows),
                "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
                "versions": {"python": platform.python_version(), **{name: version(name) for name in ("jax", "flax", "numpy")}},
                "command": shlex.join(["python", *sys.argv]),
            }  # fmt: skip
            about.write_text(json.dumps(told, indent=2) + "\n")
    episodes = {path.name.removesuffix(".csv.gz"): read(path) for path in sorted(place.glob("*.csv.gz"))}
    if not episodes:
        raise UserError(f"{place}: no episodes yet; name --models to ask")
    tables = summary(episodes, told["models"])
    about.write_text(json.dumps({**told, "tables": tables}, indent=2) + "\n")
    (args.out / "tables.md").write_text(markdown(tables))
    print((args.out / "tables.md").read_text())


def named(item: str) -> tuple[str, str]:
    """Name and folder of NAME=FOLDER."""
    name, _, folder = item.partition("=")
    if not re.fullmatch(r"[\w.-]+", name) or not folder:
        raise argparse.ArgumentTypeError(f"{item!r} is not NAME=FOLDER, as xp=mini")
    return name, folder


@functools.cache
def opened(folder: str, photos: Path | None) -> tuple[XPrompt, list[np.ndarray]]:
    """A model, and photographs of its size."""
    model = XPrompt.from_pretrained(folder)
    return model, photographs(photos, model.config.vq.image_size) if photos else []


def answers(jobs: Sequence[tuple[Level, int]], name: str, folder: str, args: argparse.Namespace) -> Iterator[list[Row]]:
    """The episodes of each (level, seed), in order; drawn by `--processes` of them."""
    if args.processes == 1:
        yield from (answer(job, name, folder, args) for job in jobs)
        return
    context, cores = multiprocessing.get_context("spawn"), sorted(os.sched_getaffinity(0))
    shares = context.Queue()
    for i in range(args.processes):
        shares.put(cores[i % len(cores) :: args.processes])
    with ProcessPoolExecutor(args.processes, context, keep_to, (shares,)) as pool:
        yield from pool.map(functools.partial(answer, name=name, folder=folder, args=args), jobs)


def keep_to(shares: multiprocessing.Queue) -> None:
    """Takes a share of the cores for this process, before anything is computed on them."""
    os.sched_setaffinity(0, shares.get())


def answer(job: tuple[Level, int], name: str, folder: str, args: argparse.Namespace) -> list[Row]:
    """The episodes of one level and seed."""
    model, photos = opened(folder, args.photos)
    return list(ask(model, name, *job, photos, args))


def ask(
    model: XPrompt, name: str, level: Level, seed: int, photos: Sequence[np.ndarray], args: argparse.Namespace
) -> Iterator[dict[str, str | float]]:
    """Episodes of one level, under named and under generic words: one example of a group, all its other pairs as queries."""
    size = model.config.vq.image_size
    records = list(held_pairs(
        level, groups=args.groups, pairs_per_group=1 + args.queries, size=size, seed=1000 + seed, photos=photos, tasks=args.tasks,
    ))  # fmt: skip
    for words in WORDS if records else ():
        said = [dataclasses.replace(r, instruction=generic(r.group)) if words == "generic" else r for r in records]
        episodes = make_episodes(said, examples=1, seed=seed)
        mode = "causal" if name.startswith("causal") else "xprompt"
        law = {"guidance": args.guidance} | ({"temperature": args.temperature} if args.temperature else {"top_k": 1, "temperature": 1.0})
        count: dict[str, int] = defaultdict(int)
        drawn = {"no_example": not args.no_controls, "wrong": not args.no_controls, "mode": mode, "seed": seed, "window": args.window}
        for o in run_pairs(model, episodes, **drawn, **law):
            query = o.episode.query
            row: dict[str, str | float] = dict(zip(KEYS, (level, words, seed, query.task, query.group, count[query.group]), strict=True))
            count[query.group] += 1
            for arm in filter(o.images.__contains__, ARMS):
                row[f"{arm}/all"] = round(psnr_rgb(o.images[arm], o.target), 3)
                row[f"{arm}/changed"] = round(changed_region_psnr(query.input, o.images[arm], o.target), 3)
            yield row


def generic(group: str) -> str:
    """One of the instructions that say nothing, the same for a whole group."""
    return GENERIC_INSTRUCTIONS[zlib.crc32(group.encode()) % len(GENERIC_INSTRUCTIONS)]


def read(path: Path) -> list[dict[str, str]]:
    """The lines of an episodes file."""
    with gzip.open(path, "rt", newline="") as f:
        return list(csv.DictReader(f))


def summary(episodes: Mapping[str, Sequence[Row]], models: Mapping[str, Mapping] | None = None) -> list[dict]:
    """A row for each model, kind of words, level and measure: means over tasks, and paired differences with their intervals.

    Args:
      models: settings of each, ASKED among them.
    """
    found = []
    for name, rows in episodes.items():
        its_family = family(name, models)
        others = {other: keyed(of_other) for other, of_other in episodes.items() if other != name and family(other, models) == its_family}
        for words in WORDS:
            for level in (*LEVELS, "all"):
                mine = [row for row in rows if row["words"] == words and level in (row["level"], "all")]
                for measure in MEASURES if mine else ():
                    found.append({"model": name, "words": words, "level": level, "measure": measure, **scored(mine, measure, others)})
    return found


def family(name: str, models: Mapping[str, Mapping] | None = None) -> tuple:
    """The number at the end of a name, and what was asked: models that share both are compared."""
    settings = (models or {}).get(name, {})
    return re.search(r"\d*$", name)[0], *(settings.get(key) for key in ASKED)


def keyed(rows: Sequence[Row]) -> dict[tuple, Row]:
    """Episodes by what they ask."""
    return {tuple(row[key] for key in KEYS): row for row in rows}


def scored(rows: Sequence[Row], measure: str, others: Mapping[str, Mapping[tuple, Row]]) -> dict:
    """Means of all arms, differences against the controls and against what other models drew in the same episodes, and each task alone."""
    value = lambda row, arm: min(float(row[f"{arm}/{measure}"]), 60.0)  # an exact copy is infinitely good
    usable = [row for row in rows if row[f"copied/{measure}"] != "nan"]
    arms = [arm for arm in ARMS if all(row.get(f"{arm}/{measure}") for row in usable)]  # controls may not have been drawn
    table = {arm: float(np.mean([value(row, arm) for row in usable])) for arm in arms}
    result: dict = {
        "episodes": len(usable),
        "tasks": len({row["task"] for row in usable}),
        "dB": {a: round(v, 2) for a, v in table.items()},
    }

    def difference(of_row: Callable[[Row], float], rows: Sequence[Row]) -> list[float]:
        """[mean, low, high] of `drawn` less something else, over groups."""
        by_group = defaultdict(list)
        for row in rows:
            by_group[row["level"], row["group"]].append(value(row, "drawn") - of_row(row))
        return [round(v, 2) for v in paired_bootstrap([float(np.mean(of_group)) for of_group in by_group.values()])]

    for arm in filter(arms.__contains__, (NO_EXAMPLE, "wrong")):
        result[f"drawn - {arm}"] = difference(lambda row, arm=arm: value(row, arm), usable)
    for other, known in others.items():
        find = lambda row, known=known: known.get(tuple(row[k] for k in KEYS))
        # Other pictures of the same name would be another question: the copied query tells.
        same = [row for row in usable if (found := find(row)) and found["copied/all"] == row["copied/all"]]
        if not same:
            continue
        result.setdefault("beside", {})[other] = difference(lambda row, find=find: value(find(row), "drawn"), same)
        if re.fullmatch(r"full\d*", other):
            result["dB"]["full"] = round(float(np.mean([value(find(row), "drawn") for row in same])), 2)
            if NO_EXAMPLE in arms:
                gap = result["dB"]["full"] - result["dB"][NO_EXAMPLE]
                result["gap closed"] = round((result["dB"]["drawn"] - result["dB"][NO_EXAMPLE]) / gap, 2) if gap > 0 else None
    by_task = defaultdict(list)
    for row in usable:
        by_task[row["task"]].append([value(row, arm) if arm in arms else np.nan for arm in (NO_EXAMPLE, "wrong", "drawn", "ceiling")])
    means = {task: np.mean(values, axis=0) for task, values in sorted(by_task.items())}
    result["by task"] = {task: [None if np.isnan(v) else round(float(v), 2) for v in each] for task, each in means.items()}
    return result


def markdown(tables: Sequence[Mapping]) -> str:
    """The tables as people read them."""
    lines = ["# In-context generation through XP tokens, on what was never trained", "", f"{__doc__.strip()}", ""]
    for measure, title in zip(
        MEASURES, ("PSNR-RGB over all pixels, dB", "PSNR-RGB over the pixels that the task changes, dB"), strict=True
    ):
        columns = "model", "words", "level", "tasks", "episodes", *ARMS, "drawn - none", "drawn - wrong", "full", "gap closed"
        lines += [f"## {title}", "", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        for t in tables:
            if t["measure"] == measure:
                interval = lambda key, t=t: "{:+.2f} [{:+.2f}, {:+.2f}]".format(*t[key]) if key in t else ""
                cells = [t["model"], t["words"], t["level"], t["tasks"], t["episodes"], *(t["dB"].get(arm, "") for arm in ARMS)]
                cells += [interval(f"drawn - {NO_EXAMPLE}"), interval("drawn - wrong"), t["dB"].get("full", ""), t.get("gap closed", "")]
                lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    lines += ["## Models beside one another: the right example, all pixels, dB", ""]
    lines += ["| difference | words | level | dB |", "|" + " --- |" * 4]
    for t in tables:
        if t["measure"] == "all":
            for other, (mean, low, high) in t.get("beside", {}).items():
                if t["model"] > other:  # the other way round is the same number
                    lines.append(f"| {t['model']} - {other} | {t['words']} | {t['level']} | {mean:+.2f} [{low:+.2f}, {high:+.2f}] |")
    lines += ["", "## By task, generic words, all pixels: no example / wrong / right / ceiling, dB", ""]
    for t in tables:
        if t["measure"] == "all" and t["words"] == "generic" and t["level"] in LEVELS:
            lines += [f"### {t['model']}, {t['level']}", "", "| task | none | wrong | right | ceiling |", "|" + " --- |" * 5]
            rows = [(task, *("" if v is None else v for v in values)) for task, values in t["by task"].items()]
            lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        main()
    except UserError as e:
        print(f"bench_in_context: {e}", file=sys.stderr)
        sys.exit(2)
