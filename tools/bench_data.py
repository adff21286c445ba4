"""The figures of the data room, by one command: tokenizing, pipeline, hosts, start-up at 8 million episodes, retrieval.

    python tools/bench_data.py                   # everything, on the device that JAX finds
    python tools/bench_data.py --only pipeline start

    tokenise    images a second with the mini's VQGAN (64 px, 256 codes), from PNG bytes to a store; and of the encoder alone
    pipeline    tokens a second of one process, with one thread and two: rows of 5120 slots, four images of 1024 tokens, from shards
    hosts       whether 1, 2 and 4 hosts, each a process of its own, make the same rows of the same steps, with a mixture and several crops
    start       seconds and memory from opening a store of 2 million pairs (8 million episodes: both ways, images and descriptions) to the
                first batch; also with all holdouts, with half a million edits that no judge was asked about
    retrieval   500,000 distinct instructions: hashing them; exact nearest neighbours of 512 random dimensions, held against NumPy; the
                whole self-join where there is a GPU, else reckoned from --queries of them

Prints the figures and writes benchmarks/results/data_<device>.json with goals, machine and versions.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
GOALS = {
    "pipeline_tokens_a_second": "at least 3,000,000 on 2 cores", "hosts_same_rows": "true", "start_seconds": "below 10",
    "start_peak_gib": "below 2",
}  # fmt: skip
WORDS = (  # noqa: SIM905
    "add remove make the a red blue green small large dog cat tree house rain snow night day sky water picture image sharper brighter "
    "darker older style paint sketch left right behind near without with into of and more less"
).split()
HOLDOUTS = ("derain", "low_light", "add_remove", "depth_spectrum")


def main() -> None:
    """Parses the flags and measures, or is one of the processes that are measured (--one)."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pairs", type=int, default=2_030_000, help="of the store of `start`; each is four episodes")
    parser.add_argument("--instructions", type=int, default=500_000)
    parser.add_argument("--queries", type=int, default=2048, help="of `retrieval` where there is no GPU")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, *rest = args.one
        print(json.dumps(PROCESSES[name](*rest)))
        return
    import jax

    figures: dict[str, float | int | bool] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.only:
            figures |= {f"{name}_{key}": value for key, value in PARTS[name](Path(scratch), args).items()}
            print(json.dumps({key: value for key, value in figures.items() if key.startswith(name)}, indent=2), flush=True)
    device = jax.devices()[0].device_kind.lower().replace(" ", "_")
    result = {
        "figures": {key: round(v, 4) if isinstance(v, float) else v for key, v in figures.items()},
        "goals": GOALS,
        "command": shlex.join(["python", *sys.argv]),
        "machine": {
            "system": platform.platform(), "cores": os.cpu_count(), "device": jax.devices()[0].device_kind, "load": os.getloadavg()[0],
        },
        "versions": {"python": platform.python_version()} | {n: version(n) for n in ("jax", "numpy", "grain", "pyarrow", "array_record")},
    }  # fmt: skip
    whole = args.only == list(PARTS)
    path = ROOT / "benchmarks/results" / f"data_{device}{'' if whole else '_' + '_'.join(args.only)}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(path)


def in_a_process(name: str, *rest: object) -> dict:
    """One of `PROCESSES`, by a fresh interpreter."""
    command = [sys.executable, __file__, "--one", name, *map(str, rest)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}  # the pipeline needs no device
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment).stdout
    return json.loads(out.splitlines()[-1])


# --- stores of made-up pairs, without pictures


def write_store(folder: Path, *, pairs: int, images: int, grid: int, crops: int, texts: int, tasks: tuple[str, ...]) -> None:
    """Random codes and random words; the first tokens of a text decide nothing, so they are the same for all."""
    import pyarrow as pa

    from xprompt_jax.data.store import Encoding, StoreWriter
    from xprompt_jax.data.table import TEXTS
    from xprompt_jax.tokens import train_tokenizer

    folder.mkdir(parents=True)
    tokenizer = train_tokenizer([" ".join(WORDS)] * 4, num_codes=8192, vocab_size=9600)
    (folder / "tokenizers").mkdir()
    tokenizer.save(folder / "tokenizers/text_tokenizer.json")
    rng = np.random.default_rng(0)
    names = {
        "task": tasks, "group": [f"{task}/{i}" for task in tasks for i in range(5)], "split": ["train", "eval"], "holdout": [""],
        "dataset": [f"set of {task}" for task in tasks],
    }  # fmt: skip
    writer = StoreWriter(folder, Encoding("0" * 16, tokenizer.fingerprint, "meta", crops, 16 * grid, grid), images=images, names=names)
    for i in range(images):
        codes = rng.integers(0, 8192, (crops, grid, grid)).astype("<u2")
        writer.add_image(codes.tobytes(), i.to_bytes(32, "little"))
    banks = {}
    for name, length in zip(TEXTS, (8, 8, 40, 40, 20), strict=True):
        bank = [" ".join(rng.choice(WORDS, length)) for _ in range(texts)]
        banks[name] = pa.array(bank), np.array([len(tokenizer.encode(text)) for text in bank], np.int32)
    for first in range(0, pairs, 65_536):
        n = min(65_536, pairs - first)
        task = rng.integers(0, len(tasks), n).astype(np.int32)
        columns = {
            "input": rng.integers(0, images, n).astype(np.int32), "output": rng.integers(0, images, n).astype(np.int32),
            "more_inputs": pa.array([[]] * n, pa.list_(pa.int32())), "task": task,
            "group": task * 5 + rng.integers(0, 5, n).astype(np.int32), "split": (rng.random(n) < 0.01).astype(np.int32),
            "holdout": np.zeros(n, np.int32), "dataset": task,
        }  # fmt: skip
        for name, (bank, counts) in banks.items():
            chosen = rng.integers(0, texts, n)
            columns |= {name: bank.take(pa.array(chosen)), f"{name}_tokens": counts[chosen]}
        writer.add_pairs(columns)
    writer.finish()


