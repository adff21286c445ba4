"""Does a run that is killed again and again end where an undisturbed one ends? kill -9 at random moments, bitwise comparison.

    python tools/check_kill.py --kills 20

A small model trains on rendered scenes, saving every few steps in the background. The process gets SIGKILL at a random moment after
a random number of steps (in a step, in a save, in an evaluation), and the same command is started again, until the kills are used up and
it finishes. Its parameters and losses must be those of a run that nobody touched, to the last bit.
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax

from xprompt_jax.config import BucketConfig, ComputeConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, VQConfig, to_json
from xprompt_jax.convert.formats import open_source
from xprompt_jax.convert.weights import shapes_of
from xprompt_jax.data.sources import world_pairs
from xprompt_jax.data.tokenise import tokenize
from xprompt_jax.model.vqgan import VQGAN
from xprompt_jax.tokens import train_tokenizer
from xprompt_jax.train.metrics import read_metrics

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    """Parses the flags, checks, says what was seen."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300, help="length of the run")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args = parser.parse_args()

    folder = Path(tempfile.mkdtemp(prefix="kill"))
    config = tiny_config(folder, args.steps)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(folder / "cache")}
    environment["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    rng = random.Random(args.seed)

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "xprompt_jax", "train", "--config", str(config), "--workdir", str(folder / name)]
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    if (error := start("whole").communicate()[1]) and not (folder / "whole/model/config.json").exists():
        sys.exit(f"the undisturbed run failed; {folder}:\n{error}")
    seen = []
    for number in range(args.kills):
        process = start("killed")
        goal, step = rng.randint(1, max(2, args.steps // args.kills)), last_step(folder / "killed")
        start_of_life = step
        while step - start_of_life < goal and process.poll() is None:
            time.sleep(0.01)
            step = last_step(folder / "killed")
            start_of_life = min(start_of_life, step)  # it takes back what was not saved
        time.sleep(rng.uniform(0, 0.5))
        if process.poll() is not None:
            print(f"the run was over before kill {number + 1}; give more --steps")
            break
        process.kill()
        process.communicate()
        seen.append(last_step(folder / "killed"))
        print(f"kill {number + 1} of {args.kills}: at step {seen[-1]} of {args.steps}", flush=True)
    error = start("killed").communicate()[1]
    if not (folder / "killed/model/config.json").exists():
        sys.exit(f"the killed run did not finish; {folder}:\n{error}")

    whole, killed = (open_source(folder / name / "model") for name in ("whole", "killed"))
    wrong = [n for n in shapes_of(whole.config) if whole.read(n).tobytes() != killed.read(n).tobytes()]
    losses = [[(m["step"], m["loss"]) for m in read_metrics(folder / name) if "loss" in m] for name in ("whole", "killed")]
    if wrong or losses[0] != losses[1]:
        sys.exit(f"not the same run: {len(wrong)} tensors differ, {wrong[:3]}; {folder}")
    shutil.rmtree(folder)
    print(f"killed {len(seen)} times, at steps {seen}: all {len(shapes_of(whole.config))} tensors and {len(losses[0])} losses are the same")


def tiny_config(folder: Path, steps: int) -> Path:
    """A configuration and its token store."""
    vq = VQConfig(
        channels=8, channel_multipliers=(1, 1, 2), num_res_blocks=1, latent_channels=8, embed_dim=8, num_codes=32, image_size=16
    )  # fmt: skip
    model = ModelConfig(
        vocab_size=448, dim=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, ffn_dim=48, num_xp_tokens=3, vq=vq
    )  # fmt: skip
    records = list(world_pairs(groups=6, pairs_per_group=3, size=16, tasks=["invert", "sepia"], eval_fraction=0.34))
    words = train_tokenizer((r.instruction for r in records), num_codes=32, vocab_size=model.vocab_size)
    tokenize(records, VQGAN(vq, jax.random.key(1)), words, folder / "tokens", progress=False)
    bucket = BucketConfig("in_context", examples=1, context=120, todo=120, answer=19, rows=4)
    config = Config(
        model=model, compute=ComputeConfig(dtype="float32"), data=DataConfig(store=str(folder / "tokens"), buckets=(bucket,)),
        optim=OptimConfig(warmup_steps=1, ema_decay=0.9),
        train=TrainConfig(steps=steps, save_every=7, eval_every=20, eval_batches=1, log_every=1, keep=2, dropout=0.1),
    )  # fmt: skip
    path = folder / "config.json"
    path.write_text(to_json(config))
    return path


def last_step(workdir: Path) -> int:
    """The newest step in a run's metrics; 0 before there is one."""
    path = workdir / "metrics.jsonl"
    found = [m["step"] for m in read_metrics(workdir) if "loss" in m] if path.exists() else []
    return max(found, default=0)


if __name__ == "__main__":
    main()
