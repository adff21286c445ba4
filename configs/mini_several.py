"""The model that ships, taught on 1, 2, 4 and 8 examples a row: half an hour on one CPU core (docs/in_context.md).

Goes on from `train.init_from`, and so needs the tokenizers that the starting model has. Memory as configs/mini_cpu.py.
"""

import dataclasses
import runpy
from pathlib import Path

from xprompt_jax.config import BucketConfig

mini = runpy.run_path(str(Path(__file__).with_name("mini_cpu.py")))["config"]
rows = {1: 6, 2: 3, 4: 2, 8: 1}
several = tuple(BucketConfig(f"in_context_{n}", examples=n, context=160, todo=160, answer=67, rows=rows[n]) for n in rows)
config = dataclasses.replace(
    mini,
    data=dataclasses.replace(mini.data, buckets=(*several, *mini.data.buckets[1:])),
    optim=dataclasses.replace(mini.optim, learning_rate=1e-3, warmup_steps=50, ema_decay=0.995),
    train=dataclasses.replace(mini.train, steps=800, eval_every=200, save_every=200, init_from="mini"),
)
