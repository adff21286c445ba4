"""Converts a checkpoint of a preset's real size between all formats and records peak memory, seconds and bytes moved.

    python tools/bench_convert.py --model 7b --scratch /tmp/convert

A checkpoint of random bits in Meta's format is made first; then Meta -> ours -> Hugging Face -> Meta, each by `xprompt convert` in
a process of its own, whose peak resident memory and disk traffic are the system's own count. The last folder must equal the first
to the byte. Needs about three times the checkpoint on disk.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import ml_dtypes
import numpy as np

from xprompt_jax.config import PRESETS
from xprompt_jax.convert.meta import MetaTarget
from xprompt_jax.convert.weights import VQGAN_PREFIX, shapes_of
from xprompt_jax.tokens import train_tokenizer

BLOCK = 2**22  # random numbers drawn once and repeated


def main() -> None:
    """Parses the flags, measures, writes benchmarks/results/convert_<model>.json and prints it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(PRESETS), default="7b")
    parser.add_argument("--layers", type=int, default=0, help="fewer layers than the preset, for a quick look")
    parser.add_argument("--ranks", type=int, default=1, help="tensor-parallel files of the Meta folder")
    parser.add_argument("--scratch", type=Path, required=True, help="folder for the checkpoints; removed at the end")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the result")
    args = parser.parse_args()

    config = PRESETS[args.model]
    if args.layers:
        config = dataclasses.replace(config, num_layers=args.layers)
    args.scratch.mkdir(parents=True, exist_ok=True)
    meta, ours, hf, back = (args.scratch / name for name in ("meta", "ours", "hf", "back"))
    start = time.perf_counter()
    make_checkpoint(meta, config, args.ranks)
    made = time.perf_counter() - start
    steps = {"meta -> xprompt": convert(meta, ours, "xprompt"), "xprompt -> huggingface": convert(ours, hf, "huggingface")}
    shutil.rmtree(ours)
    steps["huggingface -> meta"] = convert(hf, back, "meta")
    same = {str(f.relative_to(meta)): digest(f) == digest(back / f.relative_to(meta)) for f in weights(meta)}
    size = sum(f.stat().st_size for f in weights(meta))
    result = {
        "benchmark": "convert",
        "model": args.model,
        "layers": config.num_layers,
        "ranks": args.ranks,
        "checkpoint_gib": round(size / 2**30, 2),
        "seconds_to_make_it": round(made, 1),
        "steps": steps,
        "back_again_identical": all(same.values()),
        "cpus_allowed": len(os.sched_getaffinity(0)),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version()} | {p: version(p) for p in ("jax", "numpy", "orbax-checkpoint", "safetensors")},
        "command": shlex.join(["python", *sys.argv]),
    }
    shutil.rmtree(args.scratch)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"convert_{args.model}{f'_{config.num_layers}_layers' if args.layers else ''}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(f"{path}: {json.dumps(result)}")
    if not all(same.values()):
        raise SystemExit(f"not identical: {sorted(name for name, equal in same.items() if not equal)}")


def make_checkpoint(folder: Path, config, ranks: int) -> None:
    """A folder in Meta's format with random bfloat16 weights; heads of a rank share their QK-norms, as Meta's do."""
    shapes = shapes_of(config)
    block = np.random.default_rng(0).standard_normal(BLOCK).astype(ml_dtypes.bfloat16)

    def read(name: str) -> np.ndarray:
        shape, image = shapes[name], name.startswith(VQGAN_PREFIX)
        count = int(np.prod(shape))
        at = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % BLOCK  # two tensors do not begin alike
        value = np.resize(np.roll(block, -at), count).reshape(shape)
        if "_norm." in name and not image:
            heads = shape[0] // ranks
            value = np.repeat(value[:ranks], heads, axis=0)
        return value.astype(np.float32) if image else value

    folder.mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    target = MetaTarget(folder, config, ranks)
    for part in target.parts():
        target.write(part, read)
    words = train_tokenizer(["remove the rain"] * 4, num_codes=config.vq.num_codes, vocab_size=config.vocab_size)
    words.save(folder / "words.json")
    target.finish(folder / "words.json")
    (folder / "words.json").unlink()


def convert(source: Path, out: Path, to: str) -> dict[str, float]:
    """One conversion in a process of its own: seconds, peak GiB, GiB read from and written to the disk."""
    command = [sys.executable, "-m", "xprompt_jax", "convert", "--source", source, "--out", out, "--to", to, "--image-head", "keep"]
    start = time.perf_counter()
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {shlex.join(map(str, command))}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "peak_resident_gib": round(usage.ru_maxrss / 2**20, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "read_gib": round(usage.ru_inblock / 2**21, 2),
        "written_gib": round(usage.ru_oublock / 2**21, 2),
    }


def weights(folder: Path) -> list[Path]:
    """The files that must come back to the byte."""
    return [f for f in sorted(folder.rglob("*")) if f.suffix in (".pth", ".ckpt", ".safetensors")]


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
