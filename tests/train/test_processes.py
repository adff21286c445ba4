"""Two real processes of four devices each, on loopback, are one process of eight; and they stop together."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

from tests.test_runner import config as whole_run
from tests.train.test_training import CONFIG, data, replace
from xprompt_jax.convert.formats import open_source
from xprompt_jax.convert.weights import shapes_of
from xprompt_jax.runner import run_training
from xprompt_jax.train.loop import train
from xprompt_jax.train.metrics import read_metrics

ROOT = Path(__file__).parents[2]
# Without the tests' cache of programs: a kill may tear an entry of it.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | {"PYTHONPATH": str(ROOT)}


def run_two(workdir, stop=(), store=None, word=None):
    """Runs both processes; `stop` is (process, step): that process alone gets SIGTERM before that step. With a store, a whole run.
    `word` is for the workers."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    environment = ENVIRONMENT | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    processes = []
    for i in range(2):
        extra = [word] if word else [str(store)] if store else [str(stop[1])] if stop and stop[0] == i else []
        command = [sys.executable, "-m", "tests.train.worker", str(workdir), address, "2", str(i), *extra]
        processes.append(subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        outputs = [p.communicate(timeout=240)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)
    return [] if store else [int((workdir / f"finished.{i}").read_text()) for i in range(2)]


def test_two_processes_are_one_and_stop_together(tmp_path):
    config = replace(CONFIG, train={"steps": 8, "eval_every": 4})
    alone = train(config, tmp_path / "alone", data, eval_data=data, progress=False)

    first, second = run_two(tmp_path / "two", stop=(1, 3))
    assert first == second
    assert 3 <= first < 8  # one of them was told; both stopped, and saved the same step
    assert run_two(tmp_path / "two") == [8, 8]

    losses = lambda folder: [m["loss"] for m in read_metrics(tmp_path / folder) if "loss" in m]
    np.testing.assert_allclose(losses("two"), losses("alone"), rtol=1e-4)
    held_out = lambda folder: [m["eval/loss"] for m in read_metrics(tmp_path / folder) if "eval/loss" in m]
    np.testing.assert_allclose(held_out("two"), held_out("alone"), rtol=1e-4)

    # What two processes saved, one process reads.
    moved = train(config, tmp_path / "two", data, progress=False)
    for a, b in zip(jax.tree.leaves(moved.params), jax.tree.leaves(alone.params), strict=True):
        np.testing.assert_allclose(a, b, atol=4e-3)


def test_two_processes_that_hold_the_same_rows_feed_the_same(tmp_path):
    """One tensor axis over both: neither has rows of its own."""
    config = replace(CONFIG, train={"steps": 8, "eval_every": 4})
    train(config, tmp_path / "alone", data, eval_data=data, progress=False)
    assert run_two(tmp_path / "two", word="tensor") == [8, 8]
    for name in ("loss", "eval/loss"):
        told = [[m[name] for m in read_metrics(tmp_path / folder) if name in m] for folder in ("two", "alone")]
        np.testing.assert_allclose(*told, rtol=1e-4)


def test_two_processes_write_the_model_of_one(world_store, tmp_path):
    """The weights lie on two machines; the folder holds all of them, as if one had trained."""
    run_two(tmp_path / "two", store=world_store)
    run_training(whole_run(world_store), tmp_path / "one", progress=False)
    two, one = open_source(tmp_path / "two/model"), open_source(tmp_path / "one/model")
    for name in shapes_of(one.config):
        np.testing.assert_allclose(two.read(name), one.read(name), atol=1e-4, err_msg=name)
    assert sorted(p.name for p in (tmp_path / "two").iterdir()) == sorted(p.name for p in (tmp_path / "one").iterdir())


def test_killed_runs_end_where_others_do():
    """kill -9 at random moments; `python tools/check_kill.py --kills 20` is the long form."""
    command = [sys.executable, "tools/check_kill.py", "--kills", "2", "--steps", "60"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT, timeout=300)
    assert result.returncode == 0 and "are the same" in result.stdout, result.stdout + result.stderr
