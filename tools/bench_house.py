"""The figures a newcomer meets, as one: fresh clone to finished demo, the demo that trains, the test suite, memory, input pipeline.

    python tools/bench_house.py                 # everything, in a fresh clone with an empty pip cache
    python tools/bench_house.py --only pipeline # the pipeline alone, on the store that `xprompt demo --train` left in ./demo, installed

Writes benchmarks/results/house.json with machine, versions and command after every stage, and prints it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOALS = {
    "demo_seconds": "at most 600",
    "demo_again_seconds": "at most 60",
    "trained_demo_seconds": "at most 600",
    "tests_seconds": "at most 900",
    "demo_peak_gib": "below 6",
    "trained_demo_peak_gib": "below 6",
    "tests_peak_gib": "below 6",
    "trained_demo_loss_end_over_start": "below 0.5",
    "pipeline_rows_per_model_row": "at least 10",
}


def readme_block(number: int) -> str:
    """Block `number` of README.md's bash blocks."""
    return re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)[number - 1]


def timed(script: str, folder: Path) -> tuple[float, float]:
    """Seconds of a shell script, and the memory of its largest process in GiB; its output goes to ours."""
    code = (
        "import resource, subprocess, sys; code = subprocess.call(['bash', '-eu', '-c', sys.argv[1]], stdin=subprocess.DEVNULL, stdout=2)\n"
        "print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    empty = {"PIP_NO_CACHE_DIR": "1", "XDG_CACHE_HOME": str(folder / ".cache"), "PYTHONNOUSERSITE": "1", "PYTHONPATH": ""}
    environment = os.environ | empty
    start = time.perf_counter()
    out = subprocess.run([sys.executable, "-c", code, script], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    seconds = time.perf_counter() - start
    status, peak = out.stdout.split()
    if status != "0":
        raise SystemExit(f"failed: {script}")
    return seconds, int(peak) / 2**20


def pipeline(demo: Path) -> dict[str, float]:
    """Rows a second that the pipeline makes on one thread, against rows a second that the training of a demo took."""
    from xprompt_jax.config import Config, load_json
    from xprompt_jax.convert.native import load_tokenizers
    from xprompt_jax.data.pipeline import Rows
    from xprompt_jax.data.store import Store
    from xprompt_jax.prompt import Prompter
    from xprompt_jax.tokens import Layout
    from xprompt_jax.train.metrics import read_metrics

    config = load_json(Config, demo / "run" / "config.json")
    vqgan, tokenizer = load_tokenizers(demo / "tokens" / "tokenizers")
    prompter = Prompter(tokenizer, Layout("plain", tokenizer.vocab, vqgan.config.downsample))
    source = Rows(Store.open(demo / "tokens"), prompter, config.data, config.model.num_xp_tokens)
    rows = sum(b.rows for b in config.data.buckets)
    rates = []
    for repeat in range(5):
        start = time.perf_counter()
        for step in range(10):
            source(100 * repeat + step)
        rates.append(10 * rows / (time.perf_counter() - start))
    trained = [m for m in read_metrics(demo / "run") if "seconds_per_step" in m][1:]
    model = rows / statistics.median(m["seconds_per_step"] for m in trained)
    return {
        "pipeline_rows_per_second": statistics.median(rates),
        "model_rows_per_second": model,
        "pipeline_rows_per_model_row": statistics.median(rates) / model,
        "training_data_wait_fraction": statistics.median(m["data_wait"] for m in trained),
    }


def loss_ratio(demo: Path) -> float:
    """Mean training loss of the last three logged steps over the first one's."""
    losses = [json.loads(line)["loss"] for line in (demo / "run" / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    return statistics.mean(losses[-3:]) / losses[0]


def pipeline_in(python: Path | str, demo: Path) -> dict[str, float | str]:
    """`pipeline` in a process of its own, by an interpreter that has the package; with the versions that it has."""
    code = f"import json, jax; from bench_house import *; print(json.dumps(pipeline(Path({str(demo)!r})) | {{'jax': jax.__version__}}))"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    out = subprocess.run([str(python), "-c", code], env=environment, cwd=demo, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])


def save(chosen: str | None, figures: dict[str, float | str]) -> None:
    """Writes and prints what is known."""
    versions = {"python": platform.python_version()} | {n: v for n, v in figures.items() if isinstance(v, str)}
    result = {
        "figures": {name: round(value, 3) for name, value in figures.items() if not isinstance(value, str)},
        "goals": GOALS,
        "command": "python " + " ".join(["tools/bench_house.py", *sys.argv[1:]]),
        "machine": {
            "system": platform.platform(), "cores": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1), "load": os.getloadavg()[0],
        },
        "versions": versions,
    }  # fmt: skip
    path = ROOT / "benchmarks" / "results" / ("house.json" if chosen is None else f"house_{chosen}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["figures"], indent=2))


def main() -> None:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=["demo", "tests", "pipeline"])
    chosen = parser.parse_args().only
    if chosen == "pipeline":
        save(chosen, dict(pipeline_in(sys.executable, ROOT / "demo")))
        return
    figures: dict[str, float | str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        clone = Path(scratch) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        if chosen == "tests":
            subprocess.run(["python3", "-m", "venv", ".venv"], cwd=clone, check=True)
        else:
            figures["demo_seconds"], figures["demo_peak_gib"] = timed(readme_block(1), clone)
            save(chosen, figures)
            figures["demo_again_seconds"], _ = timed(".venv/bin/xprompt --no-compilation-cache demo --workdir again", clone)
            train = ".venv/bin/pip install -q -e '.[demo]'; .venv/bin/xprompt demo --train --workdir trained"
            figures["trained_demo_seconds"], figures["trained_demo_peak_gib"] = timed(train, clone)
            figures["trained_demo_loss_end_over_start"] = loss_ratio(clone / "trained")
            figures |= pipeline_in(clone / ".venv/bin/python", clone / "trained")
            save(chosen, figures)
        if chosen != "demo":
            figures["tests_seconds"], figures["tests_peak_gib"] = timed(readme_block(2), clone)
            save(chosen, figures)


if __name__ == "__main__":
    main()
