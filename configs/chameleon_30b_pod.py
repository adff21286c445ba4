"""The same recipe on the 30B: no dropout (as Chameleon), tensor parallelism of 4."""

from xprompt_jax.config import PRESETS, ComputeConfig, Config, MeshConfig, OptimConfig, TrainConfig

config = Config(
    model=PRESETS["30b"],
    compute=ComputeConfig(dtype="bfloat16", remat="block"),
    mesh=MeshConfig(data=-1, fsdp=64, tensor=4),
    optim=OptimConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=1000),
    train=TrainConfig(steps=20_000, init_from="models/chameleon-30b"),
)
