"""The paper's recipe (section 4): batch 1024, context 5120, lr 1e-4 cosine, 20k steps, the whole 7B unlocked."""

from xprompt_jax.config import PRESETS, ComputeConfig, Config, MeshConfig, OptimConfig, TrainConfig

config = Config(
    model=PRESETS["7b"],
    compute=ComputeConfig(dtype="bfloat16", remat="block"),
    mesh=MeshConfig(data=-1, fsdp=64, tensor=1),
    optim=OptimConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=1000),
    train=TrainConfig(steps=20_000, dropout=0.05, init_from="models/chameleon-7b"),
)
