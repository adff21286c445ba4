"""The mini for two CPU cores: 64-pixel images as 8 x 8 codes, 2.6 million parameters, about two hours (tools/make_mini.py).

Memory: weights, gradients, two moments and the moving average in float32 are 51 MB; 20 rows of some 340 slots add less than 1 GiB.
"""

from xprompt_jax.config import BucketConfig, ComputeConfig, Config, DataConfig, MeshConfig, ModelConfig, OptimConfig, TrainConfig, VQConfig

VQ = VQConfig(
    channels=24, channel_multipliers=(1, 2, 3, 4), num_res_blocks=1, latent_channels=64, embed_dim=16, num_codes=1024, image_size=64
)  # fmt: skip
config = Config(
    model=ModelConfig(
        vocab_size=2048,
        dim=192,
        num_layers=4,
        num_heads=6,
        num_kv_heads=6,
        head_dim=32,
        ffn_dim=512,
        num_xp_tokens=16,
        rope_theta=100.0,
        vq=VQ,
    ),
    compute=ComputeConfig(dtype="float32", remat="names"),
    mesh=MeshConfig(data=-1, fsdp=1, tensor=1),
    data=DataConfig(
        store="data/mini_cpu",
        drop_example=0.1,
        generic_instruction=0.5,
        holdouts=("derain", "low_light", "add_remove", "depth_spectrum"),
        buckets=(
            BucketConfig("in_context", examples=1, context=160, todo=160, answer=67, rows=16),
            BucketConfig("describe", examples=1, context=140, todo=96, answer=72, rows=2, kind="describe"),
            BucketConfig("text_to_image", examples=0, context=0, todo=144, answer=67, rows=2, kind="text_to_image"),
        ),
    ),
    optim=OptimConfig(
        name="muon", learning_rate=3e-3, warmup_steps=100, weight_decay=0.01, final_fraction=0.02, beta2=0.98, ema_decay=0.998
    ),
    train=TrainConfig(steps=8_000, eval_every=250, eval_batches=8, save_every=250, keep=1, log_every=20),
)
