"""Trains the model that ships on a few pairs of your own: the whole training path in about a minute on a laptop (docs/training.md).

The store is made by `xprompt tokenize --model mini`, so that both share the image and text tokenizers.
"""

from xprompt_jax.config import BucketConfig, ComputeConfig, Config, DataConfig, OptimConfig, TrainConfig
from xprompt_jax.convert.formats import MINI, open_source

config = Config(
    model=open_source(MINI).config,
    compute=ComputeConfig(dtype="float32"),
    data=DataConfig(
        store="data/tokens",
        buckets=(BucketConfig("in_context", examples=1, context=192, todo=192, answer=67, rows=8),),
    ),
    optim=OptimConfig(learning_rate=5e-4, warmup_steps=10),
    train=TrainConfig(steps=30, log_every=5, eval_every=15, save_every=15, init_from="mini"),
)
