"""One process of a run of several, for test_processes.py: python -m tests.train.worker WORKDIR ADDRESS COUNT INDEX [WORD]

WORD is a token store, for a whole run to a model folder; otherwise the loop alone runs, on one tensor axis over all devices ("tensor"), or
until it is told to stop at a step (its number).
"""

import dataclasses
import os
import signal
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

from xprompt_jax.mesh import start_distributed

if __name__ == "__main__":
    workdir, address, count, index = sys.argv[1:5]
    start_distributed(f"{address},{count},{index}")

    word = sys.argv[5] if len(sys.argv) > 5 else ""
    if word and word != "tensor" and not word.isdigit():
        from tests.test_runner import config as whole_run
        from xprompt_jax.runner import run_training

        run_training(whole_run(word), workdir, progress=False)
        sys.exit()

    from tests.train.test_training import CONFIG, data, replace
    from xprompt_jax.config import MeshConfig
    from xprompt_jax.mesh import make_mesh, row_share
    from xprompt_jax.train.loop import train

    config = replace(CONFIG, train={"steps": 8, "eval_every": 4})
    if word == "tensor":
        config = dataclasses.replace(config, mesh=MeshConfig(1, 1, 8))
    place, shares = row_share(make_mesh(config.mesh))

    def share(step):
        if word == str(step):
            os.kill(os.getpid(), signal.SIGTERM)
        return {name: {k: v[place::shares] for k, v in rows.items()} for name, rows in data(step).items()}

    state = train(config, workdir, share, eval_data=share, progress=False)
    Path(workdir, f"finished.{index}").write_text(str(int(state.step)))
