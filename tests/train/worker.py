"""One process of a run of several, for test_processes.py: python -m tests.train.worker WORKDIR ADDRESS COUNT INDEX [STOP_AT | STORE]

With a token store, a whole run to a model folder; otherwise the loop alone.
"""

import os
import signal
import sys
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

from xprompt_jax.mesh import start_distributed

if __name__ == "__main__":
    workdir, address, count, index = sys.argv[1:5]
    start_distributed(f"{address},{count},{index}")

    if len(sys.argv) > 5 and not sys.argv[5].isdigit():
        from tests.test_runner import config as whole_run
        from xprompt_jax.runner import run_training

        run_training(whole_run(sys.argv[5]), workdir, progress=False)
        sys.exit()

    from tests.train.test_training import CONFIG, data, replace
    from xprompt_jax.train.loop import train

    def share(step):
        if len(sys.argv) > 5 and step == int(sys.argv[5]):
            os.kill(os.getpid(), signal.SIGTERM)
        return {name: {k: v[int(index) :: int(count)] for k, v in rows.items()} for name, rows in data(step).items()}

    config = replace(CONFIG, train={"steps": 8, "eval_every": 4})
    state = train(config, workdir, share, eval_data=share, progress=False)
    Path(workdir, f"finished.{index}").write_text(str(int(state.step)))
