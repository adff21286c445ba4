"""Chameleon 7B, whole, on one H200: bfloat16 over float32 masters, microbatches of 8 rows."""

from xprompt_jax.config import PRESETS, BucketConfig, ComputeConfig, Config, DataConfig, OptimConfig, TrainConfig

config = Config(
    model=PRESETS["7b"],
    compute=ComputeConfig(dtype="bfloat16", remat="block", attention="cudnn"),
    data=DataConfig(
        buckets=(
            BucketConfig("in_context", examples=1, context=2304, todo=2304, answer=1027, rows=48),
            BucketConfig("describe", examples=1, context=2304, todo=512, answer=448, rows=8, kind="describe"),
            BucketConfig("text_to_image", examples=0, context=0, todo=1536, answer=1027, rows=8, kind="text_to_image"),
        ),
    ),
    optim=OptimConfig(learning_rate=2e-5, warmup_steps=500, schedule="constant"),
    train=TrainConfig(steps=20_000, accumulate=8, dropout=0.05, init_from="models/chameleon-7b"),
)
