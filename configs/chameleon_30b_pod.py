"""The same recipe on the 30B, without dropout (as Chameleon): 256 TPU v5p, or `--compute.attention cudnn` on as many H100.

The mesh is the 7B's: data x fsdp is 128, tensor the rest, which must divide the 8 key-value heads.

Memory of one of 256 devices, which holds 32,456 slots, as in chameleon_7b_pod.py (GiB = 2^30 bytes):

    weights and two moments   34.3e9 x (4 + 4 + 4) bytes / 256                                1.5
    gradients                 34.3e9 x 4 / 256                                                0.5
    block inputs (remat)      32,456 x 8192 x 2 bytes x 48 layers, whole on both of tensor   23.8
    one layer in the backward pass, 32,456 slots x ((2 x 72 x 128 + 3 x 22016) / 2 + 4 x 8192)
                              x 2 bytes, and as much for gradients                            9.1
    logits of a slice         7637 x 32,768 x 4 bytes, and their gradient                     1.9
    weights made whole        two layers, the head twice, the embedding's gradient            3.8
                                                                                             ----
                                                                                             40.5

The TPU compiler asks for a quarter more (docs/scaling.md). A v5p has 95, an H100 75; a v6e (30) is too small.
"""

from xprompt_jax.config import PRESETS, ComputeConfig, Config, MeshConfig, OptimConfig, TrainConfig

config = Config(
    model=PRESETS["30b"],
    compute=ComputeConfig(dtype="bfloat16", remat="block", attention="splash"),
    mesh=MeshConfig(data=1, fsdp=128, tensor=-1),
    optim=OptimConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=1000),
    train=TrainConfig(steps=20_000, loss_chunk=8192, init_from="models/chameleon-30b"),
)
