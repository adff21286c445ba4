"""The paper's recipe (section 4): batch 1024, context 5120, lr 1e-4 cosine, 20k steps, the whole 7B unlocked.

For a pod of 256 TPU v5p; on H100 or H200 add `--compute.attention cudnn`. A step's smallest bucket has 128 rows, so data x fsdp is 128 at
most and tensor takes the rest: 1 on 128 chips, 2 on 256, 4 on 512 (docs/scaling.md predicts them). Two slices of 128 chips:
`--mesh.slices 2 --mesh.data 2 --mesh.fsdp 64`.

Memory of one of 256 devices, which holds rows 6 + 1 + 1 of the buckets, 6 x 4673 + 2881 + 1537 = 32,456 slots (GiB = 2^30 bytes):

    weights and two moments   7.01e9 x (4 + 4 + 4) bytes / 256                                0.3
    gradients                 7.01e9 x 4 / 256                                                0.1
    block inputs (remat)      32,456 x 4096 x 2 bytes x 32 layers, whole on both of tensor    7.9
    one layer in the backward pass, 32,456 slots x ((4 x 4096 + 3 x 11008) / 2 + 4 x 4096)
                              x 2 bytes, and as much for gradients                            5.0
    logits of a slice         7637 x 32,768 x 4 bytes, and their gradient                     1.9
    weights made whole        two layers, the head twice, the embedding's gradient            1.6
                                                                                             ----
                                                                                             16.8

The TPU compiler asks for a quarter more (docs/scaling.md). A v5p has 95, an H100 75, a v6e 30.
"""

from xprompt_jax.config import PRESETS, ComputeConfig, Config, MeshConfig, OptimConfig, TrainConfig

config = Config(
    model=PRESETS["7b"],
    compute=ComputeConfig(dtype="bfloat16", remat="block", attention="splash"),
    mesh=MeshConfig(data=1, fsdp=128, tensor=-1),
    optim=OptimConfig(learning_rate=1e-4, schedule="cosine", warmup_steps=1000),
    train=TrainConfig(steps=20_000, dropout=0.05, loss_chunk=8192, init_from="models/chameleon-7b"),
)
