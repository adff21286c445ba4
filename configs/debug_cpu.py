"""The whole training path in under a minute on a laptop, on a store that `xprompt demo` or its model made (docs/data.md)."""

from xprompt_jax.config import BucketConfig, ComputeConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig, VQConfig

config = Config(
    model=ModelConfig(
        vocab_size=1280, dim=64, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=16, ffn_dim=176, num_xp_tokens=4,
        vq=VQConfig(
            channels=16, channel_multipliers=(1, 2, 2), num_res_blocks=1, latent_channels=32, embed_dim=16, num_codes=256, image_size=32
        ),
    ),
    compute=ComputeConfig(dtype="float32"),
    data=DataConfig(
        store="demo/tokens",
        buckets=(BucketConfig("in_context", examples=1, context=192, todo=192, answer=67, rows=8),),
    ),
    optim=OptimConfig(learning_rate=2e-3, warmup_steps=10),
    train=TrainConfig(steps=30, log_every=5, eval_every=15, save_every=15),
)  # fmt: skip
