"""A greater mini than the one that ships, for one GPU: a Chameleon in everything but size, of 256 codes. Not trained yet."""

from xprompt_jax.config import PRESETS, BucketConfig, ComputeConfig, Config, DataConfig, OptimConfig, TrainConfig

config = Config(
    model=PRESETS["mini"],
    compute=ComputeConfig(dtype="bfloat16", attention="xla"),
    data=DataConfig(
        store="data/mini",
        drop_example=0.1,
        repeat_example=0.25,
        buckets=(
            BucketConfig("in_context", examples=1, context=576, todo=576, answer=259, rows=48),
            BucketConfig("describe", examples=1, context=576, todo=192, answer=128, rows=8, kind="describe"),
            BucketConfig("text_to_image", examples=0, context=0, todo=384, answer=259, rows=8, kind="text_to_image"),
        ),
    ),
    optim=OptimConfig(learning_rate=1e-3, warmup_steps=500, weight_decay=0.05),
    train=TrainConfig(steps=25_000, save_every=500, eval_every=1000),
)
