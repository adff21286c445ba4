"""The second stage of the mini: more XP tokens, rows of 1, 2, 4 and 8 examples, rows that ask for their own example (docs/in_context.md).

Goes on from `train.init_from`, and so needs the tokenizers that the starting model has. Memory as configs/mini_cpu.py.
"""

import dataclasses
import runpy
from pathlib import Path

from xprompt_jax.config import BucketConfig

mini = runpy.run_path(str(Path(__file__).with_name("mini_cpu.py")))["config"]
rows = {1: 10, 2: 2, 4: 1, 8: 1}
several = tuple(BucketConfig(f"in_context_{n}", examples=n, context=160, todo=160, answer=67, rows=rows[n]) for n in rows)
config = dataclasses.replace(
    mini,
    model=dataclasses.replace(mini.model, num_xp_tokens=32),
    data=dataclasses.replace(mini.data, repeat_example=0.25, buckets=(*several, *mini.data.buckets[1:])),
    optim=dataclasses.replace(mini.optim, learning_rate=2e-3, warmup_steps=50),
    train=dataclasses.replace(mini.train, steps=2_400, init_from="runs/mini_cpu/run/model"),
)