def rows_of(folder: Path, *, rows: int, host: tuple[int, int] = (0, 1), **settings):
    """The pipeline on such a store: rows of 5120 slots, and of descriptions."""
    from xprompt_jax.config import BucketConfig, DataConfig
    from xprompt_jax.data.pipeline import Rows
    from xprompt_jax.data.store import Store
    from xprompt_jax.prompt import Prompter
    from xprompt_jax.tokens import Layout, Tokenizer

    buckets = (
        BucketConfig("in_context", examples=1, context=2527, todo=2528, answer=1027, rows=rows),
        BucketConfig("describe", examples=1, context=2527, todo=512, answer=448, rows=rows, kind="describe"),
    )
    tokenizer = Tokenizer.from_file(folder / "tokenizers/text_tokenizer.json")
    prompter = Prompter(tokenizer, Layout("plain", tokenizer.vocab, 16))
    settings = {"buckets": buckets[:1] if settings.pop("images_alone", False) else buckets} | settings
    return Rows(Store.open(folder), prompter, DataConfig(**settings), 64, host=host)


# --- the parts


def tokenise(scratch: Path, args: argparse.Namespace) -> dict[str, float]:
    """Images a second."""
    import jax
    import PIL.Image

    from xprompt_jax.config import PRESETS
    from xprompt_jax.data.sources import Record
    from xprompt_jax.data.tokenise import tokenize
    from xprompt_jax.model.vqgan import VQGAN
    from xprompt_jax.tokens import train_tokenizer

    vq = PRESETS["mini"].vq
    vqgan = VQGAN(vq, jax.random.key(0))
    tokenizer = train_tokenizer([" ".join(WORDS)] * 4, num_codes=vq.num_codes, vocab_size=2048)
    batch, few, many = (32, 64, 256) if jax.default_backend() == "cpu" else (256, 1024, 20_480)

    def png(rng: np.random.Generator) -> bytes:
        data = io.BytesIO()
        small = PIL.Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((96, 80), PIL.Image.Resampling.BICUBIC).save(data, "PNG")
        return data.getvalue()

    def seconds(images: int, seed: int) -> float:
        rng = np.random.default_rng(seed)
        records = [Record(png(rng), png(rng), "x", task="t", group="t") for _ in range(images // 2)]
        start = time.perf_counter()
        tokenize(records, vqgan, tokenizer, scratch / f"store{seed}", batch=batch, progress=False)
        return time.perf_counter() - start

    rate = (many - few) / (seconds(many, 1) - seconds(few, 2))  # both compile
    encode = jax.jit(lambda model, pixels: model.encode(pixels))
    pixels = jax.random.uniform(jax.random.key(1), (batch, vq.image_size, vq.image_size, 3), minval=-1)
    encoded = fastest(lambda: jax.block_until_ready(encode(vqgan, pixels)), 5)
    return {"images_a_second": rate, "images_a_second_of_the_encoder": batch / encoded, "batch": batch}


def fastest(f: Callable[[], object], times: int) -> float:
    """Seconds of the fastest of several calls, after one that is not counted."""
    f()
    found = []
    for _ in range(times):
        start = time.perf_counter()
        f()
        found.append(time.perf_counter() - start)
    return min(found)


def pipeline(scratch: Path, args: argparse.Namespace) -> dict[str, float]:
    """Tokens a second."""
    write_store(scratch / "shards", pairs=50_000, images=20_000, grid=32, crops=1, texts=20_000, tasks=("deblur", "edit"))
    return in_a_process("pipeline", scratch / "shards")


def pipeline_process(folder: str) -> dict[str, float]:
    """What one process makes; padding is no token."""
    rows, steps = rows_of(Path(folder), rows=64, images_alone=True), iter(range(1, 10_000))
    filled = lambda batch: int((batch["in_context"]["positions"] > 0).sum() + 64)
    rows(0)
    rates, slots = {}, 0
    for threads in (1, 2):
        with ThreadPoolExecutor(threads) as pool:
            best = 0.0
            for _ in range(5):
                some = [next(steps) for _ in range(8)]
                start = time.perf_counter()
                batches = list(pool.map(rows, some))
                seconds = time.perf_counter() - start
                best = max(best, sum(map(filled, batches)) / seconds)
        rates[threads] = best
        slots = batches[0]["in_context"]["ids"].shape[1]
    share = filled(batches[0]) / batches[0]["in_context"]["ids"].size
    return {"tokens_a_second": max(rates.values()), "tokens_a_second_of_one_thread": rates[1], "slots_of_a_row": slots, "filled": share}


def hosts(scratch: Path, args: argparse.Namespace) -> dict[str, bool | int]:
    """Rows of several hosts, as sets."""
    write_store(scratch / "hosts", pairs=5_000, images=1_000, grid=32, crops=3, texts=1_000, tasks=("deblur", "edit", "derain"))
    made = [
        sorted(row for index in range(count) for row in in_a_process("hosts", scratch / "hosts", index, count)["rows"])
        for count in (1, 2, 4)
    ]  # fmt: skip
    return {"same_rows": made[0] == made[1] == made[2], "rows": len(made[0]), "different_rows": len(set(made[0]))}


def hosts_process(folder: str, index: str, count: str) -> dict[str, list[str]]:
    """Hashes of a host's rows of three steps: all arrays, the step and the bucket."""
    rows = rows_of(Path(folder), rows=16, host=(int(index), int(count)), weights={"deblur": 5000.0, "set of edit": 300.0}, seed=7)
    found = []
    for step in (0, 5, 1000):
        for name, batch in rows(step).items():
            for row in range(16 // int(count)):
                digest = hashlib.sha256(f"{step} {name}".encode())
                for _, values in sorted(batch.items()):
                    digest.update(values[row].tobytes())
                found.append(digest.hexdigest())
    return {"rows": found}


def start(scratch: Path, args: argparse.Namespace) -> dict[str, float]:
    """Seconds and memory."""
    tasks = ("deblur", "derain", "low_light", "edit")
    write_store(scratch / "large", pairs=args.pairs, images=20_000, grid=32, crops=1, texts=100_000, tasks=tasks)
    plain, held = in_a_process("start", scratch / "large"), in_a_process("start", scratch / "large", *HOLDOUTS)
    return {**plain, "seconds_with_holdouts": held["seconds"], "peak_gib_with_holdouts": held["peak_gib"]}


def start_process(folder: str, *holdouts: str) -> dict[str, float]:
    """From opening the store to the first batch; imports are counted apart, memory with them."""
    began = time.perf_counter()
    import xprompt_jax.data.pipeline  # noqa: F401

    imported = time.perf_counter()
    rows = rows_of(Path(folder), rows=16, holdouts=holdouts)
    rows(0)
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"seconds": done - imported, "seconds_of_imports": imported - began, "peak_gib": peak, "episodes": rows.num_episodes}


def retrieval(scratch: Path, args: argparse.Namespace) -> dict[str, float | int | bool]:
    """Seconds and queries a second."""
    import jax

    from xprompt_jax.data.retrieval import HashedNgramEncoder, neighbours

    rng = np.random.default_rng(0)
    texts = [f"{' '.join(rng.choice(WORDS, 6))} {i}" for i in range(args.instructions)]
    began = time.perf_counter()
    HashedNgramEncoder()(texts)
    hashing = time.perf_counter() - began
    keys = rng.standard_normal((args.instructions, 512), np.float32)
    keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    gpu = jax.default_backend() != "cpu"
    queries = keys if gpu else keys[: args.queries]
    neighbours(keys[:1024], keys, 8)  # compiles
    began = time.perf_counter()
    found, _ = neighbours(queries, keys, 8)
    seconds = time.perf_counter() - began
    some = rng.choice(len(queries), 64, replace=False)
    exact = np.argsort(-(keys[some] @ keys.T), axis=1, kind="stable")[:, :8]
    rate = len(queries) / seconds
    return {
        "instructions": args.instructions,
        "seconds_of_hashing": hashing,
        "queries": len(queries),
        "queries_a_second": rate,
        "seconds_of_the_self_join": args.instructions / rate,
        "self_join_measured": gpu,
        "equal_to_numpy": float((found[some] == exact).mean()),
    }


PARTS = {"tokenise": tokenise, "pipeline": pipeline, "hosts": hosts, "start": start, "retrieval": retrieval}
PROCESSES = {"pipeline": pipeline_process, "hosts": hosts_process, "start": start_process}


if __name__ == "__main__":
    main()
